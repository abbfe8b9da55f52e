"""What is measured of the bitmap-sparse pages: inputs, references, least bytes and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from bench.cases import DTYPES
from bench.quant_cases import QuantAttentionCase, QuantAttentionData, QuantizePagesCase, QuantizePagesData


def bitmap_format(dtype: str, page_size: int, head_dim: int, keep: int) -> Any:
    """K and V alike."""
    import kvk

    return kvk.BitmapFormat(page_size, head_dim, keep, keep, DTYPES[dtype])


@dataclass(frozen=True)
class SparseAttentionCase(QuantAttentionCase):
    """Attention over records of bitmaps alone; `bits` is the number of elements a row keeps."""

    op: str = "sparse_decode"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"keep{self.bits}-{self.dense.name}"

    @property
    def fmt(self) -> Any:
        """What the records hold."""
        return bitmap_format(self.dense.dtype, self.dense.page_size, self.dense.head_dim, self.bits)

    def make(self, seed: int) -> SparseAttentionData:
        """Dense pages, compressed."""
        import kvk

        return SparseAttentionData(*self.packed(seed, kvk.compress_pages))


@dataclass
class SparseAttentionData(QuantAttentionData):
    """Records, and the dense pages they were made of."""

    @cached_property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages that the records stand for, in the order of the table."""
        import kvk

        return kvk.decompress_pages(self.k_pool, self.v_pool, self.dense.page_indices.flatten(), self.fmt)


def decode_sparse(data: SparseAttentionData) -> Any:
    """sparse_decode."""
    import kvk

    dense = data.dense
    return kvk.sparse_decode(dense.q, data.k_pool, data.v_pool, dense.page_indices, dense.kv_lens, data.fmt)


def prefill_sparse(data: SparseAttentionData) -> Any:
    """sparse_prefill."""
    import kvk

    dense, pools = data.dense, (data.k_pool, data.v_pool)
    return kvk.sparse_prefill(dense.q, dense.qo_indptr, *pools, dense.page_indices, dense.kv_lens, data.fmt)


@dataclass(frozen=True)
class CompressPagesCase(QuantizePagesCase):
    """compress_pages of whole pages, in random order; `bits` is the number of elements a row keeps."""

    op: ClassVar[str] = "compress_pages"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"keep{self.bits}-{self.dtype}-{self.kv_heads}h-{self.pages}p{self.page_size}"

    @property
    def fmt(self) -> Any:
        """What the records hold."""
        return bitmap_format(self.dtype, self.page_size, self.head_dim, self.bits)

    def make(self, seed: int) -> CompressPagesData:
        """Random pages."""
        return CompressPagesData(*self.drawn(seed))


@dataclass
class CompressPagesData(QuantizePagesData):
    """The tensors of one draw."""

    def records(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """What the reference makes of some pages."""
        from kvk import reference

        want = [torch.zeros_like(pool) for pool in (self.k_pool, self.v_pool)]
        reference.compress_pages(self.k_pages, self.v_pages, ids, *want, ids, self.fmt)
        return want


def compress_pages(data: CompressPagesData) -> tuple[torch.Tensor, torch.Tensor]:
    """The op."""
    import kvk

    kvk.compress_pages(data.k_pages, data.v_pages, data.ids, data.k_pool, data.v_pool, data.ids, data.fmt)
    return data.k_pool, data.v_pool
