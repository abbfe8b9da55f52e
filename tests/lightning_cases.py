"""Random calls of the lightning ops, and how their results are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import kvk
import torch
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_error_rule
from torch import Tensor

CHUNK = 64
DECAYS = ("none", "head", "token", "strong", "mixed")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def shapes(batches: int, tokens: int, dims: tuple[int, int]) -> st.SearchStrategy[tuple[int, ...]]:
    """(batch, tokens, heads, Dk, Dv): the first arguments of make_case, here and in linear_cases."""
    dim = st.integers(*dims)
    return st.tuples(st.integers(1, batches), st.integers(0, tokens), st.integers(1, 3), dim, dim)


# Bad cu_seqlens of 6 tokens, and words of their errors.
BAD_STARTS = [
    (int32(1, 3), ["start at 0", "got 1"]),
    (int32(0, 4, 3, 6), ["decrease", "got 3 after 4"]),
    (int32(0, 7), ["within the 6 tokens", "got 7"]),
    (int32(), ["at least one"]),
    (torch.tensor([0, 6]), ["int32"]),
    (int32(0, 6)[None], ["shape"]),
    (int32(0, 6).to("meta"), ["meta"]),
]


def decays(kind: str, shape: tuple[int, int, int], gen: torch.Generator) -> Tensor | None:
    """log_decay for [B, T, H]: per head, per token, so strong that all before is forgotten, or of every size."""
    if kind == "none":
        return None
    if kind == "head":
        return -torch.rand(shape[2], generator=gen)
    u = torch.rand(shape, generator=gen)
    if kind == "token":
        return -0.5 * u
    return -50 * u if kind == "strong" else -50 * u**8


@dataclass
class LightningCase:
    """The arguments of one call of lightning_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    scale: float = 1.0
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def with_(self, **changes: Any) -> LightningCase:
        return replace(self, **changes)

    @property
    def args(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {"scale": self.scale, "initial_state": self.initial_state, "cu_seqlens": self.cu_seqlens}
        return (self.q, self.k, self.v, self.log_decay), named

    def run(self) -> tuple[Tensor, Tensor]:
        args, named = self.args
        return kvk.lightning_attention(*args, **named)

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        args, named = self.args
        return reference.lightning_attention(*args, **named, compute_dtype=dtype)

    def sequence(self, n: int, start: int, end: int) -> LightningCase:
        """Tokens start to end of batch row n alone, without its state."""
        decay = self.log_decay
        if decay is not None and decay.dim() == 3:
            decay = decay[n : n + 1, start:end]
        q, k, v = (x[n : n + 1, start:end] for x in (self.q, self.k, self.v))
        return self.with_(q=q, k=k, v=v, log_decay=decay, initial_state=None, cu_seqlens=None)


def make_case(
    batch: int = 1,
    tokens: int = 100,
    heads: int = 2,
    dk: int = 32,
    dv: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    decay: str = "token",
    state: bool = True,
    starts: Tensor | None = None,
    scale: float = 0.3,
    seed: int = 0,
) -> LightningCase:
    """Unit-variance q, k, v and state."""
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, tokens, heads, dk, generator=gen).to(dtype) for _ in range(2))
    v = torch.randn(batch, tokens, heads, dv, generator=gen).to(dtype)
    count = batch if starts is None else len(starts) - 1
    initial = torch.randn(count, heads, dk, dv, generator=gen) if state else None
    return LightningCase(q, k, v, decays(decay, (batch, tokens, heads), gen), scale, initial, starts)


def groups(x: Tensor) -> Tensor:
    """[B, T, ..] as rows of 16 tokens, the last ones with zeros. An output is a sum that may cancel, so that its own
    size says little about its error; that of its neighbours does."""
    x = x.flatten(2) if x.dim() > 2 else x[..., None]
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 16))
    return x.reshape(x.shape[0], x.shape[1] // 16, 16 * x.shape[2])


def check(case: LightningCase) -> tuple[Tensor, Tensor]:
    """Runs a case and holds it to the error rule."""
    out, final = case.run()
    check_results(case, out, final)
    return out, final


def check_results(case: LightningCase, out: Tensor, final: Tensor) -> None:
    """Holds what came out of a case to the error rule."""
    assert out.dtype == case.q.dtype and out.shape == case.v.shape and out.is_contiguous()
    assert final.dtype == torch.float32
    exact_out, exact_final = case.reference()
    plain_out, plain_final = case.reference(case.q.dtype)
    assert_error_rule(groups(out), groups(exact_out), groups(plain_out), per_row=True, what="out")
    assert_error_rule(
        *(x.flatten(-2) for x in (final, exact_final, plain_final)), per_row=True, what="final_state"
    )
