// Rows of several kv heads side by side: rotated together, their channels put in another order, and back.
#pragma once

#include <memory>
#include <new>

#include "core/paged_problem.h"
#include "cpu/rotation.h"
#include "cpu/simd.h"

namespace kvk::cpu::KVK_LEVEL {

struct AlignedFloatsDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedFloatsDelete>;

inline AlignedFloats aligned_floats(int64_t count) {
  return AlignedFloats(
      static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t{64})));
}

// One row of m * D floats at a time. Stored channel i is channel permutation[i] of the rotated row.
class JointRow {
 public:
  JointRow(int n, bool rotated, const Permutation& permutation, int64_t group)
      : n_(n), rotated_(rotated), permutation_(permutation), group_(group),
        scratch_(aligned_floats(rotation_scratch(n) + padded(n))), ordered_(scratch_.get() + rotation_scratch(n)) {}

  void store_order(float* row) {
    if (rotated_) rotate_row(n_, false, row, scratch_.get());
    if (permutation_.channels == nullptr) return;
    for (int i = 0; i < n_; ++i) ordered_[i] = row[permutation_.channel(group_, i)];
    std::copy_n(ordered_, n_, row);
  }

  void restore(float* row) {
    if (permutation_.channels != nullptr) {
      for (int i = 0; i < n_; ++i) ordered_[permutation_.channel(group_, i)] = row[i];
      std::copy_n(ordered_, n_, row);
    }
    if (rotated_) rotate_row(n_, true, row, scratch_.get());
  }

 private:
  int n_;
  bool rotated_;
  const Permutation& permutation_;
  int64_t group_;
  AlignedFloats scratch_;
  float* ordered_;
};

}  // namespace kvk::cpu::KVK_LEVEL
