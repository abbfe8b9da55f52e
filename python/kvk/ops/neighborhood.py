"""Neighborhood attention in one, two and three dimensions, and its gradient.

Shapes: B batch, X.. one to three dimensions, Hq / Hkv query / kv heads, D / Dv head dims of K / V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from kvk.ops._common import attention_results, call_attention, fake, no_results

_ops = torch.ops.kvk


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    softmax_scale: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every token to the window of tokens around it (Hassani et al. 2023, 2025). Differentiable in q,
    k, v.

    The semantics are NATTEN's, to the key (docs/neighborhood.md): windows shift inward at the edges, so that every
    query of a dimension that is not causal sees exactly kernel_size keys along it; `stride` queries in a row share
    the window of their middle one (stride = kernel_size: blocked attention); `dilation` takes every dilation-th
    token. Keys that every query sees besides are one more attention, joined by :func:`merge_states`.

    Args:
        q: [B, X.., Hq, D], float32, bfloat16 or float16; 1, 2 or 3 dimensions X..; any strides with the last one 1.
            Hq is a multiple of Hkv.
        k: [B, X.., Hkv, D]; v: [B, X.., Hkv, Dv]; q's dtype. D and Dv: 32 to 256 in steps of 8.
        kernel_size: keys of a window, for every dimension or a tuple; kernel_size * dilation is at most the extent.
        stride: 1 to kernel_size. dilation: at least 1. is_causal: no key behind the query along that dimension. Each
            one value, or a tuple.
        softmax_scale: default D ** -0.5.
        out, lse: tensors to write into (no gradient then), [B, X.., Hq, Dv] in q's dtype and float32 [B, X.., Hq];
            both or none.

    Returns:
        out [B, X.., Hq, Dv] in q's dtype; lse float32 [B, X.., Hq], natural log of the sum of exp(scores).

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value; the message names it.
    """
    return call_attention(
        "neighborhood_attention",
        (q, k, v, _list(kernel_size)),
        out,
        lse,
        stride=_list(stride),
        dilation=_list(dilation),
        is_causal=_list(is_causal),
        softmax_scale=softmax_scale,
    )


def neighborhood_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of :func:`neighborhood_attention`, from an out and lse of the caller's.

    With the out and lse of a merge of this branch and others, and the merge's own gradients, it is this branch's
    exact part of the gradient of the merge. Autograd calls it with the op's own. Deterministic: no sum depends on
    the threads.

    Args:
        grad_out: [B, X.., Hq, Dv] in q's dtype; grad_lse: float32 [B, X.., Hq].
        out, lse: as grad_out and grad_lse.
        q, k, v, ...: as in :func:`neighborhood_attention`.

    Returns:
        dq, dk, dv, like q, k and v.

    Raises:
        RuntimeError: as in :func:`neighborhood_attention`.
    """
    return _ops.neighborhood_attention_backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        _list(kernel_size),
        stride=_list(stride),
        dilation=_list(dilation),
        is_causal=_list(is_causal),
        softmax_scale=softmax_scale,
    )


def _list(value):
    """The ops take lists of int: one entry for all dimensions, or one for each."""
    return [int(x) for x in ((value,) if isinstance(value, int) else value)]


@fake("neighborhood_attention")
def _(q, v, **_):
    return attention_results(q, v.shape[-1])


@fake("neighborhood_attention_backward")
def _(q, k, v, **_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


fake("neighborhood_attention.out")(no_results)


def _save(ctx, inputs, keyword_only_inputs, output):
    q, k, v, ctx.kernel_size = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.options = keyword_only_inputs


def _backward(ctx, grad_out, grad_lse):
    grads = _ops.neighborhood_attention_backward(
        grad_out.contiguous(), grad_lse.contiguous(), *ctx.saved_tensors, ctx.kernel_size, **ctx.options
    )
    return *grads, None


library.register_autograd("kvk::neighborhood_attention", _backward, setup_context=_save)
