"""Attention over quantized records on a card against dense pages: `python -m bench.bench_quant_cuda`, in a checkout.

A step of decode reads the records once, so the copy bandwidth is its ceiling. pytest finds no benchmark here:
the CPU's are bench_quant.py.
"""

from __future__ import annotations

import sys

from bench.cuda_records import RecordBench
from bench.quant_cases import QuantAttentionCase, decode_records, prefill_records

BENCH = RecordBench(
    module="bench.bench_quant_cuda",
    about=__doc__.splitlines()[0],
    case=QuantAttentionCase,
    ops=("quant_decode", "quant_prefill"),
    calls=(decode_records, prefill_records),
    widths=(4, 2, 8),
    aims={4: 2.5, 2: 4.0},
)

if __name__ == "__main__":
    sys.exit(BENCH.main())
