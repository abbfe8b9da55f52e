"""DuoAttention's streaming heads (Xiao et al., ICLR 2025) for the prompt: half of the kv heads see the first and the
newest keys only.

    from kvk.recipes.duo_attention import choose_streaming_heads, register_duo_attention

    streaming = choose_streaming_heads(model, ids)      # once a model, on any text of a few thousand tokens
    register_duo_attention("duo", streaming)
    model.set_attn_implementation("duo")

Where it departs from the paper's code: there a gate for each head is trained on a retrieval task; here the heads are
taken whose output on the text changes least, in proportion, when they stream. Sinks and the newest keys are counted in
blocks of 64. Decoding is kvk's, over all keys: the cache keeps what streaming heads no longer look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvk.integrations.transformers_prefill import register_prefill
from kvk.recipes.minference import AShape, Pattern, run_over_prompt, sparse_prefill

STREAMING = AShape(sink=2, local=4)  # 128 and 256 tokens


def register_duo_attention(
    name: str, streaming: Sequence[Sequence[bool]], pattern: AShape = STREAMING
) -> None:
    """Make `name` an attention implementation of transformers in whose prompts the kv heads with
    `streaming[layer][kv head]` see `pattern`, and the others all keys."""

    def prefill(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        group = q.shape[1] // k.shape[1]
        heads: list[Pattern | None] = [
            pattern if on else None for on in streaming[layer] for _ in range(group)
        ]
        return sparse_prefill(q, k, v, heads, scale)

    register_prefill(name, prefill)


@torch.no_grad()
def choose_streaming_heads(
    model: Any, ids: Tensor, share: float = 0.5, pattern: AShape = STREAMING
) -> list[list[bool]]:
    """[layer][kv head]: which heads stream, the `share` of all heads of the model whose outputs change least.

    Args:
        model: of transformers; its attention implementation is put back.
        ids: int64 [1, T], a text longer than the pattern.
        share: 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    changes: list[Tensor] = []

    def compare(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        dense = sparse_prefill(q, k, v, [None] * q.shape[1], scale)
        error = (sparse_prefill(q, k, v, [pattern] * q.shape[1], scale) - dense).float().square()
        of_heads = [x.sum((0, 2)).view(k.shape[1], -1).sum(1) for x in (error, dense.float().square())]
        changes.append(of_heads[0] / of_heads[1])
        return dense

    run_over_prompt(model, ids, compare)
    change = torch.stack(changes)
    order = change.flatten().argsort()
    streams = torch.zeros(change.numel(), dtype=torch.bool)
    streams[order[: round(share * change.numel())]] = True
    return streams.view(change.shape).tolist()
