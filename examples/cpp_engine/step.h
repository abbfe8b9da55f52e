// One step of one layer: append, pack what is full, attend. The same on the CPU and on a card, where everything is queued on the
// context's stream and nothing waits: all tensors lie on one device, and the host has only made the numbers in them.
#pragma once

#include <kvk/kvk.h>

#include <optional>

namespace engine {

struct Layer {
  kvk::Tensor k_pages, v_pages;  // [M, P, Hkv, D]
  kvk::Tensor k_pool, v_pool;    // u8 [N, Hkv, record bytes]
  kvk::QuantFormat format;
};

struct Packing {
  kvk::Tensor from, to;  // int32 [n]: dense pages, and the records that they become
};

struct Step {
  kvk::Tensor q, k, v;  // [B, Hq, D], [B, Hkv, D]
  kvk::Tensor slots;    // int64 [B]
  std::optional<Packing> packing;
  kvk::Tensor table, lens;  // int32 [B, max_pages], int32 [B]
  kvk::Tensor out, lse;     // [B, Hq, D], f32 [B, Hq]: written
};

inline void run_step(const Layer& layer, const Step& step, const kvk::Context& context = {}) {
  kvk::append_kv(
      {.k = step.k, .v = step.v, .k_pages = layer.k_pages, .v_pages = layer.v_pages, .slot_mapping = step.slots},
      context);
  if (step.packing) {
    kvk::quantize_pages({.k_pages = layer.k_pages,
                         .v_pages = layer.v_pages,
                         .src = step.packing->from,
                         .k_pool = layer.k_pool,
                         .v_pool = layer.v_pool,
                         .dst = step.packing->to,
                         .format = layer.format},
                        context);
  }
  kvk::quant_decode({.q = step.q,
                     .k_pool = layer.k_pool,
                     .v_pool = layer.v_pool,
                     .k_pages = layer.k_pages,
                     .v_pages = layer.v_pages,
                     .table = {.page_indices = step.table, .page_indptr = {}, .kv_lens = step.lens},
                     .score = {},
                     .format = layer.format,
                     .out = step.out,
                     .lse = step.lse},
                    context);
}

}  // namespace engine
