"""Reference of block_sparse_attention: every query block gathers the keys of its entries."""

from __future__ import annotations

import torch
from torch import Tensor


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
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over the key blocks that its row of the pattern names.

    Differentiable by ordinary autograd in q, k, v and entry_bias.

    Returns:
        (out [T, Hq, Dv] in compute_dtype, lse [T, Hq] in compute_dtype but at least float32).
    """
    starts_q = [0, q.shape[0]] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    starts_k = [0, k.shape[0]] if cu_seqlens_k is None else cu_seqlens_k.tolist()
    lse_dtype = torch.promote_types(compute_dtype, torch.float32)
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], num_heads, v.shape[2], dtype=compute_dtype)
    lse = torch.full((q.shape[0], num_heads), -torch.inf, dtype=lse_dtype)
    pointers, columns = row_ptr.tolist(), col_idx.tolist()

    for b in range(len(starts_q) - 1):
        query_ids = torch.arange(starts_q[b], starts_q[b + 1])
        key_ids = torch.arange(starts_k[b], starts_k[b + 1])
        shift = len(key_ids) - len(query_ids)
        for h in range(num_heads):
            pattern = b if row_ptr.shape[0] > 1 else 0, h if row_ptr.shape[1] > 1 else 0
            pointer, column = pointers[pattern[0]][pattern[1]], columns[pattern[0]][pattern[1]]
            for m, rows in enumerate(query_ids.split(block_q) if len(query_ids) else []):
                entries = range(pointer[m], pointer[m + 1])
                blocks = [key_ids[column[e] * block_k : (column[e] + 1) * block_k] for e in entries]
                keys = torch.cat([key_ids[:0], *blocks])
                bias = None
                if entry_bias is not None:
                    of_block = entry_bias[pattern][list(entries)]
                    bias = of_block.repeat_interleave(torch.tensor([len(x) for x in blocks]).long())
                hidden = None
                if causal:
                    hidden = (keys - starts_k[b])[None, :] > (rows - starts_q[b])[:, None] + shift
                head = h // group
                result = attend(
                    q[rows, h], k[keys, head], v[keys, head], softmax_scale, bias, hidden, compute_dtype
                )
                out[rows, h], lse[rows, h] = result
    return out, lse


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
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense causal attention of each sequence and head under the mask of its keys and bands.

    Returns:
        (out [T, Hq, Dv] in compute_dtype, lse [T, Hq] in compute_dtype but at least float32).
    """
    starts_q = [0, q.shape[0]] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    starts_k = [0, k.shape[0]] if cu_seqlens_k is None else cu_seqlens_k.tolist()
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], num_heads, v.shape[2], dtype=compute_dtype)
    lse_dtype = torch.promote_types(compute_dtype, torch.float32)
    lse = torch.full((q.shape[0], num_heads), -torch.inf, dtype=lse_dtype)
    for b in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        len_q, len_k = rows.stop - rows.start, keys.stop - keys.start
        for h in range(num_heads):
            of = b if vertical.shape[0] > 1 else 0, h if vertical.shape[1] > 1 else 0
            hidden = ~vertical_slash_mask(len_q, len_k, vertical[of], slash[of])
            out[rows, h], lse[rows, h] = attend(
                q[rows, h],
                k[keys, h // group],
                v[keys, h // group],
                softmax_scale,
                None,
                hidden,
                compute_dtype,
            )
    return out, lse


def vertical_slash_mask(len_q: int, len_k: int, vertical: Tensor, slash: Tensor) -> Tensor:
    """bool [len_q, len_k]: the keys that each query of one head sees, given its positions and distances (1-D)."""
    query, key = torch.arange(len_q)[:, None], torch.arange(len_k)[None, :]
    position = query + len_k - len_q
    first = query // 64 * 64 + len_k - len_q  # of the query's block
    seen = torch.isin(key, vertical).expand(len_q, len_k).clone()
    for s in slash.tolist():
        if s >= 0:
            seen |= (key >= first - s) & (key < first - s + 64)
    return seen & (key <= position)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    bias: Tensor | None,
    hidden: Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention of rows q [n, D] over keys k [L, D], v [L, Dv]; a row that sees no key gives 0 and -inf.

    Products are rounded to compute_dtype, the softmax is at least float32.
    """
    work = torch.promote_types(compute_dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = (q.to(work) @ k.to(work).T).to(compute_dtype).to(work) * scale
    if bias is not None:
        scores = scores + bias.to(work)
    if hidden is not None:
        scores = torch.where(hidden, -torch.inf, scores)
    seen = scores != -torch.inf
    some = seen.any(-1)
    largest = torch.where(some, scores.detach().amax(-1), 0.0) if k.shape[0] else scores.new_zeros(len(q))
    # A key that is hidden takes no part in the gradient either: exp(-inf - largest) would be 0 * inf there.
    weight = torch.where(seen, torch.exp(torch.where(seen, scores, largest[:, None]) - largest[:, None]), 0.0)
    total = torch.where(some, weight.sum(-1), 1.0)
    share = (weight / total[:, None]).to(compute_dtype).to(work)
    if (
        hidden is not None and not torch.isfinite(v).all()
    ):  # 0 * NaN must not enter rows that do not see the key
        out = torch.where(seen[:, :, None], share[:, :, None] * v.to(work)[None], 0.0).sum(1)
    else:
        out = share @ v.to(work)
    lse = torch.where(some, largest + torch.log(total), -torch.inf)
    return out.to(compute_dtype), lse
