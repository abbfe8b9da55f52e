// A checked call of paged attention, the same struct from the argument checks to the kernels of both backends. Decode is
// prefill with one token a request. Pointers are the caller's memory; on a card, lengths and page ids are read there.
#pragma once

#include "kvk/device/int.h"

namespace kvk::device {

// Where element 0 of (page, token, head) lies: data + page * page_stride + token * token_stride + head * head_stride.
struct PoolView {
  const void* data;
  int64_t page_stride, token_stride, head_stride;  // elements
};

// Rows of q or out: element 0 of (token, head).
struct RowsView {
  void* data;
  int64_t token_stride, head_stride;  // elements
};

// The checked page table; the three forms of docs/page-tables.md look alike from here.
struct PageList {
  const int32_t* indices;
  int64_t index_stride;                 // between consecutive entries of one list
  int64_t request_stride, head_stride;  // between lists; head_stride 0: heads share a list. Unused with indptr
  const int32_t* indptr;                // CSR starts, or null
  int64_t indptr_stride;
  const int32_t* lens;
  int64_t lens_request_stride, lens_head_stride;  // lens_head_stride 0: heads share a length
  bool per_head_list, per_head_len;
  int32_t num_kv_heads;

  KVK_HOST_DEVICE bool per_head() const { return per_head_list || per_head_len; }
  KVK_HOST_DEVICE const int32_t* pages(int64_t request, int64_t head) const {
    if (indptr != nullptr) {
      const int64_t row = per_head_list ? request * num_kv_heads + head : request;
      return indices + indptr[row * indptr_stride] * index_stride;
    }
    return indices + request * request_stride + head * head_stride;
  }
  KVK_HOST_DEVICE int64_t len(int64_t request, int64_t head) const {
    return lens[request * lens_request_stride + head * lens_head_stride];
  }
};

struct PagedProblem {
  int32_t num_requests, num_kv_heads, group;  // group = query heads of one kv head
  int32_t head_dim, head_dim_v;
  int64_t num_tokens;
  int64_t page_size;
  RowsView q;
  PoolView k, v;
  PageList list;
  const int32_t* qo_indptr;  // null: token b is request b's only one
  int64_t qo_indptr_stride;

  float softmax_scale, logits_soft_cap;  // soft cap 0: none
  int64_t window_left;                   // -1: none
  bool causal;
  const float* alibi_slopes;  // null: none
  int64_t alibi_stride;
  const float* sinks;
  int64_t sinks_stride;
  const float* key_bias;
  int64_t bias_page_stride, bias_token_stride, bias_head_stride;
  const uint32_t* mask_bits;
  int64_t mask_token_stride, mask_word_stride;
  int64_t mask_width;  // -1: the request's own number of tokens

  RowsView out;
  float* lse;
  int64_t lse_token_stride, lse_head_stride;

  KVK_HOST_DEVICE int64_t first_token(int64_t request) const {
    return qo_indptr ? qo_indptr[request * qo_indptr_stride] : request;
  }
  KVK_HOST_DEVICE int64_t num_request_tokens(int64_t request) const {
    return qo_indptr ? first_token(request + 1) - first_token(request) : 1;
  }
};

}  // namespace kvk::device
