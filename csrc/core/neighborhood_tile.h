// How neighborhood attention cuts a dilation group of tokens into boxes of rows, on the CPU and on a card.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "kvk/device/neighborhood_params.h"
#include "kvk/neighborhood.h"

namespace kvk {

inline device::NeighborhoodRule rule_of(const NeighborhoodAxis& axis) {
  return {static_cast<int32_t>(axis.kernel_size), static_cast<int32_t>(axis.stride), axis.is_causal};
}

// Of one dimension: places of a tile, and the columns that the tiles of a whole line visit.
using TileSizes = std::vector<std::pair<int64_t, int64_t>>;

// visited(size) of a line of `length` places.
template <class Visited>
TileSizes tile_sizes(int64_t length, Visited&& visited) {
  TileSizes sizes;
  for (const int size : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}) {
    sizes.emplace_back(size, visited(size));
    if (size >= length) break;
  }
  return sizes;
}

struct NeighborhoodTile {
  std::array<int64_t, 3> size = {1, 1, 1};
  int heads = 1;  // query heads of a tile

  int64_t tokens() const { return size[0] * size[1] * size[2]; }
};

struct TileCosts {
  int64_t most_tokens;
  int64_t row_step;     // rows are padded to a multiple
  int64_t column_rows;  // what loading a column and its share of the softmax cost, in rows of the matrix products
};

// The box with the least work: columns visited, times rows and what a column costs besides. heads(tokens): how many of the
// `group` query heads share a box of so many.
template <class Heads>
NeighborhoodTile choose_tile(const std::array<TileSizes, 3>& sizes, const TileCosts& costs, int group, Heads&& heads) {
  NeighborhoodTile tile;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const auto& [x, columns_x] : sizes[0]) {
    for (const auto& [y, columns_y] : sizes[1]) {
      for (const auto& [z, columns_z] : sizes[2]) {
        const int64_t n = x * y * z;
        if (n > costs.most_tokens) continue;
        const int64_t shared = heads(n), rows = (n * shared + costs.row_step - 1) / costs.row_step * costs.row_step;
        const int64_t cost =
            columns_x * columns_y * columns_z * (rows + costs.column_rows) * ((group + shared - 1) / shared);
        if (cost >= least) continue;
        least = cost;
        tile = {{x, y, z}, static_cast<int>(shared)};
      }
    }
  }
  return tile;
}

}  // namespace kvk
