"""Lightning linear attention on a card: `python -m bench.bench_lightning_cuda`, in a checkout.

A decode step reads and writes its states once, so the copy bandwidth is its ceiling. Peers: flash-linear-attention's
chunked and recurrent kernels, the recurrence in plain torch, and FlashAttention over as many tokens, which is another
function. Gradients are those of q, k and v, in one row of kvk's also of the decays. pytest finds no benchmark here: the
CPU's are bench_lightning.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.cuda_data import draw
from bench.cuda_run import Suite, run_suite
from bench.harness import Prepared
from bench.lightning_cases import (
    LightningCase,
    LightningData,
    LightningDecodeCase,
    LightningDecodeData,
    decode,
    ours,
    torch_decode,
)
from bench.quant_cases import Ours

DECODE_AIM = 1 / 1.3  # of the copy bandwidth


class CudaLightning(LightningData):
    """The data on a card. A peer that computes another function gives no result."""

    def check(self, result: torch.Tensor | None) -> float:
        """The error, by the reference on the CPU."""
        if result is None:
            return float("nan")
        rows = {name: getattr(self, name)[:, :200].cpu() for name in ("q", "k", "v", "grad")}
        decay = None if self.decay is None else self.decay.cpu()
        case = replace(self.case, tokens=min(200, self.case.tokens))
        return LightningData(case, **rows, decay=decay, scale=self.scale).check(result[:, :200].cpu())


class CudaLightningDecode(LightningDecodeData):
    """The same of a decode step."""

    def check(self, result: torch.Tensor) -> float:
        """The error, by the reference on the CPU."""
        tensors = {name: x.cpu() for name, x in vars(self).items() if name != "case"}
        return LightningDecodeData(self.case, **tensors).check(result.cpu())


@draw.register
def draw_lightning(case: LightningCase, seed: int, device: str = "cuda") -> CudaLightning:
    """One draw of a sequence."""
    return CudaLightning(**vars(case.make(seed, device)))


@draw.register
def draw_lightning_decode(case: LightningDecodeCase, seed: int, device: str = "cuda") -> CudaLightningDecode:
    """One draw of a step."""
    return CudaLightningDecode(**vars(case.make(seed, device)))


class Step(Ours):
    """A way to make the decode step, from the first states on."""

    def build(self, data: CudaLightningDecode) -> Prepared:
        """The states as they were drawn."""
        data.reset()
        return super().build(data)


class Fla:
    """flash-linear-attention's kernels of simple gated linear attention (Triton)."""

    def __init__(self, name: str, call: Callable[[Any], torch.Tensor]) -> None:
        self.name, self.call = f"fla {name}", call

    def unavailable(self, case: Any) -> str | None:
        """Needs the package."""
        return None if find_spec("fla") else "flash-linear-attention is not installed"

    def build(self, data: Any) -> Prepared:
        """Decays per head; of a backward, the forward pass is not timed."""
        if getattr(data.case, "backward", False):
            return gradient(self.call, data, lambda grads: grads[0])
        return Prepared(lambda: self.call(data), lambda out: out)


def gradient(
    call: Callable[[Any], torch.Tensor], data: CudaLightning, result: Callable[..., Any]
) -> Prepared:
    """A peer's gradient of q, k and v, by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (data.q, data.k, data.v)]
    copy = CudaLightning(data.case, *leaves, data.grad, data.decay, data.scale)
    out = call(copy)
    return Prepared(lambda: torch.autograd.grad(out, leaves, data.grad, retain_graph=True), result)


def fla_chunks(data: CudaLightning) -> torch.Tensor:
    """Its chunked form."""
    from fla.ops.simple_gla import chunk_simple_gla

    decay = data.decay
    out: torch.Tensor = chunk_simple_gla(data.q, data.k, data.v, g_gamma=decay, scale=data.scale)[0]
    return out


def fla_step(data: CudaLightningDecode) -> torch.Tensor:
    """Its recurrent form, of one token, with the states gathered and scattered."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    at = data.slots.long()
    q, k, v = (x[:, None] for x in (data.q, data.k, data.v))
    out, state = fused_recurrent_simple_gla(
        q, k, v, g_gamma=data.decay, scale=1.0, initial_state=data.state[at], output_final_state=True
    )
    data.state[at] = state
    result: torch.Tensor = out[:, 0]
    return result


class Flash:
    """torch's FlashAttention, causal, over as many tokens: another function, for its time."""

    name = "sdpa flash"

    def unavailable(self, case: LightningCase) -> str | None:
        """Up to 32768 tokens, where it takes a hundred times as long."""
        return "up to 32k tokens" if case.tokens > 32768 else None

    def build(self, data: CudaLightning) -> Prepared:
        """Tokens before heads, as in memory."""

        def run(data: CudaLightning) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (data.q, data.k, data.v))
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        if data.case.backward:
            return gradient(run, data, lambda _: None)
        return Prepared(lambda: run(data), lambda _: None)


def cases() -> list[LightningCase | LightningDecodeCase]:
    """A serving batch's steps first, then sequences of a model with 64 heads, and one of few."""
    sequence = LightningCase(8192, "bf16", heads=64, headline=True)
    return [
        LightningDecodeCase(64, heads=64, headline=True),
        LightningDecodeCase(1, heads=64),
        LightningDecodeCase(256, heads=16),
        *(replace(sequence, tokens=tokens) for tokens in (2048, 8192, 32768, 131072)),
        replace(sequence, decay=False, headline=False),
        replace(sequence, dtype="f16", headline=False),
        replace(sequence, heads=16, tokens=32768, headline=False),
        replace(sequence, backward=True),
        replace(sequence, backward=True, decay_grad=True, headline=False),
    ]


def implementations(case: LightningCase | LightningDecodeCase) -> list[Any]:
    """kvk, then its peers."""
    if isinstance(case, LightningDecodeCase):
        return [Step(decode), Step(torch_decode, "torch eager"), Fla("recurrent", fla_step)]
    return [Ours(ours), Fla("chunks", fla_chunks), Flash()]


def aim(row: dict[str, Any], case: LightningCase | LightningDecodeCase) -> str | None:
    """Steps: near the copy bandwidth. Sequences: faster than flash-linear-attention."""
    if not case.headline:
        return None
    if isinstance(case, LightningDecodeCase):
        return "met" if row["fraction"] >= DECODE_AIM else "missed"
    if "fla chunks" not in row["peers"]:
        return None
    return "met" if row["peers"]["fla chunks"]["ratio"] >= 1 else "missed"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    about = (__doc__ or "").splitlines()[0]
    return run_suite(Suite("bench.bench_lightning_cuda", about, cases, implementations, aim), argv)


if __name__ == "__main__":
    sys.exit(main())
