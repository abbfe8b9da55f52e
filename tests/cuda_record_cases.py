"""Attention over records on CUDA, over the device emulator and on the card: what holds for every format of records.

The emulator has an instantiation for each of a family's FORMATS, and all options with one more
(tests/emulator/torch/*_attention_kernels.cc).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import kvk
import pytest
import torch
from card import Card, EmulatedCard
from kvk_testing import assert_error_rule, expect_error
from paged_cases import TABLES
from quant_attention_cases import DENSE, QuantCase, make_quant_case
from test_cuda_ops import LAYOUTS, launched, same_bits
from torch import Tensor

ALL = {"window_left": 300, "logits_soft_cap": 8.0, "alibi": True, "sinks": True, "key_bias": "head"}
Format = kvk.QuantFormat | kvk.BitmapFormat


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


class RecordAttention:
    """Tests that a family's test class inherits."""

    FORMATS: ClassVar[
        dict[str, tuple[Format, dict[str, Any]]]
    ]  # name: format, dtype, query heads of a kv head, more
    PLAIN: ClassVar[str]  # one of them without options, with dense pages of rows of 64 elements
    OPTIONS: ClassVar[Format]  # of float16, compiled with every option

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.FORMATS)

    @classmethod
    def make(cls, name: str, lens: Any, queries: Any = None, **params: Any) -> QuantCase:
        fmt, kind = cls.FORMATS[name]
        return make_quant_case(lens, queries, fmt=fmt, **{**kind, **params})

    @classmethod
    def plain(cls, lens: Any, queries: Any = None, **params: Any) -> QuantCase:
        return cls.make(cls.PLAIN, lens, queries, **params)

    @classmethod
    def launch_every_kernel(cls, card: Card) -> None:
        """One call for each attention kernel of the family in tests/emulator/torch."""
        for name in cls.FORMATS:
            run(card, cls.make(name, [600]))
            run(card, cls.make(name, [600, 90], [1, 70]))
        run(card, make_quant_case([600], fmt=cls.OPTIONS, dtype=torch.float16, **ALL))
        run(
            card,
            make_quant_case([600, 90], [1, 70], fmt=cls.OPTIONS, dtype=torch.float16, mask="tree", **ALL),
        )

    @pytest.mark.parametrize("dense_share", [0.0, 0.4, 1.0])
    def test_decode(self, card: Card, name, dense_share):
        """Stages of every warp go around several times; splits of one request and several."""
        check(card, self.make(name, [300, 1, 64, 0, 1100], dense_share=dense_share))

    @pytest.mark.parametrize("dense_share", [0.0, 0.4])
    def test_prefill(self, card: Card, name, dense_share):
        """Tiled and streamed requests, one without tokens, one without keys, rows of no request."""
        queries = [90, 1, 0, 3, 9]
        check(card, self.make(name, [300, 600, 20, 0, 70], queries, padding_rows=2, dense_share=dense_share))

    def test_batch_does_not_matter(self, card: Card, name):
        case = self.make(name, [700, 40, 520])
        whole = run(card, case)
        for b in range(3):
            rows = slice(b, b + 1)
            one = case.with_(q=case.q[rows], page_indices=case.page_indices[rows], kv_lens=case.kv_lens[rows])
            same_bits(run(card, one), whole, rows)

    def test_size_of_the_card_and_schedule_do_not_matter(self, name):
        card = EmulatedCard()
        cases = [self.make(name, [600, 33]), self.make(name, [200, 70], [40, 2])]
        want = [run(card, case) for case in cases]
        try:
            for multiprocessors, seed in ((1, -1), (4, 3), (20, 8)):
                card.ops._emulate(multiprocessors, seed)
                for case, same in zip(cases, want, strict=True):
                    same_bits(run(card, case), same)
        finally:
            card.ops._emulate(4, -1)

    @pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 65, 511, 513, 1025])
    def test_lengths_around_borders(self, card: Card, length):
        check(card, self.plain([length, length]))

    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_and_tables(self, card: Card, layout, table):
        check(card, self.plain([170, 1, 33], layout=layout, table=table, share_pages=True))
        check(card, self.plain([170, 33], [20, 2], layout=layout, table=table))

    def test_per_head_lens(self, card: Card):
        check(card, self.plain([[70, 0, 1], [3, 300, 64]], num_kv_heads=3, group=2, table="per_head"))

    @pytest.mark.parametrize("table", ["dense", "csr_per_head"])
    def test_all_options(self, card: Card, table):
        more = {**ALL, "hidden_keys": 0.2, "dtype": torch.float16, "table": table}
        check(card, make_quant_case([300, 33, 0, 700], fmt=self.OPTIONS, group=3, **more))
        for mask in ({"mask": "tree"}, {"mask": "random", "mask_width": 70}):
            check(
                card,
                make_quant_case([300, 90, 200, 5], [70, 3, 1, 0], fmt=self.OPTIONS, group=3, **more, **mask),
            )

    @pytest.mark.parametrize("window", [0, 40, 600])
    def test_windows(self, card: Card, window):
        check(card, self.plain([700, 33, 130], window_left=window))
        check(card, self.plain([700, 33], [40, 2], window_left=window))

    def test_hidden_pages_are_not_looked_up(self, card: Card):
        """Entries of a list before the window may be anything."""
        case = self.plain([320], window_left=40, dense_share=0.0)
        want = run(card, case)
        wild = case.with_(page_indices=case.page_indices.clone())
        wild.page_indices[0, :8] = (1 << 28) - 1
        same_bits(run(card, wild), want)

    def test_selected_pages(self, card: Card):
        case = self.plain([256])
        chosen = case.with_(
            page_indices=case.page_indices[:, [1, 4, 6]].contiguous(),
            kv_lens=torch.tensor([96], dtype=torch.int32),
        )
        check(card, chosen)

    def test_prefill_then_decode_is_one_prefill(self, card: Card):
        whole = self.plain([96], [8])
        want = check(card, whole)
        for token in range(5, 8):
            lens = torch.tensor([89 + token], dtype=torch.int32)
            got = run(card, replace(whole, q=whole.q[token : token + 1], qo_indptr=None, kv_lens=lens))
            torch.testing.assert_close(got[0], want[0][token : token + 1], rtol=0.02, atol=0.01)
            torch.testing.assert_close(got[1], want[1][token : token + 1], rtol=1e-4, atol=1e-4)

    def test_empty_batches(self, card: Card):
        check(card, self.plain([]))
        out, lse = check(card, self.plain([0, 0]))
        assert (out == 0).all() and torch.isneginf(lse).all()

    def call(self, card: Card, case: QuantCase) -> Any:
        return getattr(card.ops, case.name)(
            *card.put(case.args), case.fmt.numbers, **card.put_options(case.options)
        )

    def test_float32_is_refused(self, card: Card):
        case = self.plain([40], dtype=torch.float32)
        expect_error(lambda: self.call(card, case), case.name, "q", "bfloat16 or float16", "float32")

    @pytest.mark.parametrize("argument", ["k_pages", "v_pages"])
    def test_dense_rows_off_16_bytes_are_refused(self, card: Card, argument):
        case = self.plain([40, 64])
        wide = torch.zeros(*case.options[argument].shape[:-1], 67, dtype=torch.bfloat16)
        case = case.with_(options={argument: wide[..., :64]})
        expect_error(lambda: self.call(card, case), case.name, argument, "16 bytes on a card", "elements in")

    @pytest.mark.parametrize("entry", [-1, 2 << 28, 7 << 28, 100, DENSE | 100])
    @pytest.mark.parametrize("queries", [None, [2, 3]])
    def test_kvk_check_names_the_first_bad_page(self, entry, queries):
        """KVK_CHECK=1, with the CPU's words."""
        card = EmulatedCard()
        case = self.plain([40, 64], queries)
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
            check(card, self.plain([40, 64], queries))
        finally:
            card.ops._check_values(False)
        assert "kvk::device::check_table_kernel<512>" in launched(card)
