"""References of the ops that compute gradients: autograd through the forward references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvk.reference.block_sparse import block_sparse_attention
from kvk.reference.merge import merge_states
from kvk.reference.neighborhood import neighborhood_attention

Gradients = tuple[Tensor, Tensor, Tensor]


def _leaf(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    return x.detach().to(compute_dtype).requires_grad_()


def _backward_of(attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Gradients]:
    """The gradient with p = exp(s - lse) for the given lse, and sum_k p dp for the given out: dO.O.

    out and lse are those of `attention`, or of more keys (a merge over branches), and constants here. With w = exp(its
    own lse - lse), `attention` gives the sum of p v as w out and that of p as w; the gradient is that of
    sum(dO w out) + sum(w (dlse - dO.O)).
    """

    def backward(
        grad_out: Tensor,
        grad_lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *arguments: Any,
        compute_dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> Gradients:
        work = torch.promote_types(compute_dtype, torch.float32)
        leaves = [_leaf(x, compute_dtype) for x in (q, k, v)]
        own_out, own_lse = attention(*leaves, *arguments, compute_dtype=compute_dtype, **options)
        grad_out, grad_lse, out, lse, own_out = (x.to(work) for x in (grad_out, grad_lse, out, lse, own_out))
        seen = own_lse.detach() != -torch.inf
        weight = torch.where(seen, torch.exp(own_lse.to(work) - torch.where(seen, lse, 0.0)), 0.0)
        objective = (grad_out * weight[..., None] * own_out).sum()
        objective = objective + (weight * (torch.where(seen, grad_lse, 0.0) - (grad_out * out).sum(-1))).sum()
        if not objective.requires_grad:  # of no tokens
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grads = torch.autograd.grad(objective, leaves, allow_unused=True, materialize_grads=True)
        return grads[0], grads[1], grads[2]

    backward.__doc__ = (
        f"(dq, dk, dv) of {attention.__name__} for the given out and lse, in compute_dtype; what comes after lse is as "
        "the op has it."
    )
    return backward


block_sparse_attention_backward = _backward_of(block_sparse_attention)
neighborhood_attention_backward = _backward_of(neighborhood_attention)


def merge_states_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The gradients of merge_states in its parts: (of out in compute_dtype, of lse in that but at least float32)."""
    lse_dtype = torch.promote_types(compute_dtype, torch.float32)
    leaves = [_leaf(out, compute_dtype), _leaf(lse, lse_dtype)]
    merged = merge_states(*leaves, compute_dtype=compute_dtype)
    seen = merged[1].detach() != -torch.inf
    grads = [grad_out.to(merged[0].dtype), torch.where(seen, grad_lse.to(lse_dtype), 0.0)]
    first, second = torch.autograd.grad(merged, leaves, grads, allow_unused=True, materialize_grads=True)
    return first, second
