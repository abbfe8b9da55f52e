"""paged_decode: results by hand, every option, every layout, and random cases against the reference."""

from __future__ import annotations

import math

import kvk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk_testing import assert_bit_equal
from paged_cases import LAYOUTS, Q_LAYOUTS, TABLES, make_case
from paged_strategies import DTYPES, HEAD_DIMS, PAGE_SIZES, case_params, sprinkle_nonfinite

BORDER_LENS = [1, 63, 64, 65, 127, 129, 511, 512, 513, 1023, 1024, 1025, 1500]


def by_hand(k_rows, v_rows, q_rows, **options):
    """One request, one kv head, one page: k_rows and v_rows are the first channels of each key."""
    keys, heads = len(k_rows), len(q_rows)
    k, v = torch.zeros(1, keys, 1, 32), torch.zeros(1, keys, 1, 32)
    k[0, :, 0, 0], v[0, :, 0, 0] = torch.tensor(k_rows), torch.tensor(v_rows)
    q = torch.zeros(1, heads, 32)
    q[0, :, 0] = torch.tensor(q_rows)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([keys], dtype=torch.int32)
    options.setdefault("softmax_scale", 1.0)
    out, lse = kvk.paged_decode(q, k, v, table, lens, **options)
    return out[0, :, 0].tolist(), lse[0].tolist()


class TestByHand:
    def test_one_key_returns_its_value(self):
        out, lse = by_hand([2.0], [5.0], [3.0])
        assert out == [5.0] and lse == pytest.approx([6.0], rel=1e-6)

    def test_default_scale(self):
        _, lse = by_hand([2.0], [5.0], [3.0], softmax_scale=None)
        assert lse == pytest.approx([6.0 / math.sqrt(32)], rel=1e-6)

    def test_equal_scores_average(self):
        out, lse = by_hand([7.0, -1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 6.0], [0.0])
        assert out == pytest.approx([3.0], rel=1e-6) and lse == pytest.approx([math.log(4)], rel=1e-6)

    def test_window_keeps_w_plus_1_keys(self):
        values = [1.0, 2.0, 4.0, 8.0]
        for window, mean in ((0, 8.0), (1, 6.0), (2, 14 / 3), (3, 3.75), (4, 3.75), (2**63 - 1, 3.75)):
            out, lse = by_hand([0.0] * 4, values, [1.0], window_left=window)
            assert out == pytest.approx([mean], rel=1e-6)
            assert lse == pytest.approx([math.log(min(window + 1, 4))], abs=1e-6)

    def test_soft_cap(self):
        _, lse = by_hand([10.0], [1.0], [1.0], logits_soft_cap=4.0)
        assert lse == pytest.approx([4 * math.tanh(2.5)], rel=1e-6)

    def test_alibi_counts_back_from_the_last_key(self):
        slopes = torch.tensor([0.5, 2.0])
        out, lse = by_hand([0.0, 0.0], [1.0, 3.0], [1.0, 1.0], alibi_slopes=slopes)
        want = [(math.exp(-s) * 1 + 3) / (math.exp(-s) + 1) for s in (0.5, 2.0)]
        assert out == pytest.approx(want, rel=1e-6)
        assert lse == pytest.approx([math.log(math.exp(-s) + 1) for s in (0.5, 2.0)], rel=1e-5)

    def test_sink_takes_weight_and_gives_no_value(self):
        out, lse = by_hand([1.0], [4.0], [1.0, 2.0], sinks=torch.tensor([1.0, -torch.inf]))
        assert out == pytest.approx([2.0, 4.0], rel=1e-6)
        assert lse == pytest.approx([1 + math.log(2), 2.0], rel=1e-6)

    def test_key_bias_comes_after_the_cap(self):
        bias = torch.tensor([[0.0, 3.0, -torch.inf]])
        out, lse = by_hand([0.0, 0.0, 50.0], [1.0, 2.0, 9.0], [1.0], key_bias=bias, logits_soft_cap=1.0)
        e3 = math.exp(3)
        assert out == pytest.approx([(1 + 2 * e3) / (1 + e3)], rel=1e-6)
        assert lse == pytest.approx([math.log(1 + e3)], rel=1e-6)

    def test_cap_comes_before_alibi(self):
        _, lse = by_hand([9.0, 0.0], [1.0, 1.0], [1.0], logits_soft_cap=2.0, alibi_slopes=torch.tensor([1.0]))
        assert lse == pytest.approx([math.log(math.exp(2 * math.tanh(4.5) - 1) + 1)], rel=1e-6)

    @pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8])
    def test_query_head_reads_its_kv_head(self, group):
        heads = 3
        k = torch.randn(1, 4, heads, 32)
        v = torch.arange(float(heads)).view(1, 1, heads, 1).expand(1, 4, heads, 32).contiguous()
        table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
        out, _ = kvk.paged_decode(torch.randn(1, heads * group, 32), k, v, table, lens)
        want = torch.arange(heads).repeat_interleave(group).float()
        torch.testing.assert_close(out[0], want[:, None].expand(-1, 32), rtol=1e-6, atol=1e-6)


class TestEmpty:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_row_without_keys_is_zero_and_minus_inf(self, dtype):
        case = make_case([0, 3, 0], dtype=dtype, sinks=True)
        out, lse = case.check()
        assert (out[[0, 2]] == 0).all() and torch.isneginf(lse[[0, 2]]).all()
        assert not torch.signbit(out[[0, 2]].float()).any()

    def test_all_keys_hidden(self):
        out, lse = make_case([5, 70], sinks=True, key_bias="page", hidden_keys=1.0).check()
        assert (out == 0).all() and torch.isneginf(lse).all()

    @pytest.mark.parametrize("table", TABLES)
    def test_batch_of_nothing(self, table):
        out, lse = make_case([], table=table, head_dim=64, head_dim_v=32).check()
        assert out.shape == (0, 4, 32) and lse.shape == (0, 4)

    def test_table_and_pool_may_be_empty(self):
        q, pages = torch.randn(2, 2, 32), torch.empty(0, 16, 1, 32)
        out, lse = kvk.paged_decode(
            q, pages, pages, torch.empty(2, 0, dtype=torch.int32), torch.zeros(2).int()
        )
        assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
class TestEachOption:
    lens = (1, 33, 0, 70, 600)

    def check(self, dtype, **options):
        make_case(list(self.lens), dtype=dtype, group=3, **options).check()

    @pytest.mark.parametrize("q_scale", [1.0, 6.0])
    def test_plain(self, dtype, q_scale):
        self.check(dtype, q_scale=q_scale)

    @pytest.mark.parametrize("scale", [0.0, 1.0, -0.2, 0.03])
    def test_softmax_scale(self, dtype, scale):
        self.check(dtype, softmax_scale=scale)

    @pytest.mark.parametrize("window", [0, 1, 31, 63, 64, 65, 512, 5000])
    def test_window(self, dtype, window):
        self.check(dtype, window_left=window)

    @pytest.mark.parametrize("cap", [0.5, 5.0, 50.0, 1e4])
    def test_soft_cap(self, dtype, cap):
        self.check(dtype, logits_soft_cap=cap, q_scale=4.0)

    def test_alibi(self, dtype):
        self.check(dtype, alibi=True)

    def test_sinks(self, dtype):
        self.check(dtype, sinks=True)

    @pytest.mark.parametrize("shape", ["page", "head"])
    @pytest.mark.parametrize("hidden", [0.0, 0.5, 0.98])
    def test_key_bias(self, dtype, shape, hidden):
        self.check(dtype, key_bias=shape, hidden_keys=hidden)

    def test_all_together(self, dtype):
        self.check(
            dtype,
            window_left=40,
            logits_soft_cap=10.0,
            alibi=True,
            sinks=True,
            key_bias="head",
            hidden_keys=0.2,
            softmax_scale=0.2,
        )


class TestShapes:
    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layouts_and_tables(self, layout, table, dtype):
        make_case([70, 1, 17, 130], dtype=dtype, layout=layout, table=table, share_pages=True).check()

    @pytest.mark.parametrize("table", TABLES)
    def test_per_head_lens(self, table):
        case = make_case([[70, 0, 1], [3, 600, 64]], num_kv_heads=3, table=table, alibi=True, window_left=50)
        assert case.kv_lens.shape == (2, 3)
        case.check()

    @pytest.mark.parametrize("q_layout", Q_LAYOUTS)
    def test_q_strides(self, q_layout):
        make_case([70, 9], num_kv_heads=3, q_layout=q_layout).check()

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_head_dims(self, head_dim):
        for dtype in DTYPES:
            make_case([1, 70], dtype=dtype, head_dim=head_dim).check()

    @pytest.mark.parametrize("dims", [(32, 256), (256, 32), (192, 128), (40, 72), (136, 128), (128, 136)])
    def test_value_dim_differs(self, dims):
        for dtype in DTYPES:
            make_case([1, 70, 600], dtype=dtype, head_dim=dims[0], head_dim_v=dims[1]).check()

    @pytest.mark.parametrize("group", [*range(1, 9), 12, 16, 17, 32, 71])
    def test_head_ratios(self, group):
        for dtype in DTYPES:
            make_case([70, 5, 530], dtype=dtype, num_kv_heads=2, group=group).check()

    @pytest.mark.parametrize("page_size", [*PAGE_SIZES, 33, 512, 1000])
    def test_page_sizes(self, page_size):
        make_case([1, page_size, 2 * page_size, 67, 515], page_size=page_size, share_pages=True).check()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_lengths_around_borders(self, dtype):
        make_case(BORDER_LENS, dtype=dtype, head_dim=32, page_size=5).check()

    def test_long_request(self):
        make_case([9000, 4097], num_kv_heads=1, head_dim=32, page_size=64, q_scale=3.0).check()

    def test_list_may_be_longer_than_the_length_needs(self):
        short, long = make_case([40], page_size=16), make_case([64], page_size=16)
        cut = long.with_(kv_lens=short.kv_lens)
        cut.check()

    def test_page_named_twice_counts_twice(self):
        case = make_case([32], page_size=16)
        case.page_indices[0, 1] = case.page_indices[0, 0]
        once = case.with_(kv_lens=torch.tensor([16], dtype=torch.int32))
        (out, lse), (out_once, lse_once) = case.check(), once.check()
        torch.testing.assert_close(out, out_once, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, lse_once + math.log(2), rtol=1e-5, atol=1e-6)


class TestNonFinite:
    def test_nan_key_stays_in_its_request_and_head(self):
        case = make_case([20, 20], num_kv_heads=2, group=2)
        case.k_pages[case.page_indices[0, 0], 3, 1, 5] = torch.nan
        out, lse = case.check()
        bad = torch.zeros(2, 4, dtype=torch.bool)
        bad[0, 2:] = True
        assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
        assert torch.equal(lse.isnan(), bad)

    def test_nan_value_stays_in_its_channel(self):
        case = make_case([20, 20], num_kv_heads=2, group=2)
        case.v_pages[case.page_indices[0, 0], 3, 1, 5] = torch.nan
        out, lse = case.check()
        assert out.isnan().sum() == 2 and out[0, 2:, 5].isnan().all() and not lse.isnan().any()

    def test_nan_query_stays_in_its_head(self):
        case = make_case([20, 20])
        case.q[1, 2, 7] = torch.nan
        out, lse = case.check()
        assert lse.isnan().sum() == 1 and out.isnan().sum() == 64

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_keys_out_of_the_window_are_not_read(self, value):
        case = make_case([100, 700], window_left=20, page_size=8)
        for request, length in enumerate((100, 700)):
            for position in range(length - 21):
                page = case.page_indices[request, position // 8]
                case.k_pages[page, position % 8] = value
                case.v_pages[page, position % 8] = value
        out, lse = case.check()
        assert out.isfinite().all() and lse.isfinite().all()

    @pytest.mark.parametrize("length", [5, 700])
    def test_score_of_plus_inf_gives_nan(self, length):
        case = make_case([length, 30], key_bias="head")
        case.options["key_bias"][case.page_indices[0, 0], 2, 1] = torch.inf
        out, lse = case.check()
        assert out[0, 2:].isnan().all() and lse[0, 2:].isnan().all()
        assert out[0, :2].isfinite().all() and out[1].isfinite().all()

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_infinite_key_element(self, sign):
        case = make_case([600], num_kv_heads=1, group=2)
        case.q[0, :, 0] = torch.tensor([1.0, -1.0])
        case.k_pages[case.page_indices[0, 1], 2, 0, 0] = sign * torch.inf
        case.check()
        case.with_(options={"logits_soft_cap": 5.0}).check()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
    def test_options_stay_in_their_head(self, name, value):
        case = make_case([600, 0, 40], sinks=True, alibi=True)
        case.options[name][1] = value
        case.check()

    @given(case_params(prefill=False), st.integers(0, 2**32 - 1), st.integers(1, 12))
    def test_random_places(self, params, seed, count):
        params["alibi"] = False  # weights that underflow in float32 make 0 * inf where the reference has inf
        params["q_scale"] = 1.0
        sprinkle_nonfinite(make_case(**params), seed, count).check()


class TestOut:
    def test_writes_into_given_tensors(self):
        case = make_case([70, 0, 513], num_kv_heads=2, group=3, head_dim=64, head_dim_v=40, sinks=True)
        want_out, want_lse = case.run()
        wide = torch.full((3, 8, 48), 7.0)
        out, lse_t = wide[:, 1:7, 4:44], torch.full((6, 3), 7.0)
        got_out, got_lse = kvk.paged_decode(*case.args, **case.options, out=out, lse=lse_t.T)
        assert got_out.data_ptr() == out.data_ptr() and got_lse.data_ptr() == lse_t.data_ptr()
        assert_bit_equal(out, want_out)
        assert_bit_equal(lse_t.T.contiguous(), want_lse)
        rest = torch.ones_like(wide, dtype=torch.bool)
        rest[:, 1:7, 4:44] = False
        assert (wide[rest] == 7.0).all()

    def test_overload(self):
        case = make_case([70, 3])
        out, lse = torch.empty(2, 4, 64), torch.empty(2, 4)
        result = torch.ops.kvk.paged_decode.out(*case.args, **case.options, out=out, lse=lse)
        assert result is None
        want_out, want_lse = case.run()
        assert_bit_equal(out, want_out)
        assert_bit_equal(lse, want_lse)

    def test_inputs_are_left_alone(self):
        case = make_case([70, 3], key_bias="head", sinks=True, alibi=True)
        tensors = [*case.args, *(x for x in case.options.values() if isinstance(x, torch.Tensor))]
        before = [x.clone() for x in tensors]
        case.run()
        for x, y in zip(tensors, before, strict=True):
            assert_bit_equal(x, y)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_single_scores(head_dim, dtype, scale):
    """One visible key a row: lse is its score, over enough rows to compare largest errors."""
    sizes = {"head_dim": head_dim, "head_dim_v": 32, "group": 6}
    make_case([20] * 60, dtype=dtype, window_left=0, softmax_scale=scale, q_scale=4.0, **sizes).check()


@given(case_params(prefill=False))
def test_random_cases(params):
    make_case(**params).check()
