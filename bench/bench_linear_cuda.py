"""Normalised linear attention on a card: `python -m bench.bench_linear_cuda`, in a checkout.

Peers: torch's matrix products, where a sum over all tokens or over long blocks needs no mask, and FlashAttention over
as many tokens, which is another function. pytest finds no benchmark here: the CPU's are bench_linear.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.bench_lightning_cuda import Flash
from bench.cuda_data import draw
from bench.cuda_run import Suite, run_suite
from bench.harness import Prepared
from bench.linear_cases import LinearCase, LinearData, in_torch, ours
from bench.quant_cases import Ours


class CudaLinear(LinearData):
    """The data on a card. A peer that computes another function gives no result."""

    def check(self, result: torch.Tensor | None) -> float:
        """The error, by the reference on the CPU, of one head."""
        if result is None:
            return float("nan")
        rows = (x[:, :, :1].cpu() for x in (self.q, self.k, self.v, self.grad))
        return LinearData(self.case, *rows).check(result[:, :, :1].cpu())


@draw.register
def draw_linear(case: LinearCase, seed: int, device: str = "cuda") -> CudaLinear:
    """One draw of a sequence."""
    return CudaLinear(**vars(case.make(seed, device)))


class Products:
    """The same with torch's matrix products."""

    name = "torch matmuls"

    def unavailable(self, case: LinearCase) -> str | None:
        """Whole blocks, of many tokens: a causal mask would be a loop over chunks."""
        if case.block == 1 or case.backward:
            return "forward, without a mask inside blocks"
        return None if case.tokens % (case.block or 1) == 0 else "whole blocks only"

    def build(self, data: CudaLinear) -> Prepared:
        """In the case's dtype."""
        return Prepared(lambda: in_torch(data.q, data.k, data.v, data.case.block), lambda out: out)


def cases() -> list[LinearCase]:
    """A vision model's tokens, a video's blocks, and a causal model with 64 heads."""
    causal = LinearCase(8192, heads=64, dtype="bf16", headline=True)
    vision = LinearCase(4096, block=0, heads=70, dim=32, dtype="bf16", headline=True)
    return [
        causal,
        replace(causal, tokens=32768),
        replace(causal, block=256, headline=False),
        replace(causal, dtype="f16", headline=False),
        vision,
        replace(vision, heads=20, dim=112),
        replace(causal, backward=True),
    ]


def implementations(case: LinearCase) -> list[Any]:
    """kvk, then its peers: all of the forward pass."""
    return [Ours(ours), Products(), *([] if case.backward else [Flash()])]


def aim(row: dict[str, Any], case: LinearCase) -> str | None:
    """Faster than torch's products, where they are a peer."""
    if not case.headline or "torch matmuls" not in row["peers"]:
        return None
    return "met" if row["peers"]["torch matmuls"]["ratio"] >= 1 else "missed"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    about = (__doc__ or "").splitlines()[0]
    return run_suite(Suite("bench.bench_linear_cuda", about, cases, implementations, aim), argv)


if __name__ == "__main__":
    sys.exit(main())
