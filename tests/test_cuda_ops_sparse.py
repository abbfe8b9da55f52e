"""compress_pages and decompress_pages on CUDA, over the device emulator and on the card: the CPU's bytes.

The emulator has a few instantiations (tests/emulator/torch/sparse_kernels.cc): head dims of several rows a warp
and of one, every way to select with some of them, float32 and rotated rows.
"""

from __future__ import annotations

import itertools

import kvk
import numpy
import pytest
import torch
from card import Card, check_pages_beyond_the_pools, same_message
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk.reference.sparse import pack_bitmap
from kvk_testing import assert_bit_equal
from paged_cases import LAYOUTS, pool
from quant_cases import padded_pool
from sparse_cases import all_bits, pages
from test_sparse import GOLDEN, GOLDEN_FORMATS, golden_input, int32
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = torch.inf, torch.nan
# (dtype, head dim) that select by magnitude without rotation; by scores, too.
KINDS = [(BF16, 32), (F16, 72), (BF16, 128), (BF16, 256)]
SCORED = [(BF16, 32), (F16, 72), (BF16, 256)]
EACH_KIND = pytest.mark.parametrize(("dtype", "dim"), KINDS)
# Formats of pages, and the dtype of the pages.
PAGES = {
    **{name: (fmt, F32) for name, fmt in GOLDEN_FORMATS.items()},
    "small": (kvk.BitmapFormat(37, 32, 8, 16, head_dim_v=256), BF16),
    "odd": (kvk.BitmapFormat(5, 72, 40, 72, F16), F16),
    "mustafar": (kvk.BitmapFormat(19, 128, 64, 40), BF16),
    "bf16_rotated": (kvk.BitmapFormat(3, 80, 40, 16, head_dim_v=128, k_rotate=1), BF16),
}


def check(card: Card, fmt, k_pages, v_pages, src, dst, num_pages, heads, **select) -> None:
    """The CPU's records, the gaps between them too; and back."""
    want, (k_pool, v_pool) = padded_pool(fmt, num_pages, heads), padded_pool(fmt, num_pages, heads)
    kvk.compress_pages(k_pages, v_pages, src, *want, dst, fmt, **select)
    k, v, src, k_pool, v_pool, dst = card.put([k_pages, v_pages, src, k_pool, v_pool, dst])
    card.ops.compress_pages(k, v, src, k_pool, v_pool, dst, fmt.numbers, **card.put_options(select))
    for name, a, b in zip(("k_pool", "v_pool"), (k_pool, v_pool), want, strict=True):
        whole = a if a._base is None else a._base
        assert_bit_equal(whole.cpu(), b if a._base is None else b._base, name)
    back = card.ops.decompress_pages(k_pool, v_pool, dst, fmt.numbers)
    for a, b in zip(back, kvk.decompress_pages(*want, dst.cpu(), fmt), strict=True):
        assert_bit_equal(a.cpu(), b)


def check_rows(card: Card, rows: Tensor, keep: int, **select) -> None:
    """Rows [count, D] as one page."""
    count, dim = rows.shape
    fmt = kvk.BitmapFormat(count, dim, keep, keep, rows.dtype)
    page = rows.view(1, count, 1, dim)
    check(card, fmt, page, page, int32(0), int32(0), 1, 1, **select)


@EACH_KIND
class TestMagnitude:
    def test_random_bits(self, card: Card, dtype, dim):
        """Every magnitude, zeros of both signs, infinities and NaN; any number of kept elements."""
        for seed, keep in enumerate((8, dim // 16 * 8, dim - 8, dim)):
            check_rows(card, all_bits(21 * dim, dtype, seed).view(21, dim), keep)

    def test_ties(self, card: Card, dtype, dim):
        flat = [torch.full((dim,), x) for x in (0.0, -0.0, 1.0, -2.5, INF, -INF, NAN)]
        steps = torch.arange(dim)
        rows = torch.stack(
            [*flat, (-1.0) ** steps, steps % 3 - 1.0, (steps == 20) * 1.0 - (steps == 25) * 2.0, steps / 1.0]
        )
        for keep in (8, 16, 24):
            check_rows(card, rows.to(dtype), keep)

    def test_every_pattern_of_ties(self, card: Card, dtype, dim):
        """A byte of large numbers among equal ones, all 256 of them, across the lanes of a row."""
        patterns = torch.tensor(list(itertools.product([1.0, -2.0], repeat=8)))
        rows = torch.ones(256, dim)
        for i in range(256):
            byte = i * 7 % (dim // 8)
            rows[i, 8 * byte : 8 * byte + 8] = patterns[i]
        check_rows(card, rows.to(dtype), 8)


@pytest.mark.parametrize(("dtype", "dim"), SCORED)
def test_scores(card: Card, dtype, dim):
    rows = all_bits(9 * dim, dtype).view(9, dim)
    scores = all_bits(2 * 9 * dim, BF16, 3).view(F32).view(1, 9, 1, dim)
    for keep in (8, dim // 16 * 8, dim):
        check_rows(card, rows, keep, k_select=scores, v_select=-scores)
    few = (scores.abs() * 0 + torch.arange(dim) % 3).nan_to_num(0.0)
    few[0, 0, 0, :4] = torch.tensor([-0.0, 0.0, NAN, -NAN])
    check_rows(card, rows, 16, k_select=few, v_select=-few)
    wide = torch.zeros(1, 9, 1, dim + 1)[..., 1:].copy_(scores)  # rows off 16 bytes
    check_rows(card, rows, 16, k_select=wide, v_select=wide)


class TestMasks:
    def test_masks_and_bitmaps(self, card: Card):
        rows = all_bits(40 * 32, BF16).view(40, 32)
        gen = torch.Generator().manual_seed(0)
        mask = torch.zeros(1, 40, 1, 32, dtype=torch.bool)
        for i in range(40):
            mask[0, i, 0, torch.randperm(32, generator=gen)[: i % 17]] = True
        check_rows(card, rows, 16, k_select=mask, v_select=pack_bitmap(mask))
        check_rows(card, rows, 16, k_select=pack_bitmap(mask), v_select=mask)

    def test_one_row_for_all(self, card: Card):
        fmt = kvk.BitmapFormat(16, 32, 24, 8)
        k, v = pages(fmt, 3, 2)
        mask = torch.zeros(1, 1, 2, 32, dtype=torch.bool)
        mask[0, 0, 0, 5:29], mask[0, 0, 1, 20:] = True, True
        check(card, fmt, k, v, int32(2, 0), int32(0, 1), 2, 2, k_select=mask.expand(2, 16, 2, 32))

    def test_too_many_are_cut_to_the_first(self, card: Card):
        """Values on a card are trusted, but can never make a kernel write outside its row."""
        fmt = kvk.BitmapFormat(5, 32, 8, 16)
        k, v = pages(fmt, 1, 1)
        mask = torch.zeros(1, 5, 1, 32, dtype=torch.bool)
        mask[..., 3:29] = True
        want = fmt.new_pool(1, 1)
        first = [mask & (mask.cumsum(-1) <= keep) for keep in (8, 16)]
        kvk.compress_pages(k, v, int32(0), *want, int32(0), fmt, k_select=first[0], v_select=first[1])
        k, v, ids, mask, *pools = card.put([k, v, int32(0), mask, *fmt.new_pool(1, 1)])
        card.ops.compress_pages(k, v, ids, *pools, ids, fmt.numbers, k_select=mask, v_select=mask)
        for a, b in zip(pools, want, strict=True):
            assert_bit_equal(a.cpu(), b)


@pytest.mark.parametrize("name", GOLDEN_FORMATS)
def test_golden_records(card: Card, name):
    fmt, stored = GOLDEN_FORMATS[name], numpy.load(GOLDEN)
    pools = card.put([pool.fill_(0x5A) for pool in fmt.new_pool(2, 1)])
    k, v, ids = card.put([*golden_input(fmt), int32(0, 1)])
    card.ops.compress_pages(k, v, ids, *pools, ids, fmt.numbers)
    for part, records in zip("kv", pools, strict=True):
        assert_bit_equal(records.cpu(), torch.from_numpy(stored[f"{name}.{part}"]), f"{name} {part}")


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "nhd") for name in PAGES), *(("mustafar", other) for other in LAYOUTS[1:])]
)
def test_pages(card: Card, name, layout):
    fmt, dtype = PAGES[name]
    dense = pool(layout, 5, fmt.page_size, 3, fmt.head_dim, fmt.head_dim_v, dtype)
    for to, x in zip(dense, pages(fmt, 5, 3, dtype=dtype), strict=True):
        to.copy_(x)
    check(card, fmt, *dense, int32(4, 0, 2), int32(1, 5, 0), 6, 3)
    check(card, fmt, *dense, int32(4, 9, 0, 9)[::2], int32(3, 9, 2, 9)[::2], 4, 3)


def test_rows_off_16_bytes(card: Card):
    for fmt, dtype in (PAGES["small"], PAGES["half"]):
        k, v = (
            torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=dtype)[..., 1:].copy_(x)
            for x in pages(fmt, 2, 2, dtype=dtype)
        )
        check(card, fmt, k, v, int32(1, 0), int32(0, 1), 2, 2)


def test_a_rotated_row_with_nan(card: Card):
    fmt = kvk.BitmapFormat(2, 80, 16, 16, k_rotate=1, v_rotate=1)
    k = torch.randn(1, 2, 1, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    k[0, 1, 0, 7] = NAN
    check(card, fmt, k, k, int32(0), int32(0), 1, 1)


def test_float32_beyond_the_dtype(card: Card):
    x = torch.tensor([1e6, -1e6, NAN, 70000.0, 1e-8, -0.0, 65519.0, 65520.0] * 16).view(1, 1, 1, 128)
    fmt = kvk.BitmapFormat(1, 128, 64, 128, F16)
    check(card, fmt, x, x, int32(0), int32(0), 1, 1)


def test_no_pages(card: Card):
    fmt = kvk.BitmapFormat(32, 128, 64, 64)
    dense = torch.empty(0, 32, 2, 128, dtype=BF16)
    check(card, fmt, dense, dense, int32(), int32(), 3, 2)


def test_pages_beyond_the_pools_are_left_alone(card: Card):
    fmt = kvk.BitmapFormat(16, 32, 16, 8)
    check_pages_beyond_the_pools(card, "compress_pages", fmt, *pages(fmt, 3, 2))


@settings(max_examples=25)
@given(st.data())
def test_random_cases(card: Card, data):
    draw = data.draw
    dtype, dim = draw(st.sampled_from(KINDS))
    rows = all_bits(draw(st.integers(1, 19)) * dim, dtype, draw(st.integers(0, 2**31))).view(-1, dim)
    check_rows(card, rows, 8 * draw(st.integers(1, dim // 8)))


@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize("name", ["src", "dst", "ids"])
def test_kvk_check_names_the_first_bad_page(checked, name, bad):
    """KVK_CHECK=1, with the CPU's words, and nothing written."""
    fmt = kvk.BitmapFormat(16, 32, 16, 8)
    dense = pages(fmt, 3, 2)
    pools = [records.fill_(7) for records in fmt.new_pool(3, 2)]
    lists = {"src": int32(0, 1, 2), "dst": int32(2, 1, 0), "ids": int32(0, 1, 2), name: int32(0, bad, -5)}
    if name == "ids":
        same_message(checked, lambda ops: ops.decompress_pages(*pools, lists["ids"], fmt.numbers))
    else:
        same_message(
            checked, lambda ops: ops.compress_pages(*dense, lists["src"], *pools, lists["dst"], fmt.numbers)
        )
    assert all((records == 7).all() for records in pools)


@pytest.mark.parametrize("name", ["k_select", "v_select"])
@pytest.mark.parametrize("as_bitmap", [False, True])
def test_kvk_check_names_the_first_row_that_selects_too_much(checked, name, as_bitmap):
    fmt = kvk.BitmapFormat(16, 32, 8, 8)
    dense = pages(fmt, 3, 2)
    pools = [records.fill_(7) for records in fmt.new_pool(3, 2)]
    mask = torch.zeros(3, 16, 2, 32, dtype=torch.bool)
    mask[..., 5:13] = True
    select = {"k_select": mask, "v_select": mask.clone()}

    def call(ops) -> None:
        packed = {key: pack_bitmap(x) if as_bitmap else x for key, x in select.items()}
        ops.compress_pages(*dense, int32(0, 1, 2), *pools, int32(2, 1, 0), fmt.numbers, **packed)

    call(checked.ops)
    for records in pools:
        records.fill_(7)
    select[name][1, 3, 1, 31] = select[name][2, 0, 0, 31] = True
    same_message(checked, call)
    assert all((records == 7).all() for records in pools)


def launch_every_kernel(card: Card) -> None:
    """One call for each kernel of tests/emulator/torch/sparse_kernels.cc."""
    for dtype, dim in KINDS:
        x = torch.ones(1, 1, 1, dim)
        selects = [{}]
        if (dtype, dim) in SCORED:
            selects.append({"k_select": x})
        if dim == 32:
            selects += [{"k_select": x > 0}, {"k_select": pack_bitmap(x > 0)}]
        fmt = kvk.BitmapFormat(1, dim, dim, dim, dtype)
        for select in selects:
            pools, page = fmt.new_pool(1, 1), x.to(dtype)
            card.ops.compress_pages(page, page, int32(0), *pools, int32(0), fmt.numbers, **select)
            card.ops.decompress_pages(*pools, int32(0), fmt.numbers)
    for fmt, dtype in PAGES.values():
        dense = [torch.ones(1, fmt.page_size, 1, dim, dtype=dtype) for dim in (fmt.head_dim, fmt.head_dim_v)]
        pools = fmt.new_pool(1, 1)
        card.ops.compress_pages(*dense, int32(0), *pools, int32(0), fmt.numbers)
        card.ops.decompress_pages(*pools, int32(0), fmt.numbers)
