"""What is measured of the quantized pages and the Hadamard transform: inputs, references, least bytes and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from bench.cases import (
    DTYPES,
    LSE_TOLERANCE,
    TOLERANCE,
    AttentionCase,
    AttentionData,
    WrongResultError,
    relative_error,
)
from bench.harness import OURS, Prepared


def quant_format(page_size: int, head_dim: int, bits: int) -> Any:
    """8 bits with long groups (a scale for 64 tokens, or a row), fewer with KIVI's groups of 32."""
    import kvk

    groups = (64, head_dim) if bits == 8 else (32, 32)
    return kvk.QuantFormat(page_size, head_dim, bits, bits, *groups)


class Ours:
    """kvk, or another way to the same result, as one call on the data."""

    def __init__(self, call: Callable[[Any], Any], name: str = OURS) -> None:
        self.call, self.name = call, name

    def unavailable(self, case: Any) -> str | None:
        """Never."""
        return None

    def build(self, data: Any) -> Prepared:
        """Nothing is prepared."""
        return Prepared(lambda: self.call(data), lambda result: result)


@dataclass(frozen=True)
class QuantAttentionCase:
    """Attention over records alone. The bytes are the records' (checked against what the tensors hold), q, out and lse:
    no other byte of the cache exists."""

    bits: int
    dense: AttentionCase
    quick: bool = False
    headline: bool = True
    op: str = "quant_decode"
    bandwidth: ClassVar[str] = "read"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.bits}bit-{self.dense.name}"

    @property
    def dtype(self) -> str:
        """dtype of q and of the peer's cache."""
        return self.dense.dtype

    @property
    def fmt(self) -> Any:
        """What the records hold."""
        return quant_format(self.dense.page_size, self.dense.head_dim, self.bits)

    @property
    def pages(self) -> int:
        """Pages of all requests."""
        return self.dense.batch * math.ceil(self.dense.kv_len / self.dense.page_size)

    @property
    def bytes(self) -> int:
        """Records of all listed pages once; q, out, lse and the page table."""
        dense, fmt = self.dense, self.fmt
        records = self.pages * dense.kv_heads * (fmt.k_record_bytes + fmt.v_record_bytes)
        rows = dense.tokens * dense.q_heads * (2 * dense.head_dim * DTYPES[dense.dtype].itemsize + 4)
        return records + rows + 4 * self.pages

    @property
    def flops(self) -> int:
        """As dense."""
        return self.dense.flops

    def make(self, seed: int) -> QuantAttentionData:
        """Dense pages, quantized."""
        import kvk

        return QuantAttentionData(*self.packed(seed, kvk.quantize_pages))

    def packed(self, seed: int, pack: Callable[..., None]) -> tuple[Any, ...]:
        """What the data are made of: case, dense pages, format, pools."""
        data, fmt = self.dense.make(seed), self.fmt
        ids = torch.arange(self.pages, dtype=torch.int32)
        k_pool, v_pool = fmt.new_pool(self.pages, self.dense.kv_heads)
        pack(data.k_pages, data.v_pages, ids, k_pool, v_pool, ids, fmt)
        tensors = (k_pool, v_pool, data.page_indices, data.q)
        out_and_lse = data.q.nbytes + 4 * data.q.shape[0] * data.q.shape[1]
        assert self.bytes == sum(x.nbytes for x in tensors) + out_and_lse
        return self, data, fmt, k_pool, v_pool


@dataclass
class QuantAttentionData:
    """Records, and the dense pages they were made of."""

    case: QuantAttentionCase
    dense: AttentionData
    fmt: Any
    k_pool: torch.Tensor
    v_pool: torch.Tensor

    @cached_property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages that the records stand for, in the order of the table."""
        import kvk

        ids = self.dense.page_indices.flatten()
        return kvk.dequantize_pages(self.k_pool, self.v_pool, ids, self.fmt, torch.float32)

    @cached_property
    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in fp64 over the records' numbers."""
        k, v = self.pages
        dense = self.dense.case
        shape = (dense.batch, -1, dense.kv_heads, dense.head_dim)
        k, v = (x.reshape(shape)[:, : dense.kv_len].transpose(1, 2).contiguous() for x in (k, v))
        return self.over(k, v)

    def over(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in fp64 over these keys and values."""
        fields = dict(self.dense.__dict__)
        fields.pop("reference", None)
        fields.pop("dense_q", None)
        return AttentionData(**{**fields, "k": k, "v": v}).reference

    def check(self, result: tuple[Any, ...]) -> float:
        """The error of (out, lse) against attention over the dequantized numbers; of (out, None) over the dense pages;
        of (out, None, k, v), from a cache of its own, over those."""
        out, lse, *own = result
        want = self.over(*own) if own else self.dense.reference if lse is None else self.reference
        error = relative_error(out, want[0])
        if not error <= TOLERANCE[self.case.dtype]:
            raise WrongResultError(f"out is off by {error:.2e}")
        if lse is not None and not (lse.double() - want[1]).abs().max() <= 10 * LSE_TOLERANCE:
            raise WrongResultError("lse is off")
        return error

    def reset(self) -> None:
        """Nothing: no implementation changes what it is given."""


def decode_records(data: QuantAttentionData) -> Any:
    """quant_decode."""
    import kvk

    dense = data.dense
    return kvk.quant_decode(dense.q, data.k_pool, data.v_pool, dense.page_indices, dense.kv_lens, data.fmt)


def decode_dense(data: QuantAttentionData) -> Any:
    """paged_decode over the dense pages. Its lse is of other numbers: only out is checked."""
    import kvk

    dense = data.dense
    return kvk.paged_decode(dense.q, dense.k_pages, dense.v_pages, dense.page_indices, dense.kv_lens)[0], None


def prefill_records(data: QuantAttentionData) -> Any:
    """quant_prefill."""
    import kvk

    dense = data.dense
    return kvk.quant_prefill(
        dense.q, dense.qo_indptr, data.k_pool, data.v_pool, dense.page_indices, dense.kv_lens, data.fmt
    )


def prefill_dense(data: QuantAttentionData) -> Any:
    """paged_prefill over the dense pages. Its lse is of other numbers: only out is checked."""
    import kvk

    dense = data.dense
    out, _ = kvk.paged_prefill(
        dense.q, dense.qo_indptr, dense.k_pages, dense.v_pages, dense.page_indices, dense.kv_lens
    )
    return out, None


@dataclass(frozen=True)
class QuantizePagesCase:
    """quantize_pages of whole pages, in random order."""

    bits: int
    dtype: str = "bf16"
    pages: int = 512
    page_size: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    quick: bool = False
    headline: bool = True
    op: ClassVar[str] = "quantize_pages"
    bandwidth: ClassVar[str] = "copy"
    flops: ClassVar[int] = 0

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.bits}bit-{self.dtype}-{self.kv_heads}h-{self.pages}p{self.page_size}"

    @property
    def fmt(self) -> Any:
        """What the records hold."""
        return quant_format(self.page_size, self.head_dim, self.bits)

    @property
    def bytes(self) -> int:
        """Dense pages read, records written."""
        fmt = self.fmt
        row = 2 * self.page_size * self.head_dim * DTYPES[self.dtype].itemsize
        return self.pages * self.kv_heads * (row + fmt.k_record_bytes + fmt.v_record_bytes)

    def make(self, seed: int) -> QuantizePagesData:
        """Random pages."""
        return QuantizePagesData(*self.drawn(seed))

    def drawn(self, seed: int) -> tuple[Any, ...]:
        """What the data are made of: case, dense pages, ids, pools, format."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2, self.pages, self.page_size, self.kv_heads, self.head_dim)
        k_pages, v_pages = torch.randn(shape, generator=generator).to(DTYPES[self.dtype])
        ids = torch.randperm(self.pages, generator=generator).int()
        return self, k_pages, v_pages, ids, *self.fmt.new_pool(self.pages, self.kv_heads), self.fmt


@dataclass
class QuantizePagesData:
    """The tensors of one draw."""

    case: QuantizePagesCase
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    ids: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    fmt: Any

    def check(self, result: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Some records, byte for byte."""
        few = self.ids[:4]
        for got, records in zip(result, self.records(few), strict=True):
            if not torch.equal(got[few.long()], records[few.long()]):
                raise WrongResultError("records differ from the reference's")
        return 0.0

    def reset(self) -> None:
        """Other bytes, so that nobody is judged by the work of the one before."""
        self.k_pool.fill_(255)
        self.v_pool.fill_(255)

    def records(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """What the reference makes of some pages."""
        from kvk import reference

        want = [torch.zeros_like(pool) for pool in (self.k_pool, self.v_pool)]
        reference.quantize_pages(self.k_pages, self.v_pages, ids, *want, ids, self.fmt)
        return want


def quantize_pages(data: QuantizePagesData) -> tuple[torch.Tensor, torch.Tensor]:
    """The op."""
    import kvk

    kvk.quantize_pages(data.k_pages, data.v_pages, data.ids, data.k_pool, data.v_pool, data.ids, data.fmt)
    return data.k_pool, data.v_pool


@dataclass(frozen=True)
class HadamardCase:
    """hadamard of `rows` rows of n elements, out of place."""

    dtype: str
    n: int = 128
    rows: int = 1_000_000
    quick: bool = False
    headline: bool = False
    op: ClassVar[str] = "hadamard"
    bandwidth: ClassVar[str] = "copy"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.dtype}-{self.rows}x{self.n}"

    @property
    def bytes(self) -> int:
        """Every element read and written."""
        return 2 * self.rows * self.n * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """An addition for each element and factor of 2; m of them for H_m."""
        m = next(m for m in (40, 28, 20, 12, 1) if self.n % m == 0 and (self.n // m).bit_count() == 1)
        return self.rows * self.n * (int(math.log2(self.n // m)) + (m if m > 1 else 0))

    def make(self, seed: int) -> HadamardData:
        """Random rows."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.n, generator=generator).to(DTYPES[self.dtype])
        return HadamardData(self, x, torch.empty_like(x))


@dataclass
class HadamardData:
    """The tensors of one draw."""

    case: HadamardCase
    x: torch.Tensor
    out: torch.Tensor

    @cached_property
    def matrix(self) -> torch.Tensor:
        """H / sqrt(n), transposed, in the case's dtype: for matrix products."""
        import kvk

        eye = torch.eye(self.case.n)
        return kvk.hadamard(eye).to(self.x.dtype)

    def check(self, result: torch.Tensor) -> float:
        """The error of the first rows; raises WrongResultError beyond the tolerance."""
        from kvk import reference

        error = relative_error(result[:1000], reference.hadamard(self.x[:1000]))
        if not error <= TOLERANCE[self.case.dtype]:
            raise WrongResultError(f"out is off by {error:.2e}")
        return error

    def reset(self) -> None:
        """Other numbers in the output."""
        self.out.fill_(7.0)


def hadamard(data: HadamardData) -> torch.Tensor:
    """The op, into a given tensor."""
    import kvk

    return kvk.hadamard(data.x, out=data.out)


class InPlace:
    """torch.ops.kvk.hadamard_ on its own result, over and over: an orthonormal transform keeps its size."""

    name = "kvk in place"

    def unavailable(self, case: HadamardCase) -> str | None:
        """Never."""
        return None

    def build(self, data: HadamardData) -> Prepared:
        """A copy of its own; the first call's result is the one that is checked."""
        own = data.x.clone()
        return Prepared(lambda: torch.ops.kvk.hadamard_(own), lambda _: own)


def matmul(data: HadamardData) -> torch.Tensor:
    """torch's matrix product with the explicit matrix, into a given tensor."""
    return torch.matmul(data.x, data.matrix, out=data.out)
