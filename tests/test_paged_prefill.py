"""paged_prefill: results by hand, every option, every layout, and random cases against the reference."""

from __future__ import annotations

import math
import random

import kvk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk_testing import assert_bit_equal
from paged_cases import LAYOUTS, Q_LAYOUTS, TABLES, make_case, pack_mask_bits, tree_mask
from paged_strategies import DTYPES, HEAD_DIMS, PAGE_SIZES, case_params, sprinkle_nonfinite


def mean_case(num_keys, num_queries, **options):
    """Which keys each query saw: all scores are 0 and the value of key j is 2**j, so that an output times the
    number of keys behind it is a set of bits."""
    k, v = torch.zeros(1, num_keys, 1, 32), torch.zeros(1, num_keys, 1, 32)
    v[0, :, 0] = (2.0 ** torch.arange(num_keys))[:, None]
    indptr = torch.tensor([0, num_queries], dtype=torch.int32)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([num_keys], dtype=torch.int32)
    out, lse = kvk.paged_prefill(torch.zeros(num_queries, 1, 32), indptr, k, v, table, lens, **options)
    counts = [round(math.exp(x)) for x in lse[:, 0].tolist()]
    seen = [round(x * count) for x, count in zip(out[:, 0, 7].tolist(), counts, strict=True)]
    return [[j for j in range(num_keys) if bits >> j & 1] for bits in seen]


class TestWhichKeysAreSeen:
    def test_causal_is_aligned_bottom_right(self):
        assert mean_case(5, 3) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
        assert mean_case(3, 3) == [[0], [0, 1], [0, 1, 2]]

    def test_more_queries_than_keys(self):
        assert mean_case(2, 4) == [[], [], [0], [0, 1]]

    def test_not_causal_sees_all(self):
        assert mean_case(3, 4, causal=False) == [[0, 1, 2]] * 4

    def test_window(self):
        assert mean_case(5, 3, window_left=1) == [[1, 2], [2, 3], [3, 4]]
        assert mean_case(5, 3, window_left=0) == [[2], [3], [4]]
        assert mean_case(5, 2, window_left=2**63 - 1) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
        assert mean_case(2, 4, window_left=2**63 - 1) == [[], [], [0], [0, 1]]
        assert mean_case(2, 4, window_left=2**63 - 1, causal=False) == [[0, 1]] * 4

    def test_window_without_causal_has_no_right_limit(self):
        assert mean_case(5, 3, window_left=1, causal=False) == [[1, 2, 3, 4], [2, 3, 4], [3, 4]]
        # Queries standing before the first key see everything.
        assert mean_case(2, 4, window_left=0, causal=False) == [[0, 1], [0, 1], [0, 1], [1]]

    def test_mask_stands_over_the_query_tokens(self):
        mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
        bits = pack_mask_bits(mask)
        want = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4]]
        assert mean_case(5, 3, mask_bits=bits, causal=False) == want
        assert mean_case(5, 3, mask_bits=bits, causal=True) == want

    def test_mask_and_causal_are_both_asked(self):
        bits = pack_mask_bits(torch.ones(3, 3, dtype=torch.bool))
        assert mean_case(4, 3, mask_bits=bits) == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]

    def test_mask_width(self):
        bits = torch.tensor([[0b0101], [0b1000]], dtype=torch.int32)
        assert mean_case(6, 2, mask_bits=bits, mask_width=4, causal=False) == [[0, 1, 2, 4], [0, 1, 5]]
        assert mean_case(6, 2, mask_bits=bits, mask_width=0, causal=False) == [[0, 1, 2, 3, 4, 5]] * 2

    def test_mask_wider_than_the_request(self):
        bits = torch.tensor([[0b1010110]], dtype=torch.int32)  # bits 0 to 3 stand before the first key
        assert mean_case(3, 1, mask_bits=bits, mask_width=7, causal=False) == [[0, 2]]

    def test_mask_bit_31_and_second_word(self):
        row = torch.zeros(1, 40, dtype=torch.bool)
        row[0, [31, 32, 39]] = True
        assert mean_case(20, 1, mask_bits=pack_mask_bits(row), mask_width=40, causal=False) == [[11, 12, 19]]

    def test_rows_past_the_last_request(self):
        case = make_case([4, 6], [2, 3], padding_rows=3, sinks=True)
        out, lse = case.check()
        assert out.shape[0] == 8 and (out[5:] == 0).all() and torch.isneginf(lse[5:]).all()


def test_reference_agrees_with_torch():
    """The reference itself against torch's attention, in float64."""
    case = make_case([50, 70, 9], [50, 20, 9], num_kv_heads=2, group=3, page_size=7, table="csr")
    out, _ = case.reference()
    for b, (length, n) in enumerate(((50, 50), (70, 20), (9, 9))):
        start = int(case.options["page_indptr"][b])
        pages = case.page_indices[start : start + -(-length // 7)].long()
        k, v = (
            x[pages].flatten(0, 1)[:length].double().transpose(0, 1)[None]
            for x in (case.k_pages, case.v_pages)
        )
        rows = slice(int(case.qo_indptr[b]), int(case.qo_indptr[b + 1]))
        q = case.q[rows].double().transpose(0, 1)[None]
        mask = torch.ones(n, length, dtype=torch.bool).tril(length - n)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out[rows], want[0].transpose(0, 1), rtol=1e-10, atol=1e-10)


class TestEmpty:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_empty_requests_among_others(self, dtype):
        out, lse = make_case([0, 9, 20, 5], [3, 0, 4, 8], dtype=dtype, sinks=True).check()
        assert (out[:3] == 0).all() and torch.isneginf(lse[:3]).all()
        assert (out[7:10] == 0).all() and torch.isneginf(lse[7:10]).all()  # 8 queries, 5 keys

    @pytest.mark.parametrize("table", TABLES)
    def test_batch_of_nothing(self, table):
        out, lse = make_case([], [], table=table, head_dim_v=32).check()
        assert out.shape == (0, 4, 32) and lse.shape == (0, 4)
        out, lse = make_case([], [], table=table, padding_rows=3).check()
        assert (out == 0).all() and torch.isneginf(lse).all()

    def test_no_query_at_all(self):
        out, _ = make_case([10, 20], [0, 0]).check()
        assert out.shape[0] == 0

    def test_all_keys_hidden(self):
        out, lse = make_case([5, 70], [5, 30], sinks=True, key_bias="page", hidden_keys=1.0).check()
        assert (out == 0).all() and torch.isneginf(lse).all()

    def test_mask_that_hides_everything(self):
        case = make_case([5, 3], [5, 3], sinks=True)
        bits = torch.zeros(8, 1, dtype=torch.int32)
        out, lse = case.with_(options={"mask_bits": bits, "causal": False}).check()
        assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
class TestEachOption:
    kv_lens = (1, 33, 70, 0, 300)
    q_lens = (1, 33, 5, 2, 70)

    def check(self, dtype, **options):
        make_case(
            list(self.kv_lens), list(self.q_lens), dtype=dtype, group=3, padding_rows=1, **options
        ).check()

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("q_scale", [1.0, 6.0])
    def test_plain(self, dtype, causal, q_scale):
        self.check(dtype, causal=causal, q_scale=q_scale)

    @pytest.mark.parametrize("scale", [0.0, 1.0, -0.2, 0.03])
    def test_softmax_scale(self, dtype, scale):
        self.check(dtype, softmax_scale=scale)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("window", [0, 1, 31, 63, 64, 65, 5000])
    def test_window(self, dtype, causal, window):
        self.check(dtype, causal=causal, window_left=window)

    @pytest.mark.parametrize("cap", [0.5, 5.0, 50.0, 1e4])
    def test_soft_cap(self, dtype, cap):
        self.check(dtype, logits_soft_cap=cap, q_scale=4.0)

    @pytest.mark.parametrize("causal", [True, False])
    def test_alibi(self, dtype, causal):
        self.check(dtype, alibi=True, causal=causal)

    def test_sinks(self, dtype):
        self.check(dtype, sinks=True)

    @pytest.mark.parametrize("shape", ["page", "head"])
    @pytest.mark.parametrize("hidden", [0.0, 0.5, 0.98])
    def test_key_bias(self, dtype, shape, hidden):
        self.check(dtype, key_bias=shape, hidden_keys=hidden)

    @pytest.mark.parametrize("causal", [True, False])
    def test_tree(self, dtype, causal):
        self.check(dtype, mask="tree", causal=causal)

    @pytest.mark.parametrize("width", [-1, 0, 1, 31, 32, 33, 64, 100, 400])
    def test_mask_width(self, dtype, width):
        self.check(dtype, mask="random", mask_width=width, causal=False)

    def test_all_together(self, dtype):
        self.check(
            dtype,
            window_left=40,
            logits_soft_cap=10.0,
            alibi=True,
            sinks=True,
            key_bias="head",
            hidden_keys=0.2,
            mask="random",
            mask_width=77,
            softmax_scale=0.2,
        )


class TestShapes:
    @pytest.mark.parametrize("table", TABLES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layouts_and_tables(self, layout, table, dtype):
        make_case(
            [70, 1, 17, 130], [9, 1, 17, 40], dtype=dtype, layout=layout, table=table, share_pages=True
        ).check()

    @pytest.mark.parametrize("table", TABLES)
    def test_per_head_lens(self, table):
        case = make_case(
            [[70, 0, 1], [3, 200, 64]], [5, 40], num_kv_heads=3, table=table, alibi=True, mask="tree"
        )
        assert case.kv_lens.shape == (2, 3)
        case.check()

    @pytest.mark.parametrize("q_layout", Q_LAYOUTS)
    def test_q_strides(self, q_layout):
        make_case([70, 9], [33, 9], num_kv_heads=3, q_layout=q_layout, padding_rows=2).check()

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_head_dims(self, head_dim):
        for dtype in DTYPES:
            make_case([7, 70], [7, 20], dtype=dtype, head_dim=head_dim).check()

    @pytest.mark.parametrize("dims", [(32, 256), (256, 32), (192, 128), (40, 72), (136, 128), (128, 136)])
    def test_value_dim_differs(self, dims):
        for dtype in DTYPES:
            make_case([1, 70, 300], [1, 70, 3], dtype=dtype, head_dim=dims[0], head_dim_v=dims[1]).check()

    @pytest.mark.parametrize("group", [*range(1, 9), 12, 16, 17, 32, 71])
    def test_head_ratios(self, group):
        for dtype in DTYPES:
            make_case([70, 5, 130], [30, 5, 2], dtype=dtype, num_kv_heads=2, group=group, head_dim=40).check()

    @pytest.mark.parametrize("page_size", [*PAGE_SIZES, 33, 512])
    def test_page_sizes(self, page_size):
        lens = [1, page_size, 2 * page_size, 67, 515]
        make_case(lens, [1, page_size, 3, 67, 8], page_size=page_size, share_pages=True).check()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("queries", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
    def test_query_counts_around_borders(self, queries, dtype):
        make_case([queries, queries + 63, queries + 66], [queries] * 3, dtype=dtype, head_dim=32).check()

    @pytest.mark.parametrize("causal", [True, False])
    def test_key_counts_around_borders(self, causal):
        lens = [1, 63, 64, 65, 127, 129, 511, 512, 513, 1023, 1024, 1025, 1500]
        make_case(lens, [3] * len(lens), head_dim=32, page_size=5, causal=causal).check()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_long_requests(self, dtype):
        lens, queries = [9000, 4097, 4200], [3, 70, 130]
        make_case(
            lens,
            queries,
            dtype=dtype,
            num_kv_heads=1,
            group=3,
            head_dim=32,
            page_size=64,
            q_scale=3.0,
            sinks=True,
        ).check()

    def test_prompt_of_1100(self):
        make_case([1100], [1100], num_kv_heads=1, group=2, head_dim=64, window_left=700).check()


class TestNonFinite:
    def test_nan_key_reaches_the_rows_that_see_it(self):
        case = make_case([20, 20], [8, 8], num_kv_heads=2, group=2)
        case.k_pages[case.page_indices[0, 0], 15, 1, 5] = torch.nan  # position 15; queries stand at 12 to 19
        out, lse = case.check()
        bad = torch.zeros(16, 4, dtype=torch.bool)
        bad[3:8, 2:] = True
        assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
        assert torch.equal(lse.isnan(), bad)

    def test_nan_value_behind_a_mask_bit(self):
        mask = torch.ones(4, 4, dtype=torch.bool)
        mask[2, 1] = False
        case = make_case([200], [4], num_kv_heads=1, group=2, causal=False)
        case = case.with_(options={"mask_bits": pack_mask_bits(mask)})
        position = 200 - 4 + 1
        page = case.page_indices[0, position // 16]
        case.v_pages[page, position % 16] = torch.nan
        out, lse = case.check()
        assert torch.equal(out.isnan().any(-1).any(-1), torch.tensor([True, True, False, True]))
        assert not lse.isnan().any()
        case.k_pages[page, position % 16] = torch.nan
        _, lse = case.check()
        assert torch.equal(lse.isnan().all(-1), torch.tensor([True, True, False, True]))

    def test_nan_query_stays_in_its_row(self):
        case = make_case([40, 40], [20, 20])
        case.q[25, 2, 7] = torch.nan
        out, lse = case.check()
        assert lse.isnan().sum() == 1 and out.isnan().sum() == 64

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_keys_out_of_every_window_are_not_read(self, value, causal):
        case = make_case([300], [70], window_left=20, page_size=8, causal=causal)
        for position in range(300 - 70 - 20):
            page = case.page_indices[0, position // 8]
            case.k_pages[page, position % 8] = value
            case.v_pages[page, position % 8] = value
        out, lse = case.check()
        assert out.isfinite().all() and lse.isfinite().all()

    def test_score_of_plus_inf_gives_nan(self):
        case = make_case([40, 30], [10, 10], key_bias="head")
        case.options["key_bias"][case.page_indices[0, 2], 3, 1] = (
            torch.inf
        )  # position 35; queries at 30 to 39
        out, lse = case.check()
        assert torch.equal(lse.isnan().any(-1).nonzero().flatten(), torch.arange(5, 10))
        assert out[:10, :2].isfinite().all()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
    def test_options_stay_in_their_head(self, name, value):
        case = make_case([600, 0, 40], [3, 2, 40], sinks=True, alibi=True)
        case.options[name][1] = value
        case.check()

    @given(case_params(prefill=True), st.integers(0, 2**32 - 1), st.integers(1, 12))
    def test_random_places(self, params, seed, count):
        params["alibi"] = False  # weights that underflow in float32 make 0 * inf where the reference has inf
        params["q_scale"] = 1.0
        sprinkle_nonfinite(make_case(**params), seed, count).check()


class TestOut:
    def test_writes_into_given_tensors(self):
        case = make_case([70, 0, 130], [20, 2, 3], group=3, head_dim_v=40, padding_rows=2, mask="tree")
        want_out, want_lse = case.run()
        wide = torch.full((27, 8, 48), 7.0)
        out, lse_t = wide[:, 1:7, 4:44], torch.full((6, 27), 7.0)
        got_out, got_lse = kvk.paged_prefill(*case.args, **case.options, out=out, lse=lse_t.T)
        assert got_out.data_ptr() == out.data_ptr() and got_lse.data_ptr() == lse_t.data_ptr()
        assert_bit_equal(out, want_out)
        assert_bit_equal(lse_t.T.contiguous(), want_lse)
        rest = torch.ones_like(wide, dtype=torch.bool)
        rest[:, 1:7, 4:44] = False
        assert (wide[rest] == 7.0).all()

    def test_overload(self):
        case = make_case([70, 3], [7, 3])
        out, lse = torch.empty(10, 4, 64), torch.empty(10, 4)
        assert torch.ops.kvk.paged_prefill.out(*case.args, **case.options, out=out, lse=lse) is None
        want_out, want_lse = case.run()
        assert_bit_equal(out, want_out)
        assert_bit_equal(lse, want_lse)

    def test_inputs_are_left_alone(self):
        case = make_case([70, 3], [7, 3], key_bias="head", sinks=True, alibi=True, mask="tree")
        tensors = [*case.args, *(x for x in case.options.values() if isinstance(x, torch.Tensor))]
        before = [x.clone() for x in tensors]
        case.run()
        for x, y in zip(tensors, before, strict=True):
            assert_bit_equal(x, y)


@pytest.mark.parametrize("num_tokens", [1, 5, 32, 33, 64, 100])
def test_tree_equals_the_paths_one_by_one(num_tokens):
    """Verifying a token tree gives for every node what a causal prefill of its path from the root gives."""
    prefix, rng = 37, random.Random(num_tokens)
    case = make_case([prefix + num_tokens], [num_tokens], num_kv_heads=1, group=2, page_size=1, causal=False)
    mask = tree_mask(num_tokens, rng)
    out, _ = case.with_(options={"mask_bits": pack_mask_bits(mask)}).check()
    for node in rng.sample(range(num_tokens), min(num_tokens, 5)):
        path = torch.nonzero(mask[node]).flatten()
        table = torch.cat([case.page_indices[:, :prefix], case.page_indices[:, prefix + path]], dim=1)
        lens = torch.tensor([table.shape[1]], dtype=torch.int32)
        alone, _ = kvk.paged_decode(case.q[node : node + 1], case.k_pages, case.v_pages, table, lens)
        torch.testing.assert_close(out[node], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_single_scores(head_dim, dtype, scale):
    """One visible key a row: lse is its score, over enough rows to compare largest errors."""
    sizes = {"head_dim": head_dim, "head_dim_v": 32, "group": 6}
    make_case(
        [130] * 6, [64] * 6, dtype=dtype, window_left=0, softmax_scale=scale, q_scale=4.0, **sizes
    ).check()


@given(case_params(prefill=True))
def test_random_cases(params):
    make_case(**params).check()
