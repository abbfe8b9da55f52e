"""One row of the demo's table: the workload through one cache, timed, and compared with plain torch attention."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvk.demo.text import Workload

Advance = Callable[[int], None]


@dataclass(frozen=True)
class CacheConfig:
    """A cache and attention to run the model with.

    `max_error` bounds |logit - reference logit|, as a fraction of the reference's largest |logit|. A cache that stores
    fewer bits has `max_loss` instead, which bounds its perplexity as a multiple of the reference's. The reference has
    neither.
    """

    name: str
    attention: str  # transformers' attn_implementation
    new_cache: Callable[[], Any]
    spread: Callable[[Any, int], Any]  # (cache of one row, B) -> cache of B rows that begin with it
    nbytes: Callable[[Any], int]  # bytes the cache holds
    max_error: float | None = None
    max_loss: float | None = None


@dataclass
class Result:
    """What a run gave. Logits are fp32: of the prefix [P, V], the real suffix tokens [sum S_i, V], decode [N, B, V]."""

    config: CacheConfig
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    generated: torch.Tensor = field(
        default_factory=lambda: torch.empty(0, 0, dtype=torch.int64)
    )  # greedy, [B, N]
    perplexity: float = math.nan  # of the prefix, token by token
    nbytes: int = 0
    cached_tokens: int = 0  # of all requests, a shared one counted for each

    def rate(self, *phases: str) -> float:
        """Tokens per second over these phases."""
        return sum(self.tokens[p] for p in phases) / sum(self.seconds[p] for p in phases)


@torch.inference_mode()
def run(
    model: Any,
    config: CacheConfig,
    workload: Workload,
    *,
    chunk: int,
    num_decode: int,
    forced: torch.Tensor | None,
    advance: Advance,
) -> Result:
    """Prefill the prefix in chunks, spread it over the requests, prefill their suffixes, decode.

    Args:
        chunk: tokens per forward pass of the prefix.
        num_decode: tokens to decode for each request, greedily.
        forced: int64 [B, num_decode], tokens to feed in place of the run's own, so that its logits compare with those
            of the run that chose them.
        advance: told the number of tokens after each forward pass.
    """
    model.set_attn_implementation(config.attention)
    result = Result(config)

    def forward(phase: str, num_tokens: int, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        start = time.perf_counter()
        logits: torch.Tensor = model(ids, use_cache=True, **inputs).logits
        result.seconds[phase] = result.seconds.get(phase, 0.0) + time.perf_counter() - start
        result.tokens[phase] = result.tokens.get(phase, 0) + num_tokens
        advance(num_tokens)
        return logits

    cache = config.new_cache()
    prefix = workload.prefix
    parts = [
        forward("prefix", ids.shape[1], ids, past_key_values=cache)[0] for ids in prefix.split(chunk, dim=1)
    ]
    result.logits["prefix"] = torch.cat(parts)
    loss = torch.nn.functional.cross_entropy(result.logits["prefix"][:-1], prefix[0, 1:])
    result.perplexity = math.exp(loss.item())

    batch = workload.num_requests
    cache = config.spread(cache, batch)
    ids, real = workload.padded(model.config.eos_token_id or 0)
    mask = torch.cat([torch.ones(batch, prefix.shape[1], dtype=torch.bool), real], 1)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    logits = forward(
        "suffix",
        int(real.sum()),
        ids,
        past_key_values=cache,
        attention_mask=mask,
        position_ids=positions[:, prefix.shape[1] :],
    )
    result.logits["suffix"] = logits[real]
    logits = logits[:, -1]

    steps, chosen = [], []
    for i in range(num_decode):
        chosen.append(logits.argmax(-1))
        token = chosen[-1] if forced is None else forced[:, i]
        mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        positions = positions[:, -1:] + 1
        logits = forward(
            "decode",
            batch,
            token[:, None],
            past_key_values=cache,
            attention_mask=mask,
            position_ids=positions,
        )[:, 0]
        steps.append(logits)
    result.generated = torch.stack(chosen, 1)
    result.logits["decode"] = torch.stack(steps)
    result.nbytes = config.nbytes(cache)
    result.cached_tokens = int(mask.sum())
    return result


@dataclass(frozen=True)
class Agreement:
    """How a run compares with the reference. Of a run with max_loss, only `loss` decides.

    The rule for greedy tokens: where the reference's two best logits differ by more than twice the largest error
    allowed, no error within the bound can change the choice, so the run must choose the same token.
    """

    max_error: float  # largest |logit - reference|
    allowed: float  # 0 where only the loss is bounded
    positions: int  # logit rows compared
    decided: int  # of those, the ones the rule covers
    wrong: int  # of those, the ones where the run chose another token
    same_choice: int  # of all positions, the ones with the same choice
    loss: float  # perplexity over the reference's
    max_loss: float | None

    @property
    def ok(self) -> bool:
        if self.max_loss is not None:
            return self.loss <= self.max_loss and math.isfinite(self.max_error)
        return self.max_error <= self.allowed and self.wrong == 0


def compare(result: Result, reference: Result) -> Agreement:
    """Agreement over every logit row of the run: prefix, suffixes and decode."""
    max_loss = result.config.max_loss
    assert result.config.max_error is not None or max_loss is not None
    scale = max(float(x.abs().max()) for x in reference.logits.values())
    allowed = (result.config.max_error or 0.0) * scale
    worst, positions, decided, wrong, same_choice = 0.0, 0, 0, 0, 0
    for phase, want in reference.logits.items():
        got = result.logits[phase]
        if got.shape != want.shape or not bool(torch.isfinite(got).all()):
            worst = math.inf
            continue
        for got_rows, want_rows in zip(
            got.flatten(0, -2).split(256), want.flatten(0, -2).split(256), strict=True
        ):
            worst = max(worst, float((got_rows - want_rows).abs().max()))
            best = want_rows.topk(2, dim=-1)
            clear = best.values[:, 0] - best.values[:, 1] > 2 * allowed
            same = got_rows.argmax(-1) == best.indices[:, 0]
            positions += len(same)
            decided += int(clear.sum())
            wrong += int((clear & ~same).sum())
            same_choice += int(same.sum())
    loss = result.perplexity / reference.perplexity
    return Agreement(worst, allowed, positions, decided, wrong, same_choice, loss, max_loss)
