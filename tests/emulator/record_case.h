// Attention over records and dense pages mixed, over the emulator: a case of paged attention (cpp/paged_case.h) whose full pages, two
// of three, are packed by the kernels, read back by the kernels, and then attended over both ways.
#pragma once

#include <algorithm>

#include "core/paged_check.h"
#include "core/record_check.h"
#include "cuda/launch.h"
#include "emulator/launch_ops.h"
#include "emulator/paged_device.h"

namespace kvk {

// The two families of records by their format.
inline void pack(const QuantizePagesArgs& args, cuda::Launcher& launcher) {
  cuda::launch_quantize_pages(args, launcher);
}
inline void unpack(const DequantizePagesArgs& args, cuda::Launcher& launcher) {
  cuda::launch_dequantize_pages(args, launcher);
}
inline void pack(const CompressPagesArgs& args, cuda::Launcher& launcher) {
  cuda::launch_compress_pages(args, launcher);
}
inline void unpack(const DecompressPagesArgs& args, cuda::Launcher& launcher) {
  cuda::launch_decompress_pages(args, launcher);
}

template <class Format>
struct Family;
template <>
struct Family<QuantFormat> {
  using Pack = QuantizePagesArgs;
  using Unpack = DequantizePagesArgs;
  using Pools = QuantPools;
  static PagedProblem decode(const QuantDecodeArgs& args, Pools& pools) { return check_quant_decode(args, pools); }
  static PagedProblem prefill(const QuantPrefillArgs& args, Pools& pools) { return check_quant_prefill(args, pools); }
};
template <>
struct Family<BitmapFormat> {
  using Pack = CompressPagesArgs;
  using Unpack = DecompressPagesArgs;
  using Pools = BitmapPools;
  static PagedProblem decode(const SparseDecodeArgs& args, Pools& pools) { return check_sparse_decode(args, pools); }
  static PagedProblem prefill(const SparsePrefillArgs& args, Pools& pools) { return check_sparse_prefill(args, pools); }
};

template <class Format>
class RecordCase {
 public:
  // check_packed(case): what must hold of the records themselves.
  template <class CheckPacked>
  RecordCase(const test::Spec& spec, const Format& format, int num_sms, CheckPacked&& check_packed)
      : spec_(spec), format_(format), case_(spec, 7), launcher_(num_sms, static_cast<int>(emu::max_smem_bytes())) {
    const Tensor& k = case_.args.k_pages;
    for (int64_t page = 0; page < k.shape[0]; ++page) {
      const bool packed = page % 3 != 0 && is_full(page);
      references_.push_back(packed ? static_cast<int32_t>(packed_.size()) : static_cast<int32_t>(page | 1 << 28));
      if (packed) packed_.push_back(static_cast<int32_t>(page));
    }
    make_records();
    check_packed(*this);
    take_restored();
  }

  void attend(const std::string& what) {
    PagedPrefillArgs on = case_.args;
    test::Array indices = with_references(), bias = with_records_first();
    on.table.page_indices.data = indices.view().data;
    if (on.score.key_bias) on.score.key_bias = bias.view();
    put_on(device_, on);
    typename Family<Format>::Pools pools = {};
    const PagedProblem problem =
        spec_.is_decode()
            ? Family<Format>::decode(
                  {on.q, pools_[0], pools_[1], dense_[0], dense_[1], on.table, on.score, format_, on.out, on.lse},
                  pools)
            : Family<Format>::prefill({on.q, on.qo_indptr, pools_[0], pools_[1], dense_[0], dense_[1], on.table,
                                       on.score, format_, on.causal, on.mask_bits, on.mask_width, on.out, on.lse},
                                      pools);
    const Tensor& table = on.table.page_indices;
    cuda::launch_paged_attention(problem, table.shape[table.ndim - 1], launcher_, workspace_);
    compare_results(on, case_, spec_, what);
  }

  const Format& format() const { return format_; }
  size_t num_packed() const { return packed_.size(); }
  // Bytes of the record of K, or V, of a packed page and kv head.
  const uint8_t* record(bool is_v, size_t i, int64_t head) const {
    const Tensor& pool = pools_[is_v];
    return pool.ptr<const uint8_t>() + static_cast<int64_t>(i) * pool.stride[0] + head * pool.stride[1];
  }
  // An element of a packed page as it was, and as its record reads.
  double original(bool is_v, size_t i, int64_t token, int64_t head, int64_t channel) const {
    return test::element(pages(is_v), {packed_[i], token, head, channel});
  }
  double restored(bool is_v, size_t i, int64_t token, int64_t head, int64_t channel) const {
    return test::element(restored_[is_v], {static_cast<int64_t>(i), token, head, channel});
  }

 private:
  const Tensor& pages(bool is_v) const { return is_v ? case_.args.v_pages : case_.args.k_pages; }

  static char* row(const Tensor& t, int64_t page, int64_t token, int64_t head) {
    return t.ptr<char>() + (page * t.stride[0] + token * t.stride[1] + head * t.stride[2]) * element_size(t.dtype);
  }
  template <class F>
  void for_each_row(F&& f) const {
    for (size_t i = 0; i < packed_.size(); ++i) {
      for (int64_t token = 0; token < spec_.page_size; ++token) {
        for (int64_t head = 0; head < spec_.num_kv_heads; ++head) f(static_cast<int64_t>(i), token, head);
      }
    }
  }

  // Every key of the page is in use: a group of tokens is of one request.
  bool is_full(int64_t page) const {
    for (int64_t token = 0; token < spec_.page_size; ++token) {
      for (int64_t head = 0; head < spec_.num_kv_heads; ++head) {
        if (std::isnan(test::element(pages(false), {page, token, head, 0}))) return false;
      }
    }
    return true;
  }

  // Packs on the device and reads back; dense pools in which what has been packed is NaN.
  void make_records() {
    const int64_t n = static_cast<int64_t>(packed_.size()),
                  bytes[2] = {format_.k_layout().record_bytes, format_.v_layout().record_bytes};
    std::vector<int32_t> order(packed_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    const test::Array src = test::Array::of(packed_), dst = test::Array::of(order);
    const Tensor src_on = device_(src.view()), dst_on = device_(dst.view());
    Tensor source[2];
    for (const bool is_v : {false, true}) {
      const test::Array pool(DType::u8, {n, spec_.num_kv_heads, bytes[is_v]});
      pools_[is_v] = device_(pool.view(), emu::Use::output);
      source[is_v] = device_(pages(is_v));
      const test::Array back(spec_.dtype, {n, spec_.page_size, spec_.num_kv_heads, pages(is_v).shape[3]});
      restored_[is_v] = device_(back.view(), emu::Use::output);
    }
    typename Family<Format>::Pack packing = {source[0], source[1], src_on, pools_[0], pools_[1], dst_on, format_};
    pack(packing, launcher_);
    typename Family<Format>::Unpack unpacking = {pools_[0], pools_[1], dst_on, format_, restored_[0], restored_[1]};
    unpack(unpacking, launcher_);
    for (const bool is_v : {false, true}) {
      const Tensor& t = pages(is_v);
      const size_t row_bytes = static_cast<size_t>(t.shape[3] * element_size(t.dtype));
      std::vector<char> kept(static_cast<size_t>(n * spec_.page_size * spec_.num_kv_heads) * row_bytes);
      size_t at = 0;
      for_each_row([&](int64_t i, int64_t token, int64_t head) {
        char* from = row(t, packed_[static_cast<size_t>(i)], token, head);
        std::memcpy(kept.data() + at, from, row_bytes);
        std::memset(from, 0xff, row_bytes);
        at += row_bytes;
      });
      dense_[is_v] = device_(t);
      at = 0;
      for_each_row([&](int64_t i, int64_t token, int64_t head) {
        std::memcpy(row(t, packed_[static_cast<size_t>(i)], token, head), kept.data() + at, row_bytes);
        at += row_bytes;
      });
    }
  }

  // What the reference attends over: the numbers that the records stand for.
  void take_restored() {
    for (const bool is_v : {false, true}) {
      const Tensor& t = pages(is_v);
      for_each_row([&](int64_t i, int64_t token, int64_t head) {
        std::memcpy(row(t, packed_[static_cast<size_t>(i)], token, head), row(restored_[is_v], i, token, head),
                    static_cast<size_t>(t.shape[3] * element_size(t.dtype)));
      });
    }
  }

  test::Array with_references() const {
    const Tensor& t = case_.args.table.page_indices;
    std::vector<int32_t> list(t.ptr<const int32_t>(), t.ptr<const int32_t>() + t.numel());
    for (int32_t& page : list) {
      if (page >= 0 && page < static_cast<int32_t>(references_.size())) page = references_[static_cast<size_t>(page)];
    }
    return test::Array::of(list);
  }

  // Rows of the records, then those of all dense pages.
  test::Array with_records_first() const {
    const int64_t n = static_cast<int64_t>(packed_.size()), num_pages = pages(false).shape[0];
    const int64_t per_page = spec_.page_size * spec_.num_kv_heads;
    test::Array bias(DType::f32, {n + num_pages, spec_.page_size, spec_.num_kv_heads});
    if (!case_.args.score.key_bias) return bias;
    const float* from = case_.args.score.key_bias->template ptr<const float>();
    float* to = bias.view().template ptr<float>();
    for (size_t i = 0; i < packed_.size(); ++i) {
      std::copy_n(from + packed_[i] * per_page, per_page, to + static_cast<int64_t>(i) * per_page);
    }
    std::copy_n(from, num_pages * per_page, to + n * per_page);
    return bias;
  }

  test::Spec spec_;
  Format format_;
  test::Case case_;
  OnDevice device_;
  emu::EmulatorLauncher launcher_;
  emu::EmulatorWorkspace workspace_;
  std::vector<int32_t> packed_, references_;  // pages that are packed; of every page, how the table names it
  Tensor pools_[2], dense_[2], restored_[2];  // of K and of V, on the device
};

// The two shapes that both families run: run(what, spec, num_sms).

// bf16, 18/2 heads, dim 64, pages of 32. Lengths take every pipeline around several times.
template <class Run>
void run_even_cases(const std::string& name, Run&& run) {
  test::Spec spec = {.dtype = DType::bf16,
                     .num_heads = 18,
                     .num_kv_heads = 2,
                     .head_dim = 64,
                     .head_dim_v = 64,
                     .page_size = 32,
                     .lens = {0, 1, 77, 1100, 513}};
  run(name + " decode bf16 18/2 heads, 1 to 3 splits, an empty request", spec, 4);
  spec.table = test::Table::csr;
  spec.lens = {600, 1030};
  run(name + " decode, CSR, a block takes several splits", spec, 1);
  spec.table = test::Table::dense;
  spec.heads_first = true;
  spec.lens = {170, 0, 330, 40};
  spec.tokens = {70, 2, 3, 0};
  spec.unowned_tokens = 2;
  run(name + " prefill: tiled and streamed requests, one without keys, one without tokens, rows of no request", spec,
      4);
}

// f16, 10/1 heads, dims off 16, a bias for every key, windows.
template <class Run>
void run_odd_cases(const std::string& name, int page_size, Run&& run) {
  test::Spec spec = {.dtype = DType::f16,
                     .num_heads = 10,
                     .num_kv_heads = 1,
                     .head_dim = 40,
                     .head_dim_v = 72,
                     .page_size = page_size,
                     .lens = {700, 33, 130},
                     .window_left = 599,
                     .key_bias = true};
  run("decode f16 10/1 heads, D 40 and 72, " + name + ", bias, window", spec, 4);
  spec.lens = {300, 140};
  spec.tokens = {40, 1};
  spec.window_left = 60;
  run("prefill of those with a bias and a window", spec, 4);
}

}  // namespace kvk
