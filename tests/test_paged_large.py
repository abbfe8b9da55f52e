"""Offsets past 2^31 elements and past 2^31 slots, in pools of which only the used pages ever become real
memory."""

from __future__ import annotations

import math
import mmap

import kvk
import pytest
import torch
from kvk_testing import assert_bit_equal
from paged_cases import PagedCase, make_case

# Not reserved: the kernel hands out a page when it is first touched, however large the mapping is.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
DTYPE = torch.bfloat16
HEADS, DIM, PAGE = 2, 64, 16


def lazy(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """A tensor of zeros that takes memory only where it is touched."""
    size = torch.empty(0, dtype=dtype).element_size()
    memory = mmap.mmap(-1, math.prod(shape) * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@pytest.fixture(autouse=True)
def memory_stays_small():
    before = resident_bytes()
    yield
    assert resident_bytes() - before < 1 << 30


def large_pool(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """k_pages and v_pages [N, P, Hkv, D], the last pages of each past 2^31 elements."""
    if layout == "halves":
        pages = (1 << 31) // (2 * PAGE * HEADS * DIM) + 1000
        both = lazy(pages, 2, PAGE, HEADS, DIM)
        return both[:, 0], both[:, 1]
    pages = (1 << 31) // (PAGE * HEADS * DIM) + 1000
    if layout == "nhd":
        return lazy(pages, PAGE, HEADS, DIM), lazy(pages, PAGE, HEADS, DIM)
    assert layout == "hnd"
    return tuple(lazy(pages, HEADS, PAGE, DIM).transpose(1, 2) for _ in range(2))


def spread_out(case: PagedCase, layout: str) -> PagedCase:
    """The case with its pages at both ends of a large pool, most of them past 2^31 elements."""
    k_pages, v_pages = large_pool(layout)
    small, large = case.k_pages.shape[0], k_pages.shape[0]
    place = torch.cat([torch.arange(2), torch.arange(large - small + 2, large)])
    k_pages[place], v_pages[place] = case.k_pages, case.v_pages
    assert int(place[-1]) * k_pages.stride(0) > 1 << 31
    table = case.page_indices.clone()
    known = (table >= 0) & (table < small)  # the rest is garbage that is never read
    table[known] = place[table[known].long()].int()
    return case.with_(k_pages=k_pages, v_pages=v_pages, page_indices=table)


@pytest.mark.parametrize("layout", ["nhd", "hnd", "halves"])
@pytest.mark.parametrize("queries", [None, [40, 3, 1]], ids=["decode", "prefill"])
def test_attention_past_2_31_elements(layout, queries):
    lens = [170, 33, 600]
    case = make_case(
        lens, queries, num_kv_heads=HEADS, head_dim=DIM, page_size=PAGE, dtype=DTYPE, layout=layout, seed=5
    )
    want_out, want_lse = case.check()
    out, lse = spread_out(case, layout).run()
    assert_bit_equal(out, want_out)
    assert_bit_equal(lse, want_lse)


@pytest.mark.parametrize("layout", ["nhd", "hnd", "halves"])
def test_append_past_2_31_elements(layout):
    k_pages, v_pages = large_pool(layout)
    last = k_pages.shape[0] - 1
    places = [(0, 3), (last, PAGE - 1), (last - 500, 0), (last, 0)]
    k, v = torch.randn(4, HEADS, DIM).to(DTYPE), torch.randn(4, HEADS, DIM).to(DTYPE)
    kvk.append_kv(k, v, k_pages, v_pages, torch.tensor([page * PAGE + offset for page, offset in places]))
    for token, (page, offset) in enumerate(places):
        assert_bit_equal(k_pages[page, offset], k[token])
        assert_bit_equal(v_pages[page, offset], v[token])
    for page in (0, 1, last, last - 1, last - 500, last // 2):
        written = [offset for at, offset in places if at == page]
        clear = [offset for offset in range(PAGE) if offset not in written]
        assert (k_pages[page, clear] == 0).all() and (v_pages[page, clear] == 0).all()


def test_slots_past_2_31():
    """More than 2^31 slots: append to the last ones, then attend to them."""
    page_size = 128
    pages = (1 << 31) // page_size + 2
    both = lazy(pages, 2, page_size, 1, 32)
    k_pages, v_pages = both[:, 0], both[:, 1]
    slots = torch.tensor([(1 << 31) + offset for offset in range(-3, 7)])
    k, v = torch.randn(10, 1, 32).to(DTYPE), torch.randn(10, 1, 32).to(DTYPE)
    kvk.append_kv(k, v, k_pages, v_pages, slots)
    border = (1 << 31) // page_size
    assert_bit_equal(torch.cat([k_pages[border - 1, -3:], k_pages[border, :7]]), k)
    assert_bit_equal(torch.cat([v_pages[border - 1, -3:], v_pages[border, :7]]), v)
    assert (k_pages[border - 1, :-3] == 0).all() and (v_pages[border, 7:] == 0).all()

    q = torch.randn(1, 2, 32).to(DTYPE)
    lens = torch.tensor([7], dtype=torch.int32)
    got = kvk.paged_decode(q, k_pages, v_pages, torch.tensor([[border]], dtype=torch.int32), lens)
    want = kvk.paged_decode(q, k[None, 3:], v[None, 3:], torch.zeros(1, 1, dtype=torch.int32), lens)
    assert_bit_equal(got[0], want[0])
    assert_bit_equal(got[1], want[1])


def far_apart(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose last row along the first dimension begins past 2^31 elements."""
    stride = (1 << 31) // (shape[0] - 1) + 64
    inner = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
    return lazy(stride * (shape[0] - 1) + math.prod(shape[1:]), dtype=dtype).as_strided(
        shape, [stride, *inner]
    )


@pytest.mark.parametrize("queries", [None, [40, 3, 1]], ids=["decode", "prefill"])
def test_rows_and_options_far_apart(queries):
    case = make_case(
        [170, 33, 600],
        queries,
        num_kv_heads=2,
        group=2,
        dtype=DTYPE,
        key_bias="head",
        mask="tree" if queries else None,
    )
    want_out, want_lse = case.run()

    def spread(x: torch.Tensor) -> torch.Tensor:
        y = far_apart(*x.shape, dtype=x.dtype)
        y.copy_(x)
        return y

    options = {"key_bias": spread(case.options["key_bias"])}
    if queries:
        options["mask_bits"] = spread(case.options["mask_bits"])
    far = case.with_(q=spread(case.q), page_indices=spread(case.page_indices), options=options)
    out, lse = far_apart(*want_out.shape, dtype=DTYPE), far_apart(*want_lse.shape, dtype=torch.float32)
    getattr(kvk, far.name)(*far.args, **far.options, out=out, lse=lse)
    assert_bit_equal(out.contiguous(), want_out)
    assert_bit_equal(lse.contiguous(), want_lse)


def test_append_rows_far_apart():
    k, v = far_apart(3, HEADS, DIM, dtype=DTYPE), far_apart(3, HEADS, DIM, dtype=DTYPE)
    k.copy_(torch.randn(3, HEADS, DIM))
    v.copy_(torch.randn(3, HEADS, DIM))
    k_pages, v_pages = (torch.zeros(1, PAGE, HEADS, DIM, dtype=DTYPE) for _ in range(2))
    kvk.append_kv(k, v, k_pages, v_pages, torch.tensor([2, 0, 7]))
    assert_bit_equal(k_pages[0, [2, 0, 7]], k.contiguous())
    assert_bit_equal(v_pages[0, [2, 0, 7]], v.contiguous())


def test_merge_parts_far_apart():
    out, lse = torch.randn(3, 4, 2, 16), torch.randn(3, 4, 2)
    want = kvk.merge_states(out, lse)
    far_out, far_lse = far_apart(*out.shape, dtype=torch.float32), far_apart(*lse.shape, dtype=torch.float32)
    far_out.copy_(out)
    far_lse.copy_(lse)
    got = kvk.merge_states(far_out, far_lse)
    assert_bit_equal(got[0], want[0])
    assert_bit_equal(got[1], want[1])
