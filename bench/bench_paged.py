"""Paged attention: paged_decode, paged_prefill, append_kv and merge_states against their peers.

Decode reads every key and value once and does 4 FLOPs per query head and element: with 4 query heads per kv
head 2 (f32) or 4 (16-bit) FLOPs a byte, below the knee of any CPU, so read bandwidth is its ceiling.
Prefill of 2k tokens does hundreds of FLOPs a byte: its ceiling is the fp32 FMA rate. Append is a copy, merge
a read.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases import AppendCase, AttentionCase, MergeCase
from bench.harness import Measure
from bench.peers import Kvk, append_peers, attention_peers, merge_peers


def decode_cases() -> list[AttentionCase]:
    """Every dtype, head ratio, page size and length of the speed targets, an HND pool, and short requests."""
    cases = [
        AttentionCase(
            dtype,
            q_heads=q_heads,
            page_size=page_size,
            batch=batch,
            kv_len=kv_len,
            headline=page_size == 16,
            quick=page_size == 16 and batch == 1 and (q_heads == 32 or dtype == "bf16"),
        )
        for dtype in ("f32", "bf16", "f16")
        for q_heads in (32, 8)
        for batch, kv_len in ((1, 32768), (8, 8192))
        for page_size in (16, 64)
    ]
    cases.append(AttentionCase("bf16", kv_len=32768, layout="HND", headline=True))
    for dtype in ("f32", "bf16"):
        cases.append(AttentionCase(dtype, batch=64, kv_len=1024))
        cases.append(AttentionCase(dtype, batch=1, kv_len=1024, headline=True, quick=dtype == "bf16"))
    return cases


def prefill_cases() -> list[AttentionCase]:
    """A whole prompt, and a chunk of new tokens on a long cache."""
    prompt = AttentionCase("f32", q_len=2048, kv_len=2048, headline=True, quick=True)
    chunk = AttentionCase("f32", q_len=256, kv_len=8192 + 256, headline=True)
    return [case for base in (prompt, chunk) for case in (base, replace(base, dtype="bf16"))]


@pytest.mark.parametrize("case", decode_cases(), ids=lambda case: case.name)
def bench_paged_decode(case: AttentionCase, measure: Measure) -> None:
    measure(case, [Kvk(), *attention_peers()])


@pytest.mark.parametrize("case", prefill_cases(), ids=lambda case: case.name)
def bench_paged_prefill(case: AttentionCase, measure: Measure) -> None:
    measure(case, [Kvk(), *attention_peers()])


@pytest.mark.parametrize(
    "case",
    [AppendCase("f32"), AppendCase("bf16", quick=True, headline=True)],
    ids=lambda case: case.name,
)
def bench_append_kv(case: AppendCase, measure: Measure) -> None:
    measure(case, [Kvk(), *append_peers()])


@pytest.mark.parametrize(
    "case",
    [MergeCase("f32", quick=True, headline=True), MergeCase("bf16")],
    ids=lambda case: case.name,
)
def bench_merge_states(case: MergeCase, measure: Measure) -> None:
    measure(case, [Kvk(), *merge_peers()])
