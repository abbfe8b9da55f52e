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
#include "cpu/engine/quant_record.h"

namespace kvk::cpu::KVK_LEVEL {

template <class T>
class QuantPages : public MixedPages<T, QuantPages<T>> {
  using Mixed = MixedPages<T, QuantPages<T>>;
  using Mixed::p_, Mixed::pools_, Mixed::k_rotate_;

 public:
  using typename Mixed::Rows;

  explicit QuantPages(const PagedProblem& p)
      : Mixed(p, p.quant->format.k.rotate != 0, p.quant->format.v.rotate != 0), format_(p.quant->format),
        k_layout_(format_.k_layout()), v_layout_(format_.v_layout()) {}

  void prepare_query(float* q, bool) const {
    if (k_rotate_) Mixed::rotate(p_.head_dim, false, q);
  }
  static void finish_output(const PagedProblem& p, float* acc) {
    if (p.quant->format.v.rotate) Mixed::rotate(p.head_dim_v, true, acc);
  }

  // The next block's records, while the present ones are multiplied. Steps: scores() makes one for 8 keys of a head, the
  // sums one for a few columns.
  Prefetcher prefetch_v(const Rows& rows, const void** scratch, int begin, int end, int) const {
    return prefetch(rows, scratch, begin, end, &Piece::v, pools_.v_head_stride, v_layout_, kBlockKeys / 8);
  }
  Prefetcher prefetch_k(const Rows& rows, const void** scratch, int begin, int end, int) const {
    const int columns = kIntegerDots<T> ? static_cast<int>(v_layout_.row_bytes) / kSumBytes : p_.head_dim_v / (4 * W);
    return prefetch(rows, scratch, begin, end, &Piece::k, pools_.k_head_stride, k_layout_, std::max(1, columns));
  }

  void scores(const Rows& rows, int begin, int heads, const float* q, int ldq, int num_rows, float* s,
              Prefetcher& ahead) const {
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < rows.num_pieces; ++i) {
        const Piece& piece = rows.pieces[i];
        float* to = s + static_cast<int64_t>(h) * num_rows * kBlockKeys + piece.begin;
        const float* qh = q + static_cast<int64_t>(h) * num_rows * ldq;
        if (piece.dense) {
          Mixed::dense_scores(piece, begin + h, qh, ldq, num_rows, to);
        } else {
          const Record record = k_part(piece, begin + h);
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
      const Piece& piece = rows.pieces[i];
      const float* factor = i == 0 ? scale : ones;
      if (piece.dense) {
        Mixed::dense_accumulate(piece, head, p + piece.begin, factor, num_rows, out, ldo, ahead);
      } else {
        const Record record = v_part(piece, head);
        with_bits(record.part.bits, [&](auto bits) {
          quant_accumulate<bits(), kIntegerDots<T>>(record, piece.offset, piece.count, p + piece.begin, factor,
                                                    num_rows, out, ldo, ahead);
        });
      }
    }
  }

  bool finite_record_v(const Piece& piece, int head) const {
    return quant_finite(v_part(piece, head), piece.offset, piece.count);
  }
  void unpack_k(const Piece& piece, int head, float* to, int ld) const { unpack(k_part(piece, head), piece, to, ld); }
  void unpack_v(const Piece& piece, int head, float* to, int ld) const { unpack(v_part(piece, head), piece, to, ld); }

 private:
  Record k_part(const Piece& piece, int head) const {
    return Record(format_.k, k_layout_, p_.head_dim, Mixed::k_record(piece, head));
  }
  Record v_part(const Piece& piece, int head) const {
    return Record(format_.v, v_layout_, p_.head_dim_v, Mixed::v_record(piece, head));
  }

  static void unpack(const Record& record, const Piece& piece, float* to, int ld) {
    with_bits(record.part.bits, [&](auto bits) { quant_unpack<bits()>(record, piece.offset, piece.count, to, ld); });
  }

  // Codes, scales and minima of the records of a block, of kv heads [begin, end); `steps` for each of them.
  Prefetcher prefetch(const Rows& rows, const void** scratch, int begin, int end, const void* Piece::* part,
                      int64_t head_stride, const QuantLayout& layout, int steps) const {
    typename Mixed::Regions regions;
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
};

}  // namespace kvk::cpu::KVK_LEVEL
