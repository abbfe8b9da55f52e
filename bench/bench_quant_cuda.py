"""Attention over quantized records on a card against dense pages: `python -m bench.bench_quant_cuda`, in a checkout.

A step of decode reads the records once, so the copy bandwidth is its ceiling. pytest finds no benchmark here:
the CPU's are bench_quant.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from bench import cuda_records
from bench.cuda_run import Suite, run_suite
from bench.quant_cases import Ours, QuantAttentionCase, decode_records, prefill_records

# Times faster than dense pages, by bits.
AIMS = {4: 2.5, 2: 4.0}


def cases() -> list[QuantAttentionCase]:
    """Every size with every width; the targets' first."""
    return [
        QuantAttentionCase(
            width, size, headline=size.headline, op="quant_decode" if size.q_len == 1 else "quant_prefill"
        )
        for size in cuda_records.sizes()
        for width in (4, 2, 8)
    ]


def implementations(case: QuantAttentionCase) -> list[Any]:
    """kvk over the records, and over the dense pages."""
    ours = Ours(decode_records if case.dense.q_len == 1 else prefill_records)
    return [ours, cuda_records.dense_peer(case)]


def aim(row: dict[str, Any], case: QuantAttentionCase) -> str | None:
    """Against the targets."""
    return cuda_records.aim(row, case, AIMS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    suite = Suite("bench.bench_quant_cuda", __doc__.splitlines()[0], cases, implementations, aim)
    return run_suite(suite, argv)


if __name__ == "__main__":
    sys.exit(main())
