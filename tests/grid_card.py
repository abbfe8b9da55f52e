"""Attention over ordinary tensors on a card: calls of its ops, and what the tests of both families draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from block_sparse_cases import check_results
from card import Card, EmulatedCard
from kvk import reference
from kvk_testing import assert_bit_equal
from torch import Tensor

BF16, F16 = torch.bfloat16, torch.float16
# Dtype, D and Dv of the emulator's instantiations.
KINDS = {"bf16": (BF16, 64, 64), "f16": (F16, 32, 40)}


def of_kind(kind: str) -> dict[str, Any]:
    dtype, head_dim, head_dim_v = KINDS[kind]
    return {"dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v}


def name_of(case: Any) -> str:
    return "block_sparse_attention" if hasattr(case, "row_ptr") else "neighborhood_attention"


def _list(value: Any) -> Any:
    """The ops themselves take lists of int."""
    return [int(x) for x in value] if isinstance(value, (tuple, list)) else [int(value)]


def call_args(case: Any) -> tuple[list[Any], dict[str, Any]]:
    if name_of(case) == "block_sparse_attention":
        return list(case.args), dict(case.options)
    lists = ("stride", "dilation", "is_causal")
    options = {name: _list(x) if name in lists else x for name, x in case.options.items()}
    return [*case.args[:3], _list(case.kernel_size)], options


def run(card: Card, case: Any) -> tuple[Tensor, Tensor]:
    """out and lse on the CPU; both hold NaN before."""
    args, options = call_args(case)
    rows = case.q.shape[:-1]
    out = card.new((*rows, case.v.shape[-1]), case.q.dtype)
    lse = card.new(rows, torch.float32)
    getattr(card.ops, name_of(case)).out(*card.put(args), **card.put_options(options), out=out, lse=lse)
    return out.cpu(), lse.cpu()


def check(card: Card, case: Any) -> tuple[Tensor, Tensor]:
    out, lse = run(card, case)
    return check_results(case, out, lse, getattr(reference, name_of(case)))


def backward(
    card: Card, case: Any, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> list[Tensor]:
    """dq, dk and dv on the CPU."""
    args, options = call_args(case)
    args = card.put([grad_out, grad_lse, *args[:3], out, lse, *args[3:]])
    got = getattr(card.ops, name_of(case) + "_backward")(*args, **card.put_options(options))
    return [x.cpu() for x in got]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, card, case):
        ctx.card, ctx.case = card, case.with_(q=q.detach(), k=k.detach(), v=v.detach())
        out, lse = run(card, ctx.case)
        ctx.save_for_backward(out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        grads = (x.contiguous() for x in (grad_out, grad_lse))
        return *backward(ctx.card, ctx.case, *ctx.saved_tensors, *grads), None, None


def differentiable(card: Card, case: Any) -> Any:
    """The op on the card as a function of q, k and v, with its gradient."""
    return lambda q, k, v, *_, **__: _Attention.apply(q, k, v, card, case)


def check_other_order(card: Card, call: Callable[[], Sequence[Tensor]], want: Sequence[Tensor]) -> None:
    """The same bits in another order of threads and blocks, which the emulator can be told."""
    if not isinstance(card, EmulatedCard):
        return
    try:
        card.ops._emulate(4, 5)
        for got, right in zip(call(), want, strict=True):
            assert_bit_equal(got, right)
    finally:
        card.ops._emulate(4, -1)


def turned(x: Tensor) -> Tensor:
    """The same values, heads before all tokens, and NaN between rows of a multiple of 16 bytes."""
    wide = torch.full((x.shape[-2], *x.shape[:-2], x.shape[-1] + 8), torch.nan, dtype=x.dtype)
    view = wide[..., : x.shape[-1]].movedim(0, -2)
    return view.copy_(x)
