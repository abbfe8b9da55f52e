"""What is measured of lightning attention: inputs, references, least bytes and FLOPs, and peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bench.cases import DTYPES, TOLERANCE, _require, _short, relative_error
from bench.harness import Prepared

CHUNK = 64


def judged(case: Any, result: torch.Tensor, want: torch.Tensor) -> float:
    """The error of a result, if its dtype allows it."""
    error = relative_error(result, want)
    _require(error, TOLERANCE[case.dtype], "the result")
    return error


def _normal(seed: int, device: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Draws random tensors by their shape."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)


@dataclass(frozen=True)
class LightningCase:
    """The forward pass, or forward and backward in `lightning_attention_backward`'s terms, of one sequence."""

    tokens: int
    dtype: str = "f32"
    heads: int = 16
    dim: int = 128
    decay: bool = True
    backward: bool = False
    decay_grad: bool = False  # in the backward, that of the decays, too
    quick: bool = False
    headline: bool = False
    bandwidth: ClassVar[str] = "read"

    @property
    def op(self) -> str:
        """The op that is measured."""
        return "lightning_attention_backward" if self.backward else "lightning_attention"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        end = "" if self.decay else "-no-decay"
        end += "-decay-grad" if self.decay_grad else ""
        return f"{self.dtype}-{self.heads}h-{_short(self.tokens)}x{self.dim}{end}"

    @property
    def bytes(self) -> int:
        """q, k, v and out (backward: their gradients, too) once; the final state."""
        rows = self.tokens * self.heads * self.dim * DTYPES[self.dtype].itemsize
        return (7 if self.backward else 4) * rows + 4 * self.heads * self.dim**2

    @property
    def flops(self) -> int:
        """Of the chunked form with 64 tokens, triangles as halves: C (Dk + Dv) + 4 Dk Dv a token and head; backward
        5 C (Dk + Dv) / 2 + 10 Dk Dv."""
        scores, states = 2 * CHUNK * self.dim, 2 * self.dim**2
        each = scores * 5 // 2 + 5 * states if self.backward else scores + 2 * states
        return self.tokens * self.heads * each

    def make(self, seed: int, device: str = "cpu") -> LightningData:
        """Unit-variance tensors; ALiBi's decays of a middle layer."""
        import kvk

        normal = _normal(seed, device, DTYPES[self.dtype])
        q, k, v, grad = (normal(1, self.tokens, self.heads, self.dim) for _ in range(4))
        decay = kvk.lightning_slopes(self.heads, 3, 12, device=device) if self.decay else None
        return LightningData(self, q, k, v, grad, decay, self.dim**-0.5)


@dataclass
class LightningData:
    """The tensors of one draw."""

    case: LightningCase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    decay: torch.Tensor | None
    scale: float

    def check(self, result: Any) -> float:
        """The error of the first tokens' output (backward: of their dq), against the recurrence."""
        from kvk import reference

        n = min(200, self.case.tokens)
        first = [x[:, :n] for x in (self.q, self.k, self.v)]
        if self.case.backward:
            want = reference.lightning_attention_backward(
                self.grad[:, :n], None, *first, self.decay, scale=self.scale
            )[0]
        else:
            want = reference.lightning_attention(*first, self.decay, scale=self.scale)[0]
        return judged(self.case, result[:, :n], want)

    def reset(self) -> None:
        """Nothing is written in place."""


def ours(data: LightningData) -> torch.Tensor:
    """kvk: out, or dq."""
    import kvk

    if data.case.backward:
        grads = torch.ops.kvk.lightning_attention_backward(
            data.grad,
            None,
            data.q,
            data.k,
            data.v,
            data.decay,
            scale=data.scale,
            decay_grad=data.case.decay_grad,
        )
        return grads[0]
    return kvk.lightning_attention(data.q, data.k, data.v, data.decay, scale=data.scale)[0]


def chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The chunked form with torch's matrix products: all chunks' scores at once, the states one by one."""
    heads, dim = q.shape[2], q.shape[3]
    q, k, v = (x[0].transpose(0, 1).reshape(heads, -1, CHUNK, dim) for x in (q, k, v))
    log = torch.zeros(heads) if decay is None else decay
    at = torch.arange(CHUNK)
    weights = torch.exp((at[:, None] - at).clamp(min=0) * log[:, None, None]).tril()
    since_start = torch.exp((at + 1) * log[:, None])[..., None]
    to_end = torch.exp((CHUNK - 1 - at) * log[:, None])[..., None]
    whole = torch.exp(CHUNK * log)[:, None, None]
    inside = (q @ k.mT * weights[:, None] * scale) @ v
    added = (k * to_end[:, None]).mT @ v
    states = [torch.zeros_like(added[:, 0])]
    for c in range(added.shape[1] - 1):
        states.append(whole * states[-1] + added[:, c])
    past = (q * since_start[:, None] * scale) @ torch.stack(states, 1)
    return (inside + past).reshape(heads, -1, dim).transpose(0, 1)[None]


class TorchChunks:
    """The chunked form in plain torch; its gradient is autograd's."""

    name = "torch matmuls"

    def unavailable(self, case: Any) -> str | None:
        """torch's 16-bit matrix products on a CPU are a hundred times slower than its float32 ones."""
        return None if case.dtype == "f32" and case.tokens % CHUNK == 0 else "float32 and whole chunks only"

    def forward(self, data: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What is differentiated."""
        return chunked(q, k, v, data.decay, data.scale)

    def build(self, data: Any) -> Prepared:
        """The forward pass of a backward is not timed."""
        if not data.case.backward:
            return Prepared(lambda: self.forward(data, data.q, data.k, data.v), lambda out: out)
        leaves = [x.clone().requires_grad_() for x in (data.q, data.k, data.v)]
        out = self.forward(data, *leaves)
        return Prepared(
            lambda: torch.autograd.grad(out, leaves, data.grad, retain_graph=True), lambda got: got[0]
        )


class PagedPrefill:
    """kvk's own causal softmax attention of as many tokens: another function, for its time."""

    name = "kvk paged_prefill"

    def unavailable(self, case: LightningCase) -> str | None:
        """Up to 8192 tokens, where it takes seconds."""
        return "up to 8k tokens" if case.backward or case.tokens > 8192 else None

    def build(self, data: LightningData) -> Prepared:
        """Keys and values as one page."""
        import kvk

        tokens = data.case.tokens
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        table, lens = torch.zeros(1, 1, dtype=torch.int32), starts[1:]
        return Prepared(lambda: kvk.paged_prefill(data.q[0], starts, data.k, data.v, table, lens), None)


class OnnxLinearAttention:
    """ONNX Runtime's LinearAttention (com.microsoft)."""

    name = "onnxruntime LinearAttention"

    def unavailable(self, case: LightningCase) -> str | None:
        """f32, forward, where onnx and onnxruntime are installed."""
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        return None if case.dtype == "f32" and not case.backward else "forward in float32 only"

    def build(self, data: LightningData) -> Prepared:
        """Heads side by side; a decay per head is spread over the tokens."""
        import onnxruntime
        from onnx import TensorProto, helper

        case = data.case
        names = ["query", "key", "value"] + (["", "decay"] if case.decay else [])
        rows = {"query": data.q, "key": data.k, "value": data.v}
        feeds = {name: x.flatten(2).numpy() for name, x in rows.items()}
        if data.decay is not None:
            feeds["decay"] = data.decay.expand(1, case.tokens, case.heads).contiguous().numpy()

        def info(name: str, shape: list[int]) -> Any:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        node = helper.make_node(
            "LinearAttention",
            names,
            ["output", "present_state"],
            domain="com.microsoft",
            q_num_heads=case.heads,
            kv_num_heads=case.heads,
            scale=data.scale,
            update_rule="gated" if case.decay else "linear",
        )
        graph = helper.make_graph(
            [node],
            "linear",
            [info(name, list(x.shape)) for name, x in feeds.items()],
            [
                info("output", [1, case.tokens, case.heads * case.dim]),
                info("present_state", [1, case.heads, case.dim, case.dim]),
            ],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return Prepared(
            lambda: session.run(["output"], feeds)[0], lambda out: torch.from_numpy(out).reshape(data.v.shape)
        )


@dataclass(frozen=True)
class LightningDecodeCase:
    """A decode step of `batch` rows on states that are read and written once."""

    batch: int
    dtype: str = "bf16"
    heads: int = 16
    dim: int = 128
    quick: bool = False
    headline: bool = False
    op: ClassVar[str] = "lightning_decode"
    bandwidth: ClassVar[str] = "copy"

    @property
    def name(self) -> str:
        """A label that is unique in the run."""
        return f"{self.dtype}-{self.heads}h-{self.batch}x{self.dim}"

    @property
    def bytes(self) -> int:
        """Each state read and written; q, k, v, out."""
        rows = 4 * self.batch * self.heads * self.dim * DTYPES[self.dtype].itemsize
        return rows + 8 * self.batch * self.heads * self.dim**2

    @property
    def flops(self) -> int:
        """Decay, k v^T and S^T q: 5 an element of the state."""
        return 5 * self.batch * self.heads * self.dim**2

    def make(self, seed: int, device: str = "cpu") -> LightningDecodeData:
        """Unit-variance tensors; the slots in random order."""
        import kvk

        normal = _normal(seed, device, DTYPES[self.dtype])
        q, k, v = (normal(self.batch, self.heads, self.dim) for _ in range(3))
        state = _normal(seed + 1, device, torch.float32)(self.batch, self.heads, self.dim, self.dim)
        order = torch.Generator().manual_seed(seed)
        slots = torch.randperm(self.batch, generator=order).to(device, torch.int32)
        decay = kvk.lightning_slopes(self.heads, 3, 12, device=device)
        return LightningDecodeData(self, q, k, v, state, slots, decay, state.clone())


@dataclass
class LightningDecodeData:
    """The tensors of one draw; `first` is the pool as it was."""

    case: LightningDecodeCase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    state: torch.Tensor
    slots: torch.Tensor
    decay: torch.Tensor
    first: torch.Tensor

    def check(self, result: torch.Tensor) -> float:
        """The error of the step from the first pool."""
        from kvk import reference

        want, _ = reference.lightning_decode(self.q, self.k, self.v, self.first, self.slots, self.decay)
        return judged(self.case, result, want)

    def reset(self) -> None:
        """The pool as it was."""
        self.state.copy_(self.first)


def decode(data: LightningDecodeData) -> torch.Tensor:
    """kvk."""
    import kvk

    return kvk.lightning_decode(data.q, data.k, data.v, data.state, data.slots, data.decay)


def torch_decode(data: LightningDecodeData) -> torch.Tensor:
    """The two lines of the recurrence, with the slots gathered and scattered."""
    at = data.slots.long()
    q, k, v = (x.float() for x in (data.q, data.k, data.v))
    state = data.state[at] * data.decay.exp()[:, None, None] + k[..., None] * v[..., None, :]
    data.state[at] = state
    out: torch.Tensor = (q[..., None, :] @ state)[..., 0, :].to(data.q.dtype)
    return out
