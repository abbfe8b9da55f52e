"""Attention over a paged KV cache, and the calls around it.

Shapes: B requests, T packed query tokens, Hq / Hkv query / kv heads, D / Dv head dims of K / V, P page size, N pages.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from kvk.ops._common import attention_results, both, call_attention, fake, no_results

_ops = torch.ops.kvk


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_indices: Tensor,
    kv_lens: Tensor,
    *,
    page_indptr: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token per request over that request's pages (FlashDecoding: split keys, merge by LSE).

    A key's score is ``softmax_scale * q.k``, then soft cap, ALiBi and key bias in this order; masked keys are not read.
    A request with no visible key gives out 0 and lse -inf.

    Args:
        q: [B, Hq, D], float32, bfloat16 or float16; last stride 1. The new token is the last of its request's keys.
        k_pages: [N, P, Hkv, D], q's dtype, any strides with the last one 1 (NHD and HND pools alike).
        v_pages: [N, P, Hkv, Dv]. D and Dv: 32 to 256 in steps of 8. Hq is a multiple of Hkv.
        page_indices: int32 [B, max_pages], or [B, Hkv, max_pages] where heads keep different pages, or [nnz] with
            page_indptr. Entries past a request's last page are not read.
        kv_lens: int32 [B] or [B, Hkv], keys of each request, 0 allowed.
        page_indptr: int32 [B + 1] or [B * Hkv + 1], start of each list in page_indices.
        softmax_scale: default D ** -0.5.
        window_left: w >= 0 keeps the last w + 1 keys; -1 keeps all.
        logits_soft_cap: c > 0 turns a score s into c * tanh(s / c).
        alibi_slopes: float32 [Hq]; s -= slope * |query position - key position|.
        sinks: float32 [Hq]; a logit per head that joins the denominator (and lse) and has no value.
        key_bias: float32 [N, P] or [N, P, Hkv]; added to the score of that stored key; -inf removes the key.
        out, lse: tensors to write into, [B, Hq, Dv] in q's dtype and float32 [B, Hq]; give both or none.

    Returns:
        out [B, Hq, Dv] in q's dtype; lse [B, Hq], float32, natural log of the sum of exp(scores), sink included.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value; the message names it.
    """
    return call_attention(
        "paged_decode",
        (q, k_pages, v_pages, page_indices, kv_lens),
        out,
        lse,
        page_indptr=page_indptr,
        softmax_scale=softmax_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_bias=key_bias,
    )


def paged_prefill(
    q: Tensor,
    qo_indptr: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_indices: Tensor,
    kv_lens: Tensor,
    *,
    page_indptr: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    mask_bits: Tensor | None = None,
    mask_width: int = -1,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of several new tokens per request over that request's pages (ragged prefill, chunked prefill, verify).

    The keys of the new tokens are already in the pages: append first. Any mix of lengths is one call, decode requests
    (one token) included. Options shared with :func:`paged_decode` are described there.

    Args:
        q: [T, Hq, D], the tokens of all requests one after another.
        qo_indptr: int32 [B + 1], request b's tokens are q[qo_indptr[b]:qo_indptr[b + 1]]; rows past the last
            entry belong to no request and give out 0, lse -inf.
        causal: token i of a request's n sees keys up to kv_len - n + i (bottom-right alignment); False: all keys.
        window_left: w >= 0 hides keys more than w before the token's own position.
        mask_bits: int32 [T, words], a tree mask over the request's last W keys: bit j of a row (bit j % 32 of word
            j // 32, little-endian) is key kv_len - W + j; 0 hides it. It joins the causal mask and the window, by AND.
        mask_width: W; -1: the request's own number of tokens.
        out, lse: tensors to write into, [T, Hq, Dv] in q's dtype and float32 [T, Hq]; give both or none.

    Returns:
        out [T, Hq, Dv] in q's dtype; lse [T, Hq], float32.

    Raises:
        RuntimeError: as in :func:`paged_decode`.
    """
    return call_attention(
        "paged_prefill",
        (q, qo_indptr, k_pages, v_pages, page_indices, kv_lens),
        out,
        lse,
        page_indptr=page_indptr,
        causal=causal,
        softmax_scale=softmax_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_bias=key_bias,
        mask_bits=mask_bits,
        mask_width=mask_width,
    )


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    """Writes new keys and values into their slots of the page pools, in place.

    Args:
        k: [T, Hkv, D]; v: [T, Hkv, Dv]; the pools' dtype, last stride 1.
        k_pages, v_pages: [N, P, Hkv, D] and [N, P, Hkv, Dv], written.
        slot_mapping: int64 [T], page * P + offset of each token; a negative slot skips the token. Slots must
            differ: which token wins a shared one is not defined.

    Raises:
        RuntimeError: a wrong argument, or a slot past the pool's end; then nothing has been written.
    """
    _ops.append_kv(k, v, k_pages, v_pages, slot_mapping)


def merge_states(
    out: Tensor, lse: Tensor, *, merged_out: Tensor | None = None, merged_lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint parts of the keys into attention over all of them. Differentiable.

    ``lse = log sum exp(lse_i)``, ``out = sum exp(lse_i - lse) out_i`` (FlashInfer's recursive attention). A part
    whose lse is -inf, or +inf (what FlashAttention-2 writes for an empty row), saw no key and is not read.

    Args:
        out: [n, T, H, D], float32, bfloat16 or float16, last stride 1.
        lse: float32 [n, T, H], natural log.
        merged_out, merged_lse: tensors to write into (no gradient then); give both or none.

    Returns:
        out [T, H, D] in the parts' dtype; lse float32 [T, H]. All parts empty: 0 and -inf.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or stride.
    """
    if merged_out is None and merged_lse is None:
        return _ops.merge_states(out, lse)
    merged_out, merged_lse = both("merge_states", merged_out, merged_lse, "merged_")
    _ops.merge_states.out(out, lse, merged_out=merged_out, merged_lse=merged_lse)
    return merged_out, merged_lse


@fake("paged_decode", "paged_prefill")
def _(q, v_pages, **_):
    return attention_results(q, v_pages.shape[3])


@fake("merge_states")
def _(out, lse):
    return out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:], dtype=torch.float32)


@fake("merge_states_backward")
def _(out, lse, **_):
    return out.new_empty(out.shape), lse.new_empty(lse.shape, dtype=torch.float32)


fake("paged_decode.out", "paged_prefill.out", "append_kv", "merge_states.out")(no_results)


def _save_parts(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _merge_states_backward(ctx, grad_out, grad_lse):
    out, lse = ctx.saved_tensors
    return _ops.merge_states_backward(grad_out.contiguous(), grad_lse.contiguous(), out, lse)


library.register_autograd("kvk::merge_states", _merge_states_backward, setup_context=_save_parts)
