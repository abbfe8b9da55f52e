// Format: quantized records, mixed with dense pages by the tag of a page reference. Scales stay out of the inner loop, which
// multiplies floats of whole codes, taken around the middle of their range (kMiddle):
//   K per channel  q.k = sum_d (q_d scale_d) code + sum_d q_d min_d     q is scaled once for each group of tokens
//   K per token    q.k = sum_g scale_g sum_d q_d code + min_g sum_d q_d  one factor for each group of channels
//   V per token    p v = sum_t (p_t scale_t) code + sum_t p_t min_t     p is scaled once for each group of channels
//   V per channel  p v = scale_d sum_t p_t code + min_d sum_t p_t       the sum is scaled at the end of a group of tokens
// Bytes: the records, each once for all query heads of its kv head.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu/engine/dense.h"
#include "cpu/engine/quant_record.h"
#include "cpu/engine/quant_scores.h"
#include "cpu/engine/quant_sums.h"
#include "cpu/hadamard_rows.h"

namespace kvk::cpu::KVK_LEVEL {

template <class T>
class MixedPages {
 public:
  // The runs of one block, in the order of its keys.
  struct Rows {
    struct Piece {
      const void *k, *v;  // head 0: the record, or the first key's row of a dense page
      int32_t offset;     // of the first key in its page
      int32_t begin, count;
      bool dense;
    };
    Piece pieces[kBlockKeys];
    int num_pieces = 0, count = 0;
  };

  explicit MixedPages(const PagedProblem& p)
      : p_(p), pools_(*p.quant), k_layout_(pools_.format.k_layout()), v_layout_(pools_.format.v_layout()), dense_(p),
        unpacked_(unpacked_problem(p)) {}

  void prepare_query(float* q, bool) const {
    if (pools_.format.k.rotate) rotate(p_.head_dim, false, q);
  }
  static void finish_output(const PagedProblem& p, float* acc) {
    if (p.quant->format.v.rotate) rotate(p.head_dim_v, true, acc);
  }

  void locate(const KeyBlock& block, Rows& rows) const {
    rows.count = block.count;
    rows.num_pieces = block.num_runs;
    for (int i = 0; i < block.num_runs; ++i) {
      const Run& run = block.runs[i];
      const PageReference page(run.page);
      auto& piece = rows.pieces[i];
      piece.offset = run.offset;
      piece.begin = run.begin;
      piece.count = run.count;
      piece.dense = page.tag != 0;
      if (piece.dense) {
        piece.k = static_cast<const T*>(p_.k.data) + page.page * p_.k.page_stride + run.offset * p_.k.token_stride;
        piece.v = static_cast<const T*>(p_.v.data) + page.page * p_.v.page_stride + run.offset * p_.v.token_stride;
      } else {
        piece.k = pools_.k + page.page * pools_.k_page_stride;
        piece.v = pools_.v + page.page * pools_.v_page_stride;
      }
    }
  }

  // The next block's codes, while the present one is multiplied; the hardware follows within a record.
  Prefetcher prefetch_v(const Rows& rows, const void** scratch, int begin, int, int) const {
    return prefetch(rows, scratch, begin, &Rows::Piece::v, pools_.v_head_stride, v_layout_, 8);
  }
  Prefetcher prefetch_k(const Rows& rows, const void** scratch, int begin, int, int) const {
    return prefetch(rows, scratch, begin, &Rows::Piece::k, pools_.k_head_stride, k_layout_,
                    std::max(1, p_.head_dim_v / (4 * W)));
  }

  void scores(const Rows& rows, int begin, int heads, const float* q, int ldq, int num_rows, float* s,
              Prefetcher& ahead) const {
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < rows.num_pieces; ++i) {
        const auto& piece = rows.pieces[i];
        float* to = s + static_cast<int64_t>(h) * num_rows * kBlockKeys + piece.begin;
        const float* qh = q + static_cast<int64_t>(h) * num_rows * ldq;
        if (piece.dense) {
          dense_scores(piece, begin + h, qh, ldq, num_rows, to);
        } else {
          const Record record = k_record(piece, begin + h);
          with_bits(record.part.bits, [&](auto bits) {
            quant_scores<bits()>(record, piece.offset, piece.count, qh, ldq, num_rows, to, ahead);
          });
        }
      }
      // Whole vectors of the padding are read.
      for (int r = 0; r < num_rows; ++r) {
        float* row = s + (static_cast<int64_t>(h) * num_rows + r) * kBlockKeys;
        std::fill(row + rows.count, row + (rows.count + W - 1) / W * W, 0.0f);
      }
    }
  }

  void accumulate(const Rows& rows, int head, const float* p, const float* scale, int num_rows, float* out, int ldo,
                  Prefetcher& ahead) const {
    alignas(64) float ones[kMaxStreamRows];
    std::fill(ones, ones + num_rows, 1.0f);
    for (int i = 0; i < rows.num_pieces; ++i) {
      const auto& piece = rows.pieces[i];
      const float* factor = i == 0 ? scale : ones;
      if (piece.dense) {
        dense_accumulate(piece, head, p + piece.begin, factor, num_rows, out, ldo, ahead);
      } else {
        const Record record = v_record(piece, head);
        with_bits(record.part.bits, [&](auto bits) {
          quant_accumulate<bits()>(record, piece.offset, piece.count, p + piece.begin, factor, num_rows, out, ldo,
                                   ahead);
        });
      }
    }
  }

  bool finite_v(const Rows& rows, int head) const {
    bool finite = true;
    for (int i = 0; i < rows.num_pieces && finite; ++i) {
      const auto& piece = rows.pieces[i];
      finite = piece.dense ? dense_.finite_v(dense_rows(piece), head)
                           : quant_finite(v_record(piece, head), piece.offset, piece.count);
    }
    if (!finite) unpack_v(rows, head);  // for v_element
    return finite;
  }

  // After finite_v of the same rows and head has said no.
  float v_element(const Rows&, int, int key, int d) const { return buffer_[key * padded(p_.head_dim_v) + d]; }

  void pack_k(const Rows& rows, int head, float* panels) const {
    float* to = buffer();
    const int ld = padded(p_.head_dim);
    for (int i = 0; i < rows.num_pieces; ++i) {
      const auto& piece = rows.pieces[i];
      unpack(piece, k_record(piece, head), static_cast<const T*>(piece.k) + head * p_.k.head_stride, p_.k.token_stride,
             to + piece.begin * ld, ld);
    }
    unpacked_.pack_k(unpacked_rows(rows.count, ld), 0, panels);
  }

  void pack_v(const Rows& rows, int head, float* panels) const {
    unpack_v(rows, head);
    unpacked_.pack_v(unpacked_rows(rows.count, padded(p_.head_dim_v)), 0, panels);
  }

 private:
  using Piece = typename Rows::Piece;

  // Rows of the buffer as dense fp32 keys of one head.
  static PagedProblem unpacked_problem(const PagedProblem& p) {
    PagedProblem unpacked = p;
    unpacked.k.head_stride = unpacked.v.head_stride = 0;
    return unpacked;
  }

  static void rotate(int dim, bool transpose, float* row) {
    alignas(64) float scratch[2 * padded(256)];
    HadamardRow(dim, transpose).run(row, row, static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim))), scratch);
  }

  Record k_record(const Piece& piece, int head) const {
    return Record(pools_.format.k, k_layout_, p_.head_dim,
                  static_cast<const uint8_t*>(piece.k) + head * pools_.k_head_stride);
  }
  Record v_record(const Piece& piece, int head) const {
    return Record(pools_.format.v, v_layout_, p_.head_dim_v,
                  static_cast<const uint8_t*>(piece.v) + head * pools_.v_head_stride);
  }

  // Codes, scales and minima of the records of a block, cut into pieces of one size; `steps` times it will be stepped.
  Prefetcher prefetch(const Rows& rows, const void** scratch, int head, const void* Piece::* part, int64_t head_stride,
                      const QuantLayout& layout, int steps) const {
    constexpr int kLine = 64;
    struct Region {
      const uint8_t* begin;
      int64_t bytes;
    } regions[8];
    int num_regions = 0;
    int64_t lines = 0;
    for (int i = 0; i < rows.num_pieces && rows.count > 0 && num_regions + 2 <= 8; ++i) {
      const Piece& piece = rows.pieces[i];
      if (piece.dense) continue;
      const uint8_t* record = static_cast<const uint8_t*>(piece.*part) + head * head_stride;
      regions[num_regions++] = {record + piece.offset * layout.row_bytes, piece.count * layout.row_bytes};
      regions[num_regions++] = {record + layout.scale_offset, layout.record_bytes - layout.scale_offset};
      for (int j = num_regions - 2; j < num_regions; ++j) lines += regions[j].bytes / kLine + 2;
    }
    const int64_t span = (lines / (kBlockKeys - 8) + 1) * kLine;
    int count = 0;
    for (int i = 0; i < num_regions; ++i) {
      for (int64_t at = 0; at < regions[i].bytes && count < kBlockKeys; at += span) {
        scratch[count++] = regions[i].begin + at;
      }
    }
    return Prefetcher(scratch, count, span, static_cast<int>(lines / steps) + 1);
  }

  typename DensePages<T>::Rows dense_rows(const Piece& piece) const {
    typename DensePages<T>::Rows rows;
    rows.count = piece.count;
    for (int j = 0; j < piece.count; ++j) {
      rows.k[j] = static_cast<const T*>(piece.k) + j * p_.k.token_stride;
      rows.v[j] = static_cast<const T*>(piece.v) + j * p_.v.token_stride;
    }
    return rows;
  }

  // Block rows of fp32 in the buffer.
  DensePages<float>::Rows unpacked_rows(int count, int ld) const {
    DensePages<float>::Rows rows;
    rows.count = count;
    for (int j = 0; j < count; ++j) rows.k[j] = rows.v[j] = buffer_.get() + j * ld;
    return rows;
  }

  void dense_scores(const Piece& piece, int head, const float* q, int ldq, int num_rows, float* s) const {
    Prefetcher none(nullptr, 0, 64, 1);
    alignas(64) float raw[kMaxStreamRows * kBlockKeys];  // whole steps of keys are written
    if (pools_.format.k.rotate) {
      const int ld = padded(p_.head_dim);
      unpack(piece, Record(), static_cast<const T*>(piece.k) + head * p_.k.head_stride, p_.k.token_stride, buffer(),
             ld);
      unpacked_.scores(unpacked_rows(piece.count, ld), 0, 1, q, ldq, num_rows, raw, none);
    } else {
      alignas(64) float rows[kMaxStreamRows * padded(256)];
      std::copy_n(q, num_rows * ldq, rows);
      for (int r = 0; r < num_rows; ++r) dense_.prepare_query(rows + r * ldq, true);
      dense_.scores(dense_rows(piece), head, 1, rows, ldq, num_rows, raw, none);
    }
    for (int r = 0; r < num_rows; ++r) std::copy_n(raw + r * kBlockKeys, piece.count, s + r * kBlockKeys);
  }

  void dense_accumulate(const Piece& piece, int head, const float* p, const float* scale, int num_rows, float* out,
                        int ldo, Prefetcher& ahead) const {
    if (!pools_.format.v.rotate) {
      return dense_.accumulate(dense_rows(piece), head, p, scale, num_rows, out, ldo, ahead);
    }
    const int ld = padded(p_.head_dim_v);
    unpack(piece, Record(), static_cast<const T*>(piece.v) + head * p_.v.head_stride, p_.v.token_stride, buffer(), ld,
           true);
    unpacked_.accumulate(unpacked_rows(piece.count, ld), 0, p, scale, num_rows, out, ldo, ahead);
  }

  void unpack_v(const Rows& rows, int head) const {
    float* to = buffer();
    const int ld = padded(p_.head_dim_v);
    for (int i = 0; i < rows.num_pieces; ++i) {
      const Piece& piece = rows.pieces[i];
      unpack(piece, v_record(piece, head), static_cast<const T*>(piece.v) + head * p_.v.head_stride, p_.v.token_stride,
             to + piece.begin * ld, ld, true);
    }
  }

  // The keys or values of one piece as fp32 rows, rotated as the records are.
  void unpack(const Piece& piece, const Record& record, const T* dense, int64_t token_stride, float* to, int ld,
              bool is_v = false) const {
    if (!piece.dense) {
      return with_bits(record.part.bits,
                       [&](auto bits) { quant_unpack<bits()>(record, piece.offset, piece.count, to, ld); });
    }
    const int dim = is_v ? p_.head_dim_v : p_.head_dim;
    for (int j = 0; j < piece.count; ++j) {
      const T* from = dense + j * token_stride;
      float* row = to + j * ld;
      int d = 0;
      for (; d + W <= dim; d += W) store(load(from + d), row + d);
      if (d < dim) store(load_half(from + d), row + d);
      if (is_v ? pools_.format.v.rotate : pools_.format.k.rotate) rotate(dim, false, row);
    }
  }

  // [kBlockKeys][padded(head dim)], made when it is first needed.
  float* buffer() const {
    if (!buffer_) {
      const int64_t floats = int64_t{kBlockKeys} * padded(std::max(p_.head_dim, p_.head_dim_v));
      buffer_ = Floats(
          static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float), std::align_val_t{64})));
    }
    return buffer_.get();
  }

  struct AlignedDelete {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  using Floats = std::unique_ptr<float[], AlignedDelete>;

  const PagedProblem& p_;
  const QuantPools& pools_;
  QuantLayout k_layout_, v_layout_;
  DensePages<T> dense_;
  DensePages<float> unpacked_;
  mutable Floats buffer_;
};

}  // namespace kvk::cpu::KVK_LEVEL
