"""Gradients of block-sparse and neighborhood attention on CUDA, over the device emulator and on the card."""

from __future__ import annotations

import pytest
import torch
from block_sparse_cases import check_gradients
from card import Card, EmulatedCard, same_message
from grid_card import backward, call_args, check_other_order, differentiable, name_of, run, turned
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, expect_error
from lightning_cases import int32
from test_cuda_ops_block_sparse import make as make_blocks
from test_cuda_ops_neighborhood import SHAPES
from test_cuda_ops_neighborhood import make as make_boxes
from test_neighborhood import draw_axes


def check(card: Card, case):
    return check_gradients(case, differentiable(card, case), getattr(reference, name_of(case)))


def random_grads(case):
    """Results of the forward pass, and gradients for them."""
    gen = torch.Generator().manual_seed(1)
    shape = (*case.q.shape[:-1], case.v.shape[-1])
    return torch.randn(shape, generator=gen).to(case.q.dtype), torch.randn(shape[:-1], generator=gen)


@pytest.mark.parametrize("kind, blocks", [
    ("bf16", (17, 33)), ("bf16", (128, 16)), ("f16", (16, 16)), ("f16", (100, 128)),
])  # fmt: skip
def test_blocks(card: Card, kind, blocks):
    """One tile of rows and several for a block, several blocks a tile of columns and several tiles a block."""
    check(card, make_blocks(kind, [140], [170], block_q=blocks[0], block_k=blocks[1]))


@pytest.mark.parametrize("per_head, per_batch, causal", [
    (False, False, True), (False, True, True), (True, False, False), (True, True, True),
])  # fmt: skip
def test_forms(card: Card, per_head, per_batch, causal):
    """Sequences of 40, 0, 70 and 1 queries, with more keys, none, and fewer."""
    form = {"per_head": per_head, "per_batch": per_batch, "causal": causal}
    dq, dk, dv = check(card, make_blocks("bf16", [40, 0, 70, 1], [84, 40, 50, 0], padding_rows=3, **form))
    assert all((x[-3:] == 0).all() for x in (dq, dk, dv))
    check(card, make_blocks("f16", [40, 33], [64, 70], num_kv_heads=2, group=3, **form))


def test_order_and_repetition_of_entries(card: Card):
    """Blocks count as often as they are named; those past the keys hold none; a row and columns without any."""
    case = make_blocks("bf16", [96], [150])
    row_ptr, col_idx = int32(0, 6, 6, 8)[None, None], int32(4, 0, 2, 0, 0, 1, 2, 1)[None, None]
    dq, dk, _ = check(card, case.with_(row_ptr=row_ptr, col_idx=col_idx))
    assert (dq[32:64] == 0).all() and (dk[96:128] == 0).all()
    shared = make_blocks("bf16", [32, 32], [150, 40], ragged=True)
    check(card, shared.with_(row_ptr=int32(0, 3)[None, None], col_idx=int32(0, 1, 4)[None, None]))


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 2, 3, 4, 5, 7)], ids=str)
def test_neighborhoods(card: Card, shape):
    extents, kernel, options = shape
    check(card, make_boxes("f16", extents, kernel, **options))


def test_batches_of_boxes(card: Card):
    check(card, make_boxes("bf16", (4, 6, 7), 3, batch=2, num_kv_heads=2, dilation=(1, 2, 1)))


@settings(max_examples=6)
@given(st.data())
def test_random_neighborhoods(data):
    extents, kernel, options = draw_axes(data.draw, {1: 100, 2: 12, 3: 6})
    check(EmulatedCard(), make_boxes("f16", extents, kernel, **options))


def test_results_of_a_merge(card: Card):
    """out and lse of more keys than these; a query that saw none anywhere, by -inf or +inf, has no gradient."""
    case = make_blocks("bf16", [40], [70], density=0.9)
    out, lse = run(card, case)
    out, lse = out * 0.5, lse + 0.7
    lse[3, 0], lse[5, 1] = -torch.inf, torch.inf
    grads = random_grads(case)
    got = backward(card, case, out, lse, *grads)
    wide = case.with_(q=case.q.float(), k=case.k.float(), v=case.v.float())
    cpu = torch.ops.kvk.block_sparse_attention_backward
    args, options = call_args(wide)
    want = cpu(grads[0].float(), grads[1], *args[:3], out.float(), lse, *args[3:], **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=0.02, atol=0.02 * y.abs().amax().item())
    assert (got[0][3, 0] == 0).all() and (got[0][5, 1] == 0).all()


@pytest.mark.parametrize("family", ["blocks", "boxes"])
def test_the_same_bits(card: Card, family):
    """Tensors with heads before tokens, and another order of threads and blocks."""
    if family == "blocks":
        case = make_blocks("f16", [40, 50], [70, 33], num_kv_heads=2, per_head=True)
    else:
        case = make_boxes("f16", (6, 7), 3, num_kv_heads=2)
    results, grads = run(card, case), random_grads(case)
    want = backward(card, case, *results, *grads)
    apart = case.with_(q=turned(case.q), k=turned(case.k), v=turned(case.v))
    for got, right in zip(
        backward(card, apart, turned(results[0]), results[1], turned(grads[0]), grads[1]), want, strict=True
    ):
        assert_bit_equal(got.contiguous(), right)
    check_other_order(card, lambda: backward(card, case, *results, *grads), want)


@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out"])
def test_a_bad_value_stays_where_it_is_seen(card: Card, name):
    """A NaN of token 40 in 9 x 9 reaches the gradients of tokens that see it, or that it sees, and no other."""
    case = make_boxes("bf16", (9, 9), 3, group=1)
    grads = list(random_grads(case))
    clean = backward(card, case, *run(card, case), *grads)
    mask = reference.neighborhood_mask((9, 9), 3)
    if name == "grad_out":
        grads[0] = grads[0].clone()
        grads[0][0, 4, 4, 0, 3] = torch.nan
    else:
        getattr(case, name)[0, 4, 4, 0, 3] = torch.nan
    got = backward(card, case, *run(card, case), *grads)
    query = torch.zeros(81, dtype=torch.bool)
    query[40] = True
    if name in ("k", "v"):
        query = mask[:, 40]  # queries that read it
    key = mask[query].any(0)  # keys that those see
    for i, reached in enumerate((query, key, key)):
        x, y = got[i].view(81, 64), clean[i].view(81, 64)
        torch.testing.assert_close(x[~reached], y[~reached], rtol=0.03, atol=0.03)
        assert bool(x[reached].isnan().any()) == (name != "v" or i < 2)  # dv is made without v


def test_errors(card: Card):
    case = make_blocks("bf16", [40])
    args, _ = call_args(case)
    out, lse = run(card, case)
    grads = random_grads(case)
    put = card.put([*grads, *args[:3], out, lse, *args[3:]])
    wide = put[0].repeat(1, 1, 2)[..., 4:68]
    expect_error(
        lambda: card.ops.block_sparse_attention_backward(wide, *put[1:]),
        "block_sparse_attention_backward", "grad_out", "16 bytes",
    )  # fmt: skip


def test_kvk_check_names_the_first_bad_value(checked):
    case = make_blocks("bf16", [40])
    results, grads = run(checked, case), random_grads(case)
    backward(checked, case, *results, *grads)
    args, _ = call_args(case.with_(col_idx=case.col_idx + 5))
    same_message(
        checked, lambda ops: ops.block_sparse_attention_backward(*grads, *args[:3], *results, *args[3:])
    )


def launch_every_kernel(card: Card) -> None:
    """One call for each kernel of a gradient in tests/emulator/torch/grid_kernels.cc."""
    cases = [make_blocks("bf16", [1], ragged=True), make_blocks("f16", [1], ragged=True)]
    for case in (*cases, make_boxes("bf16", (1,), 1), make_boxes("f16", (1,), 1)):
        backward(card, case, *run(card, case), *random_grads(case))
