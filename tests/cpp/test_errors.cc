// Errors of the C++ face: kvk::Error with the op, the argument, what it wants and what came; nothing is written.
#include <functional>

#include "paged_case.h"

namespace {

using namespace test;
using kvk::DType;

Spec spec(bool prefill) {
  Spec s{.num_heads = 4, .num_kv_heads = 2, .head_dim = 32, .head_dim_v = 40, .page_size = 4};
  s.lens = {5, 9};
  if (prefill) s.tokens = {2, 3};
  return s;
}

void prefill_error(const std::string& want, const std::function<void(kvk::PagedPrefillArgs&)>& spoil) {
  Case problem(spec(true), 1);
  const auto before = problem.result();
  spoil(problem.args);
  check_equal(error_of([&] { kvk::paged_prefill(problem.args); }), "kvk::paged_prefill: " + want, "prefill");
  check(problem.result() == before, "written in spite of the error: " + want);
}

void decode_error(const std::string& want, const std::function<void(kvk::PagedPrefillArgs&)>& spoil) {
  Case problem(spec(false), 1);
  const auto before = problem.result();
  spoil(problem.args);
  check_equal(error_of([&] { problem.run(); }), "kvk::paged_decode: " + want, "decode");
  check(problem.result() == before, "written in spite of the error: " + want);
}

}  // namespace

int main() {
  return run([] {
    using Args = kvk::PagedPrefillArgs;
    decode_error("q must be float32, bfloat16 or float16, got float64", [](Args& a) { a.q.dtype = DType::f64; });
    decode_error("page_indices must be int32, got int64", [](Args& a) { a.table.page_indices.dtype = DType::i64; });
    decode_error("kv_lens must not be negative, got -1 for request 1",
                 [](Args& a) { a.table.kv_lens.ptr<int32_t>()[1] = -1; });
    decode_error("page_indices: request 1 needs page 99 of a pool of 8 pages (entry 2 of its list)",
                 [](Args& a) { a.table.page_indices.ptr<int32_t>()[5] = 99; });
    decode_error("softmax_scale must be finite, got inf", [](Args& a) { a.score.softmax_scale = kInf; });
    decode_error("k_pages must be on cuda:1 like the other arguments, got cpu",
                 [](Args& a) { a.q.device = {kvk::DeviceType::cuda, 1}; });
    prefill_error("qo_indptr must start at 0, got 1", [](Args& a) { a.qo_indptr.ptr<int32_t>()[0] = 1; });
    prefill_error("out must have stride 1 in its last dimension, got 2", [](Args& a) { a.out.stride[2] = 2; });
    prefill_error("mask_width is given without mask_bits, got 3", [](Args& a) { a.mask_width = 3; });

    Case ok(spec(true), 1);
    check_equal(error_of([&] { ok.run(); }), "no error", "a right call");
    ok.check("a right call");

    Array parts(DType::f32, {2, 3, 4, 8}), lse(DType::f32, {2, 3, 4}), out(DType::f32, {3, 4, 7}),
        out_lse(DType::f32, {3, 4});
    check_equal(error_of([&] { kvk::merge_states({parts.view(), lse.view(), out.view(), out_lse.view()}); }),
                "kvk::merge_states: merged out must have shape [T=3, H=4, D=8], got [3, 4, 7]", "merge");

    Array k(DType::f32, {1, 1, 32}), pages(DType::f32, {2, 4, 1, 32}), slots(DType::i64, {1});
    slots.view().ptr<int64_t>()[0] = 8;
    check_equal(error_of([&] { kvk::append_kv({k.view(), k.view(), pages.view(), pages.view(), slots.view()}); }),
                "kvk::append_kv: slot_mapping: token 0 goes to slot 8 of a pool of 2 pages of 4", "append");
  });
}
