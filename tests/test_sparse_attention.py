"""sparse_decode and sparse_prefill against decompressing and attending: every format, every option, and bit for bit."""

from __future__ import annotations

import kvk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk_testing import assert_bit_equal, threads
from paged_cases import make_case
from paged_strategies import DTYPES, case_params
from quant_attention_cases import DENSE, make_quant_case, quantized
from sparse_cases import VALUE_DTYPES, formats, value_dtype

NAMES = {
    "half": {"page_size": 64, "head_dim": 128, "k_keep": 64, "v_keep": 64},
    "seventy": {"page_size": 32, "head_dim": 128, "k_keep": 40, "v_keep": 40},
    "small_pages": {"page_size": 5, "head_dim": 64, "k_keep": 16, "v_keep": 32},
    "apart": {"page_size": 16, "head_dim": 72, "k_keep": 64, "v_keep": 8, "head_dim_v": 40},
    "whole": {"page_size": 48, "head_dim": 96, "k_keep": 96, "v_keep": 96},
    "rotated": {"page_size": 32, "head_dim": 64, "k_keep": 32, "v_keep": 32, "k_rotate": 1, "v_rotate": 1},
    "keys_rotated": {
        "page_size": 16,
        "head_dim": 80,
        "k_keep": 40,
        "v_keep": 24,
        "head_dim_v": 96,
        "k_rotate": 1,
    },
}


def make(kv_lens, q_lens=None, *, name: str, dtype=torch.bfloat16, values=None, **options):
    fmt = kvk.BitmapFormat(**NAMES[name], dtype=values or value_dtype(dtype))
    return make_quant_case(kv_lens, q_lens, fmt=fmt, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
class TestFormats:
    @pytest.mark.parametrize("dense_share", [0.0, 0.4, 1.0])
    def test_decode(self, name, dtype, dense_share):
        make([300, 1, 64, 0, 1100], name=name, dtype=dtype, dense_share=dense_share).check()

    def test_prefill(self, name, dtype):
        make([300, 90, 0], [120, 3, 0], name=name, dtype=dtype, padding_rows=2).check()


def test_float32_queries_over_float16_values():
    make([200, 65], name="half", dtype=torch.float32, values=torch.float16, group=3).check()
    make([200, 65], [50, 2], name="seventy", dtype=torch.float32, values=torch.float16).check()


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
def test_head_dims(head_dim):
    for keep in (8, head_dim // 16 * 8, head_dim):
        fmt = kvk.BitmapFormat(16, head_dim, keep, keep)
        make_quant_case([70, 33], fmt=fmt, dtype=torch.bfloat16, group=2).check()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 20, 24])
def test_head_ratios(group):
    make([200, 65], name="half", group=group).check()


@pytest.mark.parametrize("name", ["half", "small_pages", "rotated"])
@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 40, "sinks": True},
        {"logits_soft_cap": 3.0, "softmax_scale": 0.3},
        {"alibi": True},
        {"key_bias": "page", "hidden_keys": 0.3},
        {"key_bias": "head", "hidden_keys": 0.5},
        {"table": "per_head"},
        {"table": "csr", "key_bias": "head", "window_left": 70},
        {"table": "csr_per_head"},
        {"share_pages": True, "layout": "hnd", "q_layout": "head_major"},
        {"layout": "padded", "q_layout": "sliced"},
    ],
    ids=lambda options: "-".join(f"{k}_{v}" for k, v in options.items()),
)
def test_options(name, options):
    for dtype in (torch.float32, torch.bfloat16):
        make([210, 33, 0], name=name, dtype=dtype, **options).check()
        make([210, 33, 5], [40, 2, 5], name=name, dtype=dtype, mask="tree", **options).check()


def test_selected_pages():
    """A shorter list of pages is attention over those pages."""
    case = make([256], name="seventy")
    indices = case.page_indices[:, [1, 4, 6]].contiguous()
    case.with_(page_indices=indices, kv_lens=torch.tensor([96], dtype=torch.int32)).check()


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("group", [1, 4, 5])
@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 128), (16, 64), (7, 40), (1, 256)])
def test_everything_kept_is_dense_attention_bit_for_bit(dtype, page_size, head_dim, group):
    fmt = kvk.BitmapFormat(page_size, head_dim, head_dim, head_dim, dtype)
    for q_lens in (None, [3, 40, 0]):
        paged = make_case(
            [300, 1090, 2], q_lens, dtype=dtype, page_size=page_size, head_dim=head_dim, group=group
        )
        want_out, want_lse = paged.run()
        for share in (0.0, 0.5):
            out, lse = quantized(paged, fmt, share).run()
            assert_bit_equal(out, want_out, f"out, {share} of the pages dense")
            assert_bit_equal(lse, want_lse, f"lse, {share} of the pages dense")


@pytest.mark.parametrize("keep", [8, 40, 64])
def test_attention_is_that_of_the_decompressed_pages(keep):
    """Close to the dense op over what decompress_pages gives: the same numbers, maybe summed in another order."""
    fmt = kvk.BitmapFormat(16, 128, keep, keep)
    case = quantized(make_case([500, 77], dtype=torch.bfloat16, page_size=16, head_dim=128), fmt, 0.0)
    k, v = kvk.decompress_pages(case.k_pool, case.v_pool, torch.arange(case.k_pool.shape[0]).int(), fmt)
    out, lse = case.run()
    want_out, want_lse = kvk.paged_decode(case.q, k, v, case.page_indices, case.kv_lens, **case.options)
    torch.testing.assert_close(out, want_out, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_records_of_a_mask_with_fewer_elements():
    """A row may hold fewer than `keep`: the rest reads as zeros, also in a format that keeps everything."""
    for keep in (32, 64):
        fmt = kvk.BitmapFormat(16, 64, keep, keep)
        case = quantized(make_case([60], dtype=torch.bfloat16, page_size=16, head_dim=64), fmt, 0.0)
        k, v = torch.randn(2, 4, 16, 2, 64).bfloat16()
        ids = torch.arange(4, dtype=torch.int32)
        mask = torch.rand(4, 16, 2, 64) < 0.2
        k_pool, v_pool = fmt.new_pool(4, 2)
        kvk.compress_pages(k, v, ids, k_pool, v_pool, ids, fmt, k_select=mask, v_select=mask)
        q, lens = torch.randn(1, 6, 64).bfloat16(), torch.tensor([60], dtype=torch.int32)
        case.with_(q=q, k_pool=k_pool, v_pool=v_pool, page_indices=ids[None], kv_lens=lens).check()


@pytest.mark.parametrize("name", NAMES)
def test_batch_invariance_and_threads(name):
    case = make([1200, 40, 700], name=name)
    out, lse = case.run()
    with threads(1):
        alone_out, alone_lse = case.run()
    assert_bit_equal(alone_out, out)
    assert_bit_equal(alone_lse, lse)
    for b in range(3):
        rows = slice(b, b + 1)
        one = case.with_(q=case.q[rows], page_indices=case.page_indices[rows], kv_lens=case.kv_lens[rows])
        one_out, one_lse = one.run()
        assert_bit_equal(one_out, out[rows])
        assert_bit_equal(one_lse, lse[rows])


def test_prefill_then_decode_is_one_prefill():
    """prefill(n) + decode(m) = prefill(n + m), over the same pages."""
    whole = make([96], [8], name="seventy", dtype=torch.float32)
    want_out, want_lse = whole.check()
    first = {
        "qo_indptr": torch.tensor([0, 5], dtype=torch.int32),
        "kv_lens": torch.tensor([93], dtype=torch.int32),
    }
    got = [whole.with_(q=whole.q[:5], **first).run()]
    for token in range(5, 8):
        lens = torch.tensor([89 + token], dtype=torch.int32)
        got.append(whole.with_(q=whole.q[token : token + 1], qo_indptr=None, kv_lens=lens).run())
    torch.testing.assert_close(torch.cat([x[0] for x in got]), want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([x[1] for x in got]), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [0x7FC0, 0x7F80])
@pytest.mark.parametrize("part", ["k", "v"])
def test_nan_and_infinity_stay_in_the_rows_that_read_them(part, number):
    """In a kept value: positions of NaN are those of the reference, behind a window too."""
    for name in ("half", "small_pages", "apart"):
        for window in (-1, 20):
            case = make([130, 130], name=name, dense_share=0.0, window_left=window, sinks=True)
            pool = case.k_pool if part == "k" else case.v_pool
            pool.view(torch.int16)[int(case.page_indices[0, 0]), 0, 3] = number
            out, _ = case.check()
            assert out[1].isfinite().all() and (window < 0 or bool(out[0].isfinite().all()))
            if number == 0x7FC0:
                assert (window >= 0) == bool(out[0].isfinite().all())


@given(st.data())
def test_random_decode(data):
    check_random(data, prefill=False)


@given(st.data())
def test_random_prefill(data):
    check_random(data, prefill=True)


def check_random(data, prefill):
    params = data.draw(case_params(prefill=prefill))
    fmt = data.draw(formats(None if params["dtype"] == torch.float32 else params["dtype"]))
    params |= {"page_size": fmt.page_size, "head_dim": fmt.head_dim, "head_dim_v": fmt.head_dim_v}
    case = quantized(make_case(**params), fmt, data.draw(st.sampled_from([0.0, 0.3, 1.0])), params["seed"])
    case.check()


class TestErrors:
    """What differs from the quantized ops, and that what is shared is called."""

    def case(self):
        return make([40, 64], name="seventy", dense_share=0.5)

    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            (-1, "page -1"),
            (2 << 28, "tag 2"),
            (100, "page 100 of a pool"),
            (DENSE | 100, "dense page 100 of a pool"),
        ],
    )
    def test_page_references(self, entry, words):
        case = self.case()
        case.page_indices[1, 1] = entry
        with pytest.raises(RuntimeError, match=rf"kvk::sparse_decode: page_indices: request 1 .*{words}"):
            case.run()

    @pytest.mark.parametrize("name", ["k_pool", "v_pool"])
    def test_record_pools(self, name):
        for change, word in (
            (lambda x: x[..., :-16], "record_bytes="),
            (lambda x: x[0], "shape"),
            (lambda x: x.to(torch.int8), "uint8"),
            (lambda x: x[:, :1], "Hkv|kv heads"),
        ):
            case = self.case()
            with pytest.raises(RuntimeError, match=rf"kvk::sparse_decode: .*({word})"):
                case.with_(**{name: change(getattr(case, name))}).run()

    def test_dense_pools(self):
        case = self.case()
        with pytest.raises(RuntimeError, match="k_pages and v_pages go together, got no v_pages"):
            case.with_(options={"v_pages": None}).run()
        with pytest.raises(RuntimeError, match=r"kvk::sparse_decode: k_pages must.*bfloat16"):
            case.with_(options={"k_pages": case.options["k_pages"].half()}).run()

    def test_q(self):
        case = self.case()
        with pytest.raises(
            RuntimeError, match="q must be bfloat16 like the records' values, or float32, got float16"
        ):
            case.with_(q=case.q.half()).run()
        with pytest.raises(RuntimeError, match="kvk::sparse_decode: q must have shape"):
            case.with_(q=torch.zeros(2, 4, 32).bfloat16()).run()

    @pytest.mark.parametrize(
        ("at", "number", "word"),
        [
            (0, 0, "page_size"),
            (0, 65537, "page_size"),
            (1, 36, "D"),
            (2, 264, "Dv"),
            (3, 2, "dtype"),
            (4, 0, "k_keep"),
            (4, 12, "k_keep"),
            (4, 136, "k_keep"),
            (5, 2, "k_rotate"),
            (6, -8, "v_keep"),
            (7, 1, "v_rotate"),
        ],
    )
    def test_format_numbers(self, at, number, word):
        numbers = kvk.BitmapFormat(32, 128, 40, 40, head_dim_v=72).numbers
        numbers[at] = number
        for op in ("sparse_decode", "sparse_prefill", "compress_pages", "decompress_pages", "_bitmap_layout"):
            x = torch.zeros(1)
            count = {"sparse_decode": 5, "sparse_prefill": 6, "compress_pages": 6, "decompress_pages": 3}.get(
                op, 0
            )
            with pytest.raises(RuntimeError, match=rf"kvk::{op}: fmt.*{word}"):
                getattr(torch.ops.kvk, op)(*[x] * count, numbers)
        with pytest.raises(RuntimeError, match="kvk::_bitmap_layout: fmt must be 8 numbers, got 7"):
            torch.ops.kvk._bitmap_layout(numbers[:7])
