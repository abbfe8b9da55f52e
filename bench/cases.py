"""What is measured: inputs, the fp64 reference they are checked against, and the bytes and FLOPs they need.

A case is a frozen description with a name; `make(seed)` draws its random data. `bytes` is the least traffic
the op can do with memory (every input read once, every output written once), `flops` the multiply-adds times
two that the mathematics needs, so masked scores count nothing. Both hold for every implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Largest error over the largest magnitude of the reference. The 16-bit bounds leave room for peers that round
# the probabilities to 16 bits.
TOLERANCE = {"f32": 3e-5, "bf16": 1e-2, "f16": 2e-3}
LSE_TOLERANCE = 2e-4


class WrongResultError(AssertionError):
    """An implementation's result is not the reference's; its time is not worth anything."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute error over the largest magnitude of `want`; inf where `got` has a NaN."""
    if got.shape != want.shape:
        raise WrongResultError(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    return math.inf if math.isnan(error) else error


def _require(error: float, tolerance: float, what: str) -> None:
    if not error <= tolerance:
        raise WrongResultError(f"{what} is off by {error:.2e} (allowed {tolerance:.0e})")


def _short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def heads_last(out: torch.Tensor) -> torch.Tensor:
    """[B,Hq,q_len,D] -> [T,Hq,D]."""
    return out.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class AttentionCase:
    """Attention of `q_len` new tokens of each of `batch` requests over a paged cache of `kv_len` keys, the
    new tokens' own included; causal, bottom-right aligned."""

    dtype: str
    q_heads: int = 32
    kv_heads: int = 8
    page_size: int = 16
    batch: int = 1
    kv_len: int = 1024
    q_len: int = 1
    layout: str = "NHD"
    head_dim: int = 128
    quick: bool = False
    headline: bool = False
    bandwidth: ClassVar[str] = "read"

    @property
    def op(self) -> str:
        """The kvk op this case measures."""
        return "paged_decode" if self.q_len == 1 else "paged_prefill"

    @property
    def name(self) -> str:
        """A label that is unique in the run and says everything that varies."""
        length = f"{self.batch}x{_short(self.kv_len)}"
        if self.q_len > 1:
            length = f"{self.batch}x{_short(self.q_len)}-on-{_short(self.kv_len)}"
        layout = "" if self.layout == "NHD" else f"-{self.layout.lower()}"
        return f"{self.dtype}-{self.q_heads}h{self.kv_heads}-{length}-p{self.page_size}{layout}"

    @property
    def tokens(self) -> int:
        """Query tokens of all requests."""
        return self.batch * self.q_len

    @property
    def bytes(self) -> int:
        """K and V once per kv head; q, out, lse and the page table."""
        size = DTYPES[self.dtype].itemsize
        keys = 2 * self.batch * self.kv_len * self.kv_heads * self.head_dim * size
        rows = self.tokens * self.q_heads * (2 * self.head_dim * size + 4)
        return keys + rows + 4 * self.batch * math.ceil(self.kv_len / self.page_size)

    @property
    def flops(self) -> int:
        """q k and p v: 4 FLOPs a visible (query, key) pair, head and channel."""
        pairs = self.q_len * (self.kv_len - self.q_len) + self.q_len * (self.q_len + 1) // 2
        return 4 * self.batch * self.q_heads * self.head_dim * pairs

    def make(self, seed: int) -> AttentionData:
        """Random q, K and V; the pages of all requests in one random order."""
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[self.dtype]
        per_request = math.ceil(self.kv_len / self.page_size)
        pages = self.batch * per_request
        order = torch.randperm(pages, generator=generator)

        def pool() -> tuple[torch.Tensor, torch.Tensor]:
            shape = (pages, self.page_size, self.kv_heads, self.head_dim)
            logical = torch.randn(shape, generator=generator).to(dtype)
            stored = torch.empty_like(logical)
            if self.layout == "HND":
                stored = torch.empty_like(logical.transpose(1, 2), memory_format=torch.contiguous_format)
                stored = stored.transpose(1, 2)
            stored[order] = logical
            rows = logical.view(self.batch, per_request * self.page_size, self.kv_heads, self.head_dim)
            return stored, rows[:, : self.kv_len].transpose(1, 2).contiguous()

        k_pages, k = pool()
        v_pages, v = pool()
        q = torch.randn(self.tokens, self.q_heads, self.head_dim, generator=generator).to(dtype)
        return AttentionData(
            case=self,
            q=q,
            k_pages=k_pages,
            v_pages=v_pages,
            page_indices=order.to(torch.int32).view(self.batch, per_request),
            kv_lens=torch.full((self.batch,), self.kv_len, dtype=torch.int32),
            qo_indptr=torch.arange(self.batch + 1, dtype=torch.int32) * self.q_len,
            k=k,
            v=v,
        )


@dataclass
class AttentionData:
    """The tensors of one draw. k, v [B,Hkv,L,D] hold the same keys as the pages, dense and contiguous, as the
    peers without pages want them; their queries are q as [B,Hq,q_len,D]."""

    case: AttentionCase
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_indices: torch.Tensor
    kv_lens: torch.Tensor
    qo_indptr: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @cached_property
    def dense_q(self) -> torch.Tensor:
        """q as [B,Hq,q_len,D], contiguous."""
        case = self.case
        shape = (case.batch, case.q_len, case.q_heads, case.head_dim)
        return self.q.view(shape).transpose(1, 2).contiguous()

    @cached_property
    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [T,Hq,D], lse [T,Hq]) in fp64, from the dense keys."""
        case = self.case
        group = case.q_heads // case.kv_heads
        out = torch.empty(case.batch, case.q_len, case.q_heads, case.head_dim, dtype=torch.float64)
        lse = torch.empty(case.batch, case.q_len, case.q_heads, dtype=torch.float64)
        hidden = None
        if case.q_len > 1:
            everything = torch.ones(case.q_len, case.kv_len, dtype=torch.bool)
            hidden = everything.triu(case.kv_len - case.q_len + 1)
        for b in range(case.batch):
            for h in range(case.kv_heads):
                heads = slice(h * group, (h + 1) * group)
                q = self.dense_q[b, heads].double()
                scores = q @ self.k[b, h].double().T * case.head_dim**-0.5
                if hidden is not None:
                    scores.masked_fill_(hidden, -math.inf)
                lse[b, :, heads] = scores.logsumexp(-1).T
                out[b, :, heads] = (scores.softmax(-1) @ self.v[b, h].double()).transpose(0, 1)
        return out.flatten(0, 1), lse.flatten(0, 1)

    def check(self, result: tuple[torch.Tensor, torch.Tensor | None]) -> float:
        """The error of (out [T,Hq,D], lse [T,Hq] or None); raises WrongResultError beyond the tolerance."""
        out, lse = result
        error = relative_error(out, self.reference[0])
        _require(error, TOLERANCE[self.case.dtype], "out")
        if lse is not None:
            # Absolute: the lse tells of a key too many or too few even where 16-bit output cannot.
            difference = (lse.double() - self.reference[1]).abs().max().item()
            _require(math.inf if math.isnan(difference) else difference, LSE_TOLERANCE, "lse")
        return error

    def reset(self) -> None:
        """Nothing: no implementation changes what it is given."""


@dataclass(frozen=True)
class AppendCase:
    """append_kv of `tokens` new rows into pages in random order."""

    dtype: str
    tokens: int = 2048
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    quick: bool = False
    headline: bool = False
    op: ClassVar[str] = "append_kv"
    bandwidth: ClassVar[str] = "copy"
    flops: ClassVar[int] = 0

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.dtype}-{self.kv_heads}h-{_short(self.tokens)}-p{self.page_size}"

    @property
    def bytes(self) -> int:
        """K and V rows read and written, slots read."""
        row = self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize
        return self.tokens * (4 * row + 8)

    def make(self, seed: int) -> AppendData:
        """Random rows; slots of whole pages in random order. The pools are random before, too."""
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[self.dtype]
        pages = math.ceil(self.tokens / self.page_size)
        order = torch.randperm(pages, generator=generator)
        slots = order[:, None] * self.page_size + torch.arange(self.page_size)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, self.kv_heads, self.head_dim, generator=generator).to(dtype)

        return AppendData(
            case=self,
            k=draw(self.tokens),
            v=draw(self.tokens),
            k_pages=draw(pages, self.page_size),
            v_pages=draw(pages, self.page_size),
            slot_mapping=slots.flatten()[: self.tokens].contiguous(),
        )


@dataclass
class AppendData:
    """The tensors of one draw; an implementation writes k_pages and v_pages."""

    case: AppendCase
    k: torch.Tensor
    v: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    slot_mapping: torch.Tensor

    def check(self, result: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Every row must be in its slot, bit for bit."""
        for got, want, name in zip(result, (self.k, self.v), ("k_pages", "v_pages"), strict=True):
            if not torch.equal(got.flatten(0, 1)[self.slot_mapping], want):
                raise WrongResultError(f"{name} does not hold the appended rows")
        return 0.0

    def reset(self) -> None:
        """Random pools again, so that nobody is judged by the work of the one before."""
        for pages in (self.k_pages, self.v_pages):
            pages.copy_(torch.randn(pages.shape))


@dataclass(frozen=True)
class MergeCase:
    """merge_states of `parts` partial results."""

    dtype: str
    parts: int = 8
    tokens: int = 512
    heads: int = 32
    head_dim: int = 128
    quick: bool = False
    headline: bool = False
    op: ClassVar[str] = "merge_states"
    bandwidth: ClassVar[str] = "read"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.dtype}-n{self.parts}-{self.tokens}x{self.heads}h"

    @property
    def bytes(self) -> int:
        """All partial results and their lse read, one of each written."""
        row = self.head_dim * DTYPES[self.dtype].itemsize + 4
        return (self.parts + 1) * self.tokens * self.heads * row

    @property
    def flops(self) -> int:
        """One multiply-add per element of the partial results."""
        return 2 * self.parts * self.tokens * self.heads * self.head_dim

    def make(self, seed: int) -> MergeData:
        """Random partial results with lse of a few nats apart."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.parts, self.tokens, self.heads)
        out = torch.randn(*shape, self.head_dim, generator=generator).to(DTYPES[self.dtype])
        return MergeData(case=self, out=out, lse=2 * torch.randn(*shape, generator=generator))


@dataclass
class MergeData:
    """out [n,T,H,D] and lse [n,T,H] of one draw."""

    case: MergeCase
    out: torch.Tensor
    lse: torch.Tensor

    @cached_property
    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [T,H,D], lse [T,H]) in fp64."""
        total = self.lse.double().logsumexp(0)
        weights = (self.lse.double() - total).exp()
        return (self.out.double() * weights[..., None]).sum(0), total

    def check(self, result: tuple[torch.Tensor, torch.Tensor]) -> float:
        """The error of (out, lse); raises WrongResultError beyond the tolerance."""
        error = relative_error(result[0], self.reference[0])
        _require(error, TOLERANCE[self.case.dtype], "out")
        _require((result[1].double() - self.reference[1]).abs().max().item(), LSE_TOLERANCE, "lse")
        return error

    def reset(self) -> None:
        """Nothing: no implementation changes what it is given."""


@dataclass(frozen=True)
class CallCase:
    """The cost of one call: `tiny` is too small to matter, so time is all there is and no ceiling applies."""

    tiny: AttentionCase | MergeCase
    aim_us: float = 5.0
    quick: bool = True
    headline: bool = True
    bandwidth: ClassVar[None] = None

    @property
    def op(self) -> str:
        """The kvk op this case measures."""
        return self.tiny.op

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return "call-cost"

    @property
    def dtype(self) -> str:
        """dtype of the tiny input."""
        return self.tiny.dtype

    @property
    def bytes(self) -> int:
        """Bytes of the tiny input: they stay in the first-level cache."""
        return self.tiny.bytes

    @property
    def flops(self) -> int:
        """FLOPs of the tiny input."""
        return self.tiny.flops

    def make(self, seed: int) -> AttentionData | MergeData:
        """The tiny input."""
        return self.tiny.make(seed)


Case = AttentionCase | AppendCase | MergeCase | CallCase
Data = AttentionData | AppendData | MergeData
