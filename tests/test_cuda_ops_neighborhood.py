"""Neighborhood attention on CUDA, over the device emulator and on the card.

The emulator has a few instantiations (tests/emulator/torch/grid_kernels.cc).
"""

from __future__ import annotations

import pytest
import torch
from card import Card, EmulatedCard
from grid_card import KINDS, call_args, check, check_other_order, of_kind, run, turned
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, expect_error
from test_neighborhood import NeighborhoodCase, draw_axes, make_case


def make(kind: str, extents, kernel_size, **options) -> NeighborhoodCase:
    return make_case(extents, kernel_size, **of_kind(kind), **options)


# Extents, kernel_size and options: one to three dimensions, many tiles of columns and few, groups of different lengths.
SHAPES = [
    ((1,), 1, {}),
    ((70,), 7, {}),
    ((301,), 250, {"stride": 5, "is_causal": True}),
    ((65,), 9, {"dilation": 7, "stride": 9}),
    ((13, 18), (5, 6), {"stride": (1, 3), "dilation": (2, 1)}),
    ((16, 16), 13, {"is_causal": (True, False)}),
    ((3, 40), (3, 4), {"stride": (3, 2), "is_causal": (False, True)}),
    ((5, 6, 9), (3, 2, 4), {"stride": (2, 1, 3), "is_causal": (False, True, True)}),
    ((4, 7, 6), (4, 3, 2), {"dilation": (1, 2, 3)}),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(card: Card, kind, shape):
    extents, kernel, options = shape
    check(card, make(kind, extents, kernel, **options))


@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (1, 5), (1, 70)])
def test_heads(card: Card, heads):
    """Heads that share a tile, and more than one takes."""
    num_kv_heads, group = heads
    extents = (2, 2) if group > 60 else (7, 8)
    check(card, make("f16", extents, 2, num_kv_heads=num_kv_heads, group=group))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales(card: Card, scale):
    check(card, make("f16", (20,), 5, softmax_scale=scale))


def test_empty_batch(card: Card):
    out, lse = run(card, make("f16", (6, 5), 3, batch=0))
    assert out.shape == (0, 6, 5, 2, 40) and lse.shape == (0, 6, 5, 2)


def test_batch_and_strides(card: Card):
    """A batch entry has the bits that it has alone; heads before tokens; the emulator's order does not matter."""
    case = make("bf16", (4, 6, 7), 3, batch=2, num_kv_heads=2, dilation=(1, 2, 1))
    want = check(card, case)
    one = case.with_(q=case.q[1:], k=case.k[1:], v=case.v[1:])
    for got, right in zip(run(card, one), want, strict=True):
        assert_bit_equal(got, right[1:])
    apart = case.with_(q=turned(case.q), k=turned(case.k), v=turned(case.v))
    for got, right in zip(run(card, apart), want, strict=True):
        assert_bit_equal(got, right)
    check_other_order(card, lambda: run(card, case), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_where_it_is_seen(card: Card, bad):
    case = make("bf16", (9, 9), 3, group=1)
    clean, _ = run(card, case)
    case.k[0, 4, 4], case.v[0, 4, 4] = bad, bad
    sees = reference.neighborhood_mask((9, 9), 3)[:, 4 * 9 + 4]
    out = run(card, case)[0].view(81, 64)
    # Beside rows that read NaN their weights are not rounded.
    torch.testing.assert_close(out[~sees], clean.view(81, 64)[~sees], rtol=0.02, atol=0.02)
    assert not torch.isfinite(out[sees]).all(-1).any()


@settings(max_examples=12)
@given(st.data())
def test_random_cases(data):
    extents, kernel, options = draw_axes(data.draw, {1: 150, 2: 15, 3: 7})
    case = make("f16", extents, kernel, batch=data.draw(st.integers(1, 2)), **options)
    check(EmulatedCard(), case)


def test_errors(card: Card):
    args, _ = call_args(make("bf16", (6,), 3))
    q, k, v, kernel = card.put(args)
    words = "neighborhood_attention", "q"
    expect_error(
        lambda: card.ops.neighborhood_attention(q.float(), k.float(), v.float(), kernel), *words, "float32"
    )
    expect_error(
        lambda: card.ops.neighborhood_attention(q.repeat(1, 1, 1, 2)[..., 4:68], k, v, kernel),
        *words, "16 bytes",
    )  # fmt: skip


def launch_every_kernel(card: Card) -> None:
    """One call for each kernel of neighborhood attention in tests/emulator/torch/grid_kernels.cc."""
    for kind in KINDS:
        run(card, make(kind, (1,), 1))
