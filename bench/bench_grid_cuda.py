"""Block-sparse and neighborhood attention on a card: `python -m bench.bench_grid_cuda`, in a checkout.

FLOPs are those of the pairs that are seen. Peers: kvk's own dense prefill, flex_attention compiled under a block mask,
NATTEN for windows. Gradients are timed alone. pytest finds no benchmark here: the CPU's are bench_block_sparse.py and
bench_neighborhood.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from bench.cuda_data import draw
from bench.cuda_run import Suite, run_suite
from bench.harness import Prepared
from bench.masked_cases import (
    BlockSparseCase,
    FlexMasked,
    Kvk,
    KvkDense,
    NeighborhoodCase,
    SparseCase,
    SparseData,
)

CHECKED_HEADS = 2  # fp64 scores of all would be gigabytes
AIM = 0.7  # of the rate of dense attention on the blocks that are visited


class CudaSparse(SparseData):
    """The data on a card; of a result the first heads are checked."""

    def _few(self) -> SparseData:
        tensors = (x[..., :CHECKED_HEADS, :].cpu() for x in (self.q, self.k, self.v, self.grad_out))
        return SparseData(self.case, *tensors)

    @cached_property
    def reference(self) -> tuple[torch.Tensor, ...]:
        """Of those heads."""
        return self._few().reference

    def check(self, result: tuple[torch.Tensor | None, ...]) -> float:
        """Of those heads; lse has no channels."""
        heads = self.q.shape[-2]

        def few(x: torch.Tensor | None) -> torch.Tensor | None:
            if x is None:
                return None
            dim = x.dim() - (1 if x.shape[-1] == heads and x.numel() == self.case.tokens * heads else 2)
            return x.narrow(dim, 0, min(heads, CHECKED_HEADS)).cpu()

        return super().check(tuple(few(x) for x in result))


@draw.register
def draw_sparse(case: SparseCase, seed: int, device: str = "cuda") -> CudaSparse:
    """One draw."""
    data = case.make(seed)
    return CudaSparse(case, *(x.to(device) for x in (data.q, data.k, data.v, data.grad_out)))


def gradient(forward: Callable[..., torch.Tensor], data: CudaSparse, lay: Callable[..., Any]) -> Prepared:
    """A peer's gradients by autograd, through a retained graph; lay(x): x as the peer wants it."""
    leaves = [lay(x).detach().requires_grad_() for x in (data.q, data.k, data.v)]
    out, grad = forward(*leaves), lay(data.grad_out)
    return Prepared(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), lambda grads: grads)


class Flex:
    """torch's flex_attention, compiled, under a block mask; its gradient too."""

    name = FlexMasked.name

    def __init__(self) -> None:
        self._compiled: tuple[Any, Any, Any] | None = None

    def unavailable(self, case: Any) -> str | None:
        """Never."""
        return None

    def build(self, data: CudaSparse) -> Prepared:
        """Compiles once per case; heads first."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        case, device = data.case, data.q.device
        if self._compiled is None or self._compiled[0] != case:
            torch._dynamo.reset()
            with torch.device(device):
                mask = create_block_mask(
                    on_device(case, device), None, None, case.tokens, case.tokens, device=device
                )
            self._compiled = (case, torch.compile(flex_attention, dynamic=False), mask)
        _, compiled, mask = self._compiled

        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = compiled(q, k, v, block_mask=mask)
            return out

        def tokens_first(x: torch.Tensor) -> torch.Tensor:
            return x[0].transpose(0, 1)

        if case.backward:
            prepared = gradient(forward, data, data.heads_first)
            return Prepared(prepared.run, lambda grads: tuple(tokens_first(x) for x in grads))
        inputs = [data.heads_first(x) for x in (data.q, data.k, data.v)]
        return Prepared(lambda: forward(*inputs), lambda out: (tokens_first(out), None))


def on_device(case: Any, device: torch.device) -> Callable[..., Any]:
    """The rule of a case, its pattern on the device."""
    if isinstance(case, BlockSparseCase):
        blocks, size = case.block_mask.to(device), case.block
        return lambda b, h, q, k: blocks[q // size, k // size]
    return case.visible()  # type: ignore[no-any-return]


class Natten:
    """NATTEN's own kernels."""

    name = "natten"

    def unavailable(self, case: Any) -> str | None:
        """Windows alone."""
        if not isinstance(case, NeighborhoodCase):
            return "has windows alone"
        return None if find_spec("natten") else "natten is not installed"

    def build(self, data: CudaSparse) -> Prepared:
        """Its layout is kvk's."""
        import natten

        call = getattr(natten, f"na{len(data.case.extents)}d")

        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = call(q, k, v, kernel_size=data.case.kernel)
            return out

        if data.case.backward:
            return gradient(forward, data, lambda x: x)
        return Prepared(lambda: forward(data.q, data.k, data.v), lambda out: (out, None))


def cases() -> list[SparseCase]:
    """Prompts of 16k tokens at three densities, blocks of 128, images and a volume; then gradients."""
    blocks = BlockSparseCase("bf16", heads=16, head_dim=128, length=16384, headline=True)
    image = NeighborhoodCase("bf16", heads=8, head_dim=64, extents=(128, 128), kernel=(13, 13))
    volume = replace(image, extents=(16, 24, 24), kernel=(7, 9, 9))
    return [
        *(replace(blocks, density=density) for density in (0.05, 0.1, 0.3)),
        replace(blocks, block=128),
        replace(blocks, dtype="f16", head_dim=64),
        image,
        replace(image, kernel=(33, 33)),
        volume,
        replace(blocks, backward=True, headline=False),
        replace(image, backward=True),
        replace(volume, backward=True),
    ]


def implementations(case: SparseCase) -> list[Any]:
    """kvk, then its peers."""
    return [Kvk(), KvkDense(), Flex(), Natten()]


def aim(row: dict[str, Any], case: SparseCase) -> str | None:
    """On the blocks visited, the rate of kvk's own dense attention, nearly."""
    if not case.headline or KvkDense.name not in row["peers"]:
        return None
    wanted = AIM * case.tokens**2 / case.pairs
    return "met" if row["peers"][KvkDense.name]["ratio"] >= wanted else "missed"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    about = (__doc__ or "").splitlines()[0]
    return run_suite(Suite("bench.bench_grid_cuda", about, cases, implementations, aim), argv)


if __name__ == "__main__":
    sys.exit(main())
