"""Cases of block-sparse attention: random tensors and patterns, and the checks of results and gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import kvk
import torch
from kvk import reference
from kvk_testing import assert_error_rule
from torch import Tensor


@dataclass
class BlockSparseCase:
    q: Tensor
    k: Tensor
    v: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    block_q: int
    block_k: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.row_ptr, self.col_idx, self.block_q, self.block_k

    def with_(self, **changes: Any) -> BlockSparseCase:
        return replace(self, **changes)

    def run(self) -> tuple[Tensor, Tensor]:
        return kvk.block_sparse_attention(*self.args, **self.options)


def make_case(
    lens_q: list[int],
    lens_k: list[int] | None = None,
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    block_q: int = 32,
    block_k: int = 32,
    per_batch: bool = False,
    per_head: bool = False,
    density: float = 0.5,
    bias: bool = False,
    causal: bool = False,
    ragged: bool | None = None,
    padding_rows: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> BlockSparseCase:
    """Sequences of the given lengths under one random pattern, or one for each; ragged: with cu_seqlens."""
    gen = torch.Generator().manual_seed(seed)
    lens_k = lens_q if lens_k is None else lens_k
    num_heads, head_dim_v = num_kv_heads * group, head_dim if head_dim_v is None else head_dim_v

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    q = draw(sum(lens_q) + padding_rows, num_heads, head_dim)
    k = draw(sum(lens_k) + padding_rows, num_kv_heads, head_dim)
    v = draw(sum(lens_k) + padding_rows, num_kv_heads, head_dim_v)
    if ragged or padding_rows or len(lens_q) != 1:
        for name, lens in (("cu_seqlens_q", lens_q), ("cu_seqlens_k", lens_k)):
            options[name] = torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32)
    rows, columns = (
        max((-(-n // size) for n in lens), default=0) for lens, size in ((lens_q, block_q), (lens_k, block_k))
    )
    shape = (len(lens_q) if per_batch else 1, num_heads if per_head else 1, rows, columns)
    mask = torch.rand(shape, generator=gen) < density
    if per_batch:  # no block past a sequence's own keys; a pattern that sequences share may name such
        for b, n in enumerate(lens_k):
            mask[b, ..., -(-n // block_k) :] = False
    row_ptr, col_idx = kvk.block_mask_to_csr(mask)
    if bias:
        entry_bias = torch.randn(col_idx.shape, generator=gen)
        entry_bias[torch.rand(col_idx.shape, generator=gen) < 0.1] = -torch.inf
        options["entry_bias"] = entry_bias
    if causal:
        options["causal"] = True
    return BlockSparseCase(q, k, v, row_ptr, col_idx, block_q, block_k, options)


def check(case: BlockSparseCase) -> tuple[Tensor, Tensor]:
    return check_results(case, *case.run(), reference.block_sparse_attention)


def check_results(case: Any, out: Tensor, lse: Tensor, ref: Any) -> tuple[Tensor, Tensor]:
    """The error rule against the reference, of any attention over ordinary tensors."""
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    exact_out, exact_lse = ref(*case.args, **case.options)
    plain_out, plain_lse = ref(*case.args, **case.options, compute_dtype=case.q.dtype)
    assert_error_rule(lse, exact_lse, plain_lse, per_row=False, what="lse")
    assert_error_rule(out, exact_out, plain_out, per_row=True, what="out")
    return out, lse


def gradients(function, case, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; empty rows get no gradient of their lse, which is -inf."""
    leaves = [x.detach().clone().requires_grad_() for x in case.args[:3]]
    out, lse = function(*leaves, *case.args[3:], **case.options)
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    if not out.requires_grad:  # the reference of no sequence at all
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad([out, lse], leaves, [grad_out.to(out.dtype), grad_lse.to(lse.dtype)])


def check_gradients(case, op, ref) -> tuple[Tensor, Tensor, Tensor]:
    """The error rule for dq, dk and dv, relative to the largest element of each head."""
    gen = torch.Generator().manual_seed(99)
    out, lse = op(*case.args, **case.options)
    grad_out = torch.randn(out.shape, generator=gen).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=gen)
    got = gradients(op, case, grad_out, grad_lse)
    exact = gradients(
        ref, case.with_(q=case.q.double(), k=case.k.double(), v=case.v.double()), grad_out, grad_lse
    )
    plain = gradients(partial(ref, compute_dtype=case.q.dtype), case, grad_out, grad_lse)
    rms = {name: getattr(case, name).double().square().mean().sqrt().item() for name in ("q", "k", "v")}
    factor = abs(case.options.get("softmax_scale") or case.q.shape[-1] ** -0.5)
    term = (4 if case.q.dtype == torch.float32 else 1) * factor * case.v.shape[-1] ** 0.5 * rms["v"]
    scales = {"dq": term * rms["k"], "dk": term * rms["q"], "dv": 0.0}
    for name, x, y, z in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
        assert x.dtype == case.q.dtype
        # A row is a sum of terms p * (dp - delta) that cancel, with one key entirely, and delta comes from an out that
        # has been rounded. So the scale of errors is the head, or the size of a term.
        heads = [
            torch.nn.functional.pad(t.movedim(-2, 0).flatten(1), (0, 1), value=scales[name])
            for t in (x, y, z)
        ]
        assert_error_rule(*heads, per_row=True, what=name)
    return got
