// The CUDA backend of the paged ops: checked problems in, kernels queued on the launcher's stream.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/paged_problem.h"
#include "cuda/launcher.h"

namespace kvk::cuda {

// Memory on the device that stays valid until the work queued by this call is done.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual void* allocate(int64_t bytes) = 0;
};

// list_entries: most pages that one list of the page table can name.
void paged_attention(const PagedProblem& problem, int64_t list_entries, Launcher& launcher, Workspace& workspace);

// The kernels of paged_attention for a common configuration, as (header, expression): what precompile fills the cache with.
std::vector<std::pair<std::string, std::string>> paged_kernels(DType dtype, int head_dim, int head_dim_v, int group,
                                                               uint32_t score_parts);

}  // namespace kvk::cuda
