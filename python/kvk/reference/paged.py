"""Reference of the paged-attention family: attention over keys and values that lie in pages.

The order of the score, the masks and the treatment of NaN are written down in docs/conventions.md, the forms
of the page table in docs/page-tables.md. This file is both of them as code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_request(
    page_indices: Tensor,
    kv_lens: Tensor,
    request: int,
    kv_head: int,
    *,
    page_size: int,
    num_kv_heads: int,
    page_indptr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the keys of one (request, kv head) lie: (page [L], offset in the page [L]), int64, in order.

    Reads only the table entries that the length needs, so entries past them may hold anything.

    Args:
        page_indices: int32; [B, max_pages], [B, Hkv, max_pages], or one dimension when page_indptr is given.
        kv_lens: int32 [B] or [B, Hkv].
        page_indptr: int32 [B + 1] or [B * Hkv + 1]; entry r and r + 1 bound the list r in page_indices, where
            r is the request or request * Hkv + kv_head.
    """
    length = int(kv_lens[request] if kv_lens.dim() == 1 else kv_lens[request, kv_head])
    if page_indptr is not None:
        per_request = page_indptr.numel() == kv_lens.shape[0] + 1
        row = request if per_request else request * num_kv_heads + kv_head
        pages = page_indices[int(page_indptr[row]) : int(page_indptr[row + 1])]
    elif page_indices.dim() == 3:
        pages = page_indices[request, kv_head]
    else:
        pages = page_indices[request]
    position = torch.arange(length)
    return pages[position // page_size].long(), position % page_size


def unpack_mask_bits(mask_bits: Tensor, width: int) -> Tensor:
    """int32 [T, words] -> bool [T, width]: bit j of a row is bit j % 32 of its word j // 32."""
    bit = torch.arange(width)
    return (mask_bits[:, bit // 32] >> (bit % 32)) & 1 == 1


def add_positions(k: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of keys [L, D] at positions 0 to L - 1, half style.

    Row p of rope [>= L, R] holds the cosines, then the sines, of R / 2 angles; channels j, j + R / 2 turn by angle j.
    """
    half = rope.shape[1] // 2
    cosine, sine = rope[: len(k)].to(k.dtype).split(half, 1)
    a, b, rest = k[:, :half], k[:, half : 2 * half], k[:, 2 * half :]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], 1)


def _visible(
    num_queries: int,
    num_keys: int,
    causal: bool,
    window_left: int,
    mask_bits: Tensor | None,
    mask_width: int,
) -> tuple[Tensor, Tensor]:
    """Which key each query may see, bool [n, L], and the distance |query_pos - key_pos|, [n, L].

    Causal is aligned bottom right: query i of n stands at position L - n + i.
    """
    query_pos = (num_keys - num_queries + torch.arange(num_queries))[:, None]
    key_pos = torch.arange(num_keys)[None, :]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal:
        visible &= key_pos <= query_pos
    if window_left >= 0:
        visible &= query_pos - key_pos <= window_left
    if mask_bits is not None:
        width = num_queries if mask_width < 0 else mask_width
        covered = min(width, num_keys)  # bits that stand for keys before the first one mean nothing
        visible[:, num_keys - covered :] &= unpack_mask_bits(mask_bits, width)[:, width - covered :]
    return visible, (query_pos - key_pos).abs()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    distance: Tensor,
    *,
    softmax_scale: float,
    logits_soft_cap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_bias: Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention of the query heads of one kv head over the keys of one request.

    q [n, G, D], k [L, D], v [L, Dv], visible and distance [n, L], alibi_slopes and sinks [G], key_bias [L]
    -> out [n, G, Dv] and lse [n, G].
    """
    # Matrix products run in at least float32: that is what the hardware accumulates in, and on a CPU torch's
    # own 16-bit products are very slow.
    work_dtype = torch.promote_types(compute_dtype, torch.float32)
    q, k, v = (x.to(compute_dtype).to(work_dtype) for x in (q, k, v))

    score = softmax_scale * (q @ k.T)  # [n, G, L]
    if logits_soft_cap > 0:
        score = logits_soft_cap * torch.tanh(score / logits_soft_cap)
    if alibi_slopes is not None:
        score = score - alibi_slopes.to(work_dtype)[:, None] * distance[:, None, :].to(work_dtype)
    if key_bias is not None:
        score = score + key_bias.to(work_dtype)
    score = torch.where(visible[:, None, :], score, -torch.inf)

    seen = score != -torch.inf
    empty = ~seen.any(-1, keepdim=True)
    logits = score
    if sinks is not None:  # one more key, with a logit of its own and no value
        sink = sinks.to(work_dtype)[None, :, None].expand(score.shape[0], -1, 1)
        logits = torch.cat([score, sink], dim=-1)
    p = torch.softmax(logits, dim=-1)[..., : score.shape[-1]]
    p = torch.where(empty, 0.0, p).to(compute_dtype).to(work_dtype)
    lse = torch.where(empty, -torch.inf, torch.logsumexp(logits, dim=-1, keepdim=True))
    lse = torch.where(lse == torch.inf, torch.nan, lse)[..., 0]

    # A key that a row does not see must not reach it through 0 * NaN, so values that are not finite are added
    # apart, to the rows that see them.
    finite = torch.isfinite(v).all(-1)
    out = p @ torch.where(finite[:, None], v, 0.0)
    for key in torch.nonzero(~finite).flatten().tolist():
        out = out + torch.where(seen[..., key, None], p[..., key, None] * v[key], 0.0)
    return out.to(compute_dtype), lse


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
    k_rope: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention of packed query tokens over the paged keys of their requests; see kvk.paged_prefill.

    Args:
        q: [T, Hq, D]; rows qo_indptr[b] to qo_indptr[b + 1] belong to request b, rows from qo_indptr[B] on to
            none.
        qo_indptr: int32 [B + 1].
        k_pages, v_pages: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        page_indices, kv_lens, page_indptr: see gather_request.
        alibi_slopes, sinks: float32 [Hq]. key_bias: float32 [N, P] or [N, P, Hkv].
        mask_bits: int32 [T, words], over the last mask_width keys of a request (-1: over as many as it has
            queries).
        k_rope: of the quantized ops; see add_positions.
        compute_dtype: dtype of the result. float64 or float32: everything is computed in it. Below that, the
            inputs, the softmax probabilities and the result are rounded to it, and the scores and sums are
            float32.

    Returns:
        (out [T, Hq, Dv] in compute_dtype, lse [T, Hq] in compute_dtype but at least float32).
    """
    num_tokens, num_q_heads, head_dim = q.shape
    page_size, num_kv_heads, head_dim_v = v_pages.shape[1:]
    group = num_q_heads // num_kv_heads
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale

    out = torch.zeros(num_tokens, num_q_heads, head_dim_v, dtype=compute_dtype)
    lse = torch.full(
        (num_tokens, num_q_heads), -torch.inf, dtype=torch.promote_types(compute_dtype, torch.float32)
    )
    for request in range(kv_lens.shape[0]):
        rows = slice(int(qo_indptr[request]), int(qo_indptr[request + 1]))
        for kv_head in range(num_kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            page, offset = gather_request(
                page_indices,
                kv_lens,
                request,
                kv_head,
                page_size=page_size,
                num_kv_heads=num_kv_heads,
                page_indptr=page_indptr,
            )
            visible, distance = _visible(
                rows.stop - rows.start,
                page.numel(),
                causal,
                window_left,
                None if mask_bits is None else mask_bits[rows],
                mask_width,
            )
            keys = k_pages[page, offset, kv_head]
            bias = None
            if key_bias is not None:
                bias = key_bias[page, offset] if key_bias.dim() == 2 else key_bias[page, offset, kv_head]
            out[rows, heads], lse[rows, heads] = _attend(
                q[rows, heads],
                keys if k_rope is None else add_positions(keys, k_rope),
                v_pages[page, offset, kv_head],
                visible,
                distance,
                softmax_scale=scale,
                logits_soft_cap=logits_soft_cap,
                alibi_slopes=None if alibi_slopes is None else alibi_slopes[heads],
                sinks=None if sinks is None else sinks[heads],
                key_bias=bias,
                compute_dtype=compute_dtype,
            )
    return out, lse


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
    k_rope: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token a request, q [B, Hq, D]: the prefill of one token, standing last."""
    return paged_prefill(
        q,
        torch.arange(q.shape[0] + 1, dtype=torch.int32),
        k_pages,
        v_pages,
        page_indices,
        kv_lens,
        page_indptr=page_indptr,
        softmax_scale=softmax_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        key_bias=key_bias,
        k_rope=k_rope,
        compute_dtype=compute_dtype,
    )


def append_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    """Store the keys and values of T tokens in their slots, in place.

    Args:
        k, v: [T, Hkv, D] and [T, Hkv, Dv].
        k_pages, v_pages: [N, P, Hkv, D] and [N, P, Hkv, Dv]; written.
        slot_mapping: int64 [T]; page * P + offset. A token with a negative slot is left out.

    Raises:
        ValueError: a slot lies past the pool; nothing has been written.
    """
    num_pages, page_size = k_pages.shape[:2]
    if bool((slot_mapping >= num_pages * page_size).any()):
        raise ValueError(f"slot_mapping: a slot lies past the {num_pages * page_size} slots of the pool")
    keep = slot_mapping >= 0
    page, offset = slot_mapping[keep] // page_size, slot_mapping[keep] % page_size
    k_pages[page, offset] = k[keep]
    v_pages[page, offset] = v[keep]
