"""What a result may not depend on: the batch, the order, the threads, the layout, the form of the table."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import kvk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk_testing import assert_bit_equal, assert_error_rule, threads
from paged_cases import LAYOUTS, PagedCase, make_case
from paged_strategies import DTYPES, case_params

LENS = [600, 0, 1, 70, 1500, 513, 64]
QUERIES = [1, 3, 1, 70, 2, 40, 9]
OPTIONS = {
    "plain": {},
    "all": {"window_left": 400, "logits_soft_cap": 20.0, "alibi": True, "sinks": True, "key_bias": "head"},
}


def same_bits(got, want, rows=slice(None)):
    assert_bit_equal(got[0], want[0][rows].contiguous(), "out")
    assert_bit_equal(got[1], want[1][rows].contiguous(), "lse")


def build(op: str, dtype, options: str = "plain", **changes) -> PagedCase:
    params = {"num_kv_heads": 4, "group": 2, "head_dim": 64, "dtype": dtype, **OPTIONS[options], **changes}
    if op == "decode":
        return make_case(LENS, **params)
    return make_case(LENS, QUERIES, mask=None if options == "plain" else "tree", **params)


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["decode", "prefill"])
class TestBatch:
    def test_alone(self, op, dtype, options):
        case = build(op, dtype, options)
        whole = case.check()
        for request in range(len(LENS)):
            same_bits(case.select([request]).run(), whole, case.rows(request))

    def test_any_order_and_company(self, op, dtype, options):
        case = build(op, dtype, options)
        whole = case.run()
        rng = random.Random(1)
        orders = [rng.sample(range(len(LENS)), len(LENS)), [3] * 5 + [0], rng.choices(range(len(LENS)), k=40)]
        for order in orders:
            other = case.select(order)
            got = other.run()
            for place, request in enumerate(order):
                rows = other.rows(place)
                same_bits((got[0][rows], got[1][rows]), whole, case.rows(request))

    def test_threads(self, op, dtype, options):
        case = build(op, dtype, options)
        big = case.select([0, 4, 5] * 4)
        with threads(1):
            want, want_big, want_alone = case.run(), big.run(), case.select([4]).run()
        for count in (2, 3, 7):
            with threads(count):
                same_bits(case.run(), want)
                same_bits(big.run(), want_big)
                same_bits(case.select([4]).run(), want_alone)

    def test_repeats(self, op, dtype, options):
        case = build(op, dtype, options)
        want = case.run()
        for _ in range(5):
            same_bits(case.run(), want)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_calls_at_the_same_time(op):
    """Several Python threads call the ops at once."""
    cases = [build(op, dtype, options) for dtype in DTYPES for options in OPTIONS]
    wants = [case.run() for case in cases]
    with ThreadPoolExecutor(max_workers=4) as workers:
        for case, got in zip(range(3 * len(cases)), workers.map(PagedCase.run, cases * 3), strict=True):
            same_bits(got, wants[case % len(cases)])


@pytest.mark.parametrize("heads", [(1, 1), (1, 8), (3, 5), (8, 1), (8, 4)])
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_alone_for_head_counts(op, heads):
    case = build(op, torch.bfloat16, num_kv_heads=heads[0], group=heads[1], head_dim=32, page_size=5)
    crowd = case.select([4, 0, 5] * 8)
    for count in (1, 2):
        with threads(count):
            whole, crowded = case.run(), crowd.run()
            same_bits((crowded[0][crowd.rows(0)], crowded[1][crowd.rows(0)]), whole, case.rows(4))
            same_bits(case.select([4]).run(), whole, case.rows(4))


@given(case_params(prefill=False) | case_params(prefill=True), st.randoms(use_true_random=False))
def test_alone_in_random_cases(params, rng):
    case = make_case(**params)
    batch = case.kv_lens.shape[0]
    whole = case.run()
    if batch == 0:
        return
    request = rng.randrange(batch)
    with threads(rng.choice([1, 2, 3])):
        same_bits(case.select([request]).run(), whole, case.rows(request))
    order = rng.choices(range(batch), k=batch)
    other = case.select(order)
    got = other.run()
    for place, source in enumerate(order):
        rows = other.rows(place)
        same_bits((got[0][rows], got[1][rows]), whole, case.rows(source))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["decode", "prefill"])
class TestForm:
    def test_layouts_agree(self, op, dtype):
        want = build(op, dtype, num_kv_heads=8, layout="nhd").run()
        for layout in LAYOUTS[1:]:
            same_bits(build(op, dtype, num_kv_heads=8, layout=layout).run(), want)

    def test_per_head_table_equals_dense(self, op, dtype):
        case = build(op, dtype, "all")
        want = case.run()
        table, lens = case.page_indices, case.kv_lens
        per_head = table[:, None].expand(-1, 4, -1).contiguous()
        per_head_lens = lens[:, None].expand(-1, 4).contiguous()
        same_bits(case.with_(page_indices=per_head).run(), want)
        same_bits(case.with_(kv_lens=per_head_lens).run(), want)
        same_bits(case.with_(page_indices=per_head, kv_lens=per_head_lens).run(), want)

    def test_csr_equals_dense(self, op, dtype):
        case = build(op, dtype, "all")
        want = case.run()
        needs = [-(-length // 16) for length in LENS]
        lists = [row[:need] for row, need in zip(case.page_indices, needs, strict=True)]
        indptr = torch.tensor([0, *needs]).cumsum(0, dtype=torch.int32)
        same_bits(case.with_(page_indices=torch.cat(lists), options={"page_indptr": indptr}).run(), want)
        per_head = torch.tensor([0, *(need for need in needs for _ in range(4))]).cumsum(0, dtype=torch.int32)
        flat = torch.cat([row for row in lists for _ in range(4)])
        same_bits(case.with_(page_indices=flat, options={"page_indptr": per_head}).run(), want)

    def test_strided_tables_and_options(self, op, dtype):
        case = build(op, dtype, "all")
        want = case.run()

        def spread(x: torch.Tensor) -> torch.Tensor:
            """The same values, no stride of them 1, garbage between."""
            wide = torch.full([2 * size + 1 for size in x.shape], 77, dtype=x.dtype)
            view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
            view.copy_(x)
            return view

        options = {k: spread(v) for k, v in case.options.items() if isinstance(v, torch.Tensor)}
        case = case.with_(
            page_indices=spread(case.page_indices), kv_lens=spread(case.kv_lens), options=options
        )
        if case.qo_indptr is not None:
            case = case.with_(qo_indptr=spread(case.qo_indptr))
        same_bits(case.run(), want)

    def test_page_size(self, op, dtype):
        """The same keys in pages of another size: equal but for the order of summation."""
        case = build(op, dtype, page_size=16)
        exact, plain = case.reference(), case.reference(dtype)
        for page_size in (1, 3, 7, 64, 128, 2000):
            other = repaged(case, 16, page_size)
            out, lse = other.run()
            assert_error_rule(out, exact[0], plain[0], per_row=True, what=f"out, pages of {page_size}")
            assert_error_rule(lse, exact[1], plain[1], per_row=False, what=f"lse, pages of {page_size}")


def repaged(case: PagedCase, page_size: int, new_size: int) -> PagedCase:
    """The case (dense table) with its keys moved to pages of another size."""
    lens = case.kv_lens.tolist()
    needs = [-(-length // new_size) for length in lens]
    k_pages, v_pages = (
        x.new_full((sum(needs), new_size, *x.shape[2:]), torch.nan) for x in (case.k_pages, case.v_pages)
    )
    table = torch.full((len(lens), max(needs)), -1, dtype=torch.int32)
    start = 0
    for b, (length, need) in enumerate(zip(lens, needs, strict=True)):
        table[b, :need] = torch.arange(start, start + need)
        position = torch.arange(length)
        source = case.page_indices[b, position // page_size].long(), position % page_size
        target = start + position // new_size, position % new_size
        k_pages[target], v_pages[target] = case.k_pages[source], case.v_pages[source]
        start += need
    return case.with_(k_pages=k_pages, v_pages=v_pages, page_indices=table)


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1, 20, 69, 70])
def test_prefill_then_decode_is_prefill(first, dtype, options):
    """n tokens prefilled and m decoded one by one give the rows of n + m prefilled at once."""
    total, past = 70, 530
    params = {"num_kv_heads": 2, "group": 3, "dtype": dtype, **OPTIONS[options]}
    whole = make_case([past + total, 30], [total, 2], **params)
    exact, plain = whole.reference(), whole.reference(dtype)
    shared = dict(whole.options)
    whole.check()

    lens = torch.tensor([past + first], dtype=torch.int32)
    indptr = torch.tensor([0, first], dtype=torch.int32)
    pages, table = (whole.k_pages, whole.v_pages), whole.page_indices[:1]
    parts = [kvk.paged_prefill(whole.q[:first], indptr, *pages, table, lens, **shared)]
    for i in range(first, total):
        lens = torch.tensor([past + i + 1], dtype=torch.int32)
        parts.append(kvk.paged_decode(whole.q[i : i + 1], *pages, table, lens, **shared))
    joined_out, joined_lse = (torch.cat(x) for x in zip(*parts, strict=True))
    rows = slice(0, total)
    assert_error_rule(joined_out, exact[0][rows], plain[0][rows], per_row=True, what="joined out")
    assert_error_rule(joined_lse, exact[1][rows], plain[1][rows], per_row=False, what="joined lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_in_chunks_is_prefill(dtype):
    total = 130
    whole = make_case([total], [total], num_kv_heads=2, group=3, dtype=dtype, alibi=True, window_left=50)
    exact, plain = whole.reference(), whole.reference(dtype)
    parts = []
    for begin in range(0, total, 37):
        end = min(total, begin + 37)
        chunk = whole.with_(
            q=whole.q[begin:end],
            qo_indptr=torch.tensor([0, end - begin], dtype=torch.int32),
            kv_lens=torch.tensor([end], dtype=torch.int32),
        )
        parts.append(chunk.run())
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    assert_error_rule(out, exact[0], plain[0], per_row=True, what="out")
    assert_error_rule(lse, exact[1], plain[1], per_row=False, what="lse")
