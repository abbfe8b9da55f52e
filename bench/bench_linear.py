"""Normalised linear attention, bound by FMA, and the Taylor feature map, bound by memory, beside torch's products."""

from __future__ import annotations

import pytest

from bench.harness import Measure
from bench.linear_cases import LinearCase, TaylorCase, TorchLinear, ours, taylor, torch_taylor
from bench.quant_cases import Ours

CASES = [
    LinearCase(2048, quick=True, headline=True),
    LinearCase(8192),
    LinearCase(8192, dtype="bf16"),
    LinearCase(4096, block=0, heads=20, dim=112, headline=True),
    LinearCase(4096, block=256, heads=20, dim=112),
    LinearCase(4096, block=16, heads=16, dim=64),
    LinearCase(4096, block=0, heads=32, dim=32),
    LinearCase(2048, backward=True, headline=True),
    LinearCase(4096, block=0, heads=20, dim=112, backward=True),
]
MAPS = [
    TaylorCase(65536, quick=True, headline=True),
    TaylorCase(65536, dtype="bf16"),
    TaylorCase(65536, backward=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def bench_linear(case: LinearCase, measure: Measure) -> None:
    measure(case, [Ours(ours), TorchLinear()])


@pytest.mark.parametrize("case", MAPS, ids=lambda case: case.name)
def bench_taylor(case: TaylorCase, measure: Measure) -> None:
    measure(case, [Ours(taylor), Ours(torch_taylor, "torch eager")])
