"""hadamard on CUDA through torch's tensors, over the device emulator and on the card: the CPU's bits.

The emulator has one instantiation for each of KINDS (tests/emulator/torch/quant_kernels.cc).
"""

from __future__ import annotations

import kvk
import pytest
import torch
from card import Card, EmulatedCard
from kvk_testing import assert_bit_equal, expect_error
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# In a warp's lanes; over shared memory in one and several passes; every order; rows that come in two parts.
KINDS = [
    *((F32, n, False) for n in (1, 4, 128, 2048, 96, 6144, 20, 32768)),
    *((BF16, n, False) for n in (128, 8192, 80, 28672)),
    *((F16, n, False) for n in (256, 112)),
    (F32, 20, True),
    (BF16, 80, True),
    (F16, 112, True),
]
EACH_KIND = pytest.mark.parametrize(("dtype", "n", "transpose"), KINDS)
SMALL = pytest.mark.parametrize(("dtype", "n", "transpose"), [kind for kind in KINDS if kind[1] <= 2048])


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bits; NaN equals NaN, whatever its own bits."""
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert_bit_equal(got.masked_fill(nan, 0.0), want.masked_fill(nan, 0.0))


def check(card: Card, x: Tensor, **options) -> None:
    (on_card,) = card.put([x])
    assert_same(card.ops.hadamard(on_card, **options).cpu(), kvk.hadamard(x, **options))


@EACH_KIND
def test_values(card: Card, dtype, n, transpose):
    for rows in (1, 3) if n > 4096 else (1, 5, 67):
        check(card, values(rows, n, dtype=dtype, seed=rows), transpose=transpose)
    check(card, values(2, n, dtype=dtype), transpose=transpose, scale=0.3)


@SMALL
def test_shapes_and_strides(card: Card, dtype, n, transpose):
    for shape in ((0, n), (3, 0, n), (n,), (2, 1, 3, 1, 2, n)):
        check(card, values(*shape, dtype=dtype), transpose=transpose)
    wide = values(5, 4, 3, n + 3, dtype=dtype)
    check(card, wide[1:, ::2, :, 2 : 2 + n].permute(2, 0, 1, 3), transpose=transpose)
    check(card, wide[:, :, 0, :n].transpose(0, 1), transpose=transpose)
    check(card, values(1, n, dtype=dtype).expand(6, n), transpose=transpose)


@pytest.mark.parametrize("seed", [3, 8])
@EACH_KIND
def test_schedule_does_not_matter(dtype, n, transpose, seed):
    """The emulator runs threads and blocks in other orders."""
    card = EmulatedCard()
    try:
        card.ops._emulate(4, seed)
        check(card, values(2, n, dtype=dtype), transpose=transpose)
    finally:
        card.ops._emulate(4, -1)


@EACH_KIND
def test_in_place_and_out(card: Card, dtype, n, transpose):
    x = values(1 if n > 4096 else 3, 2, n, dtype=dtype)
    want = kvk.hadamard(x, transpose=transpose)
    for start in (0, 8):  # rows on 16 bytes, and not
        wide = torch.full((2, len(x) + 1, n + 16 + start // 8), 7.0, dtype=dtype)
        wide[:, 1:, start : start + n] = x.transpose(0, 1)
        here, there = card.put([wide])[0], card.put([wide.clone()])[0]
        view = here[:, 1:, start : start + n].transpose(0, 1)
        card.ops.hadamard_(view, transpose=transpose)
        assert_same(view.cpu().contiguous(), want)
        out = there[:, 1:, start : start + n].transpose(0, 1)
        card.ops.hadamard.out(card.put([x])[0], transpose=transpose, out=out)
        assert_same(out.cpu().contiguous(), want)
        for whole in (here, there):
            whole[:, 1:, start : start + n] = 7.0
            assert (whole == 7.0).all()


@SMALL
def test_special_values(card: Card, dtype, n, transpose):
    x = values(5, n, dtype=dtype)
    x[0, n // 2], x[1, n - 1], x[2, 0] = torch.nan, torch.inf, -torch.inf
    x[3, 0], x[3, n - 1] = torch.inf, -torch.inf
    x[4] = -0.0
    check(card, x, transpose=transpose)


def test_errors(card: Card):
    x = card.put([torch.ones(2, 24)])[0]
    expect_error(lambda: card.ops.hadamard(x[:, :7]), "hadamard", "x", "got 7")
    expect_error(lambda: card.ops.hadamard(x.T), "hadamard", "x")
    expect_error(lambda: card.ops.hadamard(x, scale=float("inf")), "hadamard", "scale", "finite")


def launch_every_kernel(card: Card) -> None:
    """One call for each line KVK_HADAMARD of tests/emulator/torch/quant_kernels.cc."""
    for dtype, n, transpose in KINDS:
        card.ops.hadamard(torch.ones(1, n, dtype=dtype), transpose=transpose)
