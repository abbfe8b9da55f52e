"""What one call costs before any work is done: the op with given outputs, on an input of one key or one row.

That is with KVK_LOG and KVK_DUMP unset. Beside it, in the same rounds: the same call logged into nothing
(switching on and off included), torch.neg into a given tensor (a trivial ATen op from Python), the same through
torch.ops (what an op call from Python costs at the least), and kvk's typed Python function, which allocates.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench.cases import AttentionCase, AttentionData, CallCase, Case, MergeCase, MergeData
from bench.harness import OURS, Measure, Prepared
from bench.peers import Kvk


class OpOut:
    """torch.ops.kvk.<op>.out with given outputs."""

    name = OURS

    def unavailable(self, case: Case) -> str | None:
        """Never: a missing op is an error of the run."""
        return None

    def build(self, data: AttentionData | MergeData) -> Prepared:
        """Allocates the outputs; the op does not."""
        import kvk  # noqa: F401  registers the ops

        if isinstance(data, MergeData):
            merge = torch.ops.kvk.merge_states.out
            merged = (torch.empty_like(data.out[0]), torch.empty_like(data.lse[0]))

            def run_merge() -> tuple[torch.Tensor, torch.Tensor]:
                merge(data.out, data.lse, merged_out=merged[0], merged_lse=merged[1])
                return merged

            return Prepared(run_merge, lambda result: result)
        decode = torch.ops.kvk.paged_decode.out
        out, lse = torch.empty_like(data.q), torch.empty(data.q.shape[:2])

        def run_decode() -> tuple[torch.Tensor, torch.Tensor]:
            decode(data.q, data.k_pages, data.v_pages, data.page_indices, data.kv_lens, out=out, lse=lse)
            return out, lse

        return Prepared(run_decode, lambda result: result)


class Logged(OpOut):
    """The same with KVK_LOG=1, its lines thrown away."""

    name = "kvk op, KVK_LOG=1"

    def build(self, data: AttentionData | MergeData) -> Prepared:
        """Stderr goes nowhere for the time of a call."""
        import kvk

        plain = super().build(data)
        nowhere, stderr = os.open(os.devnull, os.O_WRONLY), os.dup(2)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            os.dup2(nowhere, 2)
            with kvk.recording(log=1):
                result = plain.run()
            os.dup2(stderr, 2)
            return result

        return Prepared(run, plain.result)


class PythonFunction(Kvk):
    """kvk.<op>, outputs allocated by the op."""

    name = "kvk python function"


class Neg:
    """torch.neg on 32 floats with a given output, directly or through torch.ops."""

    def __init__(self, through_ops: bool) -> None:
        self.function = torch.ops.aten.neg.out if through_ops else torch.neg
        self.name = "aten.neg.out" if through_ops else "torch.neg"

    def unavailable(self, case: Case) -> str | None:
        """Always there."""
        return None

    def build(self, data: AttentionData | MergeData) -> Prepared:
        """Reads nothing of the case's data."""
        x, y = torch.randn(32), torch.empty(32)
        function = self.function
        return Prepared(lambda: function(x, out=y), None)


@pytest.mark.parametrize(
    "case",
    [
        CallCase(AttentionCase("f32", q_heads=1, kv_heads=1, kv_len=1, page_size=1, head_dim=32)),
        CallCase(MergeCase("f32", parts=2, tokens=1, heads=1, head_dim=8)),
    ],
    ids=lambda case: f"{case.op}-{case.name}",
)
def bench_call_cost(case: CallCase, measure: Measure) -> None:
    measure(case, [OpOut(), Logged(), Neg(through_ops=False), Neg(through_ops=True), PythonFunction()])
