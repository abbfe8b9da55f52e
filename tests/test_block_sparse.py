"""block_sparse_attention: values, patterns, ragged sequences, empty rows, NaN, strides, invariance."""

from __future__ import annotations

import math

import kvk
import pytest
import torch
from block_sparse_cases import check, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, threads
from paged_strategies import DTYPES, HEAD_DIMS

NAN, INF = torch.nan, torch.inf


def dense_oracle(case):
    """Attention with a mask [T, S] of every head in float64, of a single sequence: what the pattern means, expanded."""
    num_heads, group = case.q.shape[1], case.q.shape[1] // case.k.shape[1]
    tokens, keys = case.q.shape[0], case.k.shape[0]
    bias = torch.full((num_heads, tokens, keys), -INF, dtype=torch.float64)
    for h in range(num_heads):
        p = h if case.row_ptr.shape[1] > 1 else 0
        pointer, columns = case.row_ptr[0, p], case.col_idx[0, p]
        for m in range(-(-tokens // case.block_q)):
            for e in range(pointer[m], pointer[m + 1]):
                n = int(columns[e])
                rows = slice(m * case.block_q, (m + 1) * case.block_q)
                cols = slice(n * case.block_k, (n + 1) * case.block_k)
                added = case.options["entry_bias"][0, p, e].double() if "entry_bias" in case.options else 0.0
                bias[h, rows, cols] = added
    if case.options.get("causal"):
        bias[:, torch.ones(tokens, keys, dtype=torch.bool).triu(keys - tokens + 1)] = -INF
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (case.k, case.v))
    scores = case.q.double().transpose(0, 1) @ k.transpose(1, 2) * case.q.shape[2] ** -0.5 + bias
    lse = scores.logsumexp(-1)
    weights = torch.where(lse[..., None] == -INF, 0.0, torch.exp(scores - lse[..., None]))
    return (weights @ v).transpose(0, 1), lse.T


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lens", [(150, 150), (70, 200), (200, 70)])
def test_reference_is_the_dense_mask(lens, bias, causal):
    case = make_case([lens[0]], [lens[1]], per_head=True, bias=bias, causal=causal, ragged=False)
    out, lse = reference.block_sparse_attention(*case.args, **case.options)
    want_out, want_lse = dense_oracle(case)
    torch.testing.assert_close(out, torch.nan_to_num(want_out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
class TestValues:
    @pytest.mark.parametrize(
        "blocks", [(16, 16), (16, 128), (17, 33), (64, 64), (100, 96), (128, 16), (128, 128)]
    )
    def test_blocks(self, dtype, blocks):
        check(make_case([300], [333], block_q=blocks[0], block_k=blocks[1], dtype=dtype))

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("per_batch", [False, True])
    @pytest.mark.parametrize("per_head", [False, True])
    def test_forms(self, dtype, per_head, per_batch, bias, causal):
        check(
            make_case([70, 0, 129, 1], [64, 40, 200, 33], per_head=per_head, per_batch=per_batch, bias=bias,
                      causal=causal, dtype=dtype)
        )  # fmt: skip

    @pytest.mark.parametrize("group", [1, 3, 5, 7, 8])
    def test_head_ratios(self, dtype, group):
        check(make_case([90], group=group, block_q=64, causal=True, dtype=dtype))

    @pytest.mark.parametrize("dims", [(32, 256), (256, 32), (40, 72), (104, 64), (136, 200)])
    def test_head_dims(self, dtype, dims):
        check(make_case([70], head_dim=dims[0], head_dim_v=dims[1], dtype=dtype))


def test_all_head_dims():
    for dim in HEAD_DIMS:
        check(make_case([40], num_kv_heads=1, head_dim=dim, seed=dim))


def test_all_blocks_are_dense_attention():
    case = make_case([130], [200], density=2.0, causal=True)
    q, k, v = (x.double() for x in (case.q, case.k.repeat_interleave(2, 1), case.v.repeat_interleave(2, 1)))
    scores = torch.einsum("thd,shd->hts", q, k) / 8
    scores.masked_fill_(torch.ones(130, 200, dtype=torch.bool).triu(71), -INF)
    out, lse = case.run()
    torch.testing.assert_close(
        out.double(), torch.einsum("hts,shd->thd", scores.softmax(-1), v), rtol=0, atol=2e-6
    )
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).T, rtol=0, atol=2e-6)


def test_empty_rows():
    """Rows of the pattern without a block, queries before every key, rows of no sequence."""
    case = make_case([100, 40], [60, 40], causal=True, padding_rows=5)
    pointer = case.row_ptr[0, 0]
    out, lse = check(case)
    assert (out[:40] == 0).all() and torch.isneginf(lse[:40]).all()  # 100 queries, 60 keys
    assert (out[140:] == 0).all() and torch.isneginf(lse[140:]).all()
    none = case.with_(row_ptr=torch.zeros_like(case.row_ptr))
    out, lse = none.run()
    assert (out == 0).all() and torch.isneginf(lse).all() and pointer[-1] > 0
    for lens in ([], [0], [0, 0]):
        out, lse = check(make_case(lens, ragged=True))
        assert out.shape[0] == 0
    out, lse = check(make_case([5], [0]))
    assert (out == 0).all() and torch.isneginf(lse).all()


def test_order_and_repetition_of_entries():
    """The order of a row's blocks is free; a block that is named twice counts twice."""
    case = make_case([64], [256], num_kv_heads=1, group=1)
    row_ptr = torch.tensor([[[0, 3, 5]]], dtype=torch.int32)
    blocks = case.with_(row_ptr=row_ptr, col_idx=torch.tensor([[[7, 0, 3, 2, 2]]], dtype=torch.int32))
    sorted_blocks = blocks.with_(col_idx=torch.tensor([[[0, 3, 7, 2, 2]]], dtype=torch.int32))
    out, lse = check(blocks)
    torch.testing.assert_close(out, sorted_blocks.run()[0])
    once = blocks.with_(
        row_ptr=torch.tensor([[[0, 3, 4]]], dtype=torch.int32), col_idx=blocks.col_idx[..., :4].contiguous()
    )
    torch.testing.assert_close(out[32:], once.run()[0][32:])
    torch.testing.assert_close(lse[32:], once.run()[1][32:] + math.log(2))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0, None])
def test_softmax_scale(scale):
    check(make_case([70], causal=True, softmax_scale=scale))
    check(make_case([70], bias=True, softmax_scale=scale))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_stay_where_they_are_seen(bad, dtype):
    for where in ("q", "k", "v"):
        case = make_case([100], [150], causal=True, dtype=dtype, bias=where == "v")
        clean_out, _ = case.run()
        tensor = getattr(case, where)
        tensor[90, 0, 3] = bad
        exact_out, exact_lse = reference.block_sparse_attention(*case.args, **case.options)
        out, lse = case.run()
        assert torch.equal(torch.isnan(out), torch.isnan(exact_out)), where
        assert torch.equal(torch.isnan(lse), torch.isnan(exact_lse)), where
        heads = slice(0, 1) if where == "q" else slice(0, 2)
        assert_bit_equal(out[:, heads.stop :].contiguous(), clean_out[:, heads.stop :].contiguous())
        assert_bit_equal(out[:40], clean_out[:40])  # queries up to 39 stand before key 90


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    case = make_case([70, 50], head_dim=40, per_head=True, bias=True, dtype=dtype)
    want = case.run()

    def spread(x):
        wide = torch.full((x.shape[1], x.shape[0] + 1, x.shape[2] + 5), NAN, dtype=x.dtype)
        wide[:, 1:, 3:-2] = x.transpose(0, 1)
        return wide[:, 1:, 3:-2].transpose(0, 1)

    def every_other(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), -7, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    options = {name: every_other(x) for name, x in case.options.items()}
    strided = case.with_(q=spread(case.q), k=spread(case.k), v=spread(case.v), row_ptr=every_other(case.row_ptr),
                         col_idx=every_other(case.col_idx), options=options)  # fmt: skip
    for got, x in zip(strided.run(), want, strict=True):
        assert_bit_equal(got, x)
    wide, lse = torch.full((4, 122, 48), 7.0, dtype=dtype), torch.full((4, 120), 7.0)
    view = wide[:, 1:121, 4:44].transpose(0, 1)
    got = kvk.block_sparse_attention(*case.args, **case.options, out=view, lse=lse.T)
    assert_bit_equal(got[0].contiguous(), want[0])
    assert_bit_equal(got[1].contiguous(), want[1])
    assert (wide[:, [0, 121]] == 7).all() and (wide[..., :4] == 7).all() and (wide[..., 44:] == 7).all()


def test_batch_invariance():
    """A sequence's result is the same bit for bit alone, in a batch, and with one thread."""
    lens_q, lens_k = [100, 37, 300], [120, 37, 260]
    case = make_case(lens_q, lens_k, causal=True, per_batch=True, group=3)
    out, lse = case.run()
    with threads(1):
        for got, want in zip(case.run(), (out, lse), strict=True):
            assert_bit_equal(got, want)
    for b in range(3):
        rows = slice(sum(lens_q[:b]), sum(lens_q[: b + 1]))
        keys = slice(sum(lens_k[:b]), sum(lens_k[: b + 1]))
        alone = case.with_(q=case.q[rows], k=case.k[keys], v=case.v[keys], row_ptr=case.row_ptr[b : b + 1],
                           col_idx=case.col_idx[b : b + 1], options={"causal": True})  # fmt: skip
        got = alone.run()
        assert_bit_equal(got[0], out[rows])
        assert_bit_equal(got[1], lse[rows])


def test_branches_merge_to_the_whole():
    """Sink and local blocks apart, merged, are the streaming pattern."""
    case = make_case([256], causal=True)
    seen = kvk.patterns.streaming_mask(8, 8, 1, 3)
    sink = seen.clone()
    sink[:, 1:] = False
    parts = [kvk.block_mask_to_csr(mask[None, None]) for mask in (sink, seen & ~sink, seen)]
    first, rest, whole = (case.with_(row_ptr=row_ptr, col_idx=col_idx).run() for row_ptr, col_idx in parts)
    out, lse = kvk.merge_states(*(torch.stack(x) for x in zip(first, rest, strict=True)))
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-6)


@settings(max_examples=40)
@given(st.data())
def test_random_cases(data):
    draw = data.draw
    batch = draw(st.integers(1, 3))
    lens = st.lists(st.one_of(st.integers(0, 40), st.integers(60, 200)), min_size=batch, max_size=batch)
    check(
        make_case(
            draw(lens),
            draw(lens),
            num_kv_heads=draw(st.integers(1, 3)),
            group=draw(st.integers(1, 4)),
            head_dim=draw(st.sampled_from(HEAD_DIMS)),
            head_dim_v=draw(st.sampled_from(HEAD_DIMS)),
            block_q=draw(st.integers(16, 128)),
            block_k=draw(st.integers(16, 128)),
            per_batch=draw(st.booleans()),
            per_head=draw(st.booleans()),
            density=draw(st.sampled_from([0.0, 0.3, 0.8, 2.0])),
            bias=draw(st.booleans()),
            causal=draw(st.booleans()),
            ragged=True,
            padding_rows=draw(st.sampled_from([0, 3])),
            dtype=draw(st.sampled_from(DTYPES)),
            seed=draw(st.integers(0, 2**32 - 1)),
        )
    )
