"""Bitmap-sparse pages: sparse_decode and sparse_prefill against the dense bf16 cache; compress_pages against a copy.

Decode reads each record once for all query heads of its kv head: 144 bytes of 256 a row at 64 of 128 elements, 96 at
40, so the ratio to dense bf16 could reach 1.78 and 2.67 where memory binds. Putting rows apart is what binds on AVX2: 7
instructions for 8 elements and one query head, whatever is kept (csrc/cpu/engine/sparse_rows.h).
"""

from __future__ import annotations

import pytest

from bench.cases import AttentionCase
from bench.harness import Measure
from bench.quant_cases import Ours, decode_dense, prefill_dense
from bench.sparse_cases import (
    CompressPagesCase,
    SparseAttentionCase,
    compress_pages,
    decode_sparse,
    prefill_sparse,
)


def decode_cases() -> list[SparseAttentionCase]:
    """The cases of the speed targets."""
    return [
        SparseAttentionCase(
            keep,
            AttentionCase("bf16", q_heads=q_heads, page_size=64, batch=batch, kv_len=kv_len),
            quick=batch == 1 and q_heads == 8,
        )
        for q_heads in (8, 32)
        for batch, kv_len in ((1, 32768), (8, 8192))
        for keep in (64, 40)
    ]


@pytest.mark.parametrize("case", decode_cases(), ids=lambda case: case.name)
def bench_sparse_decode(case: SparseAttentionCase, measure: Measure) -> None:
    measure(case, [Ours(decode_sparse), Ours(decode_dense, "kvk bf16 dense")])


@pytest.mark.parametrize(
    "case",
    [
        SparseAttentionCase(
            keep, AttentionCase("bf16", page_size=64, kv_len=2048, q_len=2048), op="sparse_prefill"
        )
        for keep in (64, 40)
    ],
    ids=lambda case: case.name,
)
def bench_sparse_prefill(case: SparseAttentionCase, measure: Measure) -> None:
    measure(case, [Ours(prefill_sparse), Ours(prefill_dense, "kvk bf16 dense")])


@pytest.mark.parametrize(
    "case", [CompressPagesCase(keep, quick=keep == 64) for keep in (64, 40)], ids=lambda case: case.name
)
def bench_compress_pages(case: CompressPagesCase, measure: Measure) -> None:
    measure(case, [Ours(compress_pages)])
