// hadamard at one instruction-set level. Bytes: every element once in and once out; bound by memory up to m = 12 or so,
// beyond by the m multiply-adds an element.
#include "cpu/kernels.h"

#include <memory>
#include <new>

#include "cpu/hadamard_rows.h"
#include "cpu/rotation.h"
#include "cpu/row_walk.h"

namespace kvk::cpu::KVK_LEVEL {
namespace {

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <class T>
void rows(const HadamardArgs& args, int64_t begin, int64_t end) {
  const int n = static_cast<int>(args.x.shape[args.x.ndim - 1]);
  const HadamardRow row(n, args.transpose);
  const float scale = static_cast<float>(*args.scale);
  const auto bytes = static_cast<size_t>(HadamardRow::scratch_floats(n)) * sizeof(float);
  const std::unique_ptr<float, AlignedDelete> scratch(static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
  RowWalk from(args.x, begin), to(args.out, begin);
  for (int64_t i = begin; i < end; ++i) {
    row.run(args.x.ptr<const T>() + from.offset(), args.out.ptr<T>() + to.offset(), scale, scratch.get());
    from.next();
    to.next();
  }
}

}  // namespace

int64_t rotation_scratch(int n) { return HadamardRow::scratch_floats(n); }

void rotate_row(int n, bool transpose, float* row, float* scratch) {
  HadamardRow(n, transpose).run(row, row, static_cast<float>(1.0 / std::sqrt(static_cast<double>(n))), scratch);
}

void hadamard(const HadamardArgs& args, int64_t row_begin, int64_t row_end) {
  switch (args.x.dtype) {
    case DType::bf16: return rows<bf16>(args, row_begin, row_end);
    case DType::f16: return rows<f16>(args, row_begin, row_end);
    default: return rows<float>(args, row_begin, row_end);
  }
}

}  // namespace kvk::cpu::KVK_LEVEL
