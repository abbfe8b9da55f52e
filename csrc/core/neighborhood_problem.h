// The checked problem of neighborhood attention, as the backends get it.
#pragma once

#include "core/grid_problem.h"
#include "kvk/neighborhood.h"

namespace kvk {

struct NeighborhoodProblem : GridProblem {
  int64_t batch = 0;
  // The dimensions of the grid behind the batch; of fewer than three, the first ones have extent 1.
  int64_t extent[3] = {1, 1, 1};
  NeighborhoodAxis axes[3];
};

}  // namespace kvk
