"""Reference of lightning attention: the recurrence token by token, its gradient by formula, and the decode step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[int, int, slice]]:
    """(sequence, batch row, its tokens)."""
    if cu_seqlens is None:
        for b in range(q.shape[0]):
            yield b, b, slice(0, q.shape[1])
        return
    starts = cu_seqlens.tolist()
    for n in range(len(starts) - 1):
        yield n, 0, slice(starts[n], starts[n + 1])


def _decays(log_decay: Tensor | None, q: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(log_decay) as [B, T, H]."""
    if log_decay is None:
        return q.new_ones(q.shape[:3], dtype=dtype)
    return torch.exp(log_decay.to(dtype)).expand(q.shape[:3])


def _states(
    state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if state is not None:
        return state.to(dtype)
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros((count, q.shape[2], q.shape[3], v.shape[3]), dtype=dtype)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay, for each sequence and head token by token:

        S = exp(log_decay) * S + k v^T;   out = scale * S^T q

    Differentiable by ordinary autograd; see kvk.lightning_attention.

    Args:
        q, k: [B, T, H, Dk]; v: [B, T, H, Dv]; log_decay: [H], [B, T, H] or None; initial_state: [N, H, Dk, Dv];
            cu_seqlens: [N + 1].
        compute_dtype: dtype of the results. Below float32, q, k, v and out are rounded to it; the
            decays and the state are float32.

    Returns:
        (out [B, T, H, Dv] in compute_dtype, final_state [N, H, Dk, Dv] in compute_dtype but at least float32).
    """
    work = torch.promote_types(compute_dtype, torch.float32)
    q_, k_, v_ = (x.to(compute_dtype).to(work) for x in (q, k, v))
    decay = _decays(log_decay, q, work)
    states = _states(initial_state, q, v, cu_seqlens, work)
    out = torch.zeros(v.shape, dtype=work)
    finals = []
    rows: list[Tensor] = []
    places: list[tuple[int, int]] = []
    for n, b, tokens in _sequences(q, cu_seqlens):
        state = states[n]
        for t in range(tokens.start, tokens.stop):
            state = decay[b, t, :, None, None] * state + k_[b, t, :, :, None] * v_[b, t, :, None, :]
            rows.append(scale * (state * q_[b, t, :, :, None]).sum(-2))
            places.append((b, t))
        finals.append(state)
    if rows:
        b_at, t_at = (torch.tensor(x) for x in zip(*places, strict=True))
        out = out.index_put((b_at, t_at), torch.stack(rows))
    final = torch.stack(finals) if finals else states
    return out.to(compute_dtype), final


def lightning_attention_backward(
    grad_out: Tensor,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient by formula. With R the gradient of the state, from the last token to the first:

        R += scale * q dO^T;  dq = scale * S dO;  dk = R v;  dv = R^T k;  dg = exp(g) <R, S of before>;  R *= exp(g)

    Args:
        grad_out: [B, T, H, Dv]; grad_final_state: [N, H, Dk, Dv] or None for zeros; the others as the op's.
        compute_dtype: as of lightning_attention.

    Returns:
        (grad_q, grad_k, grad_v in compute_dtype, grad_log_decay as [B, T, H], or summed to [H] where log_decay is,
        grad_initial_state; these two at least float32).
    """
    work = torch.promote_types(compute_dtype, torch.float32)
    q, k, v, grad_out = (x.to(compute_dtype).to(work) for x in (q, k, v, grad_out))
    decay = _decays(log_decay, q, work)
    starts = _states(initial_state, q, v, cu_seqlens, work)
    ends = _states(grad_final_state, q, v, cu_seqlens, work)
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_decay, grad_start = q.new_zeros(q.shape[:3]), torch.zeros_like(starts)
    for n, b, tokens in _sequences(q, cu_seqlens):
        before = []
        state = starts[n]
        for t in range(tokens.start, tokens.stop):
            before.append(state)
            state = decay[b, t, :, None, None] * state + k[b, t, :, :, None] * v[b, t, :, None, :]
            grad_q[b, t] = scale * (state * grad_out[b, t, :, None, :]).sum(-1)
        r = ends[n]
        for t in reversed(range(tokens.start, tokens.stop)):
            r = r + scale * q[b, t, :, :, None] * grad_out[b, t, :, None, :]
            grad_k[b, t] = (r * v[b, t, :, None, :]).sum(-1)
            grad_v[b, t] = (r * k[b, t, :, :, None]).sum(-2)
            grad_decay[b, t] = decay[b, t] * (r * before[t - tokens.start]).sum((-2, -1))
            r = decay[b, t, :, None, None] * r
        grad_start[n] = r
    if log_decay is not None and log_decay.dim() == 1:
        grad_decay = grad_decay.sum((0, 1))
    grad_q, grad_k, grad_v = (x.to(compute_dtype) for x in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_decay, grad_start


def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    slots: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float = 1.0,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence for each row on its slot of the pool; see kvk.lightning_decode.

    Returns:
        (out [B, H, Dv] in compute_dtype, the pool after the step in compute_dtype but at least float32).
    """
    work = torch.promote_types(compute_dtype, torch.float32)
    pool = state.to(work).clone()
    out = torch.zeros(v.shape, dtype=work)
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[b][None, None]
        row, final = lightning_attention(
            q[b][None, None],
            k[b][None, None],
            v[b][None, None],
            decay,
            scale=scale,
            initial_state=state[slot][None],
            compute_dtype=compute_dtype,
        )
        out[b], pool[slot] = row[0, 0].to(work), final[0]
    return out.to(compute_dtype), pool
