"""neighborhood_attention and its gradient against kvk's own dense attention and torch under the same mask.

The tile bound: what is computed is a tile's union of windows, 1.9 times what is seen for tiles of 6x6 and windows of
13x13.
"""

from __future__ import annotations

import pytest

from bench.harness import Measure
from bench.masked_cases import NeighborhoodCase, implementations

CASES = [
    NeighborhoodCase("f32", head_dim=32, extents=(32, 32), kernel=(7, 7), quick=True),
    NeighborhoodCase("f32", headline=True),
    NeighborhoodCase("bf16"),
    NeighborhoodCase("f32", extents=(16, 24, 24), kernel=(7, 9, 9), headline=True),
    NeighborhoodCase("f32", extents=(4096,), kernel=(257,)),
    NeighborhoodCase("f32", head_dim=32, extents=(32, 32), kernel=(7, 7), backward=True, quick=True),
    NeighborhoodCase("f32", backward=True, headline=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def bench_neighborhood(case: NeighborhoodCase, measure: Measure) -> None:
    peers = implementations()
    if case.dtype != "f32":  # torch's 16-bit matrix products on a CPU without the instructions say nothing
        peers = peers[:2]
    measure(case, peers)
