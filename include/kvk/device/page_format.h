// The format part of paged attention on a card: how a page's bytes become K and V. One decode kernel and one prefill kernel
// serve every format; a format is a struct that their config takes (`Pages`), with
//
//   DecodeParams, PrefillParams   what a kernel gets: PagedDecodeParams, or a struct that adds the format's pools to it
//   Place                         where a key lies; at least `float bias` and `bool visible` (a hidden key is not read)
//   place(params, item, key)      that place, worked out by one lane
//   staged(head dims, keys)       StagedBytes, below
//   rotate_query<Config>(..)      where StagedBytes asks for three terms: rotates a warp's rows of q
//   is_dense(place)               there: whether the key is as it was, not rotated
//   DecodeRing<Config>            a warp's ring of stages: load (starts the copies of 16 keys), tile (makes K and V of them in
//                                 the kernel's element type, if they are not), k, v, bias, and rows (scratch when it is empty)
//   PrefillTiles<Config>          the same for a block's tile of keys
//
// DensePages (dense_pages.cuh) copies rows of the element type as they are. QuantPages (quant_pages.cuh) copies records raw,
// and the warp that needs 16 keys expands them; pages that the reference tags as dense go around the stage.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

// Of a format whose stages hold records, for a run of keys; all 0: stages hold K and V themselves.
struct StagedBytes {
  int records = 0;  // K and V of the run, as they are stored
  int place = 0;    // sizeof(Place): places stay beside the stage until it is expanded
  int scratch = 0;  // of a warp that expands, a multiple of 16
  // 3: records are rotated. Queries are kept rotated, as a sum of two numbers of the element type (rounding them again
  // would cost as much as rounding the keys), and as they are, for the dense keys.
  int query_terms = 1;
};

struct DensePages;

}  // namespace kvk::device
