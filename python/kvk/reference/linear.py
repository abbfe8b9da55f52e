"""References of normalised linear attention and the Taylor feature map, and of their gradients, over whole matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvk.reference.lightning import _sequences


def linear_attention_mask(tokens: int, *, causal: bool = True, block_size: int = 1) -> Tensor:
    """bool [tokens, tokens]: which tokens (columns) a token (row) sees."""
    at = torch.arange(tokens)
    if not causal:
        return torch.ones(tokens, tokens, dtype=torch.bool)
    return at < (at[:, None] // block_size + 1) * block_size


def _or_zeros(state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype) if state is None else state.to(dtype)


def _rows(rounded: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """[B, T, H, D] as [B, H, T, D], rounded to a dtype and then at least float32."""
    work = torch.promote_types(rounded, torch.float32)
    return [x.to(rounded).to(work).transpose(1, 2) for x in tensors]


def _count(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_den: Tensor | None = None,
    k_den: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_z: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    block_size: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-6,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With M the mask of what each token sees:

        num = scale * (M * (q k^T)) v + scale * q S0;  den = scale * rows of M * (q_den k_den^T) + scale * q_den z0
        out = num / (den + eps), or num

    Differentiable by ordinary autograd; see kvk.linear_attention.

    Args:
        compute_dtype: dtype of the results. Below float32, q, k, v and out are rounded to it and the rest is float32.

    Returns:
        (out [B, T, H, Dv] in compute_dtype, den [B, T, H], final_state [N, H, Dk, Dv], final_z [N, H, Dk], these three
        at least float32).
    """
    work = torch.promote_types(compute_dtype, torch.float32)
    q_, k_, v_, qd, kd = _rows(
        compute_dtype, q, k, v, q if q_den is None else q_den, k if k_den is None else k_den
    )
    count, (_, heads, tokens, dk), dv = _count(q, cu_seqlens), q_.shape, v.shape[3]
    states = _or_zeros(initial_state, (count, heads, dk, dv), work)
    zs = _or_zeros(initial_z, (count, heads, dk), work)
    outs = [torch.zeros(heads, 0, dv, dtype=work)] * q.shape[0]
    dens = [torch.zeros(heads, 0, dtype=work)] * q.shape[0]
    finals, final_zs = [], []
    for n, b, at in _sequences(q, cu_seqlens):
        mask = linear_attention_mask(at.stop - at.start, causal=causal, block_size=block_size).to(work)
        num = scale * ((q_[b][:, at] @ k_[b][:, at].mT * mask) @ v_[b][:, at] + q_[b][:, at] @ states[n])
        sums = (qd[b][:, at] @ kd[b][:, at].mT * mask).sum(-1) + (qd[b][:, at] * zs[n][:, None]).sum(-1)
        den = scale * sums
        outs[b] = torch.cat([outs[b], num / (den[..., None] + eps) if normalize else num], 1)
        dens[b] = torch.cat([dens[b], den], 1)
        finals.append(states[n] + k_[b][:, at].mT @ v_[b][:, at])
        final_zs.append(zs[n] + kd[b][:, at].sum(1))
    padding = tokens - (outs[0].shape[1] if outs else 0)  # tokens of no sequence
    out = torch.nn.functional.pad(torch.stack(outs), (0, 0, 0, padding)) if outs else v_
    den = torch.nn.functional.pad(torch.stack(dens), (0, padding)) if dens else q_[..., 0]
    final = torch.stack(finals) if finals else states
    return (
        out.transpose(1, 2).to(compute_dtype),
        den.transpose(1, 2),
        final,
        torch.stack(final_zs) if finals else zs,
    )


def linear_attention_backward(
    grad_out: Tensor,
    grad_den: Tensor | None,
    grad_final_state: Tensor | None,
    grad_final_z: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_den: Tensor | None = None,
    k_den: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_z: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = True,
    block_size: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-6,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    """The gradient by formula. With G = dO / (den + eps), D = (dO . v) masked and g = d den - dO . out / (den + eps):

        dq = scale * (M * (G v^T)) k + scale * G S0^T;  dk = scale * (M * (G v^T))^T q + v dS^T
        dv = scale * (M * (q k^T))^T G + k dS;  dq_den = scale * g z;  dk_den = scale * M^T (g q_den) + dz

    Without normalize, G = dO and g = d den.

    Returns:
        (grad_q, grad_k, grad_v, grad_q_den, grad_k_den in compute_dtype, grad_initial_state, grad_initial_z at least
        float32). Where q_den (k_den) is None its gradient is part of grad_q (grad_k) and its place is empty; so are the
        places of initial states that are None.
    """
    work = torch.promote_types(compute_dtype, torch.float32)
    q_, k_, v_, qd, kd, go = _rows(
        compute_dtype, q, k, v, q if q_den is None else q_den, k if k_den is None else k_den, grad_out
    )
    count, (_, heads, _, dk), dv = _count(q, cu_seqlens), q_.shape, v.shape[3]
    states, end_states = (
        _or_zeros(x, (count, heads, dk, dv), work) for x in (initial_state, grad_final_state)
    )
    zs, end_zs = (_or_zeros(x, (count, heads, dk), work) for x in (initial_z, grad_final_z))
    dden = _or_zeros(grad_den, q.shape[:3], work).transpose(1, 2)
    dq, dk_, dv_, dqd, dkd = (torch.zeros_like(x) for x in (q_, k_, v_, qd, kd))
    dstate, dz = end_states.clone(), end_zs.clone()
    for n, b, at in _sequences(q, cu_seqlens):
        x = [y[b][:, at] for y in (q_, k_, v_, qd, kd, go)]
        qn, kn, vn, qdn, kdn, g_out = x
        mask = linear_attention_mask(at.stop - at.start, causal=causal, block_size=block_size).to(work)
        seen = mask @ kdn + zs[n][:, None]
        weights = qn @ kn.mT * mask
        g, g_den = g_out, dden[b][:, at]
        if normalize:
            inverse = 1 / (scale * (qdn * seen).sum(-1) + eps)
            out = scale * (weights @ vn + qn @ states[n]) * inverse[..., None]
            g = g_out * inverse[..., None]
            g_den = g_den - (g_out * out).sum(-1) * inverse
        g_weights = g @ vn.mT * mask
        dq[b][:, at] = scale * (g_weights @ kn + g @ states[n].mT)
        dk_[b][:, at] = scale * g_weights.mT @ qn + vn @ end_states[n].mT
        dv_[b][:, at] = scale * weights.mT @ g + kn @ end_states[n]
        dqd[b][:, at] = scale * g_den[..., None] * seen
        dkd[b][:, at] = scale * mask.T @ (g_den[..., None] * qdn) + end_zs[n][:, None]
        dstate[n] += scale * qn.mT @ g
        dz[n] += scale * (g_den[..., None] * qdn).sum(1)
    empty = q_.new_empty(0)
    of_q, of_qd = (dq + dqd, empty) if q_den is None else (dq, dqd.transpose(1, 2))
    of_k, of_kd = (dk_ + dkd, empty) if k_den is None else (dk_, dkd.transpose(1, 2))
    grads = [
        y.to(compute_dtype)
        for y in (of_q.transpose(1, 2), of_k.transpose(1, 2), dv_.transpose(1, 2), of_qd, of_kd)
    ]
    return (
        *grads,
        empty if initial_state is None else dstate,
        empty if initial_z is None else dz,
    )


def _triangle(d: int) -> tuple[Tensor, Tensor, Tensor]:
    """i <= j row by row, and the factor of x_i x_j."""
    i, j = torch.triu_indices(d, d)
    return i, j, torch.where(i == j, 1 / math.sqrt(2 * d), 1 / math.sqrt(d)).double()


def taylor_feature_map(x: Tensor, *, compute_dtype: torch.dtype = torch.float64) -> Tensor:
    """[1, x / d^(1/4), x_i x_j / sqrt(d) for i <= j, squares divided by sqrt(2)]; see kvk.taylor_feature_map."""
    work = torch.promote_types(compute_dtype, torch.float32)
    x = x.to(compute_dtype).to(work)
    d = x.shape[-1]
    i, j, factor = _triangle(d)
    pairs = x[..., i] * x[..., j] * factor.to(work)
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, pairs], -1).to(compute_dtype)


def taylor_feature_map_backward(
    grad: Tensor, x: Tensor, *, compute_dtype: torch.dtype = torch.float64
) -> Tensor:
    """Of the linear features, and of each product twice: once for either factor."""
    work = torch.promote_types(compute_dtype, torch.float32)
    x, grad = x.to(compute_dtype).to(work), grad.to(compute_dtype).to(work)
    d = x.shape[-1]
    i, j, factor = _triangle(d)
    pairs = grad[..., 1 + d :] * factor.to(work)
    out = grad[..., 1 : 1 + d] / d**0.25
    out = out.index_add(-1, i, pairs * x[..., j]).index_add(-1, j, pairs * x[..., i])
    return out.to(compute_dtype)
