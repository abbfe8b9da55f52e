"""Normalised linear attention, bidirectional, causal and block-causal, and the Taylor feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from kvk.ops._common import fake, no_results

_ops = torch.ops.kvk
_RESULTS = ("out", "den", "final_state", "final_z")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    block_size: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-6,
    q_den: Tensor | None = None,
    k_den: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_z: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
    den: Tensor | None = None,
    final_state: Tensor | None = None,
    final_z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear attention with its denominator. Differentiable in all tensors but cu_seqlens.

    With j the tokens that token t sees, S the sum of k_j v_j^T and z the sum of k_den_j over them, both from the
    initial ones on::

        num_t = scale * S^T q_t        den_t = scale * (q_den_t . z)        out_t = num_t / (den_t + eps)

    A causal token sees those up to itself, or, with ``block_size`` > 1, up to the end of its block, counted from the
    sequence's start; a token that is not causal sees all. Feature maps (elu + 1, relu, taylor_feature_map, ...) are
    applied before: docs/linear.md has a table of them, and of what SANA, NaLaFormer and Based ask for. There is no
    decay; lightning_attention has it.

    Computed in chunks, in float32: time and memory are linear in T, and a sequence's result is the same bits in any
    batch and with any number of threads.

    Args:
        q, k: [B, T, H, Dk], float32, bfloat16 or float16 (a card: the 16-bit ones), last stride 1, Dk from 1 to 256 (a
            card: in steps of 8, all rows on multiples of 16 bytes).
        v: [B, T, H, Dv], Dv from 1 to 256.
        causal: False: every token sees its whole sequence.
        block_size: at least 1; 1 if not causal.
        normalize: False: out is the numerator, for a division elsewhere.
        scale: of numerator and denominator; eps: added to the denominator, not negative.
        q_den, k_den: as q and k, for the denominator alone: models that rotate q and k in the numerator do not
            there. None: q (k).
        initial_state, initial_z: float32 [N, H, Dk, Dv] and [N, H, Dk]: what all tokens see beside their own sequence.
            None: zeros.
        cu_seqlens: int32 [N + 1], with B = 1: sequence n is the tokens from cu_seqlens[n] to cu_seqlens[n + 1], of any
            number. None: every batch row is a sequence, N = B.
        out, den, final_state, final_z: tensors to write into (no gradient then); give all or none. The final ones may
            be the initial ones.

    Returns:
        out [B, T, H, Dv] in q's dtype; den float32 [B, T, H], without eps (both 0 for tokens behind the last sequence);
        final_state float32 [N, H, Dk, Dv] and final_z float32 [N, H, Dk], of the whole sequence.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or stride, or is out of range; on the CPU also for
            cu_seqlens that decrease or leave the tokens (on a card with ``KVK_CHECK=1``).
    """
    tensors = (q, k, v, q_den, k_den, initial_state, initial_z, cu_seqlens)
    options = {"causal": causal, "block_size": block_size, "normalize": normalize, "scale": scale, "eps": eps}
    results = dict(zip(_RESULTS, (out, den, final_state, final_z), strict=True))
    missing = [name for name, x in results.items() if x is None]
    if len(missing) == len(results):
        return _ops.linear_attention(*tensors, **options)
    if out is None or den is None or final_state is None or final_z is None:
        raise RuntimeError(
            f"kvk::linear_attention: out, den, final_state and final_z go together, got no {' and no '.join(missing)}"
        )
    _ops.linear_attention.out(*tensors, **options, **results)
    return out, den, final_state, final_z


def taylor_feature_map(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Based's feature map, exp to second order, without its double entries. Differentiable. On the CPU.

    ``phi(x) . phi(y) = 1 + s + s**2 / 2`` with ``s = x . y / sqrt(d)``. The features are, in that order, 1, then
    x_i / d**(1/4), then x_i x_j / sqrt(d) for i <= j, row by row of the triangle, the squares divided by sqrt(2): 153
    of them at d = 16, where x x^T as a whole has 273.

    Args:
        x: [..., d], float32, bfloat16 or float16, any leading strides, last stride 1, d from 1 to 256.
        out: tensor to write into (no gradient then).

    Returns:
        out, [..., 1 + d + d * (d + 1) / 2] in x's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or stride, or lies on a card.
    """
    if out is None:
        return _ops.taylor_feature_map(x)
    _ops.taylor_feature_map.out(x, out=out)
    return out


def _states_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    z = q.new_empty((count, q.shape[2], q.shape[3]), dtype=torch.float32)
    return z.new_empty((*z.shape, v.shape[3])), z


@fake("linear_attention")
def _(q, v, cu_seqlens=None, **_):
    return (
        v.new_empty(v.shape),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        *_states_like(q, v, cu_seqlens),
    )


@fake("linear_attention_backward")
def _(q, k, v, q_den=None, k_den=None, initial_state=None, initial_z=None, cu_seqlens=None, **_):
    state, z = _states_like(q, v, cu_seqlens)
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        *(q.new_empty(0 if x is None else x.shape) for x in (q_den, k_den)),
        state.new_empty(0) if initial_state is None else state,
        z.new_empty(0) if initial_z is None else z,
    )


@fake("taylor_feature_map")
def _(x, **_):
    d = x.shape[-1]
    return x.new_empty((*x.shape[:-1], 1 + d + d * (d + 1) // 2))


@fake("taylor_feature_map_backward")
def _(x, **_):
    return x.new_empty(x.shape)


fake("linear_attention.out", "taylor_feature_map.out")(no_results)


def _save_inputs(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)  # results that nobody uses cost nothing


def _backward(ctx: Any, grad_out: Tensor | None, *others: Tensor | None) -> Any:
    inputs = ctx.saved_tensors
    v = inputs[2]
    grads = _ops.linear_attention_backward(
        v.new_zeros(v.shape) if grad_out is None else grad_out.contiguous(),
        *(None if grad is None else grad.contiguous() for grad in others),
        *inputs,
        **ctx.options,
    )
    # The first seven inputs have gradients, in the same order; cu_seqlens has none.
    return *(grad if x is not None else None for grad, x in zip(grads, inputs, strict=False)), None


library.register_autograd("kvk::linear_attention", _backward, setup_context=_save_inputs)


def _save_x(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _taylor_backward(ctx: Any, grad: Tensor) -> Tensor:
    return _ops.taylor_feature_map_backward(grad.contiguous(), ctx.saved_tensors[0])


library.register_autograd("kvk::taylor_feature_map", _taylor_backward, setup_context=_save_x)
