"""Reference of attention over quantized pages: dequantize, then the paged reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvk.formats.quant import QuantFormat
from kvk.reference.hadamard import hadamard
from kvk.reference.paged import paged_decode, paged_prefill
from kvk.reference.quant import read_records, restored_rows

TAG_SHIFT = 28


def dense_pages(
    k_pool: Tensor,
    v_pool: Tensor,
    fmt: QuantFormat,
    k_pages: Tensor | None,
    v_pages: Tensor | None,
    k_permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(k [N + M, P, Hkv, D], v [N + M, P, Hkv, Dv]) in float64: the records' pages, then the dense ones."""
    ids = torch.arange(k_pool.shape[0])

    def plain(pool: Tensor, which: str, rotated: int, permutation: Tensor | None) -> Tensor:
        stored = read_records(pool, ids, fmt, which).double().transpose(1, 2)
        return restored_rows(stored, rotated, permutation, lambda x: hadamard(x, transpose=True)).transpose(
            1, 2
        )

    k, v = plain(k_pool, "k", fmt.k_rotate, k_permutation), plain(v_pool, "v", fmt.v_rotate, None)
    if k_pages is None or v_pages is None:
        return k, v
    return torch.cat([k, k_pages.double()]), torch.cat([v, v_pages.double()])


def plain_indices(page_indices: Tensor, num_records: int) -> Tensor:
    """page | tag << 28 -> the page's number among the records' pages and the dense ones. int64."""
    page, tag = page_indices.long() & ((1 << TAG_SHIFT) - 1), page_indices.long() >> TAG_SHIFT
    return page + torch.where(tag == 1, num_records, 0)


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
    k_permutation: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """See kvk.quant_decode; options and results as in the reference of paged_decode."""
    k, v = dense_pages(k_pool, v_pool, fmt, k_pages, v_pages, k_permutation)
    pages = plain_indices(page_indices, k_pool.shape[0])
    return paged_decode(q, k, v, pages, kv_lens, compute_dtype=compute_dtype, **options)


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
    k_permutation: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """See kvk.quant_prefill; options and results as in the reference of paged_prefill."""
    k, v = dense_pages(k_pool, v_pool, fmt, k_pages, v_pages, k_permutation)
    pages = plain_indices(page_indices, k_pool.shape[0])
    return paged_prefill(q, qo_indptr, k, v, pages, kv_lens, compute_dtype=compute_dtype, **options)
