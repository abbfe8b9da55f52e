"""Attention over bitmap records on a card against dense pages: `python -m bench.bench_sparse_cuda`, in a checkout.

A step of decode reads the records once, so the copy bandwidth is its ceiling. pytest finds no benchmark here:
the CPU's are bench_sparse.py.
"""

from __future__ import annotations

import sys

from bench.cuda_records import RecordBench
from bench.sparse_cases import SparseAttentionCase, decode_sparse, prefill_sparse

BENCH = RecordBench(
    module="bench.bench_sparse_cuda",
    about=__doc__.splitlines()[0],
    case=SparseAttentionCase,
    ops=("sparse_decode", "sparse_prefill"),
    calls=(decode_sparse, prefill_sparse),
    widths=(64, 40),
    aims={64: 1.5, 40: 2.1},
)

if __name__ == "__main__":
    sys.exit(BENCH.main())
