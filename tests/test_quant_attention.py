"""quant_decode and quant_prefill against dequantizing and attending, in every format and with every option."""

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
from quant_cases import AXES, BITS, formats

KIVI = kvk.QuantFormat(32, 64)
FORMATS = {
    "kivi2": KIVI,
    "kivi4": kvk.QuantFormat(64, 128, 4, 4),
    "k4v2": kvk.QuantFormat(64, 128, 4, 2, 64, 128),
    "int8": kvk.QuantFormat(16, 64, 8, 8, 64, 64, "token", "token"),
    "bits3": kvk.QuantFormat(48, 72, 3, 3, 24, 24),
    "axes_swapped": kvk.QuantFormat(16, 96, 2, 3, 48, 16, "token", "channel", head_dim_v=40),
    "rotated": kvk.QuantFormat(32, 64, 4, 4, 64, 64, "token", "token", k_rotate=1, v_rotate=1),
    "rotated_odd": kvk.QuantFormat(32, 80, 3, 4, 16, 32, head_dim_v=96, k_rotate=1, v_rotate=1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
class TestFormats:
    @pytest.mark.parametrize("dense_share", [0.0, 0.4, 1.0])
    def test_decode(self, name, dtype, dense_share):
        make_quant_case(
            [300, 1, 64, 0, 1100], fmt=FORMATS[name], dtype=dtype, dense_share=dense_share
        ).check()

    def test_prefill(self, name, dtype):
        make_quant_case([300, 90, 0], [120, 3, 0], fmt=FORMATS[name], dtype=dtype, padding_rows=2).check()


@pytest.mark.parametrize("k_axis", AXES)
@pytest.mark.parametrize("v_axis", AXES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [32, 40, 64, 128, 192, 256])
def test_bits_axes_and_head_dims(bits, k_axis, v_axis, head_dim):
    group = {40: 40, 192: 24}.get(head_dim, 32)
    fmt = kvk.QuantFormat(
        64,
        head_dim,
        bits,
        bits,
        32 if k_axis == "channel" else group,
        16 if v_axis == "channel" else group,
        k_axis,
        v_axis,
    )
    make_quant_case([150, 70], fmt=fmt, dtype=torch.bfloat16, group=3).check()
    make_quant_case([150, 70], [70, 1], fmt=fmt, group=1).check()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 20, 24])
def test_head_ratios(group):
    make_quant_case([200, 65], fmt=KIVI, group=group, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("name", ["kivi2", "axes_swapped", "rotated"])
@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 40},
        {"logits_soft_cap": 3.0},
        {"softmax_scale": 0.3},
        {"alibi": True},
        {"sinks": True},
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
        make_quant_case([210, 33, 0], fmt=FORMATS[name], dtype=dtype, **options).check()
        make_quant_case(
            [210, 33, 5], [40, 2, 5], fmt=FORMATS[name], dtype=dtype, mask="tree", **options
        ).check()


def test_selected_pages():
    """A shorter list of pages is attention over those pages."""
    case = make_quant_case([256], fmt=KIVI, dense_share=0.3)
    chosen = case.with_(
        page_indices=case.page_indices[:, [1, 4, 6]].contiguous(),
        kv_lens=torch.tensor([96], dtype=torch.int32),
    )
    chosen.check()


def test_records_of_a_dense_call_are_the_dense_call():
    """All pages dense: the same bits as paged_decode."""
    paged = make_case([300, 65], dtype=torch.bfloat16, page_size=32)
    case = quantized(paged, kvk.QuantFormat(32, 64), 1.0)
    out, lse = case.run()
    want_out, want_lse = paged.run()
    torch.testing.assert_close(out, want_out, rtol=0.02, atol=0.01)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_batch_invariance_and_threads(name):
    case = make_quant_case([1200, 40, 700], fmt=FORMATS[name], dtype=torch.bfloat16)
    out, lse = case.run()
    with threads(1):
        alone_out, alone_lse = case.run()
    assert_bit_equal(alone_out, out)
    assert_bit_equal(alone_lse, lse)
    for b in range(3):
        one = case.with_(
            q=case.q[b : b + 1], page_indices=case.page_indices[b : b + 1], kv_lens=case.kv_lens[b : b + 1]
        )
        one_out, one_lse = one.run()
        assert_bit_equal(one_out, out[b : b + 1])
        assert_bit_equal(one_lse, lse[b : b + 1])


def test_prefill_then_decode_is_one_prefill():
    """prefill(n) + decode(m) = prefill(n + m), over the same pages."""
    whole = make_quant_case([96], [8], fmt=KIVI)
    want_out, want_lse = whole.check()
    part = whole.with_(
        q=whole.q[:5],
        qo_indptr=torch.tensor([0, 5], dtype=torch.int32),
        kv_lens=torch.tensor([93], dtype=torch.int32),
    )
    got = [part.run()]
    for token in range(5, 8):
        step = whole.with_(
            q=whole.q[token : token + 1],
            qo_indptr=None,
            kv_lens=torch.tensor([89 + token], dtype=torch.int32),
        )
        got.append(step.run())
    torch.testing.assert_close(torch.cat([x[0] for x in got]), want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([x[1] for x in got]), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", ["k", "v"])
def test_nan_stays_in_the_rows_that_read_it(name, part):
    """A group that reads as NaN: positions of NaN are those of the reference, behind a window too."""
    fmt = FORMATS[name]
    for window in (-1, 20):
        case = make_quant_case([130, 130], fmt=fmt, dense_share=0.0, window_left=window, sinks=True)
        pool = case.k_pool if part == "k" else case.v_pool
        layout = fmt.k_layout if part == "k" else fmt.v_layout
        page = int(case.page_indices[0, 0])
        pool[page, 0, layout.min_offset + 6 : layout.min_offset + 8] = torch.tensor(
            [0x00, 0x7E], dtype=torch.uint8
        )
        out, _ = case.check()
        assert out[1].isfinite().all() and (window >= 0) == bool(out[0].isfinite().all())


class TestIntegers:
    """Where 16-bit queries go by integer dot products (AVX2 and later): the rows that cannot, and numbers that are hard
    to round together."""

    FMT = kvk.QuantFormat(64, 64, 4, 4)

    def case(self, fmt=None, **params):
        return make_quant_case(
            [200, 70], fmt=fmt or self.FMT, group=4, dtype=torch.bfloat16, dense_share=0.0, **params
        )

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, 1e-38, 1e-33])
    @pytest.mark.parametrize("axis", ["channel", "token"])
    def test_a_row_by_itself(self, bad, axis):
        """What is in one row of q never changes the bits of another."""
        fmt = kvk.QuantFormat(64, 64, 4, 4, v_axis=axis)
        case = self.case(fmt)
        want_out, want_lse = case.run()
        q = case.q.clone()
        if bad == bad and abs(bad) < 1:
            q[0, 2] = bad
        else:
            q[0, 2, 5] = bad
        out, lse = case.with_(q=q).check()
        others = torch.ones(out.shape[:2], dtype=torch.bool)
        others[0, 2] = False
        assert_bit_equal(out[others], want_out[others])
        assert_bit_equal(lse[others], want_lse[others])

    @pytest.mark.parametrize("part", ["k", "v"])
    @pytest.mark.parametrize("name", ["kivi2", "kivi4", "axes_swapped", "int8"])
    def test_a_scale_that_is_nan(self, name, part):
        fmt = FORMATS[name]
        case = self.case(fmt)
        pool = case.k_pool if part == "k" else case.v_pool
        layout = fmt.k_layout if part == "k" else fmt.v_layout
        scale = slice(layout.scale_offset + 6, layout.scale_offset + 8)
        pool[int(case.page_indices[0, 0]), 0, scale] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
        out, _ = case.check()
        assert out[1].isfinite().all() and out[0, 4:].isfinite().all() and out[0, :4].isnan().any()

    @pytest.mark.parametrize("bits", BITS)
    def test_channels_of_unlike_size(self, bits):
        """A channel twenty times as large as the rest, in K and in V."""
        fmt = kvk.QuantFormat(64, 64, bits, bits)
        paged = make_case([300, 65], dtype=torch.float16, page_size=64, group=4, head_dim=64)
        paged.k_pages[..., 7] *= 20
        paged.v_pages[..., 40] *= 20
        quantized(paged, fmt, 0.2).check()

    @pytest.mark.parametrize("step", [0.0, 8.0, -8.0, 80.0])
    def test_weights_from_one_to_nothing(self, step):
        """Scores that rise, or fall, by `step` from key to key: blocks whose weights are tiny, or all zero."""
        case = self.case(alibi=True)
        case.options["alibi_slopes"] = torch.full_like(case.options["alibi_slopes"], step)
        case.check()


@given(st.data())
def test_random_decode(data):
    check_random(data, prefill=False)


@given(st.data())
def test_random_prefill(data):
    check_random(data, prefill=True)


def check_random(data, prefill):
    params = data.draw(case_params(prefill=prefill))
    fmt = data.draw(formats())
    params |= {"page_size": fmt.page_size, "head_dim": fmt.head_dim, "head_dim_v": fmt.head_dim_v}
    case = quantized(make_case(**params), fmt, data.draw(st.sampled_from([0.0, 0.3, 1.0])), params["seed"])
    case.check()


# Bad input -------------------------------------------------------------------------------------------------


class TestErrors:
    def case(self):
        return make_quant_case([40, 64], fmt=KIVI, dense_share=0.5)

    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            (-1, "page -1"),
            (2 << 28, "tag 2"),
            (7 << 28, "tag 7"),
            (100, "page 100 of a pool"),
            (DENSE | 100, "dense page 100 of a pool"),
        ],
    )
    def test_page_references(self, entry, words):
        case = self.case()
        case.page_indices[1, 1] = entry
        with pytest.raises(RuntimeError, match=rf"kvk::quant_decode: page_indices: request 1 .*{words}"):
            case.run()

    def test_dense_page_without_a_dense_pool(self):
        case = self.case()
        case.page_indices[0, 0] = DENSE
        del case.options["k_pages"], case.options["v_pages"]
        with pytest.raises(RuntimeError, match="dense page 0 of a pool of 0 pages"):
            case.run()

    def test_one_dense_pool_alone(self):
        case = self.case()
        del case.options["v_pages"]
        with pytest.raises(RuntimeError, match="k_pages and v_pages go together, got no v_pages"):
            case.run()

    @pytest.mark.parametrize("name", ["k_pages", "v_pages"])
    def test_dense_pools(self, name):
        for change, word in (
            (lambda x: x[:, :-1], "P=32|N="),
            (lambda x: x[:, :, :1], "Hkv="),
            (lambda x: x[..., :-8], "D=64|Dv=64"),
            (lambda x: x.bfloat16(), "float32"),
            (lambda x: x.repeat_interleave(2, -1)[..., ::2], "stride 1"),
        ):
            case = self.case()
            case.options[name] = change(case.options[name])
            with pytest.raises(RuntimeError, match=rf"kvk::quant_decode: [kv]_pages must.*({word})"):
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
            with pytest.raises(RuntimeError, match=rf"kvk::quant_decode: .*({word})"):
                case.with_(**{name: change(getattr(case, name))}).run()

    def test_key_bias_has_rows_for_both_pools(self):
        case = self.case()
        rows = case.k_pool.shape[0] + case.options["k_pages"].shape[0]
        with pytest.raises(RuntimeError, match=rf"key_bias must have shape \[N={rows}"):
            case.with_(options={"key_bias": torch.zeros(case.k_pool.shape[0], 32)}).run()

    def test_format_and_q_disagree(self):
        case = self.case()
        with pytest.raises(RuntimeError, match="kvk::quant_decode: q must have shape"):
            case.with_(q=torch.zeros(2, 4, 32)).run()
        with pytest.raises(RuntimeError, match="kvk::quant_prefill: fmt must be 11 numbers"):
            torch.ops.kvk.quant_prefill(case.q, torch.tensor([0, 2]).int(), *case.args[1:], [1, 2])

    def test_out_and_lse_go_together(self):
        case = self.case()
        with pytest.raises(RuntimeError, match="kvk::quant_decode: out and lse go together"):
            kvk.quant_decode(*case.args, KIVI, **case.options, out=torch.zeros(2, 4, 64))
