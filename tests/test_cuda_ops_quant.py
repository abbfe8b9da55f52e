"""Quantized records and codes on CUDA, over the device emulator and on the card: the CPU's bytes.

The emulator has a few instantiations (tests/emulator/torch/quant_kernels.cc): float32 with every width and axis,
bf16 and f16 with some, and rotated rows of a few head dims.
"""

from __future__ import annotations

import kvk
import numpy
import pytest
import torch
from card import Card, check_pages_beyond_the_pools
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk_testing import assert_bit_equal, expect_error
from paged_cases import LAYOUTS
from quant_cases import BITS, assert_same_parts, channel_groups, padded_pool, token_groups, values
from test_quant_pages import GOLDEN, GOLDEN_FORMATS, golden_input, int32, random_pages
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = torch.inf, torch.nan
# (dtype, bits, axis) without rotation.
KINDS = [
    *((F32, bits, axis) for bits in BITS for axis in (-1, -2)),
    (BF16, 2, -2),
    (BF16, 4, -1),
    (F16, 3, -2),
    (F16, 8, -1),
]
EACH_KIND = pytest.mark.parametrize(("dtype", "bits", "axis"), KINDS)
# Formats of pages that those and the rotated instantiations serve, and the dtype of the pages.
PAGES = {
    **{name: (fmt, F32) for name, fmt in GOLDEN_FORMATS.items()},
    "mixed": (kvk.QuantFormat(48, 72, 3, 8, 24, 24, "channel", "token"), F32),
    "per_token": (kvk.QuantFormat(17, 56, 4, 2, 56, 17, "token", "channel", k_clip=0.9, v_clip=0.5), F32),
    "bf16": (kvk.QuantFormat(64, 128, 2, 4, 32, 64, v_clip=0.8), BF16),
    "bf16_rotated": (kvk.QuantFormat(5, 96, 4, 4, 32, 32, "token", v_rotate=1, k_rotate=1), BF16),
    "f16": (kvk.QuantFormat(16, 160, 3, 8, 16, 64, head_dim_v=256), F16),
    "f16_rotated": (kvk.QuantFormat(32, 160, 8, 8, 32, 40, k_rotate=1, head_dim_v=40), F16),
}


def assert_same(got: Tensor, want: Tensor) -> None:
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert_bit_equal(got.masked_fill(nan, 0.0), want.masked_fill(nan, 0.0))


def check(card: Card, x: Tensor, bits: int, group: int, axis: int, clip: float = 1.0) -> None:
    want = kvk.quantize(x, bits, group, axis, clip=clip)
    (on_card,) = card.put([x])
    got = card.ops.quantize(on_card, bits, group, axis, clip=clip)
    assert_same_parts(tuple(part.cpu() for part in got), want)
    back = card.ops.dequantize(*card.put(list(want)), bits, group, axis, dtype=x.dtype)
    assert_same(back.cpu(), kvk.dequantize(*want, bits, group, axis, dtype=x.dtype))


@EACH_KIND
class TestCodes:
    def test_groups(self, card: Card, dtype, bits, axis):
        if axis == -1:
            for n in (16, 40, 72, 112, 128, 160, 264, 512):
                for group in token_groups(n):
                    check(card, values(5, n, dtype=dtype), bits, group, axis)
        else:
            for n, tokens in ((8, 34), (40, 48), (72, 17), (128, 64), (264, 32)):
                for group in channel_groups(tokens):
                    check(card, values(tokens, n, dtype=dtype), bits, group, axis)

    @pytest.mark.parametrize(
        "shape", [(0, 64), (3, 0, 64), (2, 3, 32, 64), (0, 32, 64), (2, 1, 2, 1, 16, 16)]
    )
    def test_shapes(self, card: Card, dtype, bits, axis, shape):
        check(card, values(*shape, dtype=dtype), bits, 16, axis)
        if axis == -1:
            check(card, values(48, dtype=dtype), bits, 16, axis)

    def test_strides(self, card: Card, dtype, bits, axis):
        wide = values(3, 34, 4, 91, dtype=dtype)
        check(card, wide[:, 2:, ::2, 3:51].permute(2, 0, 1, 3), bits, 16, axis)
        wide = values(34, 4, 64, dtype=dtype)
        check(card, wide[2:].transpose(0, 1), bits, 32, axis)

    def test_clip(self, card: Card, dtype, bits, axis):
        for clip in (0.8, 0.95, 1e-3):
            check(card, values(64, 64, dtype=dtype), bits, 32, axis, clip)

    def test_special_groups(self, card: Card, dtype, bits, axis):
        """Constants, zeros of both signs, halves, ranges below and beyond float16, NaN and infinities."""
        tops = [0.0, 1.5, -2.0, 0.1, 1000.3, 1e-9, 3e-6, 60000.0, 65504.0] + (
            [1e30, 3e38] if dtype != F16 else []
        )
        rows = []
        for i, top in enumerate(tops):
            row = torch.linspace(0, 1, 16) * top
            rows += [
                row,
                -row,
                torch.full((16,), top),
                row - top / 2,
                torch.where(torch.arange(16) == i, top, 0.0),
            ]
        for bad in (NAN, INF, -INF):
            rows += [torch.where(torch.arange(16) == 3, bad, 1.0), torch.full((16,), bad)]
        x = torch.stack(rows).to(dtype)
        if axis == -2:
            x = torch.cat([x, x[: -len(x) % 8]]).T.contiguous()
        check(card, x, bits, 16, axis)
        check(card, x, bits, 16, axis, 0.8)

    def test_quotients_are_those_of_a_division(self, card: Card, dtype, bits, axis):
        """Elements on and beside the borders between codes."""
        scale = values(40, 1).exp().half().float()
        steps = torch.arange(32) / 31 * (2**bits - 1)
        x = scale * (steps + 0.5 * (torch.arange(32) % 2))
        x = torch.cat([torch.zeros(40, 1), x[:, 1:-1], scale * (2**bits - 1)], 1)
        for bump in (0.0, 1e-7, -1e-7):
            moved = (x * (1 + bump)).to(dtype)
            check(card, moved if axis == -1 else moved.T.contiguous(), bits, 32, axis)


@pytest.mark.parametrize("name", GOLDEN_FORMATS)
def test_golden_records(card: Card, name):
    fmt, stored = GOLDEN_FORMATS[name], numpy.load(GOLDEN)
    pools = card.put([pool.fill_(0x5A) for pool in fmt.new_pool(2, 1)])
    k, v, ids = card.put([*golden_input(fmt), int32(0, 1)])
    card.ops.quantize_pages(k, v, ids, *pools, ids, fmt.numbers, k_clip=fmt.k_clip, v_clip=fmt.v_clip)
    for part, pool in zip("kv", pools, strict=True):
        assert_bit_equal(pool.cpu(), torch.from_numpy(stored[f"{name}.{part}"]), f"{name} {part}")


def check_pages(card: Card, fmt, k_pages, v_pages, src, dst, num_pages, heads) -> None:
    want = padded_pool(fmt, num_pages, heads)
    kvk.quantize_pages(k_pages, v_pages, src, *want, dst, fmt)
    k_pool, v_pool = padded_pool(fmt, num_pages, heads)
    k, v, src, k_pool, v_pool, dst = card.put([k_pages, v_pages, src, k_pool, v_pool, dst])
    card.ops.quantize_pages(k, v, src, k_pool, v_pool, dst, fmt.numbers, k_clip=fmt.k_clip, v_clip=fmt.v_clip)
    for name, a, b in zip(("k_pool", "v_pool"), (k_pool, v_pool), want, strict=True):
        whole = a if a._base is None else a._base
        assert_bit_equal(whole.cpu(), b if a._base is None else b._base, name)  # the gaps between records too
    back = card.ops.dequantize_pages(k_pool, v_pool, dst, fmt.numbers, k_pages.dtype)
    for a, b in zip(back, kvk.dequantize_pages(*want, dst.cpu(), fmt, k_pages.dtype), strict=True):
        assert_same(a.cpu(), b)


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "nhd") for name in PAGES), *(("values_apart", other) for other in LAYOUTS[1:])],
)
def test_pages(card: Card, name, layout):
    fmt, dtype = PAGES[name]
    k_pages, v_pages = random_pages(fmt, layout, 5, 3, dtype)
    check_pages(card, fmt, k_pages, v_pages, int32(4, 0, 2), int32(1, 5, 0), 6, 3)
    check_pages(card, fmt, k_pages, v_pages, int32(4, 9, 0, 9)[::2], int32(3, 9, 2, 9)[::2], 4, 3)


def test_no_pages(card: Card):
    fmt = GOLDEN_FORMATS["kivi2"]
    dense = torch.empty(0, 32, 2, 32)
    check_pages(card, fmt, dense, dense, int32(), int32(), 3, 2)


def test_pages_beyond_the_pools_are_left_alone(card: Card):
    fmt = GOLDEN_FORMATS["kivi2"]
    check_pages_beyond_the_pools(card, "quantize_pages", fmt, *random_pages(fmt, "nhd", 3, 2, F32))


@settings(max_examples=25)
@given(st.data())
def test_random_cases(card: Card, data):
    draw = data.draw
    dtype, bits, axis = draw(st.sampled_from(KINDS))
    n = 8 * draw(st.integers(2, 40))
    tokens = draw(st.integers(1, 9)) if axis == -1 else draw(st.sampled_from([16, 34, 48, 128]))
    groups = token_groups(n) if axis == -1 else channel_groups(tokens)
    if not groups:
        return
    x = values(2, tokens, n, dtype=dtype, seed=draw(st.integers(0, 2**31)))
    check(card, x, bits, draw(st.sampled_from(groups)), axis, draw(st.sampled_from([1.0, 0.8])))


class TestErrors:
    def test_arguments(self, card: Card):
        (x,) = card.put([torch.ones(32, 64)])
        expect_error(lambda: card.ops.quantize(x, 5, 32), "quantize", "bits", "got 5")
        expect_error(lambda: card.ops.quantize(x, 4, 24), "quantize", "group", "got 24")
        expect_error(lambda: card.ops.quantize(x, 4, 32, clip=1.5), "quantize", "clip", "1.5")

    def test_codes_off_their_units(self, card: Card):
        _, scale, minimum = kvk.quantize(values(4, 64), 8, 32)
        shifted = torch.zeros(4 * 64 + 4, dtype=torch.uint8)[4:].view(4, 64)
        args = card.put([shifted, scale, minimum])
        expect_error(
            lambda: card.ops.dequantize(*args, 8, 32, dtype=F32),
            "dequantize",
            "codes",
            "multiple of 8 bytes on a card",
        )


@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize(
    ("op", "name"), [("quantize_pages", "src"), ("quantize_pages", "dst"), ("dequantize_pages", "ids")]
)
def test_kvk_check_names_the_first_bad_page(checked, op, name, bad):
    """KVK_CHECK=1, with the CPU's words, and nothing written."""
    fmt = GOLDEN_FORMATS["kivi2"]
    pages = random_pages(fmt, "nhd", 3, 2, F32)
    pools = [pool.fill_(7) for pool in fmt.new_pool(3, 2)]
    lists = {"src": int32(0, 1, 2), "dst": int32(2, 1, 0), "ids": int32(0, 1, 2)}
    lists[name] = int32(0, bad, -5)

    def message(ops) -> str:
        with pytest.raises(RuntimeError) as caught:
            if op == "quantize_pages":
                ops.quantize_pages(*pages, lists["src"], *pools, lists["dst"], fmt.numbers)
            else:
                ops.dequantize_pages(*pools, lists["ids"], fmt.numbers, F32)
        return str(caught.value).splitlines()[0]

    assert message(checked.ops) == message(torch.ops.kvk)
    assert all((pool == 7).all() for pool in pools)


def launch_every_kernel(card: Card) -> None:
    """One call for each line KVK_QUANT of tests/emulator/torch/quant_kernels.cc."""
    for dtype, bits, axis in KINDS:
        card.ops.dequantize(
            *card.ops.quantize(torch.ones(16, 16, dtype=dtype), bits, 16, axis), bits, 16, axis, dtype=dtype
        )
    for fmt, dtype in PAGES.values():
        pages = [torch.ones(1, fmt.page_size, 1, dim, dtype=dtype) for dim in (fmt.head_dim, fmt.head_dim_v)]
        pools = fmt.new_pool(1, 1)
        card.ops.quantize_pages(*pages, int32(0), *pools, int32(0), fmt.numbers)
        card.ops.dequantize_pages(*pools, int32(0), fmt.numbers, dtype)
