"""The CPU benchmarks' cases of attention over records (quant_cases.py, sparse_cases.py) with their data on a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from bench.cases import AttentionCase
from bench.cuda_data import CudaData, draw, draw_dense
from bench.cuda_run import Suite, run_suite
from bench.quant_cases import Ours, QuantAttentionCase, decode_dense, prefill_dense
from bench.sparse_cases import SparseAttentionCase

DENSE = "kvk dense"


@dataclass
class CudaRecords:
    """Records of all pages, each in the place of its page, and the dense pages that they were made of."""

    case: QuantAttentionCase
    dense: CudaData
    fmt: Any
    k_pool: torch.Tensor
    v_pool: torch.Tensor

    @cached_property
    def restored(self) -> CudaData:
        """The same call over the numbers that the records stand for."""
        import kvk

        ids = torch.arange(self.case.pages, dtype=torch.int32, device=self.k_pool.device)
        if isinstance(self.case, SparseAttentionCase):
            k_pages, v_pages = kvk.decompress_pages(self.k_pool, self.v_pool, ids, self.fmt)
        else:  # on a card they become numbers of q's dtype; on the CPU, where tests run this, they stay float32
            dtype = self.dense.q.dtype if self.k_pool.is_cuda else torch.float32
            k_pages, v_pages = kvk.dequantize_pages(self.k_pool, self.v_pool, ids, self.fmt, dtype)
        return replace(self.dense, k_pages=k_pages, v_pages=v_pages)

    def check(self, result: tuple[torch.Tensor, torch.Tensor | None]) -> float:
        """The error of (out, lse) against attention over the records' numbers; of (out, None) over the dense pages."""
        return (self.dense if result[1] is None else self.restored).check(result)

    def forget(self) -> None:
        """Gives the memory of the references back."""
        self.dense.forget()
        self.__dict__.pop("restored", None)


@draw.register
def draw_records(case: QuantAttentionCase, seed: int, device: str = "cuda") -> CudaRecords:
    """Random dense pages, packed on the card."""
    import kvk

    dense, fmt = draw_dense(case.dense, seed, device), case.fmt
    ids = torch.arange(case.pages, dtype=torch.int32, device=device)
    pools = fmt.new_pool(case.pages, case.dense.kv_heads, device)
    pack = kvk.compress_pages if isinstance(case, SparseAttentionCase) else kvk.quantize_pages
    pack(dense.k_pages, dense.v_pages, ids, *pools, ids, fmt)
    return CudaRecords(case, dense, fmt, *pools)


def sizes() -> list[AttentionCase]:
    """Those of the speed targets first."""
    full = AttentionCase("bf16", batch=8, kv_len=32768, page_size=64, headline=True)
    return [
        full,
        replace(full, batch=1, headline=False),
        replace(full, q_heads=8, headline=False),
        replace(full, batch=64, kv_len=2048, headline=False),
        replace(full, batch=1, q_len=2048, kv_len=8192, headline=False),
    ]


@dataclass(frozen=True)
class RecordBench:
    """The command of a family: its attention over records at all sizes, with the targets' widths first."""

    module: str
    about: str
    case: type[QuantAttentionCase]
    ops: tuple[str, str]  # decode and prefill
    calls: tuple[Callable[[Any], Any], Callable[[Any], Any]]
    widths: Sequence[int]  # bits of a code, or elements kept of a row
    aims: Mapping[int, float]  # by width, times faster than dense pages

    def cases(self) -> list[QuantAttentionCase]:
        """Every size with every width; the targets' first."""
        return [
            self.case(width, size, headline=size.headline, op=self.ops[size.q_len > 1])
            for size in sizes()
            for width in self.widths
        ]

    def implementations(self, case: QuantAttentionCase) -> list[Any]:
        """kvk over the records, and over the dense pages."""
        prefill = case.dense.q_len > 1
        return [Ours(self.calls[prefill]), Ours(prefill_dense if prefill else decode_dense, DENSE)]

    def aim(self, row: dict[str, Any], case: QuantAttentionCase) -> str | None:
        """Whether a headline row is as many times faster than over dense pages as is wanted of its width."""
        if not case.headline or case.bits not in self.aims or DENSE not in row["peers"]:
            return None
        return "met" if row["peers"][DENSE]["ratio"] >= self.aims[case.bits] else "missed"

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs it."""
        suite = Suite(self.module, self.about, self.cases, self.implementations, self.aim)
        return run_suite(suite, argv)
