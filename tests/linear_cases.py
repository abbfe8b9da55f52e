"""Random calls of linear_attention, and how their results are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import kvk
import torch
from kvk import reference
from kvk_testing import assert_error_rule
from lightning_cases import groups
from torch import Tensor

# What a token sees: alone, blocks that share a chunk of 64 (dividing it or not), blocks of more, all.
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "blocks-of-4": {"block_size": 4},
    "blocks-of-7": {"block_size": 7},
    "blocks-of-32": {"block_size": 32},
    "blocks-of-33": {"block_size": 33},
    "blocks-of-100": {"block_size": 100},
    "all": {"causal": False},
}
RESULTS = ("out", "den", "final_state", "final_z")
OPTIONAL = ("q_den", "k_den", "initial_state", "initial_z")


@dataclass
class LinearCase:
    """The arguments of one call of linear_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_den: Tensor | None = None
    k_den: Tensor | None = None
    initial_state: Tensor | None = None
    initial_z: Tensor | None = None
    cu_seqlens: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> LinearCase:
        return replace(self, **changes)

    @property
    def count(self) -> int:
        """Sequences."""
        return len(self.q) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def named(self) -> dict[str, Any]:
        """Everything behind q, k, v."""
        given = {name: getattr(self, name) for name in OPTIONAL}
        return {**given, "cu_seqlens": self.cu_seqlens, **self.options}

    def run(self, **more: Any) -> tuple[Tensor, ...]:
        return kvk.linear_attention(self.q, self.k, self.v, **self.named, **more)

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        return reference.linear_attention(self.q, self.k, self.v, **self.named, compute_dtype=dtype)

    def sequence(self, n: int, start: int, end: int) -> LinearCase:
        """Tokens start to end of batch row n alone, without its state."""
        rows = {
            name: x if x is None else x[n : n + 1, start:end]
            for name, x in ((name, getattr(self, name)) for name in ("q", "k", "v", "q_den", "k_den"))
        }
        return self.with_(**rows, initial_state=None, initial_z=None, cu_seqlens=None)

    def states_of(self, n: int) -> dict[str, Tensor | None]:
        states = {name: getattr(self, name) for name in ("initial_state", "initial_z")}
        return {name: x if x is None else x[n : n + 1] for name, x in states.items()}


def features(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """elu(x) + 1 of unit-variance x: positive, so that denominators do not cancel."""
    return torch.nn.functional.elu(torch.randn(shape, generator=gen)) + 1


def make_case(
    batch: int = 1,
    tokens: int = 100,
    heads: int = 2,
    dk: int = 32,
    dv: int = 24,
    *,
    mask: str = "causal",
    dtype: torch.dtype = torch.float32,
    apart: bool = False,
    state: bool = True,
    starts: Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-6,
    seed: int = 0,
) -> LinearCase:
    """apart: the denominator has q and k of its own, and the numerator's have both signs (as rotated ones do)."""
    gen = torch.Generator().manual_seed(seed)
    rows = (batch, tokens, heads, dk)
    q, k = (features(rows, gen).to(dtype) for _ in range(2))
    v = torch.randn(batch, tokens, heads, dv, generator=gen).to(dtype)
    q_den, k_den = (q, k) if apart else (None, None)
    if apart:
        q, k = (torch.randn(rows, generator=gen).to(dtype) for _ in range(2))
    count = batch if starts is None else len(starts) - 1
    initial = torch.randn(count, heads, dk, dv, generator=gen) if state else None
    z = features((count, heads, dk), gen) if state else None
    options = {**MASKS[mask], "normalize": normalize, "scale": scale, "eps": eps}
    return LinearCase(q, k, v, q_den, k_den, initial, z, starts, options)


def as_rows(name: str, x: Tensor) -> Tensor:
    """What an error is relative to the largest element of, as rows: 16 tokens, or a head's state."""
    if x.dim() == 3 or name.startswith(("final", "initial")):
        return x.flatten(2) if x.dim() == 4 else x
    return groups(x)


def check(case: LinearCase) -> tuple[Tensor, ...]:
    """Runs a case and holds it to the error rule."""
    got = case.run()
    check_results(case, got)
    return got


def check_results(case: LinearCase, got: Sequence[Tensor]) -> None:
    """Holds what came out of a case to the error rule."""
    exact, plain = case.reference(), case.reference(case.q.dtype)
    assert got[0].dtype == case.q.dtype and all(x.dtype == torch.float32 for x in got[1:])
    assert all(x.is_contiguous() for x in got)
    for name, *results in zip(RESULTS, got, exact, plain, strict=True):
        assert results[0].shape == results[1].shape
        assert_error_rule(*(as_rows(name, x) for x in results), per_row=True, what=name)
