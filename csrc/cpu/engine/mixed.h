// Formats of records mixed with dense pages by the tag of a page reference: what they share. A format of records derives from
// MixedPages and says how one piece of a record becomes rows of floats, and whether it holds only finite numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "cpu/engine/dense.h"
#include "cpu/rotation.h"

namespace kvk::cpu::KVK_LEVEL {

// Keys that lie side by side in one page.
struct Piece {
  const void *k, *v;  // head 0: the record, or the first key's row of a dense page
  int32_t offset;     // of the first key in its page
  int32_t begin, count;
  bool dense;
};

// Where the runs of a block lie.
inline void locate_pieces(const PagedProblem& p, const KeyBlock& block, Piece* pieces) {
  const RecordPools& pools = *p.records;
  for (int i = 0; i < block.num_runs; ++i) {
    const Run& run = block.runs[i];
    const PageReference page(run.page);
    Piece& piece = pieces[i];
    piece.offset = run.offset;
    piece.begin = run.begin;
    piece.count = run.count;
    piece.dense = page.tag != 0;
    if (piece.dense) {
      piece.k = element_at(p.k.data, page.page * p.k.page_stride + run.offset * p.k.token_stride, p.dtype);
      piece.v = element_at(p.v.data, page.page * p.v.page_stride + run.offset * p.v.token_stride, p.dtype);
    } else {
      piece.k = pools.k + page.page * pools.k_page_stride;
      piece.v = pools.v + page.page * pools.v_page_stride;
    }
  }
}

class MixedPages {
 public:
  // The pieces of one block, in the order of its keys.
  struct Rows {
    Piece pieces[kBlockKeys];
    int num_pieces = 0, count = 0;
  };

  MixedPages(const PagedProblem& p, bool k_rotate, bool v_rotate)
      : p_(p), pools_(*p.records), unpacked_(unpacked_problem(p)), k_rotate_(k_rotate), v_rotate_(v_rotate) {}
  virtual ~MixedPages() = default;

  // Of a piece that is not dense: its rows as floats, rotated where the format rotates, and whether its values are finite.
  virtual void unpack_k(const Piece& piece, int head, float* to, int ld) const = 0;
  virtual void unpack_v(const Piece& piece, int head, float* to, int ld) const = 0;
  virtual bool finite_record_v(const Piece& piece, int head) const = 0;

  void locate(const KeyBlock& block, Rows& rows) const {
    rows.count = block.count;
    rows.num_pieces = block.num_runs;
    locate_pieces(p_, block, rows.pieces);
  }

  bool finite_v(const Rows& rows, int head) const {
    bool finite = true;
    for (int i = 0; i < rows.num_pieces && finite; ++i) {
      const Piece& piece = rows.pieces[i];
      if (!piece.dense) {
        finite = finite_record_v(piece, head);
        continue;
      }
      with_dense(piece, [&](const auto& dense, const auto& keys) { finite = dense.finite_v(keys, head); });
    }
    if (!finite) unpack_block<Part::kV>(rows, head);  // for v_element
    return finite;
  }

  // After finite_v of the same rows and head has said no.
  float v_element(const Rows&, int, int key, int d) const { return buffer_[key * padded(p_.head_dim_v) + d]; }

  void pack_k(const Rows& rows, int head, float* panels) const {
    unpack_block<Part::kK>(rows, head);
    unpacked_.pack_k(unpacked_rows(rows.count, padded(p_.head_dim)), 0, panels);
  }

  void pack_v(const Rows& rows, int head, float* panels) const {
    unpack_block<Part::kV>(rows, head);
    unpacked_.pack_v(unpacked_rows(rows.count, padded(p_.head_dim_v)), 0, panels);
  }

 protected:
  static void rotate(int dim, bool transpose, float* row) {
    alignas(64) float scratch[2 * padded(256)];
    rotate_row(dim, transpose, row, scratch);
  }

  const uint8_t* k_record(const Piece& piece, int head) const {
    return static_cast<const uint8_t*>(piece.k) + head * pools_.k_head_stride;
  }
  const uint8_t* v_record(const Piece& piece, int head) const {
    return static_cast<const uint8_t*>(piece.v) + head * pools_.v_head_stride;
  }

  // Collects what is to be fetched of a block's records, cut into pieces of one size.
  class Regions {
   public:
    void add(const uint8_t* begin, int64_t bytes) {
      if (count_ == kMost) return;
      regions_[count_++] = {begin, bytes};
      lines_ += bytes / kLine + 2;
    }
    bool full() const { return count_ + 2 > kMost; }

    // `steps` times it will be stepped. Pieces of at least `least` lines.
    Prefetcher prefetcher(const void** scratch, int64_t steps, int64_t least = 1) const {
      const int64_t span = std::max(least, lines_ / (kBlockKeys - kMost) + 1) * kLine;
      int count = 0;
      for (int i = 0; i < count_; ++i) {
        for (int64_t at = 0; at < regions_[i].bytes && count < kBlockKeys; at += span) {
          scratch[count++] = regions_[i].begin + at;
        }
      }
      return Prefetcher::spread(scratch, count, span, steps);
    }

   private:
    static constexpr int kMost = 8, kLine = 64;
    struct Region {
      const uint8_t* begin;
      int64_t bytes;
    } regions_[kMost];
    int count_ = 0;
    int64_t lines_ = 0;
  };

  // f(the format of the dense pages, the rows of a piece of one).
  template <class F>
  void with_dense(const Piece& piece, F&& f) const {
    with_dtype(p_.dtype, [&](auto element) {
      const DensePages<decltype(element)> dense(p_);
      f(dense, dense.rows(piece.k, piece.v, piece.count));
    });
  }

  // Scores of a piece by rows of q as prepare_query() of a format that only rotates leaves them: of a dense one, or of a record that
  // is unpacked first.
  void piece_scores(const Piece& piece, int head, const float* q, int ldq, int num_rows, float* s) const {
    Prefetcher none(nullptr, 0, 64, 1);
    alignas(64) float raw[kMaxStreamRows * kBlockKeys];  // whole steps of keys are written
    if (k_rotate_ || !piece.dense) {
      const int ld = padded(p_.head_dim);
      unpack<Part::kK>(piece, head, buffer(), ld);
      unpacked_.scores(unpacked_rows(piece.count, ld), 0, 1, q, ldq, num_rows, raw, none);
    } else {
      alignas(64) float rows[kMaxStreamRows * padded(256)];
      std::copy_n(q, num_rows * ldq, rows);
      with_dense(piece, [&](const auto& dense, const auto& keys) {
        for (int r = 0; r < num_rows; ++r) dense.prepare_query(rows + r * ldq, true);
        dense.scores(keys, head, 1, rows, ldq, num_rows, raw, none);
      });
    }
    for (int r = 0; r < num_rows; ++r) std::copy_n(raw + r * kBlockKeys, piece.count, s + r * kBlockKeys);
  }

  void piece_accumulate(const Piece& piece, int head, const float* p, const float* scale, int num_rows, float* out,
                        int ldo, Prefetcher& ahead) const {
    if (piece.dense && !v_rotate_) {
      return with_dense(piece, [&](const auto& dense, const auto& keys) {
        dense.accumulate(keys, head, p, scale, num_rows, out, ldo, ahead);
      });
    }
    const int ld = padded(p_.head_dim_v);
    unpack<Part::kV>(piece, head, buffer(), ld);
    unpacked_.accumulate(unpacked_rows(piece.count, ld), 0, p, scale, num_rows, out, ldo, ahead);
  }

 private:
  enum class Part { kK, kV };

  // Rows of the buffer as dense fp32 keys of one head.
  static PagedProblem unpacked_problem(const PagedProblem& p) {
    PagedProblem unpacked = p;
    unpacked.k.head_stride = unpacked.v.head_stride = 0;
    return unpacked;
  }

  // Block rows of fp32 in the buffer.
  DensePages<float>::Rows unpacked_rows(int count, int ld) const {
    DensePages<float>::Rows rows;
    rows.count = count;
    for (int j = 0; j < count; ++j) rows.k[j] = rows.v[j] = buffer_.get() + j * ld;
    return rows;
  }

  // A block's keys or values into the buffer.
  template <Part kPart>
  void unpack_block(const Rows& rows, int head) const {
    float* to = buffer();
    const int ld = padded(kPart == Part::kK ? p_.head_dim : p_.head_dim_v);
    for (int i = 0; i < rows.num_pieces; ++i) {
      unpack<kPart>(rows.pieces[i], head, to + rows.pieces[i].begin * ld, ld);
    }
  }

  // The keys or values of one piece as fp32 rows, rotated as the records are.
  template <Part kPart>
  void unpack(const Piece& piece, int head, float* to, int ld) const {
    constexpr bool kIsK = kPart == Part::kK;
    if (!piece.dense) return kIsK ? unpack_k(piece, head, to, ld) : unpack_v(piece, head, to, ld);
    const int dim = kIsK ? p_.head_dim : p_.head_dim_v;
    const PoolView& pool = kIsK ? p_.k : p_.v;
    const char* from = element_at(kIsK ? piece.k : piece.v, head * pool.head_stride, p_.dtype);
    for (int j = 0; j < piece.count; ++j) {
      unpack_row(element_at(from, j * pool.token_stride, p_.dtype), p_.dtype, dim, to + j * ld);
      if (kIsK ? k_rotate_ : v_rotate_) rotate(dim, false, to + j * ld);
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

 protected:
  const PagedProblem& p_;
  const RecordPools& pools_;
  DensePages<float> unpacked_;
  bool k_rotate_, v_rotate_;

 private:
  mutable Floats buffer_;
};

}  // namespace kvk::cpu::KVK_LEVEL
