// Quantized pages: records read back within half a step, attention over records and dense pages mixed against attention over
// the pages that dequantize_pages gives, every small shape, and groups that never leave their page. Buffers end where their
// elements end (testing.h), so the sanitizer build sees an access past them.
#include <string>

#include "paged_case.h"

namespace {

using namespace test;
using kvk::DType;
using kvk::QuantFormat;
using kvk::Tensor;

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr int32_t kDense = 1 << 28;

struct Shape {
  DType dtype;
  int64_t page_size, num_kv_heads, group, head_dim, head_dim_v;
  int bits, k_axis, v_axis, rotate;  // axis 0: channel, 1: token
};

int64_t group_of(const Shape& s, int axis, int64_t dim) {
  if (axis == 0) return s.page_size;  // one group of tokens in each channel
  for (const int64_t group : {32, 40, 24, 16}) {
    if (dim % group == 0) return group;
  }
  return dim;
}

QuantFormat format_of(const Shape& s) {
  return kvk::quant_format("test", {s.page_size, s.head_dim, s.head_dim_v, s.bits, group_of(s, s.k_axis, s.head_dim),
                                    s.k_axis, s.rotate, s.bits, group_of(s, s.v_axis, s.head_dim_v), s.v_axis, 0});
}

Array bytes_of(std::initializer_list<int64_t> shape) {
  Array a(DType::u8, shape);
  a.poison();
  return a;
}

class QuantCase {
 public:
  QuantCase(const Shape& s, int64_t num_pages, uint64_t seed)
      : s_(s), format_(format_of(s)), num_pages_(num_pages), random_(seed),
        k_(Array::random(s.dtype, {num_pages, s.page_size, s.num_kv_heads, s.head_dim}, random_)),
        v_(Array::random(s.dtype, {num_pages, s.page_size, s.num_kv_heads, s.head_dim_v}, random_)),
        k_pool_(bytes_of({num_pages + 1, s.num_kv_heads, format_.k_layout().record_bytes})),
        v_pool_(bytes_of({num_pages + 1, s.num_kv_heads, format_.v_layout().record_bytes})),
        k_back_(DType::f32, {num_pages, s.page_size, s.num_kv_heads, s.head_dim}),
        v_back_(DType::f32, {num_pages, s.page_size, s.num_kv_heads, s.head_dim_v}) {
    std::vector<int32_t> src, dst;  // page i becomes record num_pages - i; record 0 stays poisoned
    for (int32_t i = 0; i < num_pages; ++i) {
      src.push_back(i);
      dst.push_back(static_cast<int32_t>(num_pages) - i);
    }
    const Array from = Array::of(src), to = Array::of(dst);
    kvk::quantize_pages({k_.view(), v_.view(), from.view(), k_pool_.view(), v_pool_.view(), to.view(), format_});
    kvk::dequantize_pages({k_pool_.view(), v_pool_.view(), to.view(), format_, k_back_.view(), v_back_.view()});
  }

  // Numbers within [-1, 1]: a step is at most 2 / (2**bits - 1), and rotation only mixes the errors of a row.
  void check_round_trip(const std::string& what) const {
    const double step = 2.0 / ((1 << s_.bits) - 1) * (s_.rotate ? 3 : 1);
    const auto largest_error = [&](const Tensor& x, const Tensor& back) {
      double error = 0;
      for (int64_t p = 0; p < num_pages_; ++p) {
        for (int64_t t = 0; t < s_.page_size; ++t) {
          for (int64_t h = 0; h < s_.num_kv_heads; ++h) {
            for (int64_t d = 0; d < x.shape[3]; ++d) {
              error = std::max(error, std::abs(element(x, {p, t, h, d}) - element(back, {p, t, h, d})));
            }
          }
        }
      }
      return error;
    };
    check(largest_error(k_.view(), k_back_.view()) <= step * (s_.rotate ? 2 : 0.51), what + " keys read back");
    check(largest_error(v_.view(), v_back_.view()) <= step * 0.51, what + " values read back");
  }

  // Two requests that share their first pages, every third page dense; prefill with `tokens` query tokens each.
  void check_attention_of(int64_t tokens, const std::string& what) {
    const int64_t heads = s_.num_kv_heads * s_.group, P = s_.page_size;
    const std::vector<int32_t> lens = {static_cast<int32_t>(num_pages_ * P - 3),
                                       static_cast<int32_t>((num_pages_ - 1) * P - P / 2)};
    std::vector<int32_t> refs, plain;
    for (int r = 0; r < 2; ++r) {
      for (int32_t i = 0; i < num_pages_; ++i) {
        refs.push_back(i % 3 == 1 ? kDense | i : static_cast<int32_t>(num_pages_) - i);
        plain.push_back(i);
        if (i % 3 == 1) copy_dense(i);
      }
    }
    const Array references = matrix(refs), pages = matrix(plain), kv_lens = Array::of(lens);
    const Array q = Array::random(s_.dtype, {2 * tokens, heads, s_.head_dim}, random_);
    const Array starts = Array::of({0, static_cast<int32_t>(tokens), static_cast<int32_t>(2 * tokens)});
    Array out(s_.dtype, {2 * tokens, heads, s_.head_dim_v}), lse(DType::f32, {2 * tokens, heads});
    out.poison();
    lse.poison();
    const kvk::PageTable table = {references.view(), std::nullopt, kv_lens.view()};
    if (tokens == 1) {
      kvk::quant_decode(
          {q.view(), k_pool_.view(), v_pool_.view(), k_.view(), v_.view(), table, {}, format_, out.view(), lse.view()});
    } else {
      kvk::QuantPrefillArgs args = {};
      args.q = q.view();
      args.qo_indptr = starts.view();
      args.k_pool = k_pool_.view();
      args.v_pool = v_pool_.view();
      args.k_pages = k_.view();
      args.v_pages = v_.view();
      args.table = table;
      args.format = format_;
      args.out = out.view();
      args.lse = lse.view();
      kvk::quant_prefill(args);
    }
    // The same over what the records read back as.
    kvk::PagedPrefillArgs want = {};
    want.q = q.view();
    want.qo_indptr = starts.view();
    want.k_pages = k_back_.view();
    want.v_pages = v_back_.view();
    want.table = {pages.view(), std::nullopt, kv_lens.view()};
    want.out = out.view();
    want.lse = lse.view();
    check_attention(want, what);
  }

  // Changing one page changes its records alone.
  void check_groups_stay_in_their_page(const std::string& what) {
    const int64_t k_bytes = k_pool_.view().stride[0];
    const std::vector<unsigned char> k_before(k_pool_.view().ptr<unsigned char>(),
                                              k_pool_.view().ptr<unsigned char>() + k_pool_.bytes());
    const int64_t page_elements = k_.view().stride[0];
    for (int64_t i = 0; i < page_elements; ++i) k_.set(page_elements + i, 100.0f);
    const Array page = Array::of({1}), record = Array::of({static_cast<int32_t>(num_pages_) - 1});
    kvk::quantize_pages({k_.view(), v_.view(), page.view(), k_pool_.view(), v_pool_.view(), record.view(), format_});
    const auto* k_after = k_pool_.view().ptr<unsigned char>();
    for (int64_t r = 0; r <= num_pages_; ++r) {
      const bool same =
          std::memcmp(k_after + r * k_bytes, k_before.data() + r * k_bytes, static_cast<size_t>(k_bytes)) == 0;
      check(same == (r != num_pages_ - 1), what + " record " + std::to_string(r));
    }
  }

 private:
  Array matrix(const std::vector<int32_t>& values) const {
    Array a(DType::i32, {2, num_pages_});
    std::memcpy(a.view().data, values.data(), a.bytes());
    return a;
  }

  // What a dense page holds, for the expected result.
  void copy_dense(int64_t page) {
    for (auto [from, to] : {std::pair(&k_, &k_back_), std::pair(&v_, &v_back_)}) {
      const Tensor& x = from->view();
      for (int64_t i = 0; i < x.stride[0]; ++i) {
        Tensor flat = x;
        flat.ndim = 1;
        flat.stride[0] = 1;
        to->set(page * x.stride[0] + i, static_cast<float>(element(flat, {page * x.stride[0] + i})));
      }
    }
  }

  Shape s_;
  QuantFormat format_;
  int64_t num_pages_;
  Random random_;
  Array k_, v_, k_pool_, v_pool_, k_back_, v_back_;
};

void shapes() {
  uint64_t seed = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (const int axes : {0, 1, 2, 3}) {
      for (int64_t head_dim = 32; head_dim <= 256; head_dim += head_dim < 136 ? 8 : 24) {
        ++seed;
        Shape s = {kDTypes[seed % 3],
                   seed % 2 ? 16 : 32,
                   1 + static_cast<int64_t>(seed % 2),
                   1 + static_cast<int64_t>(seed % 5),
                   head_dim,
                   0,
                   bits,
                   axes & 1,
                   axes >> 1,
                   0};
        s.head_dim_v = seed % 4 ? head_dim : 64;
        if (group_of(s, 1, head_dim) > 128 || group_of(s, 1, head_dim) % 8 != 0) s.k_axis = 0;
        if (group_of(s, 1, s.head_dim_v) > 128) s.v_axis = 0;
        s.rotate = head_dim == 64 || head_dim == 96 || head_dim == 128;
        const std::string what = std::to_string(bits) + " bits head dim " + std::to_string(head_dim) + " axes " +
                                 std::to_string(axes) + " seed " + std::to_string(seed);
        QuantCase c(s, 5, seed);
        c.check_round_trip(what);
        c.check_attention_of(1, what + " decode");
        c.check_attention_of(2 + static_cast<int64_t>(seed % 9), what + " prefill");
        c.check_groups_stay_in_their_page(what);
      }
    }
  }
}

}  // namespace

int main() { return run(shapes); }
