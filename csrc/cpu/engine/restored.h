// Format: quantized records whose heads cannot be read one by one: rotated over several kv heads, their channels in another
// order, or keys stored before their rotary embedding (RotateKV). A block is restored to fp32 rows of plain keys and values,
// for all heads of a group at once, and goes on as dense rows; dense pages among them get the rotary embedding alone.
// Bytes: the records, each once; FLOPs on top of dense attention: 2 log2(m * D) for each element, once for all query heads.
#pragma once

#include <algorithm>

#include "cpu/engine/dense.h"
#include "cpu/engine/mixed.h"
#include "cpu/engine/quant_record.h"
#include "cpu/joint_rows.h"

namespace kvk::cpu::KVK_LEVEL {

class RestoredPages {
 public:
  struct Rows {
    Piece pieces[kBlockKeys];
    int num_pieces = 0, count = 0;
    int64_t first = 0;   // position of the block's first key
    int64_t number = 0;  // of the block, to know it again
  };

  explicit RestoredPages(const PagedProblem& p)
      : p_(p), unpacked_(fp32_problem(p)),
        k_(p.quant->format.k, p.quant->format.k_layout(), p.head_dim, p.quant->k_head_stride),
        v_(p.quant->format.v, p.quant->format.v_layout(), p.head_dim_v, p.quant->v_head_stride) {}

  void prepare_query(float* q, bool stream) const { unpacked_.prepare_query(q, stream); }
  static void finish_output(const PagedProblem&, float*) {}

  void locate(const KeyBlock& block, Rows& rows) const {
    locate_pieces(p_, block, rows.pieces);
    rows.num_pieces = block.num_runs;
    rows.count = block.count;
    rows.first = block.first;
    rows.number = ++blocks_;
  }

  Prefetcher prefetch_v(const Rows&, const void**, int, int, int) const { return nothing(); }
  Prefetcher prefetch_k(const Rows&, const void**, int, int, int) const { return nothing(); }

  void scores(const Rows& rows, int begin, int heads, const float* q, int ldq, int num_rows, float* s,
              Prefetcher&) const {
    Prefetcher none = nothing();
    for (int h = 0; h < heads; ++h) {
      float* to = s + static_cast<int64_t>(h) * num_rows * kBlockKeys;
      unpacked_.scores(k_rows(rows, begin + h), 0, 1, q + static_cast<int64_t>(h) * num_rows * ldq, ldq, num_rows, to,
                       none);
      // Whole vectors of the padding are read.
      for (int r = 0; r < num_rows; ++r) {
        float* row = to + r * kBlockKeys;
        std::fill(row + rows.count, row + (rows.count + W - 1) / W * W, 0.0f);
      }
    }
  }

  void accumulate(const Rows& rows, int head, const float* p, const float* scale, int num_rows, float* out, int ldo,
                  Prefetcher&) const {
    Prefetcher none = nothing();
    unpacked_.accumulate(v_rows(rows, head), 0, p, scale, num_rows, out, ldo, none);
  }

  bool finite_v(const Rows& rows, int head) const { return unpacked_.finite_v(v_rows(rows, head), 0); }

  // After finite_v of the same rows and head.
  float v_element(const Rows&, int head, int key, int d) const { return v_.row(head)[key * v_.ld + d]; }

  void pack_k(const Rows& rows, int head, float* panels) const { unpacked_.pack_k(k_rows(rows, head), 0, panels); }
  void pack_v(const Rows& rows, int head, float* panels) const { unpacked_.pack_v(v_rows(rows, head), 0, panels); }

 private:
  // K or V: how a record is read, and a group of heads of one block as fp32 rows.
  struct Side {
    Side(const QuantPart& p, const QuantLayout& l, int head_dim, int64_t stride)
        : part(p), layout(l), dim(head_dim), ld(padded(head_dim)), heads(p.joint_heads()), head_stride(stride) {}

    float* row(int head) const { return floats.get() + int64_t{head % heads} * kBlockKeys * ld; }

    QuantPart part;
    QuantLayout layout;
    int dim, ld, heads;
    int64_t head_stride;           // of the records, in bytes
    mutable AlignedFloats floats;  // [heads][kBlockKeys][ld]
    mutable int64_t number = 0;    // of the block that is there, 0: none
    mutable int group = 0;
  };

  static PagedProblem fp32_problem(const PagedProblem& p) {
    PagedProblem fp32 = p;
    fp32.k.head_stride = fp32.v.head_stride = 0;
    return fp32;
  }

  static Prefetcher nothing() { return Prefetcher(nullptr, 0, 64, 1); }

  DensePages<float>::Rows k_rows(const Rows& rows, int head) const {
    const Permutation& order = p_.quant->permutation;
    restore(k_, rows, head / k_.heads, &Piece::k, p_.k, order);
    return rows_of(k_, rows.count, head);
  }
  DensePages<float>::Rows v_rows(const Rows& rows, int head) const {
    static constexpr Permutation kAsTheyAre = {};
    restore(v_, rows, head / v_.heads, &Piece::v, p_.v, kAsTheyAre);
    return rows_of(v_, rows.count, head);
  }

  static DensePages<float>::Rows rows_of(const Side& side, int count, int head) {
    DensePages<float>::Rows rows;
    rows.count = count;
    for (int j = 0; j < count; ++j) rows.k[j] = rows.v[j] = side.row(head) + j * side.ld;
    return rows;
  }

  // The heads of a group of one block, unless they are there already.
  void restore(const Side& side, const Rows& rows, int group, const void* Piece::* data, const PoolView& dense,
               const Permutation& order) const {
    if (side.number == rows.number && side.group == group) return;
    if (!side.floats) side.floats = aligned_floats(int64_t{side.heads} * kBlockKeys * side.ld);
    side.number = rows.number;
    side.group = group;
    JointRow joint(side.heads * side.dim, side.part.rotate != 0, order, group);
    const AlignedFloats whole = aligned_floats(int64_t{side.heads} * side.dim + W);
    for (int i = 0; i < rows.num_pieces; ++i) {
      const Piece& piece = rows.pieces[i];
      for (int h = 0; h < side.heads; ++h) {
        float* to = side.row(h) + piece.begin * side.ld;
        const int head = group * side.heads + h;
        if (piece.dense) {
          for (int j = 0; j < piece.count; ++j) {
            const int64_t from = head * dense.head_stride + j * dense.token_stride;
            unpack_row(element_at(piece.*data, from, p_.dtype), p_.dtype, side.dim, to + j * side.ld);
          }
        } else {
          const Record record(side.part, side.layout, side.dim,
                              static_cast<const uint8_t*>(piece.*data) + head * side.head_stride);
          quant_unpack(record, piece.offset, piece.count, to, side.ld);
        }
      }
      for (int j = piece.begin; !piece.dense && j < piece.begin + piece.count; ++j) {
        for (int h = 0; h < side.heads; ++h) {
          std::copy_n(side.row(h) + j * side.ld, side.dim, whole.get() + h * side.dim);
        }
        joint.restore(whole.get());
        for (int h = 0; h < side.heads; ++h) {
          std::copy_n(whole.get() + h * side.dim, side.dim, side.row(h) + j * side.ld);
        }
      }
    }
    if (&side == &k_ && p_.quant->rope.values != nullptr) add_positions(rows);
  }

  // Rotary embedding, half style: channels (j, j + R / 2) turn by the angle of the key's position.
  void add_positions(const Rows& rows) const {
    const Rope& rope = p_.quant->rope;
    const int half = rope.dim / 2;
    for (int j = 0; j < rows.count; ++j) {
      const float* cosine = rope.values + (rows.first + j) * rope.stride;
      const float* sine = cosine + half;
      for (int h = 0; h < k_.heads; ++h) {
        float* row = k_.row(h) + j * k_.ld;
        for (int d = 0; d < half; ++d) {
          const float a = row[d], b = row[d + half];
          row[d] = a * cosine[d] - b * sine[d];
          row[d + half] = b * cosine[d] + a * sine[d];
        }
      }
    }
  }

  const PagedProblem& p_;
  DensePages<float> unpacked_;
  Side k_, v_;
  mutable int64_t blocks_ = 0;
};

}  // namespace kvk::cpu::KVK_LEVEL
