"""append_kv: rows land in their slots bit for bit, and nothing else changes."""

from __future__ import annotations

import kvk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, bits
from paged_cases import LAYOUTS, make_case, pool
from paged_strategies import DTYPES, HEAD_DIMS, PAGE_SIZES


def random_bytes(shape, dtype, gen) -> torch.Tensor:
    """Every bit pattern, NaN payloads and subnormals included: append_kv copies and does not compute."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), generator=gen, dtype=torch.uint8).view(dtype)[..., 0]


def filled_pool(layout, num_pages, page_size, heads, dim, dim_v, dtype, gen):
    pages = pool(layout, num_pages, page_size, heads, dim, dim_v, dtype)
    for x in pages:
        x.copy_(random_bytes(x.shape, dtype, gen))
    return pages


def check(k, v, k_pages, v_pages, slots):
    want_k, want_v = k_pages.clone(), v_pages.clone()
    reference.append_kv(k, v, want_k, want_v, slots)
    before = bits(k), bits(v), slots.clone()
    assert kvk.append_kv(k, v, k_pages, v_pages, slots) is None
    assert_bit_equal(k_pages, want_k, "k_pages")
    assert_bit_equal(v_pages, want_v, "v_pages")
    assert (
        torch.equal(bits(k), before[0]) and torch.equal(bits(v), before[1]) and torch.equal(slots, before[2])
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype):
    gen = torch.Generator().manual_seed(0)
    k_pages, v_pages = filled_pool(layout, 6, 5, 3, 64, 40, dtype, gen)
    slots = torch.randperm(30, generator=gen)[:17]
    slots[3] = slots[8] = -1
    k, v = (random_bytes((17, 3, d), dtype, gen) for d in (64, 40))
    check(k, v, k_pages, v_pages, slots)


def test_slot_is_page_times_size_plus_offset():
    k_pages, v_pages = torch.zeros(4, 5, 1, 32), torch.zeros(4, 5, 1, 32)
    k, v = torch.full((1, 1, 32), 3.0), torch.full((1, 1, 32), 4.0)
    kvk.append_kv(k, v, k_pages, v_pages, torch.tensor([13]))
    assert (k_pages[2, 3] == 3).all() and (v_pages[2, 3] == 4).all()
    assert k_pages.count_nonzero() == 32 and v_pages.count_nonzero() == 32


@pytest.mark.parametrize("slot", [-1, -2, -(2**31), -(2**63)])
def test_negative_slot_is_skipped(slot):
    gen = torch.Generator().manual_seed(1)
    k_pages, v_pages = filled_pool("nhd", 3, 4, 2, 32, 32, torch.float32, gen)
    before = bits(k_pages).clone(), bits(v_pages).clone()
    kvk.append_kv(torch.randn(1, 2, 32), torch.randn(1, 2, 32), k_pages, v_pages, torch.tensor([slot]))
    assert torch.equal(bits(k_pages), before[0]) and torch.equal(bits(v_pages), before[1])


@pytest.mark.parametrize("pages", [0, 3])
def test_no_tokens(pages):
    k_pages, v_pages = torch.ones(pages, 4, 2, 32), torch.ones(pages, 4, 2, 40)
    empty = torch.empty(0, 2, 32), torch.empty(0, 2, 40)
    kvk.append_kv(*empty, k_pages, v_pages, torch.empty(0, dtype=torch.int64))
    assert (k_pages == 1).all() and (v_pages == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype):
    """k and v as slices of one fused qkv projection, and head by head."""
    gen = torch.Generator().manual_seed(2)
    qkv = random_bytes((9, 8, 48), dtype, gen)
    k, v = qkv[:, 4:6, 3:35], qkv[:, 6:, 5:45]
    slots = torch.randperm(21, generator=gen)[:9]
    check(k, v, *filled_pool("nhd", 3, 7, 2, 32, 40, dtype, gen), slots)
    k = random_bytes((2, 9, 32), dtype, gen).transpose(0, 1)
    check(k, v, *filled_pool("hnd", 3, 7, 2, 32, 40, dtype, gen), slots)
    one = random_bytes((1, 2, 32), dtype, gen).expand(9, 2, 32)  # stride 0: the same row everywhere
    check(one, v, *filled_pool("hnd", 3, 7, 2, 32, 40, dtype, gen), slots)


def test_strided_slots():
    gen = torch.Generator().manual_seed(4)
    slots = torch.full((9, 2), 10**9)
    slots[:, 1] = torch.randperm(21, generator=gen)[:9]
    k, v = torch.randn(9, 2, 32, generator=gen), torch.randn(9, 2, 40, generator=gen)
    check(k, v, *filled_pool("nhd", 3, 7, 2, 32, 40, torch.float32, gen), slots[:, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(dtype):
    gen = torch.Generator().manual_seed(3)
    k_pages, v_pages = filled_pool("nhd", 70, 64, 4, 32, 32, dtype, gen)
    slots = torch.randperm(70 * 64, generator=gen)
    slots[torch.rand(slots.shape, generator=gen) < 0.1] = -1
    k, v = (random_bytes((slots.numel(), 4, 32), dtype, gen) for _ in range(2))
    check(k, v, k_pages, v_pages, slots)


def test_append_then_attend():
    """Tokens appended one by one give the cache that attention reads."""
    case = make_case([37, 20], num_kv_heads=2, group=3, page_size=8, table="dense", layout="hnd")
    k_pages, v_pages = torch.full_like(case.k_pages, torch.nan), torch.full_like(case.v_pages, torch.nan)
    for request, length in enumerate((37, 20)):
        for position in range(length):
            page, offset = int(case.page_indices[request, position // 8]), position % 8
            kvk.append_kv(
                case.k_pages[page, offset][None],
                case.v_pages[page, offset][None],
                k_pages,
                v_pages,
                torch.tensor([page * 8 + offset]),
            )
    out, lse = case.with_(k_pages=k_pages, v_pages=v_pages).run()
    want_out, want_lse = case.run()
    assert_bit_equal(out, want_out)
    assert_bit_equal(lse, want_lse)


@given(st.data())
def test_random_cases(data):
    draw = data.draw
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    heads, page_size, num_pages = (
        draw(st.integers(1, 4)),
        draw(st.sampled_from(PAGE_SIZES)),
        draw(st.integers(1, 9)),
    )
    dims = draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(HEAD_DIMS))
    k_pages, v_pages = filled_pool(layout, num_pages, page_size, heads, *dims, dtype, gen)
    slots = torch.randperm(num_pages * page_size, generator=gen)[: draw(st.integers(0, 100))]
    slots[torch.rand(slots.shape, generator=gen) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    k, v = (random_bytes((slots.numel(), heads, d), dtype, gen) for d in dims)
    check(k, v, k_pages, v_pages, slots)
