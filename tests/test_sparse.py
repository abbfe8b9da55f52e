"""compress_pages and decompress_pages: which elements are kept, records byte for byte, golden files, formats."""

from __future__ import annotations

import itertools
from pathlib import Path

import kvk
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk import reference
from kvk.reference.sparse import pack_bitmap, unpack_bitmap
from kvk_testing import assert_bit_equal, bits, threads
from paged_cases import LAYOUTS, pool
from quant_cases import padded_pool
from sparse_cases import VALUE_DTYPES, all_bits, formats, pages

INF, NAN = torch.inf, torch.nan
GOLDEN = Path(__file__).parent / "golden" / "sparse_records.npz"
GOLDEN_FORMATS = {
    "half": kvk.BitmapFormat(16, 64, 32, 32),
    "seventy": kvk.BitmapFormat(4, 128, 40, 40, torch.float16),
    "apart": kvk.BitmapFormat(3, 40, 8, 72, head_dim_v=72),
    "rotated": kvk.BitmapFormat(5, 80, 24, 40, head_dim_v=160, k_rotate=1, v_rotate=1),
}


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def check(fmt, k_pages, v_pages, src, dst, num_pages, heads, **select):
    """Against the reference, the gaps between records too; and back."""
    got, want = padded_pool(fmt, num_pages, heads), padded_pool(fmt, num_pages, heads)
    assert kvk.compress_pages(k_pages, v_pages, src, *got, dst, fmt, **select) is None
    reference.compress_pages(k_pages, v_pages, src, *want, dst, fmt, **select)
    for name, a, b in zip(("k_pool", "v_pool"), got, want, strict=True):
        assert_bit_equal(a._base, b._base, name)
    back, want_back = kvk.decompress_pages(*got, dst, fmt), reference.decompress_pages(*got, dst, fmt)
    for a, b in zip(back, want_back, strict=True):
        assert a.is_contiguous() and a.dtype == fmt.dtype
        assert_bit_equal(a, b)
    return got, back


def kept(row: torch.Tensor, keep: int = 8, **select) -> list[int]:
    """Channels of a row of 32 that stay, by what reads back; the values must be the row's own bits."""
    fmt = kvk.BitmapFormat(1, row.shape[-1], keep, keep, row.dtype)
    page = row.view(1, 1, 1, -1)
    pools, _ = check(fmt, page, page, int32(0), int32(0), 1, 1, **select)
    mask = unpack_bitmap(pools[0][0, 0, fmt.k_layout.bitmap_offset :][: row.shape[-1] // 8])
    values = pools[0][0, 0, : 2 * keep].view(torch.int16)
    chosen = row.view(torch.int16)[mask]
    assert torch.equal(values[: len(chosen)], chosen) and (values[len(chosen) :] == 0).all()
    return torch.nonzero(mask).flatten().tolist()


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
class TestSelection:
    def row(self, dtype, **at: float) -> torch.Tensor:
        """32 zeros with numbers at channels: c3=1.5."""
        x = torch.zeros(32, dtype=dtype)
        for name, number in at.items():
            x[int(name[1:])] = number
        return x

    def test_largest(self, dtype):
        x = torch.tensor([(-1) ** i * i for i in range(32)], dtype=dtype)
        assert kept(x) == list(range(24, 32))
        assert kept(x.flip(0)) == list(range(8))

    def test_all_equal(self, dtype):
        """Lower channels first, whatever the sign."""
        for number in (0.0, -0.0, 1.0, -2.5, INF, -INF, NAN):
            assert kept(torch.full((32,), number, dtype=dtype)) == list(range(8))
        signs = torch.tensor([1.0, -1.0] * 16, dtype=dtype)
        assert kept(signs, 16) == kept(signs * 0, 16) == list(range(16))

    def test_ties_at_the_threshold(self, dtype):
        x = torch.ones(32, dtype=dtype)
        x[[30, 31]] = torch.tensor([-2.0, 3.0], dtype=dtype)
        assert kept(x) == [0, 1, 2, 3, 4, 5, 30, 31]

    def test_zeros_fill_up(self, dtype):
        """Fewer than 8 numbers that are not 0: the first zeros stay, bit for bit, the negative one too."""
        x = self.row(dtype, c0=-0.0, c20=1.0, c25=-3.0)
        assert kept(x) == [0, 1, 2, 3, 4, 5, 20, 25]

    def test_nan_and_infinity_come_first(self, dtype):
        x = torch.arange(32).to(dtype)
        x[2], x[3], x[4] = -INF, NAN, INF
        assert kept(x) == [2, 3, 4, 27, 28, 29, 30, 31]
        x[:] = INF
        x[25:32] = NAN
        assert kept(x) == [0, 25, 26, 27, 28, 29, 30, 31]

    def test_subnormals(self, dtype):
        tiny = torch.arange(32, dtype=torch.int16).view(dtype)
        assert kept(tiny) == list(range(24, 32))

    def test_every_pattern_of_ties(self, dtype):
        """A byte of large numbers among equal ones, all 256 of them, in each byte of the row."""
        for byte in range(4):
            rows = torch.ones(256, 32, dtype=dtype)
            for number, flags in enumerate(itertools.product([1.0, -2.0], repeat=8)):
                rows[number, 8 * byte : 8 * byte + 8] = torch.tensor(flags, dtype=dtype)
            fmt = kvk.BitmapFormat(256, 32, 8, 16, dtype)
            page = rows.view(1, 256, 1, 32)
            _, (k, v) = check(fmt, page, page, int32(0), int32(0), 1, 1)
            assert ((k != 0).sum(-1) == 8).all() and ((v != 0).sum(-1) == 16).all()
            assert torch.equal((k == -2).sum(-1).flatten(), (rows == -2).sum(-1))

    def test_every_magnitude(self, dtype):
        """All 32768 patterns below the sign, in one page, in random order and sign."""
        gen = torch.Generator().manual_seed(1)
        x = (
            torch.randperm(1 << 15, generator=gen) | torch.randint(0, 2, (1 << 15,), generator=gen) << 15
        ).to(torch.uint16)
        for dim, keep in ((32, 16), (64, 24), (128, 40), (256, 200)):
            fmt = kvk.BitmapFormat((1 << 15) // dim, dim, keep, keep, dtype)
            page = x.view(dtype).view(1, -1, 1, dim)
            check(fmt, page, page, int32(0), int32(0), 1, 1)

    @pytest.mark.parametrize("page_size", [7, 8, 9, 16, 23, 40])
    def test_rows_together_and_alone(self, dtype, page_size):
        """Few magnitudes, so that every row has ties: the choice does not depend on how many rows a page has."""
        gen = torch.Generator().manual_seed(page_size)
        for dim, keep in ((40, 16), (64, 32), (72, 40), (128, 64), (256, 104)):
            x = torch.randint(-3, 4, (page_size, 1, 1, dim), generator=gen).to(dtype)
            one = kvk.BitmapFormat(1, dim, keep, keep, dtype)
            all_rows = kvk.BitmapFormat(page_size, dim, keep, keep, dtype)
            each = torch.arange(page_size, dtype=torch.int32)
            _, (alone, _) = check(one, x, x, each, each, page_size, 1)
            page = x.view(1, page_size, 1, dim)
            _, (together, _) = check(all_rows, page, page, int32(0), int32(0), 1, 1)
            assert_bit_equal(together.view_as(alone), alone)


class TestSelectedByTheCaller:
    def test_scores(self):
        x = torch.arange(32).bfloat16()
        scores = torch.zeros(1, 1, 1, 32)
        scores[..., [5, 9]] = torch.tensor([2.0, -1.0])
        scores[..., 4], scores[..., 11], scores[..., 12] = -0.0, INF, NAN
        assert kept(x, k_select=scores, v_select=-scores) == [0, 1, 2, 3, 4, 5, 11, 12]

    def test_masks_and_bitmaps(self):
        x = torch.arange(32).bfloat16() + 1
        for channels in ([], [31], [0, 7, 8, 30], list(range(3, 11))):
            mask = torch.zeros(1, 1, 1, 32, dtype=torch.bool)
            mask[..., channels] = True
            assert kept(x, k_select=mask, v_select=pack_bitmap(mask)) == channels
            assert kept(x, k_select=pack_bitmap(mask), v_select=mask) == channels

    def test_one_row_for_all(self):
        """Channel pruning (ThinK): a mask of one row per head, expanded over pages and tokens."""
        fmt = kvk.BitmapFormat(16, 64, 24, 64)
        k, v = pages(fmt, 3, 2)
        mask = torch.zeros(1, 1, 2, 64, dtype=torch.bool)
        mask[0, 0, 0, 5:29], mask[0, 0, 1, 40:] = True, True
        _, (back, _) = check(fmt, k, v, int32(2, 0), int32(0, 1), 2, 2, k_select=mask.expand(2, 16, 2, 64))
        assert_bit_equal(back, torch.where(mask, k[[2, 0]], 0))

    def test_output_aware(self):
        """Mustafar's other rule: |mean q| * |k|, of all query heads of the group."""
        fmt = kvk.BitmapFormat(8, 32, 8, 8)
        k = torch.randn(1, 8, 2, 32).bfloat16()
        q = torch.randn(4, 2, 3, 32)  # the last queries, [tokens, Hkv, group, D]
        scores = k.float().abs() * q.mean(0).abs().sum(1)
        _, (back, _) = check(fmt, k, k, int32(0), int32(0), 1, 2, k_select=scores)
        kept_scores = torch.where(back != 0, scores, 0).sum(-1)
        torch.testing.assert_close(kept_scores, scores.topk(8, -1).values.sum(-1))


class TestFormat:
    def test_sizes_of_mustafar(self):
        """Fixed rows take 0.375 of dense at 40 of 128; tiles with offsets take 0.462."""
        fmt = kvk.BitmapFormat(64, 128, 40, 40)
        assert (fmt.k_record_bytes, fmt.bits_per_element) == (64 * 96, 6.0)
        assert kvk.BitmapFormat(64, 128, 64, 64).bits_per_element == 9.0
        assert kvk.BitmapFormat(64, 128, 128, 40).bits_per_element == (17 + 6) / 2

    def test_is_a_value(self):
        assert kvk.BitmapFormat(64, 128, 64, 40) == kvk.BitmapFormat(64, 128, 64, 40, head_dim_v=128)
        assert len({kvk.BitmapFormat(64, 128, 64, 64), kvk.BitmapFormat(64, 128, 64, 40)}) == 2
        with pytest.raises(AttributeError):
            kvk.BitmapFormat(64, 128, 64, 64).k_keep = 8

    @given(formats())
    def test_python_and_cpp_agree(self, fmt):
        layouts = [
            number
            for x in (fmt.k_layout, fmt.v_layout)
            for number in (x.value_row_bytes, x.bitmap_row_bytes, x.bitmap_offset, x.record_bytes)
        ]
        assert torch.ops.kvk._bitmap_layout(fmt.numbers) == layouts
        assert all(number % 16 == 0 for number in (*layouts[2:4], *layouts[6:]))

    def test_new_pool(self):
        k_pool, v_pool = kvk.BitmapFormat(32, 64, 32, 64, head_dim_v=128).new_pool(5, 3)
        assert k_pool.shape == (5, 3, 32 * 72) and v_pool.shape == (5, 3, 32 * 144)
        assert k_pool.dtype == v_pool.dtype == torch.uint8


class TestGolden:
    """Bytes that must never change: records are kept and sent elsewhere."""

    @pytest.mark.parametrize("name", GOLDEN_FORMATS)
    def test_records(self, name):
        fmt, stored = GOLDEN_FORMATS[name], numpy.load(GOLDEN)
        assert stored[f"{name}.numbers"].tolist() == fmt.numbers
        pools = fmt.new_pool(2, 1)
        kvk.compress_pages(*golden_input(fmt), int32(0, 1), *pools, int32(0, 1), fmt)
        for part, pool_ in zip("kv", pools, strict=True):
            assert_bit_equal(pool_, torch.from_numpy(stored[f"{name}.{part}"]), f"{name} {part}")


def golden_input(fmt: kvk.BitmapFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pages of one kv head without a random number, float32 that the dtypes hold exactly, with ties and a NaN."""
    count = 2 * fmt.page_size
    k = torch.tensor([((37 * i) % 101 - 50) / 8 for i in range(count * fmt.head_dim)])
    v = torch.tensor([((53 * i) % 89 - 44) / 16 for i in range(count * fmt.head_dim_v)])
    k[3] = NAN
    return k.view(2, fmt.page_size, 1, fmt.head_dim), v.view(2, fmt.page_size, 1, fmt.head_dim_v)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("dim", [32, 40, 56, 64, 72, 96, 120, 128, 136, 192, 200, 256])
def test_everything_kept_is_the_dense_page(dim, dtype):
    fmt = kvk.BitmapFormat(5, dim, dim, dim, dtype)
    k, v = pages(fmt, 2, 2)
    _, back = check(fmt, k, v, int32(1, 0), int32(0, 1), 2, 2)
    assert_bit_equal(back[0], k[[1, 0]])
    assert_bit_equal(back[1], v[[1, 0]])


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize(
    ("dim", "keep"), [(32, 8), (64, 32), (72, 40), (128, 40), (128, 64), (256, 8), (256, 248)]
)
def test_kept_elements_are_the_chosen_ones_bit_for_bit(dim, keep, dtype):
    fmt = kvk.BitmapFormat(9, dim, keep, keep, dtype)
    k, v = pages(fmt, 2, 3)
    pools, back = check(fmt, k, v, int32(0, 1), int32(1, 0), 2, 3)
    for pool_, x, y in zip(pools, (k, v), back, strict=True):
        mask = unpack_bitmap(pool_[[1, 0]][..., fmt.k_layout.bitmap_offset :][..., : 9 * dim // 8])
        mask = mask.unflatten(-1, (9, dim)).transpose(1, 2)
        assert (mask.sum(-1) == keep).all()
        assert torch.equal(bits(y), torch.where(mask, bits(x), 0))
        size = (bits(x).int() & 0x7FFF).double()
        assert (size.masked_fill(~mask, -1).amax(-1) >= size.masked_fill(mask, -1).amax(-1)).all()
        assert (size.masked_fill(~mask, 1e9).amin(-1) >= size.masked_fill(mask, -1).amax(-1)).all()


def test_float32_pages_are_rounded_first():
    """A tie after rounding is a tie."""
    x = torch.full((32,), 1.0)
    x[20:] += 2**-12  # bf16 does not hold it
    fmt = kvk.BitmapFormat(1, 32, 8, 8)
    _, (back, _) = check(fmt, x.view(1, 1, 1, 32), x.view(1, 1, 1, 32), int32(0), int32(0), 1, 1)
    assert torch.nonzero(back.flatten()).flatten().tolist() == list(range(8))
    big = torch.tensor([1e6, -1e6, NAN, 70000.0] * 8).view(1, 1, 1, 32)
    fmt = kvk.BitmapFormat(1, 32, 32, 32, torch.float16)
    _, (back, _) = check(fmt, big, big, int32(0), int32(0), 1, 1)
    assert back.flatten()[:4].tolist()[:2] == [INF, -INF] and back.isnan().sum() == 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*VALUE_DTYPES, torch.float32])
def test_layouts(layout, dtype):
    for fmt in GOLDEN_FORMATS.values():
        if dtype not in (fmt.dtype, torch.float32):
            continue
        dense = pool(layout, 5, fmt.page_size, 3, fmt.head_dim, fmt.head_dim_v, dtype)
        for to, x in zip(dense, pages(fmt, 5, 3, dtype=dtype), strict=True):
            to.copy_(x)
        check(fmt, *dense, int32(4, 0, 2), int32(1, 5, 0), 6, 3)


def test_a_rotated_row_with_nan_reads_as_nan():
    fmt = kvk.BitmapFormat(2, 64, 16, 16, k_rotate=1, v_rotate=1)
    k = torch.randn(1, 2, 1, 64).bfloat16()
    k[0, 1, 0, 7] = NAN
    _, (back, _) = check(fmt, k, k, int32(0), int32(0), 1, 1)
    assert back[0, 0].isfinite().all() and back[0, 1].isnan().all()


def test_rotated_there_and_back():
    """Everything kept: what is lost is the rounding to bfloat16, of the rotated row and of the row."""
    k = torch.randn(2, 64, 1, 128)
    fmt = kvk.BitmapFormat(64, 128, 128, 128, k_rotate=1)
    _, (rotated, plain) = check(fmt, k, k, int32(0, 1), int32(0, 1), 2, 1)
    assert 0 < (rotated.float() - k).abs().max() < 0.05 and (plain.float() - k).abs().max() < 0.02


def test_no_pages():
    fmt = kvk.BitmapFormat(32, 64, 32, 32)
    pools = fmt.new_pool(0, 2)
    dense = torch.empty(0, 32, 2, 64, dtype=torch.bfloat16)
    kvk.compress_pages(dense, dense, int32(), *pools, int32(), fmt)
    k, v = kvk.decompress_pages(*pools, int32(), fmt)
    assert k.shape == v.shape == (0, 32, 2, 64)


def test_threads_do_not_matter():
    fmt = kvk.BitmapFormat(16, 128, 64, 40)
    k, v = pages(fmt, 9, 3)
    ids = torch.arange(9, dtype=torch.int32)
    results = []
    for count in (1, 2):
        with threads(count):
            pools = fmt.new_pool(9, 3)
            kvk.compress_pages(k, v, ids, *pools, ids, fmt)
            results.append(pools)
    for a, b in zip(*results, strict=True):
        assert_bit_equal(a, b)


@given(st.data())
def test_random_cases(data):
    draw = data.draw
    fmt = draw(formats())
    heads, num_pages = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([fmt.dtype, torch.float32]))
    seed = draw(st.integers(0, 2**31))
    k_pages, v_pages = pages(fmt, num_pages, heads, seed, dtype)
    src = draw(st.lists(st.integers(0, num_pages - 1), max_size=3))
    dst = draw(st.permutations(range(4)))[: len(src)]
    select = {}
    for name, dim, keep in (("k", fmt.head_dim, fmt.k_keep), ("v", fmt.head_dim_v, fmt.v_keep)):
        shape = (len(src), fmt.page_size, heads, dim)
        scores = all_bits(2 * torch.Size(shape).numel(), torch.bfloat16, seed).view(torch.float32).view(shape)
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.scatter_(-1, torch.rand(shape).argsort(-1)[..., : draw(st.integers(0, keep))], True)
        kind = draw(st.sampled_from(["none", "scores", "mask", "bitmap"]))
        if kind != "none":
            chosen = {"scores": scores, "mask": mask, "bitmap": pack_bitmap(mask)}[kind]
            select[f"{name}_select"] = chosen
    check(fmt, k_pages, v_pages, int32(*src), int32(*dst), 4, heads, **select)
