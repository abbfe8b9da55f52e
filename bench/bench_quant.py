"""Quantized pages: quant_decode and quant_prefill against the dense bf16 cache, and quantize_pages against a copy.

Decode reads each record once for all query heads of its kv head. With 8 heads on 8 it is bound by memory, and the
ratio to dense bf16 could reach that of the bytes (2 bits in groups of 32: 5.3); with 32 on 8 by arithmetic.
"""

from __future__ import annotations

import pytest

from bench.cases import AttentionCase
from bench.harness import Measure
from bench.peers_quant import OnnxRuntimeQuant
from bench.quant_cases import (
    Ours,
    QuantAttentionCase,
    QuantizePagesCase,
    decode_dense,
    decode_records,
    prefill_dense,
    prefill_records,
    quantize_pages,
)


def decode_cases() -> list[QuantAttentionCase]:
    """The cases of the speed targets."""
    return [
        QuantAttentionCase(
            bits,
            AttentionCase("bf16", q_heads=q_heads, page_size=64, batch=batch, kv_len=kv_len),
            quick=bits in (2, 4) and batch == 1,
        )
        for q_heads in (8, 32)
        for batch, kv_len in ((1, 32768), (8, 8192))
        for bits in (8, 4, 3, 2)
    ]


@pytest.mark.parametrize("case", decode_cases(), ids=lambda case: case.name)
def bench_quant_decode(case: QuantAttentionCase, measure: Measure) -> None:
    measure(case, [Ours(decode_records), Ours(decode_dense, "kvk bf16 dense"), OnnxRuntimeQuant()])


@pytest.mark.parametrize(
    "case",
    [
        QuantAttentionCase(
            bits, AttentionCase("bf16", page_size=64, kv_len=2048, q_len=2048), op="quant_prefill"
        )
        for bits in (8, 4, 2)
    ],
    ids=lambda case: case.name,
)
def bench_quant_prefill(case: QuantAttentionCase, measure: Measure) -> None:
    measure(case, [Ours(prefill_records), Ours(prefill_dense, "kvk bf16 dense")])


@pytest.mark.parametrize(
    "case",
    [QuantizePagesCase(bits, quick=bits in (2, 4)) for bits in (8, 4, 3, 2)],
    ids=lambda case: case.name,
)
def bench_quantize_pages(case: QuantizePagesCase, measure: Measure) -> None:
    measure(case, [Ours(quantize_pages)])
