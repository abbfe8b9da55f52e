"""block_sparse_attention and its gradient, and vertical_slash_attention, beside kvk's own dense attention and torch's.

Bound by multiply-adds: at 90% sparsity ten times quicker than dense is the bound. A tile of 64 rows unpacks its keys
three times as often as the 192 rows of dense attention do.
"""

from __future__ import annotations

import pytest

from bench.harness import Measure
from bench.masked_cases import BlockSparseCase, VerticalSlashCase, implementations

CASES = [
    BlockSparseCase(
        dtype, block=block, backward=backward, quick=dtype == "f32" and block == 64, headline=block == 64
    )
    for backward in (False, True)
    for dtype in ("f32", "bf16")
    for block in (64, 128)
] + [VerticalSlashCase(dtype, quick=dtype == "f32", headline=dtype == "f32") for dtype in ("f32", "bf16")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def bench_block_sparse(case: BlockSparseCase | VerticalSlashCase, measure: Measure) -> None:
    peers = implementations()
    if case.dtype != "f32":  # torch's 16-bit matrix products on a CPU without the instructions say nothing
        peers = peers[:2]
    measure(case, peers)
