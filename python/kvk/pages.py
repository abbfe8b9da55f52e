"""Page pools: the tensors under a paged cache, one store per layer.

A store is everything a cache must know of how a layer's pages are kept: how to grow, copy a page, append tokens and
attend. `DensePages` keeps K and V as they come. `PackedPages` keeps full pages as records of a format and the others
dense; what is particular to the format stands in one `PageOps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvk.formats import BitmapFormat, QuantFormat
from kvk.ops.paged import append_kv, paged_decode, paged_prefill
from kvk.ops.quant import dequantize_pages, quantize_pages
from kvk.ops.quant_attention import quant_decode, quant_prefill
from kvk.ops.sparse import compress_pages, decompress_pages
from kvk.ops.sparse_attention import sparse_decode, sparse_prefill

Pair = tuple[torch.Tensor, torch.Tensor]


class DensePages:
    """K and V of one layer in pages of their own dtype.

    `k_pages` [num_pages, page_size, num_kv_heads, head_dim] and `v_pages` [..., head_dim_v], contiguous, so a token's
    heads lie in one row (NHD). The memory of a page is undefined until it is written.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        page_size: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.k_pages = torch.empty(0, page_size, num_kv_heads, self.head_dim, dtype=dtype, device=device)
        self.v_pages = torch.empty(0, page_size, num_kv_heads, self.head_dim_v, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """dtype that q, k and v must have."""
        return self.k_pages.dtype

    @property
    def num_pages(self) -> int:
        """Pages there is memory for."""
        return self.k_pages.shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of one dense page of this layer, K and V together."""
        _, page_size, heads, _ = self.k_pages.shape
        return page_size * heads * (self.head_dim + self.head_dim_v) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the pools."""
        return self.k_pages.nbytes + self.v_pages.nbytes

    def resize(self, num_pages: int) -> None:
        """Grow to `num_pages` pages, keeping what is stored. Old and new memory of one tensor exist side by side."""
        self.k_pages, self.v_pages = _grown(self.k_pages, num_pages), _grown(self.v_pages, num_pages)

    def keep(self, pages: Sequence[int], num_pages: int) -> None:
        """New pools of `num_pages` pages that begin with these old ones."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.k_pages.device)
        self.k_pages = _grown(self.k_pages[index], num_pages)
        self.v_pages = _grown(self.v_pages[index], num_pages)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (source, destination) each; no destination is also a source."""
        source, target = torch.tensor(copies, dtype=torch.int64, device=self.k_pages.device).unbind(1)
        for pool in (self.k_pages, self.v_pages):
            pool[target] = pool[source]

    def append(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write k [T, Hkv, D] and v [T, Hkv, Dv] to their slots, see `kvk.append_kv`."""
        append_kv(k, v, self.k_pages, self.v_pages, slot_mapping)

    def decode(
        self, q: torch.Tensor, page_indices: torch.Tensor, kv_lens: torch.Tensor, **options: Any
    ) -> Pair:
        """`kvk.paged_decode` of q [B, Hq, D] over these pages."""
        return paged_decode(q, self.k_pages, self.v_pages, page_indices, kv_lens, **options)

    def prefill(
        self,
        q: torch.Tensor,
        qo_indptr: torch.Tensor,
        page_indices: torch.Tensor,
        kv_lens: torch.Tensor,
        **options: Any,
    ) -> Pair:
        """`kvk.paged_prefill` of q [T, Hq, D] over these pages."""
        return paged_prefill(q, qo_indptr, self.k_pages, self.v_pages, page_indices, kv_lens, **options)


def _grown(pool: torch.Tensor, num_pages: int) -> torch.Tensor:
    new = pool.new_empty(num_pages, *pool.shape[1:])
    new[: pool.shape[0]].copy_(pool)
    return new


@dataclass(frozen=True)
class PageOps:
    """Who packs, unpacks and attends for a kind of format; signatures as those of the quantized pages' ops."""

    pack: Callable[..., None]  # (k_pages, v_pages, src, k_pool, v_pool, dst, fmt)
    unpack: Callable[..., Pair]  # (k_pool, v_pool, ids, fmt, dtype) -> k, v
    decode: Callable[..., Pair]  # (q, k_pool, v_pool, page_indices, kv_lens, fmt, k_pages=, v_pages=, ...)
    prefill: Callable[
        ..., Pair
    ]  # (q, qo_indptr, k_pool, v_pool, page_indices, kv_lens, fmt, k_pages=, v_pages=, ...)


def _decompress_as(
    k_pool: torch.Tensor, v_pool: torch.Tensor, ids: torch.Tensor, fmt: BitmapFormat, dtype: torch.dtype
) -> Pair:
    k, v = decompress_pages(k_pool, v_pool, ids, fmt)
    return k.to(dtype), v.to(dtype)


# A format has page_size, head_dim, head_dim_v, k_record_bytes, v_record_bytes and new_pool.
PAGE_OPS: dict[type, PageOps] = {
    QuantFormat: PageOps(quantize_pages, dequantize_pages, quant_decode, quant_prefill),
    BitmapFormat: PageOps(compress_pages, _decompress_as, sparse_decode, sparse_prefill),
}


class PackedPages:
    """K and V of one layer: full pages as records of a format, young ones dense.

    `k_pool`, `v_pool` uint8 [num_records, num_kv_heads, record bytes]; `dense` the pages that are not packed. Page
    references are those of `kvk.quant_decode`: a record, or 1 << 28 | a dense page. `k_permutation` and `k_rope` are
    options of the quantized ops; with k_rope the keys that come are those before their rotary embedding.
    """

    def __init__(
        self,
        num_kv_heads: int,
        fmt: QuantFormat | BitmapFormat,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        k_permutation: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
    ) -> None:
        self.fmt, self._ops = fmt, PAGE_OPS[type(fmt)]
        self._pack_options = {} if k_permutation is None else {"k_permutation": k_permutation}
        self._read_options = (
            self._pack_options if k_rope is None else {**self._pack_options, "k_rope": k_rope}
        )
        self.dense = DensePages(
            num_kv_heads,
            fmt.head_dim,
            page_size=fmt.page_size,
            head_dim_v=fmt.head_dim_v,
            dtype=dtype,
            device=device,
        )
        self.k_pool, self.v_pool = fmt.new_pool(0, num_kv_heads, device)

    @property
    def dtype(self) -> torch.dtype:
        """dtype that q, k and v must have."""
        return self.dense.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one dense page of this layer, K and V together."""
        return self.dense.page_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one packed page of this layer: the records of all heads, K and V together."""
        return self.dense.num_kv_heads * (self.fmt.k_record_bytes + self.fmt.v_record_bytes)

    @property
    def num_records(self) -> int:
        """Packed pages there is memory for."""
        return self.k_pool.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the pools, dense and packed."""
        return self.dense.nbytes + self.k_pool.nbytes + self.v_pool.nbytes

    def resize(self, num_records: int) -> None:
        """Grow to `num_records` packed pages, keeping what is stored."""
        self.k_pool, self.v_pool = _grown(self.k_pool, num_records), _grown(self.v_pool, num_records)

    def pack(self, slots: torch.Tensor, records: torch.Tensor) -> None:
        """Make records of dense pages; int32 [n] each."""
        self._ops.pack(
            self.dense.k_pages,
            self.dense.v_pages,
            slots,
            self.k_pool,
            self.v_pool,
            records,
            self.fmt,
            **self._pack_options,
        )

    def unpack(self, records: torch.Tensor, slots: torch.Tensor) -> None:
        """Write records back to dense pages; int32 [n] each."""
        k, v = self._ops.unpack(self.k_pool, self.v_pool, records, self.fmt, self.dtype, **self._pack_options)
        self.dense.k_pages[slots.long()] = k
        self.dense.v_pages[slots.long()] = v

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole dense pages, (source, destination) each; no destination is also a source."""
        self.dense.copy_pages(copies)

    def append(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write k [T, Hkv, D] and v [T, Hkv, Dv] to slots of the dense pages."""
        self.dense.append(k, v, slot_mapping)

    def decode(
        self, q: torch.Tensor, page_indices: torch.Tensor, kv_lens: torch.Tensor, **options: Any
    ) -> Pair:
        """Attention of q [B, Hq, D] over records and dense pages."""
        return self._ops.decode(
            q,
            self.k_pool,
            self.v_pool,
            page_indices,
            kv_lens,
            self.fmt,
            k_pages=self.dense.k_pages,
            v_pages=self.dense.v_pages,
            **self._read_options,
            **options,
        )

    def prefill(
        self,
        q: torch.Tensor,
        qo_indptr: torch.Tensor,
        page_indices: torch.Tensor,
        kv_lens: torch.Tensor,
        **options: Any,
    ) -> Pair:
        """Attention of q [T, Hq, D] over records and dense pages."""
        return self._ops.prefill(
            q,
            qo_indptr,
            self.k_pool,
            self.v_pool,
            page_indices,
            kv_lens,
            self.fmt,
            k_pages=self.dense.k_pages,
            v_pages=self.dense.v_pages,
            **self._read_options,
            **options,
        )
