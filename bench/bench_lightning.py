"""Lightning linear attention: the chunked forward and backward, bound by FMA, and the decode step, bound by memory.

Peers: the chunked form in torch's matrix products, ONNX Runtime's LinearAttention, and kvk's own causal softmax
attention over as many tokens, which is another function.
"""

from __future__ import annotations

import pytest

from bench.harness import Measure
from bench.lightning_cases import (
    LightningCase,
    LightningDecodeCase,
    OnnxLinearAttention,
    PagedPrefill,
    TorchChunks,
    decode,
    ours,
    torch_decode,
)
from bench.quant_cases import Ours

CASES = [
    LightningCase(1024),
    LightningCase(2048, decay=False, headline=True),
    LightningCase(2048, quick=True, headline=True),
    LightningCase(4096),
    LightningCase(8192, headline=True),
    LightningCase(8192, dtype="bf16", headline=True),
    LightningCase(16384),
    LightningCase(32768),
    LightningCase(65536),
    LightningCase(2048, backward=True, headline=True),
    LightningCase(8192, backward=True),
]
DECODES = [
    LightningDecodeCase(1),
    LightningDecodeCase(16, quick=True, headline=True),
    LightningDecodeCase(64, headline=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def bench_lightning(case: LightningCase, measure: Measure) -> None:
    measure(case, [Ours(ours), TorchChunks(), OnnxLinearAttention(), PagedPrefill()])


@pytest.mark.parametrize("case", DECODES, ids=lambda case: case.name)
def bench_lightning_decode(case: LightningDecodeCase, measure: Measure) -> None:
    measure(case, [Ours(decode), Ours(torch_decode, "torch eager")])
