"""Builders of block patterns for :func:`kvk.block_sparse_attention`.

The block masks here are bool ``[..., Mb, Nb]``: True where query block m visits key block n.
:func:`block_mask_to_csr` turns them into the CSR that the op takes; masks combine with ``|`` and ``&`` before that,
and heads of different kinds are stacked along the head dimension. Which of these masks is whose is in
docs/block-sparse.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_mask_to_csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    """CSR of a block mask.

    Args:
        mask: bool [B or 1, Hq or 1, Mb, Nb].

    Returns:
        row_ptr int32 [B or 1, Hq or 1, Mb + 1]; col_idx int32 [B or 1, Hq or 1, NNZ], ascending within a row, NNZ
        that of the fullest list; what is behind a shorter list's end is -1 and never read.

    Raises:
        ValueError: mask is not bool or has not 4 dimensions.
    """
    if mask.dtype != torch.bool or mask.ndim != 4:
        raise ValueError(
            f"kvk: block_mask_to_csr: mask must be bool [B, Hq, Mb, Nb], got {mask.dtype} {list(mask.shape)}"
        )
    batches, heads, rows, columns = mask.shape
    counts = mask.sum(-1, dtype=torch.int32)
    row_ptr = torch.zeros(batches, heads, rows + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(counts, -1, dtype=torch.int32, out=row_ptr[..., 1:])
    per_list = row_ptr[..., -1]
    nnz = int(per_list.max()) if per_list.numel() else 0
    col_idx = torch.full((batches, heads, nnz), -1, dtype=torch.int32, device=mask.device)
    used = torch.arange(nnz, device=mask.device) < per_list[..., None]
    # Both sides go through lists, rows and columns in the same order.
    ids = torch.arange(columns, dtype=torch.int32, device=mask.device).expand(mask.shape)
    col_idx[used] = ids[mask]
    return row_ptr, col_idx


def _grid(rows: int, columns: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Query block and key block numbers; the last query block stands at the last key block (bottom right)."""
    for name, value in (("rows", rows), ("columns", columns)):
        if value < 0:
            raise ValueError(f"kvk: {name} must not be negative, got {value}")
    row = torch.arange(rows, device=device)[:, None] + (columns - rows)
    return row, torch.arange(columns, device=device)[None, :]


def streaming_mask(
    rows: int, columns: int, sink: int, local: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Sink and local blocks (StreamingLLM, Xiao et al. 2023; the streaming heads of DuoAttention and LServe).

    Args:
        rows, columns: query and key blocks; where there are fewer query blocks, they are the last ones.
        sink: first key blocks, which every query block sees.
        local: key blocks up to and including the query block's own.

    Returns:
        bool [rows, columns], causal by blocks.
    """
    row, column = _grid(rows, columns, device)
    return (column <= row) & ((column < sink) | (row - column < local))


def strided_mask(
    rows: int,
    columns: int,
    num_heads: int,
    local: int,
    stride: int,
    *,
    offset: int = 0,
    num_kv_heads: int | None = None,
    num_dense_heads: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Local blocks and every stride-th key block, the stride shifted from head to head (S2-Attention, Lin et al.
    2024).

    Query block a sees key block b of kv head h if ``a - b < local`` or ``(b + h * step + offset) % stride == 0`` with
    ``step = max(1, stride // num_kv_heads)``. The stride counts from the first key, not from the query, so that a
    key that later queries skip is skipped for good.

    Args:
        rows, columns: query and key blocks; where there are fewer query blocks, they are the last ones.
        num_heads: query heads; all of one kv head share a pattern.
        num_kv_heads: default num_heads.
        num_dense_heads: the last kv heads see every block (causal).

    Returns:
        bool [num_heads, rows, columns], causal by blocks.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads != 0:
        raise ValueError(f"kvk: num_heads must be a multiple of num_kv_heads={kv_heads}, got {num_heads}")
    if stride < 1:
        raise ValueError(f"kvk: stride must be at least 1, got {stride}")
    row, column = _grid(rows, columns, device)
    head = torch.arange(kv_heads, device=device)[:, None, None]
    seen = (row - column < local) | ((column + head * max(1, stride // kv_heads) + offset) % stride == 0)
    seen = (column <= row) & (seen | (head >= kv_heads - num_dense_heads))
    return seen.repeat_interleave(num_heads // kv_heads, 0)


def power_mask(
    rows: int, columns: int, sink: int = 1, local: int = 1, *, device: torch.device | str | None = None
) -> Tensor:
    """Sink, local, and the blocks at distances that are powers of two (after PowerAttention, Chen et al. 2025).

    Every block reaches every earlier one within log2(columns) layers.

    Returns:
        bool [rows, columns], causal by blocks.
    """
    row, column = _grid(rows, columns, device)
    distance = row - column
    power = (distance > 0) & (distance & (distance - 1) == 0)
    return (column <= row) & ((column < sink) | (distance < max(1, local)) | power)


def block_causal_mask(
    rows: int, columns: int, group: int = 1, *, device: torch.device | str | None = None
) -> Tensor:
    """Whole blocks of the past and the own block in both directions: decoding of block diffusion models (Arriola et
    al. 2025).

    Args:
        group: pattern blocks that make one diffusion block; of 1, a diffusion block is one pattern block.

    Returns:
        bool [rows, columns]; used with ``causal=False``.
    """
    if group < 1:
        raise ValueError(f"kvk: group must be at least 1, got {group}")
    row, column = _grid(rows, columns, device)
    return torch.div(column, group, rounding_mode="floor") <= torch.div(row, group, rounding_mode="floor")


def block_diffusion_mask(blocks: int, *, device: torch.device | str | None = None) -> Tensor:
    """The training mask of block diffusion over ``[noised; clean]``, each of `blocks` blocks (BD3-LM, Arriola et al.
    2025).

    A noised block sees itself and the clean blocks before it; a clean block sees the clean ones up to itself.

    Returns:
        bool [2 * blocks, 2 * blocks]; used with ``causal=False`` and ``block_q = block_k``, the diffusion block.
    """
    row, column = _grid(2 * blocks, 2 * blocks, device)
    noised_row, noised_column = row < blocks, column < blocks
    block_row, block_column = row % max(1, blocks), column % max(1, blocks)
    same = (noised_row == noised_column) & (block_row == block_column)
    context = noised_row & ~noised_column & (block_row > block_column)
    clean = ~noised_row & ~noised_column & (block_row >= block_column)
    return same | context | clean


def pooled_block_mask(q: Tensor, k: Tensor, block_q: int, block_k: int, top: int) -> Tensor:
    """The key blocks whose mean key has the largest products with the mean query (MInference's block-sparse heads,
    Jiang et al. 2024).

    Args:
        q: [T, Hq, D]; k: [S, Hkv, D]; one sequence, query i at position S - T + i.
        top: key blocks of a query block, the causal ones if there are no more.

    Returns:
        bool [Hq, Mb, Nb]: of the key blocks that a query block's last query sees, the `top` best.

    Raises:
        ValueError: T exceeds S, or top is below 1.
    """
    tokens, keys = _one_sequence(q, k)
    if top < 1:
        raise ValueError(f"kvk: top must be at least 1, got {top}")
    means = [_block_means(x, block) for x, block in ((q, block_q), (k, block_k))]
    pooled_k = means[1].repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("mhd,nhd->hmn", means[0], pooled_k)
    rows, columns = scores.shape[1:]
    last = torch.arange(1, rows + 1, device=q.device).mul(block_q).clamp(max=tokens) - 1 + (keys - tokens)
    first = torch.arange(columns, device=q.device) * block_k
    seen = first <= last[:, None]
    best = scores.masked_fill(~seen, -torch.inf).topk(min(top, columns), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & seen


def _one_sequence(q: Tensor, k: Tensor) -> tuple[int, int]:
    if q.shape[0] > k.shape[0]:
        raise ValueError(f"kvk: q has {q.shape[0]} tokens, more than the {k.shape[0]} keys they see")
    return q.shape[0], k.shape[0]


def _block_means(x: Tensor, block: int) -> Tensor:
    """[ceil(T / block), H, D] in float32; the last block may be short."""
    tokens = x.shape[0]
    ids = torch.arange(tokens, device=x.device) // block
    sums = x.new_zeros(-(-tokens // block), *x.shape[1:], dtype=torch.float32).index_add_(0, ids, x.float())
    return sums / torch.bincount(ids, minlength=sums.shape[0])[:, None, None].clamp(min=1)


def vertical_slash_index(
    q: Tensor,
    k: Tensor,
    vertical: int,
    slash: int,
    *,
    softmax_scale: float | None = None,
    last: int = 64,
    first_keys: int = 30,
    near: int = 100,
) -> tuple[Tensor, Tensor]:
    """The keys and the distances that the last queries attend to most, for :func:`kvk.vertical_slash_attention`
    (MInference's estimate, Jiang et al. 2024).

    Args:
        q: [T, Hq, D]; k: [S, Hkv, D]; one sequence, query i at position S - T + i.
        vertical, slash: keys and distances of each head; S of them at most.
        softmax_scale: default D ** -0.5.
        last: queries at the end that the estimate is made from.
        first_keys, near: the first keys and the smallest distances, which come before all others.

    Returns:
        vertical int32 [1, Hq, min(vertical, S)], ascending; slash int32 [1, Hq, min(slash, S)], ascending.

    Raises:
        ValueError: T exceeds S, or vertical or slash is below 1.
    """
    for name, count in (("vertical", vertical), ("slash", slash)):
        if count < 1:
            raise ValueError(f"kvk: {name} must be at least 1, got {count}")
    tokens, keys = _one_sequence(q, k)
    q = q[max(0, tokens - last) :].float() * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    position = torch.arange(keys - q.shape[0], keys, device=q.device)[:, None]
    key = torch.arange(keys, device=q.device)
    scores = torch.einsum("thd,shd->hts", q, k).masked_fill_(key > position, -torch.inf)
    weights = scores.softmax(-1)
    columns = weights.sum(1)
    columns[:, :first_keys] = torch.inf
    at = position - key  # of query t and distance s the key; before the first one there is none
    diagonals = weights.gather(-1, at.clamp(min=0).expand_as(weights)).masked_fill_(at < 0, 0.0).sum(1)
    diagonals[:, :near] = torch.inf
    chosen = [
        x.topk(min(count, keys), dim=-1).indices.sort(-1).values.to(torch.int32)[None]
        for x, count in ((columns, vertical), (diagonals, slash))
    ]
    return chosen[0], chosen[1]
