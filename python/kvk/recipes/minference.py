"""MInference (Jiang et al., NeurIPS 2024): a long prompt's attention over the part of it that each head looks at.

    from kvk.recipes.minference import choose_patterns, register_minference

    patterns = choose_patterns(model, ids)          # once a model, on a text as long as the prompts
    register_minference("minference", patterns)
    model.set_attn_implementation("minference")     # prompts are sparse; decoding is kvk's, over all keys

A head has one of three patterns: some keys and some distances, estimated for each prompt from its last 64 queries
(vertical-slash); for each block of queries the key blocks of the largest mean product (block-sparse); the first and
the newest blocks (A-shape). Which of them, is a property of the head.

Where it departs from the paper's code: the search compares the outputs of the heads on one text, patterns of one cost
beside each other, and knows no kernel's speed; blocks of all patterns are 64 keys; bands of distances are not rounded
up to runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvk.integrations.transformers_prefill import register_prefill
from kvk.ops.block_sparse import block_sparse_attention, vertical_slash_attention
from kvk.patterns import block_mask_to_csr, pooled_block_mask, streaming_mask, vertical_slash_index

BLOCK = 64


@dataclass(frozen=True)
class VerticalSlash:
    """So many keys, and so many distances, which are bands of 64 keys."""

    vertical: int
    slash: int


@dataclass(frozen=True)
class TopBlocks:
    """So many key blocks of 64 for each query block."""

    top: int


@dataclass(frozen=True)
class AShape:
    """So many blocks of 64 at the beginning and up to the query's own."""

    sink: int
    local: int


Pattern = VerticalSlash | TopBlocks | AShape
# What a head may be, at about the same number of keys a query: 1000 of a prompt of 8192. 100 of the distances are the
# nearest, and the others lie close together, so that their bands overlap.
CANDIDATES: tuple[Pattern, ...] = (
    VerticalSlash(128, 256),
    VerticalSlash(640, 160),
    TopBlocks(16),
    AShape(2, 14),
)


def _of_heads(q: Tensor, k: Tensor, heads: list[int]) -> tuple[Tensor, Tensor]:
    """q of these query heads, and k of the kv head of each."""
    group = q.shape[1] // k.shape[1]
    return q[:, heads], k[:, [head // group for head in heads]]


def _block_mask(pattern: Pattern | None, q: Tensor, k: Tensor, heads: list[int]) -> Tensor:
    """bool [Mb, Nb], or [len(heads), Mb, Nb]"""
    blocks = -(-q.shape[0] // BLOCK)
    if isinstance(pattern, TopBlocks):
        return pooled_block_mask(*_of_heads(q, k, heads), BLOCK, BLOCK, pattern.top)
    if isinstance(pattern, AShape):
        return streaming_mask(blocks, blocks, pattern.sink, pattern.local, device=q.device)
    return torch.ones(blocks, blocks, dtype=torch.bool, device=q.device)


def sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[Pattern | None], scale: float | None
) -> Tensor:
    """Causal attention of one prompt, q [T, Hq, D], each query head after its pattern; None: over all keys.

    Two calls at most serve all heads: of either a head without a list costs nothing and gives 0.
    """
    heads: dict[Pattern | None, list[int]] = {}
    for head, pattern in enumerate(patterns):
        heads.setdefault(pattern, []).append(head)
    slashes = {pattern: on for pattern, on in heads.items() if isinstance(pattern, VerticalSlash)}
    blocks = {pattern: on for pattern, on in heads.items() if pattern not in slashes}
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    if blocks:
        count = -(-q.shape[0] // BLOCK)
        mask = torch.zeros(q.shape[1], count, count, dtype=torch.bool, device=q.device)
        for pattern, on in blocks.items():
            mask[on] = _block_mask(pattern, q, k, on)
        out += block_sparse_attention(
            q, k, v, *block_mask_to_csr(mask[None]), BLOCK, BLOCK, causal=True, softmax_scale=scale
        )[0]
    if slashes:
        widths = max(p.vertical for p in slashes), max(p.slash for p in slashes)
        lists = [torch.full((1, q.shape[1], n), -1, dtype=torch.int32, device=q.device) for n in widths]
        for pattern, on in slashes.items():
            counts = pattern.vertical, pattern.slash
            found = vertical_slash_index(*_of_heads(q, k, on), *counts, softmax_scale=scale)
            for whole, own in zip(lists, found, strict=True):
                whole[:, on, : own.shape[2]] = own
        out += vertical_slash_attention(q, k, v, *lists, softmax_scale=scale)[0]
    return out


def register_minference(name: str, patterns: Sequence[Sequence[Pattern | None]]) -> None:
    """Make `name` an attention implementation of transformers whose prompts follow `patterns[layer][query head]`."""

    def prefill(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return sparse_prefill(q, k, v, patterns[layer], scale)

    register_prefill(name, prefill)


@torch.no_grad()
def choose_patterns(
    model: Any, ids: Tensor, candidates: Sequence[Pattern] = CANDIDATES
) -> list[list[Pattern]]:
    """For every layer and query head the candidate whose output on the text is closest to dense attention's.

    Args:
        model: of transformers; its attention implementation is put back.
        ids: int64 [1, T], a text about as long as the prompts will be: of a shorter one the candidates see more, and
            another may be best.
    """
    chosen: dict[int, list[Pattern]] = {}

    def compare(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        dense = sparse_prefill(q, k, v, [None] * q.shape[1], scale)
        errors = torch.stack(
            [
                (sparse_prefill(q, k, v, [pattern] * q.shape[1], scale) - dense).float().square().sum((0, 2))
                for pattern in candidates
            ]
        )
        chosen[layer] = [candidates[i] for i in errors.argmin(0).tolist()]
        return dense

    run_over_prompt(model, ids, compare)
    return [chosen[layer] for layer in range(len(chosen))]


def run_over_prompt(model: Any, ids: Tensor, prefill: Any) -> None:
    """Runs the text through the model with this prefill; see `register_prefill`."""
    before = model.config._attn_implementation
    register_prefill("kvk_calibration", prefill)
    model.set_attn_implementation("kvk_calibration")
    try:
        model(ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
