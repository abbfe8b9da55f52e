"""The Hadamard transform against a copy and against torch's product with the explicit matrix.

Seven additions an element at n = 128: bound by memory. With H_20 and more the matrix of the slow index counts.
"""

from __future__ import annotations

import pytest

from bench.harness import Measure
from bench.quant_cases import HadamardCase, InPlace, Ours, hadamard, matmul

CASES = [
    HadamardCase("f32", quick=True, headline=True),
    HadamardCase("bf16", headline=True),
    HadamardCase("f16"),
    HadamardCase("f32", n=1024, rows=100_000),
    HadamardCase("f32", n=32768, rows=4_000),
    HadamardCase("f32", n=80, rows=1_000_000),
    HadamardCase("f32", n=5120, rows=20_000),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_hadamard(case: HadamardCase, measure: Measure) -> None:
    # torch's 16-bit matrix product on a CPU is a hundred times slower than its float32 one.
    peers = [Ours(matmul, "torch matmul")] if case.dtype == "f32" and case.n <= 1024 else []
    measure(case, [Ours(hadamard), InPlace(), *peers])
