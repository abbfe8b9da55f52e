// A call's inputs as a safetensors file.
#pragma once

#include <algorithm>
#include <string>

#include "core/record.h"

namespace kvk::record {

// Copies `bytes` from memory of the tensor's device; throws kvk::Error where that cannot be.
void read_memory(const Tensor& t, void* cuda_stream, void* host, const void* from, size_t bytes);

// The rows (of dimension 0) of a pool that the call's own indices name: pages of a table, slots, ids. Pools are gigabytes and
// a call looks at some pages of them. An empty list of ranges for a tensor that is no such pool means all rows.
struct Rows {
  bool all = true;
  std::vector<int64_t> rows;  // ascending, each once
};
Rows used_rows(const Fields& fields, const Field& pool, void* cuda_stream);

// Rows first to first + count of dimension 0 (a tensor without dimensions is one row), densely packed into `to`.
void read_rows(const Tensor& t, int64_t first, int64_t count, void* cuda_stream, char* to);
int64_t row_bytes(const Tensor& t);

// f(offset in the packed tensor, data, bytes) over the given rows, a few megabytes at a time.
template <class F>
void for_each_chunk(const Tensor& t, const Rows& rows, void* cuda_stream, const F& f) {
  if (t.numel() == 0) return;
  const int64_t bytes = row_bytes(t), most = std::max<int64_t>(1, (int64_t{4} << 20) / bytes);
  std::vector<char> chunk;
  const auto run = [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += most) {
      const int64_t count = std::min(most, end - begin);
      chunk.resize(static_cast<size_t>(count * bytes));
      read_rows(t, begin, count, cuda_stream, chunk.data());
      f(begin * bytes, static_cast<const char*>(chunk.data()), count * bytes);
    }
  };
  if (rows.all) return run(0, t.ndim == 0 ? 1 : t.shape[0]);
  for (size_t i = 0; i < rows.rows.size();) {
    size_t next = i + 1;
    while (next < rows.rows.size() && rows.rows[next] == rows.rows[next - 1] + 1) ++next;
    run(rows.rows[i], rows.rows[next - 1] + 1);
    i = next;
  }
}

// Writes the file and returns its path; empty if the folder's bounds say no. Throws kvk::Error if it cannot be written.
std::string write_dump(const Settings& settings, const std::string& op, const std::string& overload,
                       const Fields& fields, void* cuda_stream);

}  // namespace kvk::record
