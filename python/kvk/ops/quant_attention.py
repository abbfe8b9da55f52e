"""Attention straight over quantized records, mixed with dense pages.

Shapes as in kvk.ops.paged; N pages of records, M dense pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvk.formats.quant import QuantFormat
from kvk.ops._common import attention_results, call_attention, fake, no_results

_ops = torch.ops.kvk


def quant_decode(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_indices: Tensor,
    kv_lens: Tensor,
    fmt: QuantFormat,
    *,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    page_indptr: Tensor | None = None,
    k_permutation: Tensor | None = None,
    k_rope: Tensor | None = None,
    softmax_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token per request over quantized pages (KIVI, RotateKV), no copy of the cache made.

    What it computes is :func:`paged_decode` over the pages that :func:`dequantize_pages` would give in float32; scales
    stay out of the inner loop. A step reads the records of the listed pages once, fmt.bits_per_element bits an element.
    Where the format rotates, q is rotated and out is rotated back here; dense pages are not stored rotated.

    Args:
        q: [B, Hq, D], float32, bfloat16 or float16; last stride 1.
        k_pool, v_pool: uint8 [N, Hkv, fmt.k_record_bytes] and [N, Hkv, fmt.v_record_bytes], as quantize_pages
            writes them.
        page_indices: as in :func:`paged_decode`, with a tag in bits 28 to 30 of each entry: ``page`` is a record,
            ``page | 1 << 28`` a page of k_pages and v_pages. Any mix: recent tokens, sinks, important pages stay dense.
        kv_lens: int32 [B] or [B, Hkv].
        fmt: what the records hold.
        k_pages, v_pages: [M, P, Hkv, D] and [M, P, Hkv, Dv], q's dtype, any strides with the last one 1; both or none.
        key_bias: float32 [N + M, P] or [N + M, P, Hkv]: the records' pages first, then the dense ones.
        k_permutation: int32 [Hkv / m, m * D], as :func:`quantize_pages` had it. CPU only.
        k_rope: float32 [max_len, R], R even and at most D: cosines, then sines, of R / 2 angles for each position.
            Keys, those of dense pages too, are then stored before their rotary embedding, and channels j and j + R / 2
            turn here by angle j of the key's position in its request's list. q comes with its own. CPU only.
        page_indptr, softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, out, lse: as in
            :func:`paged_decode`.

    Returns:
        out [B, Hq, Dv] in q's dtype; lse [B, Hq], float32.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value; the message names it.
    """
    return call_attention(
        "quant_decode",
        (q, k_pool, v_pool, page_indices, kv_lens, fmt.numbers),
        out,
        lse,
        k_pages=k_pages,
        v_pages=v_pages,
        page_indptr=page_indptr,
        k_permutation=k_permutation,
        k_rope=k_rope,
        softmax_scale=softmax_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_bias=key_bias,
    )


def quant_prefill(
    q: Tensor,
    qo_indptr: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_indices: Tensor,
    kv_lens: Tensor,
    fmt: QuantFormat,
    *,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    page_indptr: Tensor | None = None,
    k_permutation: Tensor | None = None,
    k_rope: Tensor | None = None,
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
    """Attention of several new tokens per request over quantized and dense pages: chunked prefill, verification.

    Args:
        q, qo_indptr, causal, mask_bits, mask_width: as in :func:`paged_prefill`.
        k_pool, v_pool, page_indices, kv_lens, fmt, k_pages, v_pages and the other options: as in :func:`quant_decode`.

    Returns:
        out [T, Hq, Dv] in q's dtype; lse [T, Hq], float32.

    Raises:
        RuntimeError: as in :func:`quant_decode`.
    """
    return call_attention(
        "quant_prefill",
        (q, qo_indptr, k_pool, v_pool, page_indices, kv_lens, fmt.numbers),
        out,
        lse,
        k_pages=k_pages,
        v_pages=v_pages,
        page_indptr=page_indptr,
        k_permutation=k_permutation,
        k_rope=k_rope,
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


@fake("quant_decode", "quant_prefill")
def _(q, fmt, **_):
    return attention_results(q, QuantFormat.from_numbers(fmt).head_dim_v)


fake("quant_decode.out", "quant_prefill.out")(no_results)
