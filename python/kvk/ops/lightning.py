"""Lightning linear attention: the op, its gradient, the decode step and the published decay schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, library

from kvk.ops._common import fake, no_results

_ops = torch.ops.kvk


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
    final_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay. Differentiable in q, k, v, log_decay and initial_state.

    For every sequence and head, token by token: ``S = exp(log_decay) * S + k v^T``, ``out = scale * S^T q``. So a token
    sees itself with weight 1 and one n tokens back with the product of the n decays since; nothing is normalised. This
    is Lightning Attention 1 and 2, TransNormerLLM, MiniMax-01, RetNet's retention and scalar-gated linear attention
    (docs/lightning.md); all of them differ in decay and scale alone.

    Computed in chunks of 64 tokens from each sequence's start, in float32: time and memory are linear in T, and a
    sequence's result is the same bits in any batch. Started anew from a state at a multiple of 64 tokens, it is
    the same bits as in one run, elsewhere up to rounding.

    Args:
        q, k: [B, T, H, Dk], float32, bfloat16 or float16 (a card: the 16-bit ones), last stride 1, Dk from 1 to 256 (a
            card: in steps of 8).
        v: [B, T, H, Dv], Dv as Dk, of which it is free.
        log_decay: float32, natural log of the decay, <= 0: [H], or [B, T, H] for gates, or None for no decay. -inf
            forgets all before.
        scale: of the output. 1 for Lightning and MiniMax, Dk ** -0.5 for flash-linear-attention's defaults.
        initial_state: float32 [N, H, Dk, Dv]; None: zeros.
        cu_seqlens: int32 [N + 1], with B = 1: sequence n is the tokens from cu_seqlens[n] to cu_seqlens[n + 1], of any
            number. None: every batch row is a sequence, N = B.
        out, final_state: tensors to write into (no gradient then); give both or none. final_state may be initial_state.

    Returns:
        out [B, T, H, Dv] in q's dtype (0 for tokens behind the last sequence), final_state float32 [N, H, Dk, Dv]: a
        sequence of no tokens keeps its initial state.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or stride; on the CPU also for a positive log_decay
            and for cu_seqlens that decrease or leave the tokens.
    """
    if out is None and final_state is None:
        return _ops.lightning_attention(q, k, v, log_decay, initial_state, cu_seqlens, scale=scale)
    if out is None or final_state is None:
        missing = "out" if out is None else "final_state"
        raise RuntimeError(f"kvk::lightning_attention: out and final_state go together, got no {missing}")
    _ops.lightning_attention.out(
        q, k, v, log_decay, initial_state, cu_seqlens, scale=scale, out=out, final_state=final_state
    )
    return out, final_state


def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slots: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """One token of lightning_attention for each of B rows, on states in a pool, which are updated in place.

    Reads and writes each state once, whatever the length of the sequence; one launch for any batch.

    Args:
        q, k: [B, H, Dk], float32, bfloat16 or float16, last stride 1, Dk from 1 to 256 (a card: in steps of 8).
        v: [B, H, Dv].
        state: float32 [S, H, Dk, Dv], last stride 1: the pool, changed in the slots that are named.
        slots: int32 [B], all different: where row b's state lies. A negative one skips the row: its out is 0.
        log_decay: float32 [H] or [B, H], <= 0, or None for no decay.
        scale: of the output.
        out: tensor to write into.

    Returns:
        out, [B, H, Dv] in q's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or stride; on the CPU also for a slot that the pool
            lacks or that is named twice, and for a positive log_decay.
    """
    if out is None:
        return _ops.lightning_decode(q, k, v, state, slots, log_decay, scale=scale)
    _ops.lightning_decode.out(q, k, v, state, slots, log_decay, scale=scale, out=out)
    return out


def _alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes: a geometric series for a power of two; else that of the next lower one, then every second slope
    of the next higher one."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power == num_heads:
        return slopes
    return slopes + _alibi_slopes(2 * power)[0::2][: num_heads - power]


def lightning_slopes(
    num_heads: int,
    layer: int,
    num_layers: int,
    variant: str = "alibi",
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The log decays of a layer's heads in the published schedules, which do not agree with each other.

    With h the head and l the layer, both from 0, H heads, L layers and s_h ALiBi's slope of head h (2**(-8 (h + 1) / H)
    for a power of two):

    - ``"alibi"``: -s_h * (1 - l / (L - 1) + 1e-5). OpenNLPLab's Lightning Attention and vLLM.
    - ``"alibi_hf"``: -s_h * (1 - l / (L - 1 + 1e-5) + 1e-5), H a power of two. MiniMax-01 in Hugging Face transformers.
    - ``"tnl"``: -(8 h / H) * (1 - l / L). TransNormerLLM's paper and flash-linear-attention; head 0 does not decay.
    - ``"retnet"``: log(1 - 2**(-5 - h)), the same in all layers. RetNet.

    Args:
        num_heads: H. layer: l. num_layers: L; a single layer has factor 1 + 1e-5 in the first two.
        variant: one of the four.
        device: of the result.

    Returns:
        float32 [H], ready for log_decay.

    Raises:
        ValueError: an unknown variant, a layer that is not one of num_layers, or a head count that a variant lacks.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be from 0 to num_layers - 1 = {num_layers - 1}, got {layer}")
    if variant == "alibi":
        factor = 1 - (layer / (num_layers - 1) if num_layers > 1 else 0.0) + 1e-5
        decays = [-s * factor for s in _alibi_slopes(num_heads)]
    elif variant == "alibi_hf":
        if num_heads & (num_heads - 1):
            raise ValueError(
                f"variant 'alibi_hf' has no slopes for num_heads that is no power of two, got {num_heads}"
            )
        factor = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
        decays = [-s * factor for s in _alibi_slopes(num_heads)]
    elif variant == "tnl":
        decays = [-(8.0 * h / num_heads) * (1 - layer / num_layers) for h in range(num_heads)]
    elif variant == "retnet":
        decays = [math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)]
    else:
        raise ValueError(f"variant must be 'alibi', 'alibi_hf', 'tnl' or 'retnet', got {variant!r}")
    return torch.tensor(decays, dtype=torch.float32, device=device)


def _state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((count, q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)


@fake("lightning_attention")
def _(q, v, cu_seqlens=None, **_):
    return v.new_empty(v.shape), _state_like(q, v, cu_seqlens)


@fake("lightning_attention_backward")
def _(q, k, v, log_decay, initial_state=None, cu_seqlens=None, decay_grad=True, **_):
    with_decay = decay_grad and log_decay is not None
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(log_decay.shape if with_decay else 0, dtype=torch.float32),
        q.new_empty(0, dtype=torch.float32) if initial_state is None else _state_like(q, v, cu_seqlens),
    )


@fake("lightning_decode")
def _(v, **_):
    return v.new_empty(v.shape)


fake("lightning_attention.out", "lightning_decode.out")(no_results)


def _save_inputs(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.scale = keyword_only_inputs["scale"]
    ctx.set_materialize_grads(False)  # no gradient of the final state costs nothing


def _backward(ctx: Any, grad_out: Tensor | None, grad_final_state: Tensor | None) -> Any:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    decay_grad = log_decay is not None and ctx.needs_input_grad[3]
    grads = _ops.lightning_attention_backward(
        v.new_zeros(v.shape) if grad_out is None else grad_out.contiguous(),
        None if grad_final_state is None else grad_final_state.contiguous(),
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        scale=ctx.scale,
        decay_grad=decay_grad,
    )
    grad_decay = grads[3] if decay_grad else None
    return *grads[:3], grad_decay, grads[4] if initial_state is not None else None, None


library.register_autograd("kvk::lightning_attention", _backward, setup_context=_save_inputs)
