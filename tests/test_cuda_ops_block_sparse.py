"""Block-sparse attention on CUDA, over the device emulator and on the card.

The emulator has a few instantiations (tests/emulator/torch/grid_kernels.cc).
"""

from __future__ import annotations

import pytest
import torch
from block_sparse_cases import BlockSparseCase, make_case
from card import Card, same_message
from grid_card import BF16, check, check_other_order, of_kind, run, turned
from kvk import reference
from kvk_testing import assert_bit_equal, expect_error
from lightning_cases import int32


def make(kind: str, lens_q, lens_k=None, **options) -> BlockSparseCase:
    """f16 always has a bias, but in tiles of 64 rows: that is what the emulator has."""
    defaults = {"bias": kind == "f16", "num_kv_heads": 1}
    return make_case(lens_q, lens_k, **of_kind(kind), **{**defaults, **options})


@pytest.mark.parametrize("kind, blocks", [
    ("bf16", (17, 33)), ("bf16", (128, 16)), ("f16", (16, 16)), ("f16", (64, 128)), ("f16", (100, 48)),
])  # fmt: skip
def test_blocks(card: Card, kind, blocks):
    """One tile of rows and several for a query block, several blocks a tile of keys and several tiles a block."""
    check(card, make(kind, [140], [333], block_q=blocks[0], block_k=blocks[1]))


@pytest.mark.parametrize("per_head, per_batch, causal", [
    (False, False, True), (False, True, True), (True, False, False), (True, True, True),
])  # fmt: skip
def test_forms(card: Card, per_head, per_batch, causal):
    """Sequences of 40, 0, 70 and 1 queries, with more keys, none, and fewer."""
    form = {"per_head": per_head, "per_batch": per_batch, "causal": causal}
    check(card, make("bf16", [40, 0, 70, 1], [84, 40, 50, 0], padding_rows=3, **form))
    check(card, make("f16", [40, 33], [64, 70], **form))


@pytest.mark.parametrize("group", [1, 3, 5])
def test_head_ratios(card: Card, group):
    check(card, make("f16", [50], num_kv_heads=2, group=group, causal=True))


def test_empty_rows(card: Card):
    """A row of no block, and one whose only block is behind all its queries."""
    case = make("bf16", [128], causal=True)
    row_ptr, col_idx = int32(0, 1, 1, 2, 3)[None, None], int32(0, 3, 1)[None, None]
    out, lse = check(card, case.with_(row_ptr=row_ptr, col_idx=col_idx))
    for rows in (slice(32, 64), slice(64, 96)):
        assert (out[rows] == 0).all() and (lse[rows] == -torch.inf).all()
    none = case.with_(row_ptr=torch.zeros_like(row_ptr), col_idx=col_idx[..., :0])
    out, lse = check(card, none)
    assert (out == 0).all()


def test_order_and_repetition_of_entries(card: Card):
    """Blocks count as often as they are named; those past the sequence's keys hold none."""
    case = make("bf16", [32], [150])
    check(card, case.with_(row_ptr=int32(0, 6)[None, None], col_idx=int32(4, 0, 2, 0, 0, 1)[None, None]))
    shared = make("bf16", [32, 32], [150, 40], ragged=True)
    check(card, shared.with_(row_ptr=int32(0, 3)[None, None], col_idx=int32(0, 1, 4)[None, None]))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.5])
def test_scales(card: Card, scale):
    check(card, make("f16", [40], softmax_scale=scale))


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_where_it_is_seen(card: Card, where, bad):
    case = make("f16", [100], [150], num_kv_heads=2, group=1, causal=True, block_q=64, density=0.8)
    clean, _ = run(card, case)
    getattr(case, where)[90, 0, 3] = bad
    want, want_lse = reference.block_sparse_attention(*case.args, **case.options)
    out, lse = run(card, case)
    assert torch.equal(out.isnan(), want.isnan()) and torch.equal(lse.isnan(), want_lse.isnan())
    assert_bit_equal(out[:, 1:].contiguous(), clean[:, 1:].contiguous())
    # Queries before 40 do not see the key; beside rows that read NaN their weights are not rounded.
    torch.testing.assert_close(out[:40], clean[:40], rtol=2e-3, atol=1e-3)


def test_strides(card: Card):
    """Heads before tokens, lists of every second entry, outputs within larger tensors."""
    case = make("f16", [70, 50], num_kv_heads=2, per_head=True)
    want = run(card, case)
    pattern = [x.repeat_interleave(2, -1)[..., ::2] for x in (case.row_ptr, case.col_idx)]
    options = {**case.options, "entry_bias": case.options["entry_bias"].repeat_interleave(2, -1)[..., ::2]}
    apart = case.with_(q=turned(case.q), k=turned(case.k), v=turned(case.v), row_ptr=pattern[0],
                       col_idx=pattern[1], options=options)  # fmt: skip
    for got, right in zip(run(card, apart), want, strict=True):
        assert_bit_equal(got, right)
    args, options = card.put(case.args), card.put_options(case.options)
    out, lse = card.put([torch.full((120, 5, 50), 7.0, dtype=torch.float16), torch.full((120, 5), 7.0)])
    card.ops.block_sparse_attention.out(*args, **options, out=out[:, 1:, 3:43], lse=lse[:, 1:])
    assert_bit_equal(out[:, 1:, 3:43].cpu().contiguous(), want[0])
    assert (out[:, 0] == 7).all() and (out[..., :3] == 7).all() and (out[..., 43:] == 7).all()


def test_batch_invariance(card: Card):
    """A sequence has the bits that it has alone, and the emulator's order of threads and blocks does not matter."""
    case = make("bf16", [33, 0, 70], per_batch=True, per_head=True, causal=True)
    want = run(card, case)
    for b, start, n in ((0, 0, 33), (2, 33, 70)):
        rows = slice(start, start + n)
        one = case.with_(
            q=case.q[rows], k=case.k[rows], v=case.v[rows], row_ptr=case.row_ptr[b : b + 1],
            col_idx=case.col_idx[b : b + 1], options={"causal": True},
        )  # fmt: skip
        for got, right in zip(run(card, one), want, strict=True):
            assert_bit_equal(got, right[rows].contiguous())
    check_other_order(card, lambda: run(card, case), want)


def test_values_out_of_range_write_nothing_else(card: Card):
    """Values on a card are trusted, but can never make a kernel write outside its output."""
    case = make("bf16", [70, 50])
    wild = dict(case.options, cu_seqlens_q=int32(-9, 200, 2**31 - 1), cu_seqlens_k=int32(5, 9000, -3))
    args = [*case.args[:3], case.row_ptr * 1000 - 7, case.col_idx * 5000 - 9, 32, 32]
    out = card.put([torch.full((200, 2, 64), 7.0, dtype=BF16)])[0]
    lse = card.new((120, 2), torch.float32)
    card.ops.block_sparse_attention.out(*card.put(args), **card.put_options(wild), out=out[40:160], lse=lse)
    assert (out[:40] == 7).all() and (out[160:] == 7).all()


def test_errors(card: Card):
    case = make("bf16", [40])
    q, k, v, *pattern = card.put(case.args)
    words = "block_sparse_attention", "q"

    def call(q, k, v):
        return lambda: card.ops.block_sparse_attention(q, k, v, *pattern)

    expect_error(call(q.float(), k.float(), v.float()), *words, "float32")
    expect_error(call(q.repeat(1, 1, 2)[..., 4:68], k, v), *words, "16 bytes")
    expect_error(
        lambda: card.ops.vertical_slash_attention(q, k, v, pattern[0], pattern[0]),
        "vertical_slash_attention", "q", "must be on cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"cu_seqlens_q": int32(1, 40, 120)},
        {"cu_seqlens_k": int32(0, 90, 70)},
        {"cu_seqlens_q": int32(0, 40, 121)},
        {"cu_seqlens_q": int32(0, 0, 120)},
        {"row_ptr": (1, 1, 2, -1)},
        {"row_ptr": (1, 1, 3, 1000)},
        {"col_idx": (0, 1, 2, 3)},
        {"col_idx": (1, 1, 0, -1)},
    ],
)
def test_kvk_check_names_the_first_bad_value(checked, change):
    case = make("bf16", [70, 50], per_batch=True, per_head=True, density=0.9)
    run(checked, case)
    ((name, value),) = change.items()
    options, lists = dict(case.options), {"row_ptr": case.row_ptr.clone(), "col_idx": case.col_idx.clone()}
    if name in lists:
        b, h, i, bad = value
        lists[name][b, h, i] = bad
    else:
        options[name] = value
    args = case.with_(**lists).args
    same_message(checked, lambda ops: ops.block_sparse_attention(*args, **options))


def test_small_blocks_without_bias(card: Card):
    check(card, make("f16", [50], block_q=16, bias=False))


def launch_every_kernel(card: Card) -> None:
    """One call for each kernel of block-sparse attention in tests/emulator/torch/grid_kernels.cc."""
    for kind, bias in (("bf16", False), ("f16", True)):
        for block_q in (16, 128):
            run(card, make(kind, [1], block_q=block_q, num_kv_heads=1, bias=bias))
    run(card, make("f16", [1], block_q=16, num_kv_heads=1, bias=False))
