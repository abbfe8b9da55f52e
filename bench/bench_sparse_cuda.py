"""Attention over bitmap records on a card against dense pages: `python -m bench.bench_sparse_cuda`, in a checkout.

A step of decode reads the records once, so the copy bandwidth is its ceiling. pytest finds no benchmark here:
the CPU's are bench_sparse.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from bench import cuda_records
from bench.cuda_run import Suite, run_suite
from bench.quant_cases import Ours
from bench.sparse_cases import SparseAttentionCase, decode_sparse, prefill_sparse

# Times faster than dense pages, by elements kept of a row.
AIMS = {64: 1.5, 40: 2.1}


def cases() -> list[SparseAttentionCase]:
    """Every size with every width; the targets' first."""
    return [
        SparseAttentionCase(
            width, size, headline=size.headline, op="sparse_decode" if size.q_len == 1 else "sparse_prefill"
        )
        for size in cuda_records.sizes()
        for width in (64, 40)
    ]


def implementations(case: SparseAttentionCase) -> list[Any]:
    """kvk over the records, and over the dense pages."""
    ours = Ours(decode_sparse if case.dense.q_len == 1 else prefill_sparse)
    return [ours, cuda_records.dense_peer(case)]


def aim(row: dict[str, Any], case: SparseAttentionCase) -> str | None:
    """Against the targets."""
    return cuda_records.aim(row, case, AIMS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    suite = Suite("bench.bench_sparse_cuda", __doc__.splitlines()[0], cases, implementations, aim)
    return run_suite(suite, argv)


if __name__ == "__main__":
    sys.exit(main())
