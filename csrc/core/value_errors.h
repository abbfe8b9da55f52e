// The wording of errors about values in tensors, which the CPU reads itself and a card's check kernels find.
#pragma once

#include "core/check.h"

namespace kvk {

[[noreturn]] inline void fail_first_start(const char* op, const char* name, int64_t start) {
  fail(op, name, " must start at 0, got ", start);
}

[[noreturn]] inline void fail_decreasing_start(const char* op, const char* name, int64_t start, int64_t previous,
                                               int64_t entry) {
  fail(op, name, " must not decrease, got ", start, " after ", previous, " at entry ", entry);
}

// of: "tokens of q"
[[noreturn]] inline void fail_last_start(const char* op, const char* name, int64_t limit, const char* of,
                                         int64_t last) {
  fail(op, name, " must end within the ", limit, " ", of, ", got ", last);
}

[[noreturn]] inline void fail_negative_len(const char* op, int64_t len, int64_t request) {
  fail(op, "kv_lens must not be negative, got ", len, " for request ", request);
}

[[noreturn]] inline void fail_len_past_list(const char* op, int64_t request, int64_t len, int64_t num_pages,
                                            int64_t page_size) {
  fail(op, "kv_lens: request ", request, " has ", len, " keys, but its list of ", num_pages, " pages of ", page_size,
       " holds ", num_pages * page_size);
}

// kind: "", or "dense " beside records
[[noreturn]] inline void fail_page(const char* op, int64_t request, const char* kind, int64_t page, int64_t num_pages,
                                   int64_t entry) {
  fail(op, "page_indices: request ", request, " needs ", kind, "page ", page, " of a pool of ", num_pages,
       " pages (entry ", entry, " of its list)");
}

[[noreturn]] inline void fail_tag(const char* op, int64_t request, int64_t tag, int64_t entry) {
  fail(op, "page_indices: request ", request, " has a page with tag ", tag, ", want 0 (record) or 1 (dense) (entry ",
       entry, " of its list)");
}

[[noreturn]] inline void fail_tokens_past_mask(const char* op, int64_t words, int64_t request, int64_t tokens) {
  fail(op, "mask_bits: ", words, " words a row hold ", words * 32, " bits, request ", request, " has ", tokens,
       " tokens");
}

[[noreturn]] inline void fail_slot(const char* op, int64_t token, int64_t slot, int64_t num_pages, int64_t page_size) {
  fail(op, "slot_mapping: token ", token, " goes to slot ", slot, " of a pool of ", num_pages, " pages of ", page_size);
}

[[noreturn]] inline void fail_id(const char* op, const char* name, int64_t num_pages, int64_t page, int64_t entry) {
  fail(op, name, " must name pages of the ", num_pages, " of its pool, got ", page, " at entry ", entry);
}

// Of a pattern of blocks: more query blocks than it has rows; then of its list of sequence b and head h.
[[noreturn]] inline void fail_block_rows(const char* op, int64_t pattern_rows, int64_t rows, int64_t block_q) {
  fail(op, "row_ptr: ", pattern_rows, " rows of blocks, but the longest sequence has ", rows, " query blocks of ",
       block_q);
}

[[noreturn]] inline void fail_row_start(const char* op, int64_t start, int64_t previous, int64_t row, int64_t b,
                                        int64_t h) {
  fail(op, "row_ptr must not decrease and not be negative, got ", start, " after ", previous, " at row ", row,
       " (batch ", b, ", head ", h, ")");
}

[[noreturn]] inline void fail_row_end(const char* op, int64_t num_entries, int64_t end, int64_t b, int64_t h) {
  fail(op, "row_ptr must end within the ", num_entries, " entries of col_idx, got ", end, " (batch ", b, ", head ", h,
       ")");
}

[[noreturn]] inline void fail_key_block(const char* op, int64_t entry, int64_t block, int64_t blocks, int64_t b,
                                        int64_t h) {
  fail(op, "col_idx: entry ", entry, " names key block ", block, " of ", blocks, " (batch ", b, ", head ", h, ")");
}

[[noreturn]] inline void fail_state_slot(int64_t row, int64_t slot, int64_t num_slots) {
  fail("lightning_decode", "slots: row ", row, " needs slot ", slot, " of a pool of ", num_slots);
}

[[noreturn]] inline void fail_state_slot_again(int64_t row, int64_t slot) {
  fail("lightning_decode", "slots: slot ", slot, " is named again at row ", row);
}

// Of row [page, token, head] of a mask or of bitmaps.
[[noreturn]] inline void fail_selected(const char* op, const char* name, int64_t keep, int64_t selected, int64_t page,
                                       int64_t token, int64_t head) {
  fail(op, name, " must select at most the ", keep, " elements of a row that the format keeps, got ", selected, " at [",
       page, ", ", token, ", ", head, "]");
}

}  // namespace kvk
