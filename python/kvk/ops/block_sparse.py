"""Attention over blocks of keys that a pattern names, and its gradient.

Shapes: T / S packed query / key tokens of B sequences, Hq / Hkv query / kv heads, D / Dv head dims of K / V, Mb / Nb
query / key blocks of the longest sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from kvk.ops._common import attention_results, call_attention, fake, no_results

_ops = torch.ops.kvk


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    block_q: int,
    block_k: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    entry_bias: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which each block of queries sees the key blocks that a CSR pattern names. Differentiable in q, k,
    v.

    Query block m of a sequence is its queries ``[m * block_q, (m + 1) * block_q)``; it visits the key blocks
    ``col_idx[row_ptr[m]:row_ptr[m + 1]]``, key block n being keys ``[n * block_k, (n + 1) * block_k)``. The last
    blocks may be short. A query with no visible key gives out 0, lse -inf and gradient 0. Patterns come from
    :func:`block_mask_to_csr` and the builders of :mod:`kvk.patterns` (docs/block-sparse.md).

    Args:
        q: [T, Hq, D], float32, bfloat16 or float16; any strides with the last one 1. Hq is a multiple of Hkv.
        k: [S, Hkv, D]; v: [S, Hkv, Dv]; q's dtype. D and Dv: 32 to 256 in steps of 8.
        row_ptr: int32 [B or 1, Hq or 1, Mb + 1]; a pattern of its own for each sequence and head, or shared by them.
        col_idx: int32 [B or 1, Hq or 1, NNZ], key blocks; in any order within a row. A block named twice counts
            twice.
        block_q, block_k: 16 to 128, each.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sequence starts in q and in k; without them q and k are
            one sequence. Rows of q past the last entry give out 0, lse -inf.
        causal: query i of a sequence's Lq sees its keys up to Lk - Lq + i, on top of the pattern.
        softmax_scale: default D ** -0.5.
        entry_bias: float32, like col_idx; added to all scores of that block. It gets no gradient.
        out, lse: tensors to write into (no gradient then), [T, Hq, Dv] in q's dtype and float32 [T, Hq]; both or
            none.

    Returns:
        out [T, Hq, Dv] in q's dtype; lse float32 [T, Hq], natural log of the sum of exp(scores).

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value; the message names it.
    """
    return call_attention(
        "block_sparse_attention",
        (q, k, v, row_ptr, col_idx, block_q, block_k, cu_seqlens_q, cu_seqlens_k, entry_bias),
        out,
        lse,
        causal=causal,
        softmax_scale=softmax_scale,
    )


def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    block_q: int,
    block_k: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    entry_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of :func:`block_sparse_attention`, from an out and lse of the caller's.

    With the out and lse of a merge (:func:`merge_states`) of this branch and others, and the merge's own gradients,
    it is this branch's exact part of the gradient of the merge: ``exp(score - lse)`` are then the probabilities
    among all keys. Autograd calls it with the op's own out and lse. Deterministic: no sum depends on the threads.

    Args:
        grad_out: [T, Hq, Dv] in q's dtype; grad_lse: float32 [T, Hq].
        out, lse: as grad_out and grad_lse; what the forward pass, or the merge, gave. A query with lse -inf (or +inf)
            gets gradient 0.
        q, k, v, ...: as in :func:`block_sparse_attention`.

    Returns:
        dq, dk, dv, like q, k and v.

    Raises:
        RuntimeError: as in :func:`block_sparse_attention`.
    """
    return _ops.block_sparse_attention_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        row_ptr,
        col_idx,
        block_q,
        block_k,
        cu_seqlens_q,
        cu_seqlens_k,
        entry_bias,
        causal=causal,
        softmax_scale=softmax_scale,
    )


@fake("block_sparse_attention", "vertical_slash_attention")
def _(q, v, **_):
    return attention_results(q, v.shape[2])


@fake("block_sparse_attention_backward")
def _(q, k, v, **_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


fake("block_sparse_attention.out", "vertical_slash_attention.out")(no_results)


def _save(ctx, inputs, keyword_only_inputs, output):
    q, k, v, row_ptr, col_idx, block_q, block_k, cu_seqlens_q, cu_seqlens_k, entry_bias = inputs
    ctx.save_for_backward(q, k, v, *output, row_ptr, col_idx, cu_seqlens_q, cu_seqlens_k, entry_bias)
    ctx.blocks = block_q, block_k
    ctx.options = keyword_only_inputs


def _backward(ctx, grad_out, grad_lse):
    *tensors, cu_seqlens_q, cu_seqlens_k, entry_bias = ctx.saved_tensors
    grads = _ops.block_sparse_attention_backward(
        grad_out.contiguous(),
        grad_lse.contiguous(),
        *tensors,
        *ctx.blocks,
        cu_seqlens_q,
        cu_seqlens_k,
        entry_bias,
        **ctx.options,
    )
    return *grads, *[None] * 7


library.register_autograd("kvk::block_sparse_attention", _backward, setup_context=_save)


def vertical_slash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vertical: Tensor,
    slash: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    softmax_scale: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention to some keys (vertical) and some distances (slash): a head of MInference (Jiang et al. 2024).

    Query i of a sequence's Lq stands at position p = Lk - Lq + i. It sees key j <= p if j is in `vertical`, or if j
    is in the band of a slash s: the 64 keys from P - s on, P being the position of the first query of i's block of
    64. So it sees key p - s for every s of the list, and the band's other keys up to itself; no key counts twice.
    For inference: no gradient.

    Args:
        q: [T, Hq, D], float32, bfloat16 or float16; k: [S, Hkv, D]; v: [S, Hkv, Dv]; as in
            :func:`block_sparse_attention`.
        vertical: int32 [B or 1, Hq or 1, NV], key positions; slash: int32 [B or 1, Hq or 1, NS], distances. Any
            order; what a sequence does not have (-1, say) is ignored, and so are repetitions.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1]; without them q and k are one sequence.
        softmax_scale: default D ** -0.5.
        out, lse: tensors to write into, [T, Hq, Dv] in q's dtype and float32 [T, Hq]; both or none.

    Returns:
        out [T, Hq, Dv] in q's dtype; lse float32 [T, Hq]. A query with no visible key: 0 and -inf.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value; the message names it.
    """
    return call_attention(
        "vertical_slash_attention",
        (q, k, v, vertical, slash),
        out,
        lse,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        softmax_scale=softmax_scale,
    )
