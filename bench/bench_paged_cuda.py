"""Paged attention on a card against its peers: `python -m bench.bench_paged_cuda`, in a checkout.

Decode reads every key and value once, so the copy bandwidth is its ceiling; prefill of thousands of tokens is bound by
the rate of the tensor cores. pytest finds no benchmark here: the CPU's are bench_paged.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.cases import AttentionCase
from bench.cuda_run import Suite, run_suite

# What a headline row should reach: a part of the measured copy bandwidth, or GFLOP/s of an H100 or H200.
DECODE_AIM, DECODE_ALONE_AIM, PREFILL_AIM = 0.85, 0.70, 330e3


def cases() -> list[AttentionCase]:
    """The sizes of the speed targets first, so that a short run has them."""
    full = AttentionCase("bf16", batch=8, kv_len=32768, headline=True)
    alone = replace(full, batch=1)
    prompt = AttentionCase("bf16", q_len=8192, kv_len=8192, headline=True)
    return [
        full,
        alone,
        prompt,
        replace(full, page_size=64),
        replace(alone, page_size=64),
        replace(prompt, batch=4, q_len=2048, kv_len=2048, headline=False),
        replace(prompt, q_len=512, kv_len=32768, headline=False),
        replace(full, layout="HND", headline=False),
        replace(full, batch=64, kv_len=1024, headline=False),
        replace(full, q_heads=64, headline=False),
        replace(full, dtype="f16", headline=False),
        replace(prompt, dtype="f16", headline=False),
        replace(alone, kv_len=131072, page_size=64, headline=False),
    ]


def aim(row: dict[str, Any], case: AttentionCase) -> str | None:
    """Whether a headline row reaches its target: "met", "missed", or None where there is none."""
    if not case.headline:
        return None
    if case.q_len > 1:
        return "met" if row["gflop_s"] >= PREFILL_AIM else "missed"
    return "met" if row["fraction"] >= (DECODE_AIM if case.batch >= 8 else DECODE_ALONE_AIM) else "missed"


def implementations(case: AttentionCase) -> list[Any]:
    """kvk and every peer; each says where it sits out."""
    from bench import cuda_peers

    return [cuda_peers.Kvk(), *cuda_peers.peers()]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    suite = Suite("bench.bench_paged_cuda", __doc__.splitlines()[0], cases, implementations, aim)
    return run_suite(suite, argv)


if __name__ == "__main__":
    sys.exit(main())
