"""Reference of attention over bitmap-sparse pages: decompress, then the paged reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvk.formats.sparse import BitmapFormat
from kvk.reference.hadamard import hadamard
from kvk.reference.paged import paged_decode, paged_prefill
from kvk.reference.quant_attention import plain_indices
from kvk.reference.sparse import read_records


def dense_pages(
    k_pool: Tensor, v_pool: Tensor, fmt: BitmapFormat, k_pages: Tensor | None, v_pages: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(k [N + M, P, Hkv, D], v [N + M, P, Hkv, Dv]) in float64: the records' pages, then the dense ones."""
    ids = torch.arange(k_pool.shape[0])
    k, v = read_records(k_pool, ids, fmt, "k").double(), read_records(v_pool, ids, fmt, "v").double()
    k = hadamard(k, transpose=True) if fmt.k_rotate else k
    v = hadamard(v, transpose=True) if fmt.v_rotate else v
    if k_pages is None or v_pages is None:
        return k, v
    return torch.cat([k, k_pages.double()]), torch.cat([v, v_pages.double()])


def sparse_decode(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_indices: Tensor,
    kv_lens: Tensor,
    fmt: BitmapFormat,
    *,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """See kvk.sparse_decode; options and results as in the reference of paged_decode."""
    k, v = dense_pages(k_pool, v_pool, fmt, k_pages, v_pages)
    pages = plain_indices(page_indices, k_pool.shape[0])
    return paged_decode(q, k, v, pages, kv_lens, compute_dtype=compute_dtype, **options)


def sparse_prefill(
    q: Tensor,
    qo_indptr: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page_indices: Tensor,
    kv_lens: Tensor,
    fmt: BitmapFormat,
    *,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """See kvk.sparse_prefill; options and results as in the reference of paged_prefill."""
    k, v = dense_pages(k_pool, v_pool, fmt, k_pages, v_pages)
    pages = plain_indices(page_indices, k_pool.shape[0])
    return paged_prefill(q, qo_indptr, k, v, pages, kv_lens, compute_dtype=compute_dtype, **options)
