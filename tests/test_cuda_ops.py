"""Attention on CUDA through torch's tensors, over the device emulator and, where there is one, on the card.

The emulator holds a few instantiations (tests/emulator/torch/*_kernels.cc): bf16 with D 64 and no part of the score,
f16 with D 32 and Dv 40 and one part, or all. An op that asks for another says which line is missing.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from card import Card, EmulatedCard
from hypothesis import given, settings
from kvk_testing import assert_bit_equal, expect_error
from paged_cases import TABLES, PagedCase, make_case
from paged_strategies import case_params
from test_paged_large import spread_out

BF16: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 64}
F16: dict[str, Any] = {"dtype": torch.float16, "head_dim": 32, "head_dim_v": 40}
KINDS = pytest.mark.parametrize("kind", [BF16, F16], ids=["bf16", "f16"])
OPS = pytest.mark.parametrize("op", ["decode", "prefill"])
ALL = {"window_left": 300, "logits_soft_cap": 8.0, "alibi": True, "sinks": True, "key_bias": "head"}
LAYOUTS = ("nhd", "hnd", "halves")  # a card wants rows on 16 bytes: no "padded" pools

LENS = [600, 0, 1, 70, 1500, 513, 64]
QUERIES = [1, 3, 1, 70, 2, 40, 9]


def build(op: str, options: str, **changes: Any) -> PagedCase:
    if op == "decode":
        return make_case(LENS, **{**(F16 if options == "all" else BF16), **OPTIONS[options], **changes})
    mask = {"mask": "tree"} if options == "all" else {}
    return make_case(LENS, QUERIES, **{**(F16 if mask else BF16), **mask, **OPTIONS[options], **changes})


OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "all": ALL}
OPTION_SETS = pytest.mark.parametrize("options", list(OPTIONS))


def same_bits(got, want, rows=slice(None)):
    assert_bit_equal(got[0], want[0][rows].contiguous(), "out")
    assert_bit_equal(got[1], want[1][rows].contiguous(), "lse")


class TestDecode:
    @KINDS
    @pytest.mark.parametrize("group", [*range(1, 9), 12, 16, 17, 32])
    def test_head_ratios(self, card: Card, kind, group):
        card.check(make_case([70, 5, 0, 530], group=group, **kind))

    @KINDS
    @pytest.mark.parametrize("page_size", [1, 3, 5, 7, 16, 33, 64, 128, 1000])
    def test_page_sizes(self, card: Card, kind, page_size):
        lens = [1, page_size, 2 * page_size, 67, 515]
        card.check(make_case(lens, page_size=page_size, share_pages=True, **kind))

    @KINDS
    def test_lengths_around_borders(self, card: Card, kind):
        borders = [1, 15, 16, 17, 63, 64, 65, 127, 129, 511, 512, 513, 1023, 1024, 1025, 2100]
        card.check(make_case(borders, page_size=5, **kind))

    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @KINDS
    def test_layouts_and_tables(self, card: Card, kind, layout, table):
        card.check(make_case([70, 1, 17, 130], layout=layout, table=table, share_pages=True, **kind))

    @pytest.mark.parametrize("table", TABLES)
    def test_per_head_lens(self, card: Card, table):
        lens = [[70, 0, 1], [3, 600, 64]]
        card.check(make_case(lens, num_kv_heads=3, table=table, alibi=True, window_left=50, **F16))

    @pytest.mark.parametrize("q_layout", ["packed", "sliced", "head_major"])
    def test_q_strides(self, card: Card, q_layout):
        card.check(make_case([70, 9], num_kv_heads=3, q_layout=q_layout, **BF16))

    @pytest.mark.parametrize(
        "options",
        [
            {"window_left": 0},
            {"window_left": 64},
            {"window_left": 5000},
            {"softmax_scale": -0.2},
            {"softmax_scale": 0.0},
            {"logits_soft_cap": 5.0, "q_scale": 4.0},
            {"alibi": True},
            {"sinks": True},
            {"key_bias": "page", "hidden_keys": 0.5},
            {"key_bias": "head", "hidden_keys": 0.98},
            {"key_bias": "page", "hidden_keys": 1.0, "sinks": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("group", [3, 12])
    def test_options(self, card: Card, group, options):
        card.check(make_case([1, 33, 0, 70, 600], group=group, page_size=7, **options, **F16))

    @pytest.mark.parametrize("window", [511, 512, 600, 1100])
    def test_window_of_several_splits(self, card: Card, window):
        card.check(make_case([1500, 2100, 700], num_kv_heads=1, group=3, window_left=window, **BF16))

    @pytest.mark.parametrize("group", [1, 5, 7, 8])
    def test_all_options(self, card: Card, group):
        options = {**ALL, "hidden_keys": 0.2, "softmax_scale": 0.3}
        card.check(make_case([1, 33, 0, 70, 600], group=group, page_size=7, **options, **F16))

    @KINDS
    def test_empty_batches(self, card: Card, kind):
        out, lse = card.check(make_case([], **kind))
        assert out.shape[0] == lse.shape[0] == 0
        out, lse = card.check(make_case([0, 0], sinks=True, **kind))
        assert (out == 0).all() and torch.isneginf(lse).all()


class TestPrefill:
    @KINDS
    def test_mixed_requests(self, card: Card, kind):
        """Tiled and streamed requests, one without tokens, one without keys, rows of no request."""
        lens, queries = [100, 600, 200, 5, 330, 0], [100, 1, 3, 0, 140, 4]
        card.check(make_case(lens, queries, padding_rows=3, page_size=5, **kind))

    @KINDS
    @pytest.mark.parametrize("group", range(1, 9))
    def test_head_ratios(self, card: Card, kind, group):
        card.check(make_case([90, 30], [60, 2], group=group, num_kv_heads=1, **kind))

    @KINDS
    def test_more_tokens_than_keys(self, card: Card, kind):
        card.check(make_case([10, 0, 40], [40, 9, 41], **kind))

    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_and_tables(self, card: Card, layout, table):
        case = make_case([70, 1, 130], [33, 1, 40], layout=layout, table=table, page_size=7, **BF16)
        card.check(case)

    @pytest.mark.parametrize("window", [511, 600, 1100])
    def test_window_of_several_splits(self, card: Card, window):
        """Of requests of few tokens, which are split like those of decode, and of many."""
        case = make_case([1500, 2100, 1300], [3, 1, 20], num_kv_heads=1, group=3, window_left=window, **BF16)
        card.check(case)

    def test_per_head_lens(self, card: Card):
        lens, queries = [[70, 0, 100], [3, 300, 64]], [40, 3]
        card.check(make_case(lens, queries, num_kv_heads=3, table="per_head", **F16))

    @pytest.mark.parametrize(
        "options",
        [
            {"causal": False},
            {"window_left": 0},
            {"window_left": 40},
            {"causal": False, "window_left": 20},
            {"logits_soft_cap": 5.0, "q_scale": 4.0},
            {"alibi": True},
            {"alibi": True, "causal": False},
            {"sinks": True},
            {"key_bias": "page", "hidden_keys": 0.5},
            {"key_bias": "head", "hidden_keys": 0.98},
            {"mask": "tree"},
            {"mask": "random", "mask_width": 70},
            {"mask": "random", "mask_width": 33, "causal": False},
            {**ALL, "hidden_keys": 0.2, "mask": "tree"},
            {**ALL, "mask": "random", "mask_width": 100},
        ],
        ids=str,
    )
    def test_options(self, card: Card, options):
        card.check(make_case([90, 70, 300, 200], [33, 5, 40, 1], group=3, page_size=3, **options, **F16))


@OPS
class TestNotFinite:
    def test_nan_stays_in_its_request_and_head(self, card: Card, op):
        queries = None if op == "decode" else [60, 2]
        case = make_case([100, 100], queries, **BF16)
        case.k_pages[case.page_indices[0, 0], 3, 1, 5] = torch.nan
        out, lse = card.check(case)
        assert lse.isnan().any() and not lse[case.rows(1)].isnan().any() and not lse[:, :2].isnan().any()
        assert torch.equal(out.isnan().all(-1), lse.isnan())

    def test_nan_value_stays_in_its_channel(self, card: Card, op):
        queries = None if op == "decode" else [60, 2]
        case = make_case([100, 100], queries, **BF16)
        case.v_pages[case.page_indices[0, 0], 3, 1, 5] = torch.nan
        out, lse = card.check(case)
        bad = torch.zeros_like(out, dtype=torch.bool)
        bad[case.rows(0), 2:, 5] = True
        assert torch.equal(out.isnan(), bad) and lse.isfinite().all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_keys_out_of_the_window_are_not_read(self, card: Card, op, value):
        case = make_case([700, 90], None if op == "decode" else [3, 40], window_left=20, page_size=8, **BF16)
        for request, (length, queries) in enumerate(zip((700, 90), (3, 40), strict=True)):
            for position in range(length - (1 if op == "decode" else queries) - 20):
                page = case.page_indices[request, position // 8]
                case.k_pages[page, position % 8] = value
                case.v_pages[page, position % 8] = value
        out, lse = card.check(case)
        assert out.isfinite().all() and lse.isfinite().all()


@OPS
@OPTION_SETS
class TestInvariance:
    def test_alone_in_any_order_and_company(self, card: Card, op, options):
        case = build(op, options)
        whole = card.check(case)
        for request in range(len(LENS)):
            same_bits(card.run(case.select([request])), whole, case.rows(request))
        rng = random.Random(1)
        for order in (
            rng.sample(range(len(LENS)), len(LENS)),
            [3] * 4 + [0],
            rng.choices(range(len(LENS)), k=9),
        ):
            other = case.select(order)
            got = card.run(other)
            for place, request in enumerate(order):
                rows = other.rows(place)
                same_bits((got[0][rows], got[1][rows]), whole, case.rows(request))

    def test_repeats_and_plain_form(self, card: Card, op, options):
        case = build(op, options)
        want = card.run(case)
        same_bits(card.run(case), want)
        op_new = getattr(card.ops, case.name)
        out, lse = op_new(*card.put(case.args), **card.put_options(case.options))
        same_bits((out.cpu(), lse.cpu()), want)

    def test_outputs_with_strides(self, card: Card, op, options):
        case = build(op, options)
        want = card.run(case)
        rows, heads, dim = want[0].shape
        wide, lse_t = card.put(
            [torch.full((rows, heads + 2, dim + 24), 7.0, dtype=case.q.dtype), torch.full((heads, rows), 7.0)]
        )
        out = wide[:, 1:-1, 16 : 16 + dim]
        args, more = card.put(case.args), card.put_options(case.options)
        getattr(card.ops, case.name).out(*args, **more, out=out, lse=lse_t.T)
        same_bits((out.cpu().contiguous(), lse_t.T.cpu().contiguous()), want)
        out.fill_(7.0)
        assert (wide == 7.0).all()


@OPS
@OPTION_SETS
def test_size_of_the_card_and_schedule_do_not_matter(op, options):
    """More multiprocessors cut a request's splits among other blocks; the emulator runs them in other orders."""
    card = EmulatedCard()
    case = build(op, options)
    want = card.run(case)
    try:
        for multiprocessors, seed in ((1, -1), (132, -1), (4, 3), (20, 8)):
            card.ops._emulate(multiprocessors, seed)
            same_bits(card.run(case), want)
    finally:
        card.ops._emulate(4, -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@OPS
def test_offsets_past_2_31_elements(op, layout):
    """The pools' memory is there only where it is touched. On a card: tests/test_gpu_paged.py."""
    card = EmulatedCard()
    lens = [170, 33, 600]
    case = make_case(lens, [40, 3, 1] if op == "prefill" else None, layout=layout, seed=5, **BF16)
    want = card.check(case)
    same_bits(card.run(spread_out(case, layout)), want)


class TestErrors:
    def call(self, card: Card, case: PagedCase) -> Any:
        options = card.put_options(case.options)
        return getattr(card.ops, case.name)(*card.put(case.args), **options)

    @OPS
    def test_float32_is_refused(self, card: Card, op):
        case = make_case([9], [3] if op == "prefill" else None)
        message = expect_error(
            lambda: self.call(card, case), case.name, "q", "bfloat16 or float16", "float32"
        )
        assert "card" in message

    @pytest.mark.parametrize("name", ["q", "k_pages", "v_pages"])
    def test_rows_off_16_bytes_are_refused(self, card: Card, name):
        case = make_case([9, 5], **BF16)
        wide = torch.zeros(*getattr(case, name).shape[:-1], 67, dtype=torch.bfloat16)
        case = case.with_(**{name: wide[..., :64]})
        expect_error(lambda: self.call(card, case), "paged_decode", name, "16 bytes on a card", "elements in")
        shifted = torch.zeros(*wide.shape[:-1], 72, dtype=torch.bfloat16)[..., 4:68]
        case = case.with_(**{name: shifted})
        expect_error(lambda: self.call(card, case), "paged_decode", name, "start on a multiple of 16 bytes")

    def test_dtype_and_shape(self, card: Card):
        case = make_case([9, 5], **BF16)
        wrong = case.with_(kv_lens=case.kv_lens.long())
        expect_error(lambda: self.call(card, wrong), "paged_decode", "kv_lens", "int32", "int64")
        wrong = case.with_(page_indices=case.page_indices[:1])
        expect_error(lambda: self.call(card, wrong), "paged_decode", "page_indices", "[1, ")
        wrong = case.with_(options={"logits_soft_cap": -1.0})
        expect_error(lambda: self.call(card, wrong), "paged_decode", "logits_soft_cap", "-1")
        # Nothing of a refused call may linger.
        card.check(case)

    def test_values_on_the_card_are_not_read_by_the_host(self, card: Card):
        """Lengths of another table: the CPU backend refuses them, a card takes them as they are."""
        case = make_case([40, 40], **BF16)
        shorter = case.with_(kv_lens=torch.tensor([40, -3], dtype=torch.int32))
        out, lse = card.run(shorter)
        same_bits((out[:1], lse[:1]), card.run(case), case.rows(0))
        assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()


def test_a_missing_instantiation_is_named():
    with pytest.raises(RuntimeError) as caught:
        EmulatedCard().run(make_case([9], dtype=torch.bfloat16, head_dim=96))
    text = str(caught.value)
    assert "KVK_EMULATED_KERNEL(kvk::device::paged_decode_kernel<" in text and "bf16, 96, 96, 1, 0" in text


def launched(card: Card) -> set[str]:
    return {line.replace(" ", "") for line in card.ops._launched_kernels().splitlines()}


def for_the_emulator(params: dict[str, Any]) -> dict[str, Any]:
    """Random parameters of make_case, with the dims and the parts of the score that the emulator has."""
    params["layout"] = "hnd" if params["layout"] == "padded" else params["layout"]
    names = ("logits_soft_cap", "alibi", "key_bias", "mask")
    given_parts = [name for name in names if params.get(name)]
    prefill = "q_lens" in params
    if not given_parts and params["dtype"] == torch.bfloat16:
        return {**params, **BF16, "head_dim_v": None}
    every = list(names) if prefill else list(names[:3])
    if len(given_parts) > 1:  # all of them
        params.update(logits_soft_cap=10.0, alibi=True)
        params.setdefault("key_bias", "head")
        if prefill and not params.get("mask"):
            params["mask"] = "tree"
        given_parts = every
    return {**params, **F16}


@settings(max_examples=60)
@given(case_params(prefill=False) | case_params(prefill=True))
def test_random_cases(card: Card, params):
    card.check(make_case(**for_the_emulator(params)))
