"""quant_decode and quant_prefill on CUDA, over the device emulator and on the card, against dequantizing and attending.

The emulator has an instantiation for each of FORMATS (tests/emulator/torch/quant_attention_kernels.cc), and all
options with one more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import kvk
import pytest
import torch
from card import Card, EmulatedCard
from kvk_testing import assert_error_rule, expect_error
from paged_cases import TABLES
from quant_attention_cases import DENSE, QuantCase, make_quant_case
from test_cuda_ops import LAYOUTS, launched, same_bits
from torch import Tensor

BF16, F16 = torch.bfloat16, torch.float16
KIVI = kvk.QuantFormat(32, 64)
OPTIONS = kvk.QuantFormat(48, 32, 3, 4, 24, 40, head_dim_v=40)
BIAS = kvk.QuantFormat(16, 32, 8, 2, 16, 40, head_dim_v=40)
# name: format, dtype, query heads of a kv head, more.
FORMATS: dict[str, tuple[kvk.QuantFormat, dict[str, Any]]] = {
    "kivi": (KIVI, {"dtype": BF16, "group": 3}),
    "kivi_many_heads": (KIVI, {"dtype": BF16, "group": 12}),
    "groups_of_17": (
        kvk.QuantFormat(34, 40, 8, 3, 40, 17, "token", "channel", head_dim_v=72),
        {"dtype": F16, "group": 10},
    ),
    "rotated": (
        kvk.QuantFormat(48, 80, 4, 8, 16, 16, "token", "channel", head_dim_v=64, k_rotate=1, v_rotate=1),
        {"dtype": BF16, "group": 9},
    ),
    "biased": (BIAS, {"dtype": F16, "group": 17, "key_bias": "head", "hidden_keys": 0.3}),
}
EACH_FORMAT = pytest.mark.parametrize("name", FORMATS)
ALL = {"window_left": 300, "logits_soft_cap": 8.0, "alibi": True, "sinks": True, "key_bias": "head"}


def run(card: Card, case: QuantCase) -> tuple[Tensor, Tensor]:
    """The case's op, into outputs that hold NaN before; (out, lse) on the CPU."""
    rows, heads = case.q.shape[:2]
    out = card.new((rows, heads, case.fmt.head_dim_v), case.q.dtype)
    lse = card.new((rows, heads), torch.float32)
    args, options = card.put(case.args), card.put_options(case.options)
    getattr(card.ops, case.name).out(*args, case.fmt.numbers, **options, out=out, lse=lse)
    return out.cpu(), lse.cpu()


def check(card: Card, case: QuantCase) -> tuple[Tensor, Tensor]:
    """Runs the op and holds it against the reference."""
    out, lse = run(card, case)
    exact, plain = case.reference(), case.reference(case.q.dtype)
    assert_error_rule(lse, exact[1], plain[1], per_row=False, what="lse")
    assert_error_rule(out, exact[0], plain[0], per_row=True, what="out")
    return out, lse


def make(name: str, lens: Any, queries: Any = None, **params: Any) -> QuantCase:
    fmt, kind = FORMATS[name]
    return make_quant_case(lens, queries, fmt=fmt, **{**kind, **params})


@EACH_FORMAT
class TestFormats:
    @pytest.mark.parametrize("dense_share", [0.0, 0.4, 1.0])
    def test_decode(self, card: Card, name, dense_share):
        """Stages of every warp go around several times; splits of one request and several."""
        check(card, make(name, [300, 1, 64, 0, 1100], dense_share=dense_share))

    @pytest.mark.parametrize("dense_share", [0.0, 0.4])
    def test_prefill(self, card: Card, name, dense_share):
        """Tiled and streamed requests, one without tokens, one without keys, rows of no request."""
        queries = [90, 1, 0, 3, 9]
        check(card, make(name, [300, 600, 20, 0, 70], queries, padding_rows=2, dense_share=dense_share))

    def test_batch_does_not_matter(self, card: Card, name):
        case = make(name, [700, 40, 520])
        whole = run(card, case)
        for b in range(3):
            rows = slice(b, b + 1)
            one = case.with_(q=case.q[rows], page_indices=case.page_indices[rows], kv_lens=case.kv_lens[rows])
            same_bits(run(card, one), whole, rows)


@EACH_FORMAT
def test_size_of_the_card_and_schedule_do_not_matter(name):
    card = EmulatedCard()
    cases = [make(name, [600, 33]), make(name, [200, 70], [40, 2])]
    want = [run(card, case) for case in cases]
    try:
        for multiprocessors, seed in ((1, -1), (4, 3), (20, 8)):
            card.ops._emulate(multiprocessors, seed)
            for case, same in zip(cases, want, strict=True):
                same_bits(run(card, case), same)
    finally:
        card.ops._emulate(4, -1)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 65, 511, 513, 1025])
def test_lengths_around_borders(card: Card, length):
    check(card, make("kivi", [length, length]))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_tables(card: Card, layout, table):
    check(card, make("kivi", [170, 1, 33], layout=layout, table=table, share_pages=True))
    check(card, make("kivi", [170, 33], [20, 2], layout=layout, table=table))


def test_per_head_lens(card: Card):
    check(card, make("kivi", [[70, 0, 1], [3, 300, 64]], num_kv_heads=3, group=2, table="per_head"))


@pytest.mark.parametrize("table", ["dense", "csr_per_head"])
def test_all_options(card: Card, table):
    more = {**ALL, "hidden_keys": 0.2, "dtype": F16, "table": table}
    check(card, make_quant_case([300, 33, 0, 700], fmt=OPTIONS, group=3, **more))
    for mask in ({"mask": "tree"}, {"mask": "random", "mask_width": 70}):
        check(card, make_quant_case([300, 90, 200, 5], [70, 3, 1, 0], fmt=OPTIONS, group=3, **more, **mask))


@pytest.mark.parametrize("window", [0, 40, 600])
def test_windows(card: Card, window):
    check(card, make("kivi", [700, 33, 130], window_left=window))
    check(card, make("kivi", [700, 33], [40, 2], window_left=window))


def test_hidden_pages_are_not_looked_up(card: Card):
    """Entries of a list before the window may be anything."""
    case = make("kivi", [320], window_left=40, dense_share=0.0)
    want = run(card, case)
    wild = case.with_(page_indices=case.page_indices.clone())
    wild.page_indices[0, :8] = (1 << 28) - 1
    same_bits(run(card, wild), want)


def test_selected_pages(card: Card):
    case = make("kivi", [256])
    chosen = case.with_(
        page_indices=case.page_indices[:, [1, 4, 6]].contiguous(),
        kv_lens=torch.tensor([96], dtype=torch.int32),
    )
    check(card, chosen)


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("name", ["kivi", "groups_of_17"])
def test_nan_stays_in_the_rows_that_read_it(card: Card, name, part):
    """A group that reads as NaN, in the window and out of it."""
    for window in (-1, 20):
        case = make(name, [150, 150], dense_share=0.0, window_left=window)
        pool = case.k_pool if part == "k" else case.v_pool
        layout = case.fmt.k_layout if part == "k" else case.fmt.v_layout
        nan = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
        pool[int(case.page_indices[0, 0]), 0, layout.min_offset + 6 : layout.min_offset + 8] = nan
        out, _ = check(card, case)
        assert out[1].isfinite().all() and (window >= 0) == bool(out[0].isfinite().all())


def test_prefill_then_decode_is_one_prefill(card: Card):
    whole = make("kivi", [96], [8])
    want = check(card, whole)
    for token in range(5, 8):
        lens = torch.tensor([89 + token], dtype=torch.int32)
        got = run(card, replace(whole, q=whole.q[token : token + 1], qo_indptr=None, kv_lens=lens))
        torch.testing.assert_close(got[0], want[0][token : token + 1], rtol=0.02, atol=0.01)
        torch.testing.assert_close(got[1], want[1][token : token + 1], rtol=1e-4, atol=1e-4)


def test_empty_batches(card: Card):
    check(card, make("kivi", []))
    out, lse = check(card, make("kivi", [0, 0]))
    assert (out == 0).all() and torch.isneginf(lse).all()


class TestErrors:
    def call(self, card: Card, case: QuantCase) -> Any:
        return getattr(card.ops, case.name)(
            *card.put(case.args), case.fmt.numbers, **card.put_options(case.options)
        )

    def test_float32_is_refused(self, card: Card):
        case = make("kivi", [40], dtype=torch.float32)
        expect_error(lambda: self.call(card, case), "quant_decode", "q", "bfloat16 or float16", "float32")

    @pytest.mark.parametrize("name", ["k_pages", "v_pages"])
    def test_dense_rows_off_16_bytes_are_refused(self, card: Card, name):
        case = make("kivi", [40, 64])
        wide = torch.zeros(*case.options[name].shape[:-1], 67, dtype=BF16)
        case = case.with_(options={name: wide[..., :64]})
        expect_error(lambda: self.call(card, case), "quant_decode", name, "16 bytes on a card", "elements in")

    @pytest.mark.parametrize("entry", [-1, 2 << 28, 7 << 28, 100, DENSE | 100])
    @pytest.mark.parametrize("queries", [None, [2, 3]])
    def test_kvk_check_names_the_first_bad_page(self, entry, queries):
        """KVK_CHECK=1, with the CPU's words."""
        card = EmulatedCard()
        case = make("kivi", [40, 64], queries)
        case.page_indices[1, 1] = entry
        case.page_indices[1, 2:] = -7  # not in use
        card.ops._check_values(True)
        try:
            messages = []
            for call in (lambda: self.call(card, case), case.run):
                with pytest.raises(RuntimeError) as caught:
                    call()
                messages.append(str(caught.value).splitlines()[0])
            assert messages[0] == messages[1]
            check(card, make("kivi", [40, 64], queries))
        finally:
            card.ops._check_values(False)
        assert "kvk::device::check_table_kernel<512>" in launched(card)


def launch_every_kernel(card: Card) -> None:
    """One call for each line of tests/emulator/torch/quant_attention_kernels.cc."""
    for name in FORMATS:
        run(card, make(name, [600]))
        run(card, make(name, [600, 90], [1, 70]))
    run(card, make_quant_case([600], fmt=OPTIONS, dtype=F16, **ALL))
    run(card, make_quant_case([600, 90], [1, 70], fmt=OPTIONS, dtype=F16, mask="tree", **ALL))
