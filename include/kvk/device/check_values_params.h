// Parameters of the kernels that check values on a card (KVK_CHECK=1), and what they find.
#pragma once

#include "kvk/device/block_sparse_params.h"
#include "kvk/device/paged_problem.h"

namespace kvk::device {

// The first bad value of a call, in the order in which the CPU checks them.
struct BadValue {
  enum Kind : int32_t {
    kNone,
    kFirstStart,       // value: page_indptr[0] or qo_indptr[0]
    kDecreasingStart,  // value: the start at `index`; other: the one before it
    kLastStart,        // value: the last start
    kNegativeLen,      // value: the length; index: the request
    kLenPastList,      // the same; other: pages of the request's list
    kPage,             // value: the page; index: the request; entry: where in its list
    kTokensPastMask,   // value: tokens; index: the request
    kSlot,             // value: the slot; index: the token
    kDensePage,        // as kPage, of the dense pages beside records
    kTag,              // value: the tag; index and entry as of kPage
    kId,               // value: the page; index: the entry
    kSelected,         // value: elements that a row selects; index: the row, of all
    kStateSlot,        // value: the slot; index: the row
    kStateSlotAgain,   // the same, of a slot that an earlier row names
    kBlockRows,        // value: query blocks of the longest sequence
    kRowStart,  // value: where row `entry` of a pattern starts; other: where the one before it does; index: the batch
    kRowEnd,    // value: where the last row ends; index: the batch
    kKeyBlock,  // value: the block that `entry` names; other: blocks of the longest sequence; index: the batch
  };
  Kind kind = kNone;
  int32_t of_queries = 0;  // starts: of qo_indptr, not of page_indptr
  int64_t index = 0, entry = 0, value = 0, other = 0;
  int64_t head = 0;  // of a pattern
};

struct CheckTableParams {
  PagedProblem problem;
  int64_t num_pages;
  int64_t num_dense_pages;  // beside records; -1: page references carry no tag
  int64_t list_entries;     // dense table: of one list; CSR: of all
  int64_t mask_words;       // of a row; -1: no mask
  BadValue* found;
};

struct CheckSlotsParams {
  const int64_t* slots;
  int64_t slot_stride, num_tokens, num_slots;
  BadValue* found;
};

struct CheckIdsParams {
  const int32_t* ids;
  int64_t stride, count, limit;  // an id is below the limit
  BadValue* found;
};

struct CheckPatternParams {
  BlockSparseParams pattern;
  int32_t batches, heads;  // of the pattern
  BadValue* found;
};

struct CheckSelectParams {
  const uint8_t* select;  // [pages, tokens, heads, ..], a byte an element, or a bit
  bool is_bitmap;
  int64_t shape[4], stride[3];
  int64_t keep;
  BadValue* found;
};

}  // namespace kvk::device
