"""Reference of neighborhood_attention: NATTEN's mask, expanded, and dense attention under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kvk.reference.block_sparse import attend

T = TypeVar("T", int, bool)


def axis_mask(
    extent: int, kernel_size: int, stride: int = 1, dilation: int = 1, is_causal: bool = False
) -> Tensor:
    """bool [extent, extent]: which keys (columns) a query (row) sees along one dimension.

    Positions of one remainder by dilation form a group. In a group of n places, the `stride` queries from a multiple
    of stride on share the window of one of them, the middle one (causal: the last), or the group's last place if
    that is past the end. The window is kernel_size places around it (kernel_size // 2 to the left), shifted inward
    at both ends; causal, the kernel_size places up to it, cut at the first place and at the query itself.
    """
    position = torch.arange(extent)
    group, place = position % dilation, position // dilation
    length = extent // dilation + (group < extent % dilation)
    first = place // stride * stride
    if is_causal:
        leader = torch.minimum(first + stride - 1, length - 1)
        begin = (leader - kernel_size + 1).clamp(min=0)
        end = place + 1
    else:
        leader = torch.minimum(first + stride // 2, length - 1)
        begin = torch.minimum((leader - kernel_size // 2).clamp(min=0), length - kernel_size)
        end = begin + kernel_size
    same = group[:, None] == group[None, :]
    return same & (place[None, :] >= begin[:, None]) & (place[None, :] < end[:, None])


def _each(value: T | Sequence[T], n: int) -> list[T]:
    values = [value] if isinstance(value, (int, bool)) else list(value)
    return values * n if len(values) == 1 else values


def neighborhood_mask(
    extents: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """bool [tokens, tokens] over the flattened extents: a key is seen if it is along every dimension."""
    n = len(extents)
    mask = torch.ones(1, 1, dtype=torch.bool)
    settings = zip(
        extents, _each(kernel_size, n), _each(stride, n), _each(dilation, n), _each(is_causal, n), strict=True
    )
    for axis in settings:
        along = axis_mask(*axis)
        rows = mask.shape[0] * along.shape[0]
        mask = (mask[:, None, :, None] & along[None, :, None, :]).reshape(rows, rows)
    return mask


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
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense attention over all tokens, masked. Differentiable by ordinary autograd.

    Returns:
        (out [B, X.., Hq, Dv] in compute_dtype, lse [B, X.., Hq] in compute_dtype but at least float32).
    """
    extents = q.shape[1:-2]
    hidden = ~neighborhood_mask(extents, kernel_size, stride, dilation, is_causal)
    group = q.shape[-2] // k.shape[-2]
    flat_q, flat_k, flat_v = (x.flatten(1, -3) for x in (q, k, v))
    batches = []
    for b in range(q.shape[0]):
        heads = [
            attend(
                flat_q[b, :, h], flat_k[b, :, h // group], flat_v[b, :, h // group], softmax_scale, None, hidden,
                compute_dtype,
            )
            for h in range(q.shape[-2])
        ]  # fmt: skip
        batches.append([torch.stack(x, 1) for x in zip(*heads, strict=True)])
    if not batches:
        lse_dtype = torch.promote_types(compute_dtype, torch.float32)
        return q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=compute_dtype), q.new_zeros(
            q.shape[:-1], dtype=lse_dtype
        )
    out, lse = (torch.stack(x) for x in zip(*batches, strict=True))
    return out.unflatten(1, extents), lse.unflatten(1, extents)
