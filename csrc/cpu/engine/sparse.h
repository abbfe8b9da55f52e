// Format: records of bitmaps, mixed with dense pages by the tag of a page reference. A block's rows are put apart into a small
// dense block of their own dtype, once for all query heads of the kv head, and go through the dense format's kernels from
// there: the result is that of the dense pages, bit for bit. With AVX2 the few query rows of decode are multiplied
// straight with the records instead (sparse_rows.h), unless a row keeps everything.
//
// Bytes: the records, each once; of D = 128 and bf16 144 of 256 a row at keep 64, 96 at keep 40.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/engine/mixed.h"
#include "cpu/engine/sparse_rows.h"
#include "cpu/simd_bitmap.h"

namespace kvk::cpu::KVK_LEVEL {

class BitmapPages : public MixedPages {
 public:
  explicit BitmapPages(const PagedProblem& p)
      : MixedPages(p, p.bitmap->format.k.rotate != 0, p.bitmap->format.v.rotate != 0),
        value_dtype_(p.bitmap->format.dtype), apart_problem_(apart_problem(p)), k_layout_(p.bitmap->format.k_layout()),
        v_layout_(p.bitmap->format.v_layout()), k_straight_(straight(p, p.bitmap->format.k, p.head_dim)),
        v_straight_(straight(p, p.bitmap->format.v, p.head_dim_v)) {}

  void prepare_query(float* q, bool stream) const {
    if (k_rotate_) rotate(p_.head_dim, false, q);
    if (!k_straight_) with_values([&](const auto& values) { values.prepare_query(q, stream); });
  }
  static void finish_output(const PagedProblem& p, float* acc) {
    if (p.bitmap->format.v.rotate) rotate(p.head_dim_v, true, acc);
  }

  // A line of the records ahead at a time, all through the work on the present block.
  Prefetcher prefetch_v(const Rows& rows, const void** scratch, int begin, int end, int num_rows) const {
    return prefetch(rows, scratch, begin, end, pools_.v_head_stride, &Piece::v, v_layout_,
                    score_steps(rows.count, num_rows));
  }
  Prefetcher prefetch_k(const Rows& rows, const void** scratch, int begin, int end, int num_rows) const {
    return prefetch(rows, scratch, begin, end, pools_.k_head_stride, &Piece::k, k_layout_,
                    accumulate_steps(rows.count, num_rows));
  }

  void scores(const Rows& rows, int begin, int heads, const float* q, int ldq, int num_rows, float* s,
              Prefetcher& ahead) const {
    for (int h = 0; h < heads; ++h) {
      const float* qh = q + static_cast<int64_t>(h) * num_rows * ldq;
      float* sh = s + static_cast<int64_t>(h) * num_rows * kBlockKeys;
      if (k_straight_) {
        straight_scores(rows, begin + h, qh, ldq, num_rows, sh, ahead);
      } else {
        apart_scores(rows, begin + h, qh, ldq, num_rows, sh, ahead);
      }
      // Whole vectors of the padding are read.
      for (int r = 0; r < num_rows; ++r) {
        float* row = sh + r * kBlockKeys;
        std::fill(row + rows.count, row + (rows.count + W - 1) / W * W, 0.0f);
      }
    }
  }

  void accumulate(const Rows& rows, int head, const float* p, const float* scale, int num_rows, float* out, int ldo,
                  Prefetcher& ahead) const {
    alignas(64) float ones[kMaxStreamRows];
    std::fill(ones, ones + num_rows, 1.0f);
    Run run;
    for (int i = 0; i < rows.num_pieces; i = run.end) {
      const Piece& piece = rows.pieces[i];
      const float* factor = i == 0 ? scale : ones;
      if (v_straight_ && !piece.dense) {
        run.end = i + 1;
        straight_accumulate(piece, head, p + piece.begin, factor, num_rows, out, ldo, ahead);
      } else if (take_run(rows, i, v_rotate_ || v_straight_, run)) {
        with_values([&](const auto& values) {
          values.accumulate(locate_run<&Piece::v>(values, rows, run, head, ahead), 0, p + piece.begin, factor, num_rows,
                            out, ldo, ahead);
        });
      } else {
        piece_accumulate(piece, head, p + piece.begin, factor, num_rows, out, ldo, ahead);
      }
    }
  }

  bool finite_record_v(const Piece& piece, int head) const override {
    const uint16_t exponent = value_dtype_ == DType::bf16 ? 0x7f80 : 0x7c00;
    const uint8_t* row = v_record(piece, head) + piece.offset * v_layout_.value_row_bytes;
    const auto* values = reinterpret_cast<const uint16_t*>(row);
    bool finite = true;
    for (int64_t i = 0; i < piece.count * v_layout_.value_row_bytes / 2; ++i) {
      finite &= (values[i] & exponent) != exponent;
    }
    return finite;
  }

  void unpack_k(const Piece& piece, int head, float* to, int ld) const override {
    unpack(piece, k_record(piece, head), k_layout_, p_.head_dim, to, ld);
  }
  void unpack_v(const Piece& piece, int head, float* to, int ld) const override {
    unpack(piece, v_record(piece, head), v_layout_, p_.head_dim_v, to, ld);
  }

 private:
  static constexpr int kExpandStep = 4;  // rows put apart between fetches

  // Pieces [begin, end) whose rows are values: of records, and of dense pages of the same dtype in the same basis.
  struct Run {
    int begin, end;
  };

  // f(the dense format of the records' dtype, over rows with their head counted in).
  template <class F>
  void with_values(F&& f) const {
    with_value(value_dtype_, [&](auto value) { f(DensePages<decltype(value)>(apart_problem_)); });
  }

  // Few rows, of decode: whether a call goes straight over the records depends on its shape alone.
  static bool straight(const PagedProblem& p, const BitmapPart& part, int dim) {
    return kSparseRows && part.keep < dim && p.qo_indptr == nullptr && p.group <= kMaxSparseRows;
  }

  // Steps of the prefetcher for one head.
  int64_t score_steps(int keys, int num_rows) const {
    return k_straight_ ? sparse_score_steps(keys, num_rows)
                       : keys + DensePages<bf16>(apart_problem_).score_steps(keys, num_rows);
  }
  int64_t accumulate_steps(int keys, int num_rows) const {
    return v_straight_ ? sparse_accumulate_steps(keys, num_rows, p_.head_dim_v)
                       : keys + DensePages<bf16>(apart_problem_).accumulate_steps(keys, num_rows);
  }

  RowsApart record_rows(const uint8_t* record, const BitmapLayout& layout, int token, int count, int dim) const {
    return {record + token * layout.value_row_bytes,
            layout.value_row_bytes,
            record + layout.bitmap_offset + token * layout.bitmap_row_bytes,
            layout.bitmap_row_bytes,
            dim,
            count,
            nullptr,
            0};
  }

  void straight_scores(const Rows& rows, int head, const float* q, int ldq, int num_rows, float* s,
                       Prefetcher& ahead) const {
    for (int i = 0; i < rows.num_pieces; ++i) {
      const Piece& piece = rows.pieces[i];
      if (piece.dense) {
        piece_scores(piece, head, q, ldq, num_rows, s + piece.begin);
      } else if constexpr (kSparseRows) {
        const RowsApart apart = record_rows(k_record(piece, head), k_layout_, piece.offset, piece.count, p_.head_dim);
        sparse_scores(value_dtype_, apart, q, ldq, num_rows, s + piece.begin, ahead);
      }
    }
  }

  void straight_accumulate(const Piece& piece, int head, const float* p, const float* scale, int num_rows, float* out,
                           int ldo, Prefetcher& ahead) const {
    if constexpr (kSparseRows) {
      const RowsApart apart = record_rows(v_record(piece, head), v_layout_, piece.offset, piece.count, p_.head_dim_v);
      sparse_accumulate(value_dtype_, apart, p, scale, num_rows, out, ldo, ahead);
    }
  }

  void apart_scores(const Rows& rows, int head, const float* q, int ldq, int num_rows, float* s,
                    Prefetcher& ahead) const {
    Run run;
    for (int i = 0; i < rows.num_pieces; i = run.end) {
      const Piece& piece = rows.pieces[i];
      if (take_run(rows, i, k_rotate_, run)) {
        // Whole steps of keys are written: behind a run that does not begin the block they could leave their row.
        alignas(64) float raw[kMaxStreamRows * kBlockKeys];
        float* to = piece.begin == 0 ? s : raw;
        with_values([&](const auto& values) {
          const auto keys = locate_run<&Piece::k>(values, rows, run, head, ahead);
          values.scores(keys, 0, 1, q, ldq, num_rows, to, ahead);
          for (int r = 0; r < num_rows && to == raw; ++r) {
            std::copy_n(raw + r * kBlockKeys, keys.count, s + r * kBlockKeys + piece.begin);
          }
        });
      } else {
        alignas(64) float natural[kMaxStreamRows * padded(256)];
        std::copy_n(q, num_rows * ldq, natural);
        with_values([&](const auto& values) {
          for (int r = 0; r < num_rows; ++r) values.natural_query(natural + r * ldq);
        });
        piece_scores(piece, head, natural, ldq, num_rows, s + piece.begin);
      }
    }
  }

  // Rows put apart, and rows of dense pages with their head counted in.
  static PagedProblem apart_problem(const PagedProblem& p) {
    PagedProblem apart = p;
    apart.k.head_stride = apart.v.head_stride = 0;
    return apart;
  }

  // The run from piece `i`; false, and that piece alone, where it is not of values.
  bool take_run(const Rows& rows, int i, bool rotate, Run& run) const {
    const bool dense_too = p_.dtype == value_dtype_ && !rotate;
    const auto is_values = [&](const Piece& piece) { return !piece.dense || dense_too; };
    run.begin = i;
    run.end = i + 1;
    if (!is_values(rows.pieces[i])) return false;
    while (run.end < rows.num_pieces && is_values(rows.pieces[run.end])) ++run.end;
    return true;
  }

  // Where the run's rows lie, records put apart first.
  template <const void* Piece::* kPart, class Value>
  typename DensePages<Value>::Rows locate_run(const DensePages<Value>&, const Rows& rows, const Run& run, int head,
                                              Prefetcher& ahead) const {
    constexpr bool kIsK = kPart == &Piece::k;
    const PoolView& pool = kIsK ? p_.k : p_.v;
    const BitmapLayout& layout = kIsK ? k_layout_ : v_layout_;
    const int dim = kIsK ? p_.head_dim : p_.head_dim_v;
    typename DensePages<Value>::Rows located;
    const Value** to = kIsK ? located.k : located.v;
    int count = 0;
    for (int i = run.begin; i < run.end; ++i) {
      const Piece& piece = rows.pieces[i];
      if (piece.dense) {
        const Value* row = static_cast<const Value*>(piece.*kPart) + head * pool.head_stride;
        for (int j = 0; j < piece.count; ++j) to[count++] = row + j * pool.token_stride;
        continue;
      }
      const uint8_t* record = kIsK ? k_record(piece, head) : v_record(piece, head);
      uint16_t* apart = apart_ + count * padded(dim);
      expand(record, layout, piece.offset, piece.count, dim, apart, ahead);
      for (int j = 0; j < piece.count; ++j) to[count++] = reinterpret_cast<const Value*>(apart + j * padded(dim));
    }
    located.count = count;
    return located;
  }

  void expand(const uint8_t* record, const BitmapLayout& layout, int offset, int count, int dim, uint16_t* to,
              Prefetcher& ahead) const {
    for (int j = 0; j < count; j += kExpandStep) {
      for (int e = 0; e < kExpandStep; ++e) ahead.step();
      RowsApart rows = record_rows(record, layout, offset + j, std::min(kExpandStep, count - j), dim);
      rows.to = to + static_cast<int64_t>(j) * padded(dim);
      rows.ld = padded(dim);
      expand_rows(rows);
    }
  }

  void unpack(const Piece& piece, const uint8_t* record, const BitmapLayout& layout, int dim, float* to, int ld) const {
    alignas(64) uint16_t row[kMaxRow];
    const uint8_t* values = record + piece.offset * layout.value_row_bytes;
    const uint8_t* bitmap = record + layout.bitmap_offset + piece.offset * layout.bitmap_row_bytes;
    for (int j = 0; j < piece.count; ++j) {
      expand_row(values + j * layout.value_row_bytes, bitmap + j * layout.bitmap_row_bytes, dim, row);
      unpack_row(row, value_dtype_, dim, to + j * ld);
    }
  }

  // `steps` for each head.
  Prefetcher prefetch(const Rows& rows, const void** scratch, int begin, int end, int64_t head_stride,
                      const void* Piece::* part, const BitmapLayout& layout, int64_t steps) const {
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
        regions.add(record + piece.offset * layout.value_row_bytes, piece.count * layout.value_row_bytes);
        regions.add(record + layout.bitmap_offset + piece.offset * layout.bitmap_row_bytes,
                    piece.count * layout.bitmap_row_bytes);
      }
    }
    return regions.prefetcher(scratch, steps * (end - begin), 16);
  }

  DType value_dtype_;
  PagedProblem apart_problem_;
  BitmapLayout k_layout_, v_layout_;
  bool k_straight_, v_straight_;
  alignas(64) mutable uint16_t apart_[kBlockKeys * padded(kMaxRow)];
};

}  // namespace kvk::cpu::KVK_LEVEL
