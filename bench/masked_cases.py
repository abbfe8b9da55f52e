"""What the benchmarks of block-sparse and neighborhood attention measure, and the peers they share.

FLOPs are those of the (query, key) pairs that are seen, so a dense implementation under a mask gets a low rate for
the same work. Forward 2 (D + Dv) of them a pair; backward 2.5 times as many, the five products that the mathematics
needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import DTYPES, LSE_TOLERANCE, TOLERANCE, _require, relative_error
from bench.harness import Prepared


@dataclass(frozen=True)
class SparseCase:
    """Attention of tokens to tokens under a mask: what the two families share. q and k have the same tokens."""

    dtype: str
    heads: int = 4
    head_dim: int = 64
    backward: bool = False
    quick: bool = False
    headline: bool = False
    bandwidth: ClassVar[str] = "read"
    causal: ClassVar[bool] = False

    @property
    def tokens(self) -> int:
        """Of q and of k."""
        raise TypeError("a family says")

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one head that are seen."""
        raise TypeError("a family says")

    @property
    def bytes(self) -> int:
        """q, k, v, out and lse once; in the gradient out, lse, their gradients and three results besides."""
        row = self.tokens * self.heads
        tensors = 8 if self.backward else 4
        return row * (tensors * self.head_dim * DTYPES[self.dtype].itemsize + (8 if self.backward else 4))

    @property
    def flops(self) -> int:
        """4 D a pair and head; 10 D in the gradient."""
        return (10 if self.backward else 4) * self.head_dim * self.heads * self.pairs


@dataclass(frozen=True)
class BlockSparseCase(SparseCase):
    """A random pattern of `density` of all blocks, the diagonal always, one for all heads."""

    length: int = 4096
    block: int = 64
    density: float = 0.1

    @property
    def op(self) -> str:
        """The kvk op this case measures."""
        return "block_sparse_attention" + ("_backward" if self.backward else "")

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.dtype}-{self.heads}h-{self.length}-d{self.head_dim}-b{self.block}-{self.density:.0%}"

    @property
    def tokens(self) -> int:
        """Of q and of k."""
        return self.length

    @cached_property
    def block_mask(self) -> torch.Tensor:
        """bool [blocks, blocks], with exactly the wanted number of blocks."""
        n = self.length // self.block
        order = torch.rand(n, n, generator=torch.Generator().manual_seed(n))
        order.fill_diagonal_(-1.0)
        wanted = max(n, round(self.density * n * n))
        return order <= order.flatten().kthvalue(wanted).values

    @property
    def pairs(self) -> int:
        """Of one head."""
        return int(self.block_mask.sum()) * self.block**2

    @property
    def mask(self) -> torch.Tensor:
        """bool [T, T]."""
        return self.block_mask.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)

    def make(self, seed: int) -> SparseData:
        """Random q, k, v."""
        return SparseData.draw(self, (self.length,), seed)

    def visible(self) -> Callable[..., Any]:
        """The mask as flex_attention wants it."""
        blocks, size = self.block_mask, self.block
        return lambda b, h, q, k: blocks[q // size, k // size]


@dataclass(frozen=True)
class VerticalSlashCase(SparseCase):
    """The first keys and random ones, the own diagonal and random ones: a head of MInference. Forward only."""

    length: int = 4096
    verticals: int = 64
    slashes: int = 8
    causal: ClassVar[bool] = True

    @property
    def op(self) -> str:
        """The kvk op this case measures."""
        return "vertical_slash_attention"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.dtype}-{self.heads}h-{self.length}-d{self.head_dim}-{self.verticals}keys-{self.slashes}diagonals"

    @property
    def tokens(self) -> int:
        """Of q and of k."""
        return self.length

    @cached_property
    def lists(self) -> tuple[torch.Tensor, torch.Tensor]:
        """vertical and slash, int32 [1, 1, n]."""
        generator = torch.Generator().manual_seed(self.length)
        vertical, slash = (torch.randperm(self.length, generator=generator, dtype=torch.int32) for _ in "vs")
        vertical[: min(4, self.verticals)] = torch.arange(min(4, self.verticals), dtype=torch.int32)
        slash[0] = 0
        return vertical[None, None, : self.verticals], slash[None, None, : self.slashes]

    @property
    def pairs(self) -> int:
        """Of one head."""
        return int(self.mask.sum())

    @cached_property
    def mask(self) -> torch.Tensor:
        """bool [T, T]."""
        from kvk.reference.block_sparse import vertical_slash_mask

        return vertical_slash_mask(self.length, self.length, *(x[0, 0] for x in self.lists))

    def make(self, seed: int) -> SparseData:
        """Random q, k, v."""
        return SparseData.draw(self, (self.length,), seed)

    def visible(self) -> Callable[..., Any]:
        """The mask as flex_attention wants it."""
        mask = self.mask
        return lambda b, h, q, k: mask[q, k]


@dataclass(frozen=True)
class NeighborhoodCase(SparseCase):
    """Windows of `kernel` in a volume of `extents`."""

    extents: tuple[int, ...] = (64, 64)
    kernel: tuple[int, ...] = (13, 13)

    @property
    def op(self) -> str:
        """The kvk op this case measures."""
        return "neighborhood_attention" + ("_backward" if self.backward else "")

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        by = ["x".join(map(str, x)) for x in (self.extents, self.kernel)]
        return f"{self.dtype}-{self.heads}h-{by[0]}-d{self.head_dim}-k{by[1]}"

    @property
    def tokens(self) -> int:
        """Of q and of k."""
        return math.prod(self.extents)

    @property
    def pairs(self) -> int:
        """Every query sees a whole window."""
        return self.tokens * math.prod(self.kernel)

    @property
    def mask(self) -> torch.Tensor:
        """bool [T, T]."""
        from kvk import reference

        return reference.neighborhood_mask(self.extents, self.kernel)

    def make(self, seed: int) -> SparseData:
        """Random q, k, v."""
        return SparseData.draw(self, self.extents, seed)

    def visible(self) -> Callable[..., Any]:
        """The mask as flex_attention wants it: undilated windows that shift inward."""

        def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
            seen = q >= 0
            for extent, kernel in zip(self.extents[::-1], self.kernel[::-1], strict=True):
                x, y, q, k = q % extent, k % extent, q // extent, k // extent
                start = torch.clamp(x - kernel // 2, 0, extent - kernel)
                seen = seen & (y >= start) & (y < start + kernel)
            return seen

        return rule


@dataclass
class SparseData:
    """One draw: q, k, v [1, X.., H, D], and for gradients the output's."""

    case: Any
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor

    @classmethod
    def draw(cls, case: Any, extents: tuple[int, ...], seed: int) -> SparseData:
        """Random tensors."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, *extents, case.heads, case.head_dim)
        return cls(case, *(torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for _ in range(4)))

    def heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """[1, H, T, D], contiguous, as torch's functions want it."""
        return x.flatten(1, -3).transpose(1, 2).contiguous()

    @cached_property
    def reference(self) -> tuple[torch.Tensor, ...]:
        """(out [T, H, D], lse [T, H]), or (dq, dk, dv), in fp64, head by head."""
        case, hidden = self.case, ~self.case.mask
        results = []
        tensors = [self.heads_first(x)[0].double() for x in (self.q, self.k, self.v, self.grad_out)]
        for q, k, v, grad in zip(*tensors, strict=True):
            scores = (q @ k.T * case.head_dim**-0.5).masked_fill_(hidden, -math.inf)
            lse = scores.logsumexp(-1)
            weights = scores.sub_(lse[:, None]).exp_()
            out = weights @ v
            if not case.backward:
                results.append((out, lse))
                continue
            dv = weights.T @ grad
            ds = weights.mul_(grad @ v.T - (grad * out).sum(-1, keepdim=True)).mul_(case.head_dim**-0.5)
            results.append((ds @ k, ds.T @ q, dv))
        return tuple(torch.stack(x, 1) for x in zip(*results, strict=True))

    def check(self, result: tuple[torch.Tensor | None, ...]) -> float:
        """The largest error; raises WrongResultError beyond the tolerance."""
        case, errors = self.case, []
        names = ("dq", "dk", "dv") if case.backward else ("out", "lse")
        for name, got, want in zip(names, result, self.reference, strict=True):
            if got is None:
                continue
            if name == "lse":
                _require((got.reshape(want.shape).double() - want).abs().max().item(), LSE_TOLERANCE, name)
                continue
            errors.append(relative_error(got.reshape(want.shape), want))
            _require(errors[-1], 2 * TOLERANCE[case.dtype], name)
        return max(errors)

    def reset(self) -> None:
        """Nothing: no implementation changes what it is given."""


class Kvk:
    """The op; its pattern is made ahead, and for gradients the forward's results."""

    name = "kvk"

    def unavailable(self, case: Any) -> str | None:
        """Never."""
        return None

    def build(self, data: SparseData) -> Prepared:
        """As a training loop would call it."""
        import kvk

        case = data.case
        if isinstance(case, VerticalSlashCase):
            inputs = data.q[0], data.k[0], data.v[0]
            return Prepared(lambda: kvk.vertical_slash_attention(*inputs, *case.lists), lambda result: result)
        if isinstance(case, NeighborhoodCase):
            inputs, rest = (data.q, data.k, data.v), (case.kernel,)
            forward, backward = kvk.neighborhood_attention, kvk.neighborhood_attention_backward
            grad_out = data.grad_out
        else:
            inputs = data.q[0], data.k[0], data.v[0]
            mask = case.block_mask[None, None].to(data.q.device)
            rest = (*kvk.block_mask_to_csr(mask), case.block, case.block)
            forward, backward = kvk.block_sparse_attention, kvk.block_sparse_attention_backward
            grad_out = data.grad_out[0]
        if not case.backward:
            return Prepared(lambda: forward(*inputs, *rest), lambda result: result)
        out, lse = forward(*inputs, *rest)
        grad_lse = torch.zeros_like(lse)
        return Prepared(lambda: backward(grad_out, grad_lse, *inputs, out, lse, *rest), lambda result: result)


class KvkDense:
    """kvk's own dense attention over all keys, as one page list: what the sparsity is worth. Its result is another
    one."""

    name = "kvk dense"

    def unavailable(self, case: Any) -> str | None:
        """Forward only."""
        return "paged_prefill has no gradient" if case.backward else None

    def build(self, data: SparseData) -> Prepared:
        """Pages of 64 that lie in order."""
        import kvk

        case, tokens = data.case, data.case.tokens
        q, k, v = (x.reshape(tokens, case.heads, case.head_dim) for x in (data.q, data.k, data.v))
        k, v = (x.view(tokens // 64, 64, case.heads, case.head_dim) for x in (k, v))
        ints = {"dtype": torch.int32, "device": q.device}
        table, lens, starts = (
            torch.arange(tokens // 64, **ints)[None],
            torch.tensor([tokens], **ints),
            torch.tensor([0, tokens], **ints),
        )
        return Prepared(lambda: kvk.paged_prefill(q, starts, k, v, table, lens, causal=case.causal), None)


class SdpaMasked:
    """torch's scaled_dot_product_attention with a boolean mask."""

    name = "torch sdpa masked"

    def unavailable(self, case: Any) -> str | None:
        """Never."""
        return None

    def build(self, data: SparseData) -> Prepared:
        """Heads first; the gradient through a retained graph."""
        case = data.case
        q, k, v = (data.heads_first(x) for x in (data.q, data.k, data.v))
        mask = case.mask
        tokens_first = lambda x: x[0].transpose(0, 1)  # noqa: E731
        if not case.backward:
            return Prepared(
                lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask),
                lambda out: (tokens_first(out), None),
            )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, grad = scaled_dot_product_attention(*leaves, attn_mask=mask), data.heads_first(data.grad_out)
        return Prepared(
            lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
            lambda grads: tuple(tokens_first(x) for x in grads),
        )


class FlexMasked:
    """torch's flex_attention, compiled, under a block mask."""

    name = "torch flex compiled"

    def __init__(self) -> None:
        self._compiled: tuple[Any, Any, Any] | None = None

    def unavailable(self, case: Any) -> str | None:
        """Forward only."""
        return "flex_attention has no gradient on the CPU" if case.backward else None

    def build(self, data: SparseData) -> Prepared:
        """Compiles once per case."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        case = data.case
        if self._compiled is None or self._compiled[0] != case:
            torch._dynamo.reset()
            mask = create_block_mask(case.visible(), None, None, case.tokens, case.tokens, device="cpu")
            self._compiled = (case, torch.compile(flex_attention, dynamic=False, fullgraph=True), mask)
        _, compiled, mask = self._compiled
        q, k, v = (data.heads_first(x) for x in (data.q, data.k, data.v))

        def run() -> torch.Tensor:
            with torch.no_grad():
                result: torch.Tensor = compiled(q, k, v, block_mask=mask)
            return result

        return Prepared(run, lambda out: (out[0].transpose(0, 1), None))


def implementations() -> list[Any]:
    """kvk and everything that it is held against."""
    return [Kvk(), KvkDense(), SdpaMasked(), FlexMasked()]
