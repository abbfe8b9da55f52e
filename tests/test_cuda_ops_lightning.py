"""Lightning attention on CUDA, over the device emulator and on the card.

The emulator has a few instantiations (tests/emulator/torch/lightning_kernels.cc).
"""

from __future__ import annotations

import pytest
import torch
from card import Card, same_message
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, expect_error
from lightning_cases import DECAYS, int32
from paged_strategies import DTYPES
from test_lightning import decode_case, strided

BF16, F16 = torch.bfloat16, torch.float16


# Decode ----------------------------------------------------------------------------------------------------


def decode(card: Card, args, **options):
    """(out, the pool after it), on the CPU; out holds NaN before."""
    q, k, v, pool, *rest = card.put(args)
    out = card.new(v.shape, v.dtype)
    card.ops.lightning_decode.out(q, k, v, pool, *rest, **options, out=out)
    return out.cpu(), pool.cpu()


def check_decode(card: Card, args) -> None:
    """The error rule for the rows that have a slot, 0 for the others, and the rest of the pool as it was."""
    args = [x if x is None else x.clone() for x in args]
    exact, exact_pool = reference.lightning_decode(*args, scale=0.3)
    plain, plain_pool = reference.lightning_decode(*args, scale=0.3, compute_dtype=args[0].dtype)
    before, slots = args[3].clone(), args[4]
    out, pool = decode(card, args, scale=0.3)
    assert_error_rule(*(x.flatten(-2) for x in (out, exact, plain)), per_row=True, what="out")
    assert_error_rule(*(x.flatten(-2) for x in (pool, exact_pool, plain_pool)), per_row=True, what="state")
    assert (out[slots < 0] == 0).all()
    unused = torch.ones(len(before), dtype=torch.bool)
    unused[slots[slots >= 0].long()] = False
    assert_bit_equal(pool[unused], before[unused])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dims", [(40, 24), (128, 128), (8, 72), (256, 8)])
def test_decode(card: Card, dtype, decay, dims):
    check_decode(card, decode_case(dk=dims[0], dv=dims[1], dtype=dtype, decay=decay))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_does_not_depend_on_the_batch(card: Card, dtype):
    args = decode_case(5, dk=72, dv=64, dtype=dtype)
    want, want_pool = decode(card, [x.clone() for x in args])
    for b in range(5):
        one = [x[b : b + 1].clone() for x in args]
        one[3] = args[3].clone()
        out, pool = decode(card, one)
        assert_bit_equal(out, want[b : b + 1])
        if args[4][b] >= 0:
            assert_bit_equal(pool[int(args[4][b])], want_pool[int(args[4][b])])


def test_decode_strides(card: Card):
    """Heads before rows, a pool with gaps, every second slot of a list."""
    args = decode_case(4, 3, dk=40, dv=24, dtype=BF16)
    want, want_pool = decode(card, [x.clone() for x in args])
    q, k, v = (torch.stack([x, x], 1)[:, 1].transpose(0, 1).contiguous().transpose(0, 1) for x in args[:3])
    pool = torch.full((len(args[3]), 2, 3, 40, 28), torch.nan)[:, 1, ..., :24]
    pool.copy_(args[3])
    slots, log = torch.stack([args[4], args[4]], 1)[:, 0], args[5].T.contiguous().T
    out, pool = decode(card, [q, k, v, pool, slots, log])
    assert_bit_equal(out, want)
    assert_bit_equal(pool.contiguous(), want_pool)


def test_decode_of_nothing(card: Card):
    out, _ = decode(card, decode_case(0, dk=40, dv=24))
    assert out.shape == (0, 3, 24)
    args = decode_case(3, slots=int32(-1, -5, -(2**31)), dk=40, dv=24)
    before = args[3].clone()
    out, pool = decode(card, args)
    assert (out == 0).all()
    assert_bit_equal(pool, before)


def test_decode_skips_without_reading(card: Card):
    args = decode_case(3, slots=int32(0, -1, 2), dk=40, dv=24)
    want, _ = decode(card, [x.clone() for x in args])
    for x in (*args[:3], args[5]):
        x[1] = torch.nan
    assert_bit_equal(decode(card, args)[0], want)


def test_slots_past_the_pool_are_skipped(card: Card):
    """Values on a card are trusted, but can never make a kernel write outside its pool."""
    args = decode_case(3, slots=int32(6, 1, 2**31 - 1), dk=40, dv=24)
    before = args[3].clone()
    out, pool = decode(card, args)
    assert (out[::2] == 0).all() and (out[1] != 0).any()
    keep = torch.arange(6) != 1
    assert_bit_equal(pool[keep], before[keep])


def test_decode_errors(card: Card):
    q, k, v, pool, slots, log = card.put(decode_case(4, dk=40, dv=24, dtype=BF16))
    expect_error(
        lambda: card.ops.lightning_decode(q[..., :20], k[..., :20], v, pool[:, :, :20], slots, log),
        "lightning_decode", "q", "steps of 8",
    )  # fmt: skip
    wide = card.put([strided(pool.cpu())])[0]
    expect_error(
        lambda: card.ops.lightning_decode(q, k, v, wide, slots, log), "lightning_decode", "state", "16"
    )


@pytest.mark.parametrize("slots", [(0, 7, 9), (0, -1, 2**31 - 1), (4, -1, 4), (3, 3, 9)])
def test_kvk_check_names_the_first_bad_slot(checked, slots):
    args = decode_case(3, slots=int32(*slots), dk=40, dv=24)[:6]
    before = args[3].clone()
    same_message(checked, lambda ops: ops.lightning_decode(*args))
    assert_bit_equal(args[3], before)
    args[4] = int32(5, -1, 0)
    checked.ops.lightning_decode(*args)


def launch_every_kernel(card: Card) -> None:
    """One call for each kernel of tests/emulator/torch/lightning_kernels.cc."""
    for dtype in DTYPES:
        card.ops.lightning_decode(*decode_case(1, 1, dk=8, dv=8, dtype=dtype, slots=int32(0)))
