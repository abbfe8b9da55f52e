"""quantize_pages and dequantize_pages: records byte for byte, golden files, strided pools, and formats themselves."""

from __future__ import annotations

from pathlib import Path

import kvk
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, threads
from paged_cases import LAYOUTS, pool
from paged_strategies import DTYPES
from quant_cases import BITS, formats, padded_pool, values

GOLDEN = Path(__file__).parent / "golden" / "quant_records.npz"
GOLDEN_FORMATS = {
    "kivi2": kvk.QuantFormat(32, 32),
    "kivi4": kvk.QuantFormat(32, 32, 4, 4, 16, 32),
    "bits3": kvk.QuantFormat(32, 40, 3, 3, 32, 40),
    "int8_per_token": kvk.QuantFormat(16, 32, 8, 8, 32, 32, "token", "token"),
    "clipped_rotated": kvk.QuantFormat(16, 32, 2, 2, 32, 16, "token", "channel", k_clip=0.8, k_rotate=1),
    "values_apart": kvk.QuantFormat(16, 80, 4, 2, 16, 32, head_dim_v=64, k_rotate=1, v_rotate=1),
}


def golden_input(fmt: kvk.QuantFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages without a random number: two pages, one kv head, float32 that no dtype of torch's need round."""
    count = 2 * fmt.page_size
    k = torch.tensor([((37 * i) % 101 - 50) / 8 + (i // 7) % 5 for i in range(count * fmt.head_dim)])
    v = torch.tensor([((53 * i) % 89 - 44) / 16 for i in range(count * fmt.head_dim_v)])
    k[3] = float("nan")
    return k.view(2, fmt.page_size, 1, fmt.head_dim), v.view(2, fmt.page_size, 1, fmt.head_dim_v)


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def random_pages(fmt, layout, num_pages, heads, dtype, seed=0):
    pages = pool(layout, num_pages, fmt.page_size, heads, fmt.head_dim, fmt.head_dim_v, dtype)
    for i, x in enumerate(pages):
        x.copy_(values(*x.shape, dtype=dtype, seed=seed + i))
    return pages


def check(fmt, k_pages, v_pages, src, dst, num_pages, heads):
    got, want = padded_pool(fmt, num_pages, heads), padded_pool(fmt, num_pages, heads)
    assert kvk.quantize_pages(k_pages, v_pages, src, *got, dst, fmt) is None
    reference.quantize_pages(k_pages, v_pages, src, *want, dst, fmt)
    for name, a, b in zip(("k_pool", "v_pool"), got, want, strict=True):
        assert_bit_equal(a._base, b._base, name)  # the gaps between records too
    for dtype in DTYPES:
        back = kvk.dequantize_pages(*got, dst, fmt, dtype)
        want_back = reference.dequantize_pages(*got, dst, fmt, dtype)
        for a, b in zip(back, want_back, strict=True):
            assert a.is_contiguous() and a.dtype == dtype
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return got


class TestFormat:
    def test_sizes_of_kivi(self):
        fmt = kvk.QuantFormat(64, 128)
        assert (fmt.k_record_bytes, fmt.v_record_bytes, fmt.bits_per_element) == (3072, 3072, 3.0)
        assert kvk.QuantFormat(128, 128, 4, 4, 128, 128).bits_per_element == 4.25
        assert kvk.QuantFormat(64, 128, 8, 8, 64, 128, "token", "token").bits_per_element == 8.375

    def test_is_a_value(self):
        assert kvk.QuantFormat(64, 128) == kvk.QuantFormat(64, 128, head_dim_v=128)
        assert len({kvk.QuantFormat(64, 128), kvk.QuantFormat(64, 128), kvk.QuantFormat(64, 64)}) == 2
        with pytest.raises(AttributeError):
            kvk.QuantFormat(64, 128).k_bits = 4

    @given(formats())
    def test_python_and_cpp_agree(self, fmt):
        layouts = [(x.row_bytes, x.num_scales, x.scale_offset, x.min_offset, x.record_bytes)
                   for x in (fmt.k_layout, fmt.v_layout)]  # fmt: skip
        assert torch.ops.kvk._quant_layout(fmt.numbers) == [*layouts[0], *layouts[1]]
        assert all(number % 16 == 0 for layout in layouts for number in layout[2:])

    def test_new_pool(self):
        k_pool, v_pool = kvk.QuantFormat(32, 64, head_dim_v=128).new_pool(5, 3)
        assert k_pool.shape == (5, 3, 768) and v_pool.shape == (5, 3, 1536)
        assert k_pool.dtype == v_pool.dtype == torch.uint8


class TestGolden:
    """Bytes that must never change: records are kept and sent elsewhere."""

    @pytest.mark.parametrize("name", GOLDEN_FORMATS)
    def test_records(self, name):
        fmt, stored = GOLDEN_FORMATS[name], numpy.load(GOLDEN)
        assert stored[f"{name}.numbers"].tolist() == fmt.numbers
        pools = fmt.new_pool(2, 1)
        kvk.quantize_pages(*golden_input(fmt), int32(0, 1), *pools, int32(0, 1), fmt)
        for part, pool_ in zip("kv", pools, strict=True):
            assert_bit_equal(pool_, torch.from_numpy(stored[f"{name}.{part}"]), f"{name} {part}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    for fmt in GOLDEN_FORMATS.values():
        k_pages, v_pages = random_pages(fmt, layout, 5, 3, dtype)
        check(fmt, k_pages, v_pages, int32(4, 0, 2), int32(1, 5, 0), 6, 3)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 256])
def test_page_and_head_sizes(page_size, head_dim):
    group = {80: 40, 160: 80}.get(head_dim, 32)
    for bits in BITS:
        fmt = kvk.QuantFormat(page_size, head_dim, bits, bits, 16, group, k_rotate=1)
        check(fmt, *random_pages(fmt, "nhd", 2, 2, torch.bfloat16), int32(1), int32(0), 1, 2)


@pytest.mark.parametrize("n", [12, 20, 28, 40, 32, 64, 96, 80, 112, 128, 224, 256, 320, 448])
def test_rotation_is_defined_to_the_bit(n):
    """The transform's sums have one order, so that rotated records are the same bytes everywhere."""
    x = values(50, n)
    assert_bit_equal(kvk.hadamard(x), reference.quant.rotate(x))
    assert_bit_equal(kvk.hadamard(x, transpose=True), reference.quant.rotate(x, transpose=True))


def test_rotation_spreads_an_outlier():
    """At 2 bits per token, one channel times 20 costs the others most of their bits, unless rows are rotated."""
    k = values(4, 64, 1, 128, spread=False)
    k[..., 17] *= 20
    errors = {}
    for rotate in (0, 1):
        fmt = kvk.QuantFormat(64, 128, k_axis="token", v_axis="token", k_rotate=rotate, v_rotate=rotate)
        pools = fmt.new_pool(4, 1)
        ids = int32(0, 1, 2, 3)
        kvk.quantize_pages(k, k, ids, *pools, ids, fmt)
        back = kvk.dequantize_pages(*pools, ids, fmt, torch.float32)[0]
        rest = torch.arange(128) // 32 == 0
        rest[17] = False
        errors[rotate] = (back - k)[..., rest].pow(2).mean().item()
    assert errors[1] < errors[0] / 4


def test_pages_do_not_see_each_other():
    """A group never crosses a page: NaN in the neighbours changes nothing."""
    fmt = kvk.QuantFormat(16, 32, k_group=16)
    k_pages, v_pages = random_pages(fmt, "nhd", 3, 2, torch.float32)
    want = fmt.new_pool(1, 2)
    kvk.quantize_pages(k_pages, v_pages, int32(1), *want, int32(0), fmt)
    k_pages[[0, 2]] = torch.nan
    v_pages[[0, 2]] = torch.nan
    got = fmt.new_pool(1, 2)
    with threads(1):
        kvk.quantize_pages(k_pages, v_pages, int32(1), *got, int32(0), fmt)
    assert_bit_equal(got[0], want[0])
    assert_bit_equal(got[1], want[1])


def test_no_pages():
    fmt = kvk.QuantFormat(32, 64)
    pools = fmt.new_pool(0, 2)
    dense = torch.empty(0, 32, 2, 64)
    kvk.quantize_pages(dense, dense, int32(), *pools, int32(), fmt)
    k, v = kvk.dequantize_pages(*pools, int32(), fmt, torch.float16)
    assert k.shape == v.shape == (0, 32, 2, 64)


@given(st.data())
def test_random_cases(data):
    draw = data.draw
    fmt = draw(formats())
    heads, num_pages = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES))
    k_pages, v_pages = random_pages(fmt, layout, num_pages, heads, dtype, draw(st.integers(0, 2**31)))
    src = draw(st.lists(st.integers(0, num_pages - 1), max_size=3))
    dst = draw(st.permutations(range(4)))[: len(src)]
    check(fmt, k_pages, v_pages, int32(*src), int32(*dst), 4, heads)
