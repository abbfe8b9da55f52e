// The checked problem of paged attention, as the host code names it.
#pragma once

#include "kvk/device/paged_problem.h"
#include "kvk/paged.h"

namespace kvk {

using device::PageList;
using device::PoolView;
using device::RowsView;

// The kernels get their element type as a template argument, the host code as a value.
struct PagedProblem : device::PagedProblem {
  DType dtype;
};

}  // namespace kvk
