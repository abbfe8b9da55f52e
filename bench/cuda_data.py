"""The CPU benchmarks' cases (cases.py) with their data on a card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, singledispatch
from typing import Any

import torch

from bench.cases import DTYPES, LSE_TOLERANCE, TOLERANCE, AttentionCase, WrongResultError, relative_error

CHECKED_ROWS = (
    48  # of a prompt's query rows, at its start and at its end: fp64 scores of all would be gigabytes
)


@dataclass
class CudaData:
    """The tensors of one draw on the card. k, v [B,Hkv,L,D] hold the keys of the pages, dense and contiguous, as peers
    without pages want them."""

    case: AttentionCase
    q: torch.Tensor  # [T, Hq, D]
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_indices: torch.Tensor
    kv_lens: torch.Tensor
    qo_indptr: torch.Tensor
    order: torch.Tensor  # int64 [pages], the pages of all requests one after another

    def _dense(self, pages: torch.Tensor) -> torch.Tensor:
        case = self.case
        rows = pages[self.order].reshape(case.batch, -1, case.kv_heads, case.head_dim)[:, : case.kv_len]
        return rows.transpose(1, 2).contiguous()

    @cached_property
    def k(self) -> torch.Tensor:
        """[B,Hkv,L,D]."""
        return self._dense(self.k_pages)

    @cached_property
    def v(self) -> torch.Tensor:
        """[B,Hkv,L,D]."""
        return self._dense(self.v_pages)

    @cached_property
    def dense_q(self) -> torch.Tensor:
        """q as [B,Hq,q_len,D], contiguous."""
        case = self.case
        shape = (case.batch, case.q_len, case.q_heads, case.head_dim)
        return self.q.view(shape).transpose(1, 2).contiguous()

    @cached_property
    def checked(self) -> torch.Tensor:
        """Rows of a request that are compared."""
        n = self.case.q_len
        rows = range(n) if n <= 2 * CHECKED_ROWS else [*range(CHECKED_ROWS), *range(n - CHECKED_ROWS, n)]
        return torch.tensor(list(rows), device=self.q.device)

    @cached_property
    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [B, rows, Hq, D], lse [B, rows, Hq]) of the checked rows, in fp64, from the pages."""
        case, rows = self.case, self.checked
        group, device = case.q_heads // case.kv_heads, self.q.device
        shape = (case.batch, len(rows), case.q_heads)
        out = torch.empty(*shape, case.head_dim, dtype=torch.float64, device=device)
        lse = torch.empty(*shape, dtype=torch.float64, device=device)
        keys = torch.arange(case.kv_len, device=device)
        hidden = keys > (rows + case.kv_len - case.q_len)[:, None]
        for b in range(case.batch):
            for h in range(case.kv_heads):
                heads = slice(h * group, (h + 1) * group)
                k, v = self.k[b, h].double(), self.v[b, h].double()
                scores = self.dense_q[b, heads][:, rows].double() @ k.T * case.head_dim**-0.5
                scores.masked_fill_(hidden, -math.inf)
                lse[b, :, heads] = scores.logsumexp(-1).T
                out[b, :, heads] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out, lse

    def check(self, result: tuple[torch.Tensor, torch.Tensor | None]) -> float:
        """The error of (out [T,Hq,D], lse [T,Hq] or None); raises WrongResultError beyond the tolerance."""
        case = self.case
        out, lse = result
        if out.shape != (case.tokens, case.q_heads, case.head_dim):
            raise WrongResultError(f"shape {tuple(out.shape)}")
        got = out.view(case.batch, case.q_len, case.q_heads, case.head_dim)[:, self.checked]
        error = relative_error(got, self.reference[0])
        if not error <= TOLERANCE[case.dtype]:
            raise WrongResultError(f"out is off by {error:.2e} (allowed {TOLERANCE[case.dtype]:.0e})")
        if lse is not None:
            mine = lse.view(case.batch, case.q_len, case.q_heads)[:, self.checked].double()
            difference = (mine - self.reference[1]).abs().max().item()
            if not difference <= LSE_TOLERANCE:
                raise WrongResultError(f"lse is off by {difference:.2e} (allowed {LSE_TOLERANCE:.0e})")
        return error

    def forget(self) -> None:
        """Gives the memory of the reference back; the dense keys stay with the peers that took them."""
        for name in ("reference", "k", "v", "dense_q"):
            self.__dict__.pop(name, None)


@singledispatch
def draw(case: Any, seed: int, device: str = "cuda") -> Any:
    """The tensors of one draw of a case, by its type."""
    raise TypeError(f"no data for {case!r}")


@draw.register
def draw_dense(case: AttentionCase, seed: int, device: str = "cuda") -> CudaData:
    """Random q, K and V; the pages of all requests in one random order."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    per_request = math.ceil(case.kv_len / case.page_size)
    pages = case.batch * per_request
    order = torch.randperm(pages, generator=generator, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def pool() -> torch.Tensor:
        if case.layout == "HND":
            return normal(pages, case.kv_heads, case.page_size, case.head_dim).transpose(1, 2)
        return normal(pages, case.page_size, case.kv_heads, case.head_dim)

    return CudaData(
        case=case,
        q=normal(case.tokens, case.q_heads, case.head_dim),
        k_pages=pool(),
        v_pages=pool(),
        page_indices=order.to(torch.int32).view(case.batch, per_request),
        kv_lens=torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=device),
        qo_indptr=torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.q_len,
        order=order,
    )
