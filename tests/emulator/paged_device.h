// What tests of attention over the emulator share: a case's tensors in device memory, and its results against two nested loops in
// double.
#pragma once

#include <list>

#include "cpp/paged_case.h"
#include "emulator/harness.h"

namespace kvk {

// Copies of a case's tensors in the emulator's device memory.
class OnDevice {
 public:
  Tensor operator()(Tensor t, emu::Use use = emu::Use::input) {
    int64_t elements = t.numel() == 0 ? 0 : 1;
    for (int i = 0; i < t.ndim; ++i) elements += t.numel() == 0 ? 0 : (t.shape[i] - 1) * t.stride[i];
    const char* from = t.ptr<const char>();
    const size_t bytes = static_cast<size_t>(elements * element_size(t.dtype));
    if (use == emu::Use::input) {
      arrays_.emplace_back(std::vector<char>(from, from + bytes), use);
    } else {
      arrays_.emplace_back(bytes);
    }
    t.data = arrays_.back().data();
    t.device = {DeviceType::cuda, 0};
    return t;
  }
  std::optional<Tensor> operator()(const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>((*this)(*t)) : std::nullopt;
  }

 private:
  std::list<emu::DeviceArray<char>> arrays_;
};

// All of them but the pages.
inline void put_on(OnDevice& device, PagedPrefillArgs& on) {
  for (Tensor* t : {&on.q, &on.qo_indptr, &on.table.page_indices, &on.table.kv_lens}) *t = device(*t);
  on.table.page_indptr = device(on.table.page_indptr);
  on.score.alibi_slopes = device(on.score.alibi_slopes);
  on.score.sinks = device(on.score.sinks);
  on.score.key_bias = device(on.score.key_bias);
  on.mask_bits = device(on.mask_bits);
  on.out = device(on.out, emu::Use::output);
  on.lse = device(on.lse, emu::Use::output);
}

// 16-bit weights: half an ulp of the largest weight, on values of about 3.
inline double tolerance(DType dtype) { return dtype == DType::bf16 ? 1.5e-2 : 2e-3; }

inline void compare(const PagedPrefillArgs& a, const std::string& what) {
  double worst = 0;
  int64_t owned = 0;
  const auto row = [&](int64_t token, int64_t h, const test::Row& want) {
    const auto error = [](double got, double x) {
      return std::isnan(x)     ? (std::isnan(got) ? 0 : INFINITY)
             : std::isinf(x)   ? (got == x ? 0 : INFINITY)
             : std::isnan(got) ? INFINITY
                               : std::fabs(got - x);
    };
    worst = std::max(worst, error(test::element(a.lse, {token, h}), want.lse) * 10);
    for (size_t d = 0; d < want.out.size(); ++d) {
      worst = std::max(worst, error(test::element(a.out, {token, h, static_cast<int64_t>(d)}), want.out[d]));
    }
  };
  for (int64_t b = 0; b + 1 < a.qo_indptr.shape[0]; ++b) {
    const int64_t start = static_cast<int64_t>(test::element(a.qo_indptr, {b}));
    owned = static_cast<int64_t>(test::element(a.qo_indptr, {b + 1}));
    for (int64_t i = 0; i < owned - start; ++i) {
      for (int64_t h = 0; h < a.q.shape[1]; ++h) row(start + i, h, test::naive_row(a, b, start, i, owned - start, h));
    }
  }
  const test::Row none{std::vector<double>(static_cast<size_t>(a.v_pages.shape[3]), 0.0), -test::kInf};
  for (int64_t token = owned; token < a.q.shape[0]; ++token) {
    for (int64_t h = 0; h < a.q.shape[1]; ++h) row(token, h, none);
  }
  emu::expect(worst <= tolerance(a.q.dtype), what + ": worst error " + std::to_string(worst));
}

// Copies out and lse back and compares. `on`: the arguments on the device; the case is a decode if its spec is.
inline void compare_results(const PagedPrefillArgs& on, test::Case& c, const test::Spec& spec,
                            const std::string& what) {
  for (const auto& [from, to] : {std::pair{&on.out, &c.args.out}, std::pair{&on.lse, &c.args.lse}}) {
    std::memcpy(to->data, from->data, static_cast<size_t>(to->numel() * element_size(to->dtype)));
  }
  if (spec.is_decode()) {  // compare() wants starts
    std::vector<int32_t> starts(spec.lens.size() + 1);
    for (size_t i = 0; i < starts.size(); ++i) starts[i] = static_cast<int32_t>(i);
    const test::Array array = test::Array::of(starts);
    PagedPrefillArgs as_prefill = c.args;
    as_prefill.qo_indptr = array.view();
    compare(as_prefill, what);
  } else {
    compare(c.args, what);
  }
}

}  // namespace kvk
