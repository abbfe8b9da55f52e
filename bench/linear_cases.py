"""What is measured of normalised linear attention and the Taylor map: inputs, references, bytes and FLOPs, peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bench.cases import DTYPES, _short
from bench.lightning_cases import CHUNK, TorchChunks, chunked, judged


@dataclass(frozen=True)
class LinearCase:
    """The forward pass of one sequence, or its gradient; block: 1 causal, more block-causal, 0 bidirectional."""

    tokens: int
    block: int = 1
    heads: int = 16
    dim: int = 128
    dtype: str = "f32"
    backward: bool = False
    quick: bool = False
    headline: bool = False
    bandwidth: ClassVar[str] = "read"

    @property
    def op(self) -> str:
        """The op that is measured."""
        return "linear_attention_backward" if self.backward else "linear_attention"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        mask = {0: "all", 1: "causal"}.get(self.block, f"blocks-of-{self.block}")
        return f"{self.dtype}-{self.heads}h-{_short(self.tokens)}x{self.dim}-{mask}"

    @property
    def options(self) -> dict[str, Any]:
        """The mask, as the op takes it."""
        return {"causal": self.block > 0, "block_size": max(1, self.block)}

    @property
    def bytes(self) -> int:
        """q, k, v and out (backward: their gradients, too) once; denominators and final states."""
        rows = self.tokens * self.heads * self.dim * DTYPES[self.dtype].itemsize
        rest = 0 if self.backward else 4 * self.heads * (self.tokens + self.dim * (self.dim + 1))
        return (7 if self.backward else 4) * rows + rest

    @property
    def flops(self) -> int:
        """k v^T and S^T q; where blocks share chunks of 64, visible scores, too: C (Dk + Dv) causal. Backward: for each
        of q, k and v as much, but for two states instead of three."""
        states = 4 * self.dim**2
        scores = 2 * self.dim * (CHUNK + self.block - 1) if 0 < self.block <= CHUNK // 2 else 0
        each = 5 * states // 2 + 5 * scores // 2 if self.backward else states + scores
        return self.tokens * self.heads * each

    def make(self, seed: int, device: str = "cpu") -> LinearData:
        """elu + 1 of unit-variance q and k."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (1, self.tokens, self.heads, self.dim)
        q, k, v, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
        q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        return LinearData(self, *(x.to(DTYPES[self.dtype]) for x in (q, k, v, grad)))


@dataclass
class LinearData:
    """The tensors of one draw."""

    case: LinearCase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor

    def check(self, result: Any) -> float:
        """The error of one head's output, or of its dq; masked, those of the first tokens do not see the others."""
        from kvk import reference

        n = min(2048, self.case.tokens) if self.case.block else self.case.tokens
        rows = [x[:, :n, :1] for x in (self.q, self.k, self.v)]
        if self.case.backward:
            want = reference.linear_attention_backward(
                self.grad[:, :n, :1], None, None, None, *rows, **self.case.options
            )[0]
        else:
            want = reference.linear_attention(*rows, **self.case.options)[0]
        return judged(self.case, result[:, :n, :1], want)

    def reset(self) -> None:
        """Nothing is written in place."""


def ours(data: LinearData) -> torch.Tensor:
    """kvk: out, or dq."""
    import kvk

    if data.case.backward:
        grads = torch.ops.kvk.linear_attention_backward(
            data.grad, None, None, None, data.q, data.k, data.v, **data.case.options
        )
        return grads[0]
    return kvk.linear_attention(data.q, data.k, data.v, **data.case.options)[0]


def in_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> torch.Tensor:
    """The same with torch's matrix products: a sum over all, over blocks, or in chunks of causal tokens."""
    if block == 1:
        num = chunked(q, k, v, None, 1.0)
        return num / ((q * k.cumsum(1)).sum(-1, keepdim=True) + 1e-6)
    step, heads, dim = block or q.shape[1], q.shape[2], q.shape[3]
    q, k, v = (x[0].transpose(0, 1).reshape(heads, -1, step, dim) for x in (q, k, v))
    num = q @ (k.mT @ v).cumsum(1)
    out = num / (q @ k.sum(2).cumsum(1)[..., None] + 1e-6)
    return out.reshape(heads, -1, dim).transpose(0, 1)[None]


class TorchLinear(TorchChunks):
    """in_torch; its gradient is autograd's."""

    def unavailable(self, case: LinearCase) -> str | None:
        """As of TorchChunks; blocks are whole, too."""
        whole = case.tokens % (CHUNK if case.block == 1 else case.block or 1) == 0
        return None if case.dtype == "f32" and whole else "float32 and whole chunks only"

    def forward(self, data: LinearData, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The mask is the case's."""
        return in_torch(q, k, v, data.case.block)


@dataclass(frozen=True)
class TaylorCase:
    """The map of `rows` rows of `dim` channels, or its gradient."""

    rows: int
    dim: int = 16
    dtype: str = "f32"
    backward: bool = False
    quick: bool = False
    headline: bool = False
    bandwidth: ClassVar[str] = "copy"

    @property
    def op(self) -> str:
        """The op that is measured."""
        return "taylor_feature_map_backward" if self.backward else "taylor_feature_map"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.dtype}-{_short(self.rows)}x{self.dim}"

    @property
    def features(self) -> int:
        """Of a row."""
        return 1 + self.dim + self.dim * (self.dim + 1) // 2

    @property
    def bytes(self) -> int:
        """Rows in, features out; backward: rows and the features' gradients in, the rows' out."""
        return (
            self.rows * (self.dim * (2 if self.backward else 1) + self.features) * DTYPES[self.dtype].itemsize
        )

    @property
    def flops(self) -> int:
        """A product a feature, and its factor; backward: the factor, then two multiply-adds."""
        pairs = self.dim * (self.dim + 1) // 2
        return self.rows * (self.dim + (5 if self.backward else 2) * pairs)

    def make(self, seed: int) -> TaylorData:
        """Unit-variance rows, and gradients of their features."""
        generator, dtype = torch.Generator().manual_seed(seed), DTYPES[self.dtype]
        x, grad = (
            torch.randn(self.rows, n, generator=generator).to(dtype) for n in (self.dim, self.features)
        )
        return TaylorData(self, x, grad, torch.empty_like(grad))


@dataclass
class TaylorData:
    """The rows of one draw."""

    case: TaylorCase
    x: torch.Tensor
    grad: torch.Tensor
    out: torch.Tensor  # written: the pages of a new tensor cost more than the map, and are the allocator's

    def check(self, result: torch.Tensor) -> float:
        """The error of the first rows."""
        from kvk import reference

        x, grad = self.x[:1000], self.grad[:1000]
        backward = self.case.backward
        want = reference.taylor_feature_map_backward(grad, x) if backward else reference.taylor_feature_map(x)
        return judged(self.case, result[:1000], want)

    def reset(self) -> None:
        """Nothing is written in place."""


def taylor(data: TaylorData) -> torch.Tensor:
    """kvk."""
    import kvk

    if data.case.backward:
        return torch.ops.kvk.taylor_feature_map_backward(data.grad, data.x)
    return kvk.taylor_feature_map(data.x, out=data.out)


def torch_taylor(data: TaylorData) -> torch.Tensor:
    """Gathered factors, in torch; the gradient is autograd's, the forward pass with it."""
    x, d = data.x.float().requires_grad_(data.case.backward), data.case.dim
    i, j = torch.triu_indices(d, d)
    factor = torch.where(i == j, (2 * d) ** -0.5, d**-0.5)
    pairs = x[:, i] * x[:, j] * factor
    parts = [torch.ones_like(x[:, :1]), x * d**-0.25, pairs]
    if data.case.backward:
        return torch.autograd.grad(torch.cat(parts, -1), x, data.grad.float())[0].to(data.x.dtype)
    if x.dtype == data.out.dtype:
        return torch.cat(parts, -1, out=data.out)
    return data.out.copy_(torch.cat(parts, -1))
