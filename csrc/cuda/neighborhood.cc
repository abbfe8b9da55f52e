// Launch code of neighborhood attention: boxes of rows, whose columns the kernels work out.
#include <algorithm>

#include "core/check.h"
#include "core/neighborhood_tile.h"
#include "cuda/grid.h"

namespace kvk::cuda {
namespace {

using device::ceil_div;
using device::Neighborhood;

// A line of so many places, and windows, tells what a tile of a longer one costs.
constexpr int32_t kLinePlaces = 512;

// Columns that all tiles of `size` rows of a line visit.
int64_t visited(const device::NeighborhoodRule& rule, bool rows_are_keys, int32_t length, int64_t size) {
  const auto columns = [&](int64_t row) {
    const auto i = static_cast<int32_t>(row);
    return rows_are_keys ? rule.queries(i, length) : rule.keys(i, length);
  };
  int64_t sum = 0;
  for (int64_t i = 0; i < length; i += size) {
    sum += columns(std::min<int64_t>(i + size, length) - 1).end - columns(i).begin;
  }
  return sum;
}

// Boxes of at most `most_rows` rows, tokens times the query heads that share them, where warps take `warp_rows` at a time.
device::NeighborhoodParams boxes(const NeighborhoodProblem& p, bool rows_are_keys, int most_rows, int warp_rows) {
  const int group = rows_are_keys ? 1 : p.group;
  std::array<TileSizes, 3> sizes;
  for (int d = 0; d < 3; ++d) {
    const device::NeighborhoodRule rule = rule_of(p.axes[d]);
    const int32_t length =
        std::min(static_cast<int32_t>(p.extent[d] / p.axes[d].dilation), kLinePlaces + rule.kernel_size);
    sizes[static_cast<size_t>(d)] =
        tile_sizes(length, [&](int64_t size) { return visited(rule, rows_are_keys, length, size); });
  }
  // Copying and weighing a column takes about as long as the products of a quarter of the usual rows.
  const NeighborhoodTile tile = choose_tile(sizes, {most_rows, warp_rows, 32}, group, [&](int64_t tokens) {
    const int64_t most = std::max<int64_t>(1, most_rows / tokens);
    return ceil_div<int64_t>(group, ceil_div<int64_t>(group, most));
  });
  device::NeighborhoodParams params = {};
  params.heads = tile.heads;
  params.parts = ceil_div(group, tile.heads);
  params.boxes = 1;
  for (size_t d = 0; d < 3; ++d) {
    device::NeighborhoodDimension& dim = params.dims[d];
    dim.rule = rule_of(p.axes[d]);
    dim.extent = static_cast<int32_t>(p.extent[d]);
    dim.dilation = static_cast<int32_t>(p.axes[d].dilation);
    dim.tile = static_cast<int32_t>(tile.size[d]);
    dim.boxes = ceil_div(ceil_div(dim.extent, dim.dilation), dim.tile);
    params.boxes *= int64_t{dim.dilation} * dim.boxes;
  }
  return params;
}

// Blocks along x, of which a grid has no more than 2**31 - 1.
Dim3 grid_of(const char* op, const NeighborhoodProblem& p, const device::NeighborhoodParams& params) {
  const int64_t blocks = p.batch * p.num_kv_heads * params.parts * params.boxes;
  if (blocks > 0x7fffffff) fail(op, "q has ", blocks, " tiles, more than a grid of 2147483647 blocks on a card");
  return {static_cast<uint32_t>(blocks), 1, 1};
}

}  // namespace

void launch_neighborhood_attention(const NeighborhoodProblem& p, Launcher& launcher) {
  const bool small = needs_small_grid<Neighborhood>(p, launcher);
  const device::GridShape shape = grid_shape<Neighborhood>(p, small);
  auto params = grid_params<Neighborhood>(p);
  params.schedule = boxes(p, false, shape.rows, 16 * shape.row_tiles);
  launch(launcher, grid_kernel("Neighborhood", p.dtype, p.head_dim, p.head_dim_v, 0, small),
         grid_of("neighborhood_attention", p, params.schedule), device::GridShape::kThreads, shape.shared_bytes(),
         params);
}

void launch_neighborhood_attention_backward(const NeighborhoodProblem& p, Launcher& launcher, Workspace& workspace) {
  const device::GridView state =
      launch_grid_state(p, {p.batch, p.extent[0], p.extent[1], p.extent[2]}, launcher, workspace);
  launch_gradients<Neighborhood>(
      "Neighborhood", p, state, 0, launcher,
      [&](const GridPass& pass, const device::GridGradientShape& shape, device::NeighborhoodParams& params) {
        params = boxes(p, pass.rows_are_keys, shape.rows, 16);
        return grid_of("neighborhood_attention_backward", p, params);
      });
}

}  // namespace kvk::cuda
