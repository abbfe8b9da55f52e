// Format: quantized records, mixed with dense pages by the tag of a page reference. Scales stay out of the inner loop, which
// multiplies whole codes, taken around the middle of their range (kMiddle):
//   K per channel  q.k = sum_d (q_d scale_d) code + sum_d q_d min_d       q is scaled once for a group of tokens
//   K per token    q.k = sum_g scale_g sum_d q_d code + min_g sum_d q_d   one factor for a group of channels
//   V per token    p v = sum_t (p_t scale_t) code + sum_t p_t min_t       p is scaled once for a group of channels
//   V per channel  p v = scale_d sum_t p_t code + min_d sum_t p_t         the sum is scaled at the end of a group of tokens
// Bytes: the records, each once for all query heads of its kv head.
#pragma once

#include <algorithm>

#include "cpu/engine/mixed.h"
#include "cpu/engine/quant_products.h"
#include "cpu/engine/quant_scores.h"

namespace kvk::cpu::KVK_LEVEL {

class QuantPages : public MixedPages {
 public:
  explicit QuantPages(const PagedProblem& p)
      : MixedPages(p, p.quant->format.k.rotate != 0, p.quant->format.v.rotate != 0), format_(p.quant->format),
        k_layout_(format_.k_layout()), v_layout_(format_.v_layout()), integers_(integer_sums(p.dtype)),
        k_unpacked_(!whole_vectors(format_.k)), v_unpacked_(!whole_vectors(format_.v)) {}

  void prepare_query(float* q, bool) const {
    if (k_rotate_) rotate(p_.head_dim, false, q);
  }
  static void finish_output(const PagedProblem& p, float* acc) {
    if (p.quant->format.v.rotate) rotate(p.head_dim_v, true, acc);
  }

  // The next block's records, while the present ones are multiplied. Steps: scores() makes one for 8 keys of a head, the
  // sums one for a few columns.
  Prefetcher prefetch_v(const Rows& rows, const void** scratch, int begin, int end, int) const {
    return prefetch(rows, scratch, begin, end, &Piece::v, pools_.v_head_stride, v_layout_, kBlockKeys / 8);
  }
  Prefetcher prefetch_k(const Rows& rows, const void** scratch, int begin, int end, int) const {
    const int columns = integers_ ? static_cast<int>(v_layout_.row_bytes) / kSumBytes : p_.head_dim_v / (4 * W);
    return prefetch(rows, scratch, begin, end, &Piece::k, pools_.k_head_stride, k_layout_, std::max(1, columns));
  }

  void scores(const Rows& rows, int begin, int heads, const float* q, int ldq, int num_rows, float* s,
              Prefetcher& ahead) const {
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < rows.num_pieces; ++i) {
        const Piece& piece = rows.pieces[i];
        float* to = s + static_cast<int64_t>(h) * num_rows * kBlockKeys + piece.begin;
        const float* qh = q + static_cast<int64_t>(h) * num_rows * ldq;
        if (piece.dense || k_unpacked_) {
          piece_scores(piece, begin + h, qh, ldq, num_rows, to);
        } else {
          quant_scores(k_part(piece, begin + h), piece.offset, piece.count, qh, ldq, num_rows, to, ahead);
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
      const Piece& piece = rows.pieces[i];
      const float* factor = i == 0 ? scale : ones;
      if (piece.dense || v_unpacked_) {
        piece_accumulate(piece, head, p + piece.begin, factor, num_rows, out, ldo, ahead);
      } else {
        const WeightedRows weighted = {p + piece.begin, factor, num_rows, out, ldo};
        quant_accumulate(v_part(piece, head), piece.offset, piece.count, weighted, integers_, ahead);
      }
    }
  }

  bool finite_record_v(const Piece& piece, int head) const override {
    return quant_finite(v_part(piece, head), piece.offset, piece.count);
  }
  void unpack_k(const Piece& piece, int head, float* to, int ld) const override {
    quant_unpack(k_part(piece, head), piece.offset, piece.count, to, ld);
  }
  void unpack_v(const Piece& piece, int head, float* to, int ld) const override {
    quant_unpack(v_part(piece, head), piece.offset, piece.count, to, ld);
  }

 private:
  Record k_part(const Piece& piece, int head) const {
    return Record(format_.k, k_layout_, p_.head_dim, k_record(piece, head));
  }
  Record v_part(const Piece& piece, int head) const {
    return Record(format_.v, v_layout_, p_.head_dim_v, v_record(piece, head));
  }

  // Whether no vector spans two groups; else (groups of 24 channels, say, in vectors of 16) records are unpacked first.
  static bool whole_vectors(const QuantPart& part) { return part.along_tokens || part.group % W == 0; }

  // Codes, scales and minima of the records of a block, of kv heads [begin, end); `steps` for each of them.
  Prefetcher prefetch(const Rows& rows, const void** scratch, int begin, int end, const void* Piece::* part,
                      int64_t head_stride, const QuantLayout& layout, int steps) const {
    Regions regions;
    for (int i = 0; i < rows.num_pieces && rows.count > 0; ++i) {
      const Piece& piece = rows.pieces[i];
      if (piece.dense) continue;
      const uint8_t* record = static_cast<const uint8_t*>(piece.*part) + begin * head_stride;
      if (piece.count == p_.page_size && head_stride == layout.record_bytes) {
        regions.add(record, (end - begin) * layout.record_bytes);
        continue;
      }
      for (int h = begin; h < end && !regions.full(); ++h, record += head_stride) {
        regions.add(record + piece.offset * layout.row_bytes, piece.count * layout.row_bytes);
        regions.add(record + layout.scale_offset, layout.record_bytes - layout.scale_offset);
      }
    }
    return regions.prefetcher(scratch, steps * (end - begin));
  }

  const QuantFormat& format_;
  QuantLayout k_layout_, v_layout_;
  bool integers_, k_unpacked_, v_unpacked_;
};

}  // namespace kvk::cpu::KVK_LEVEL
