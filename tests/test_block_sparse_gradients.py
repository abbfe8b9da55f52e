"""Gradients of block_sparse_attention: values, finite differences, merged branches, NaN."""

from __future__ import annotations

import kvk
import pytest
import torch
from block_sparse_cases import check_gradients, gradients, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, assert_finite_differences, threads
from paged_strategies import DTYPES, HEAD_DIMS

OPS = kvk.block_sparse_attention, reference.block_sparse_attention


def random_grads(case, seed=1):
    gen = torch.Generator().manual_seed(seed)
    shape = (*case.q.shape[:2], case.v.shape[2])
    return torch.randn(shape, generator=gen).to(case.q.dtype), torch.randn(shape[:2], generator=gen)


def backward(case, seed=1):
    return gradients(kvk.block_sparse_attention, case, *random_grads(case, seed))


@pytest.mark.parametrize("dtype", DTYPES)
class TestValues:
    @pytest.mark.parametrize("blocks", [(16, 16), (17, 100), (128, 33), (64, 64), (48, 128)])
    def test_blocks(self, dtype, blocks):
        check_gradients(make_case([200], [230], block_q=blocks[0], block_k=blocks[1], dtype=dtype), *OPS)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("per_batch", [False, True])
    @pytest.mark.parametrize("per_head", [False, True])
    def test_forms(self, dtype, per_head, per_batch, bias, causal):
        check_gradients(
            make_case([70, 0, 129, 1], [64, 40, 200, 33], per_head=per_head, per_batch=per_batch, bias=bias,
                      causal=causal, dtype=dtype), *OPS
        )  # fmt: skip

    @pytest.mark.parametrize("dims", [(32, 256), (256, 32), (40, 72), (104, 64)])
    def test_head_dims(self, dtype, dims):
        check_gradients(make_case([70], head_dim=dims[0], head_dim_v=dims[1], group=3, dtype=dtype), *OPS)


def test_finite_differences():
    """Central differences of the float64 reference against the gradients of the op, element by element."""
    case = make_case([20], [24], num_kv_heads=1, head_dim=32, block_q=16, block_k=16, causal=True, bias=True)
    case.options["entry_bias"].clamp_(min=-3.0)
    grad_out, grad_lse = random_grads(case)
    got = gradients(kvk.block_sparse_attention, case, grad_out, grad_lse)
    exact = case.with_(q=case.q.double(), k=case.k.double(), v=case.v.double())

    def loss():
        out, lse = reference.block_sparse_attention(*exact.args, **exact.options)
        return ((out * grad_out).sum() + (torch.where(lse == -torch.inf, 0.0, lse) * grad_lse).sum()).item()

    for x, grad in zip((exact.q, exact.k, exact.v), got, strict=True):
        assert_finite_differences(loss, x, grad, every=37)


def test_reference_gradcheck():
    case = make_case(
        [6], [20], num_kv_heads=1, group=1, head_dim=32, block_q=16, block_k=16, bias=True, density=2.0
    )
    case.options["entry_bias"].clamp_(min=-3.0)
    leaves = [x.double().requires_grad_() for x in case.args[:3]]
    assert torch.autograd.gradcheck(
        lambda *x: reference.block_sparse_attention(*x, *case.args[3:], **case.options),
        leaves,
        fast_mode=True,
    )


def branches(case):
    """The case's pattern as two disjoint ones."""
    mask = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.7
    mask |= torch.eye(8, dtype=torch.bool)
    half = torch.arange(8) % 2 == 0
    return [
        case.with_(row_ptr=row_ptr, col_idx=col_idx)
        for row_ptr, col_idx in map(kvk.block_mask_to_csr, (mask & half, mask & ~half, mask))
    ]


class TestMerge:
    """Two branches, merged, have the gradient of the whole: by autograd, and from the merged out and lse."""

    def test_autograd(self):
        first, second, whole = branches(make_case([256], causal=True))
        grad_out, grad_lse = random_grads(whole)

        def merged(q, k, v, *_, **options):
            parts = [kvk.block_sparse_attention(q, k, v, *x.args[3:], **options) for x in (first, second)]
            return kvk.merge_states(*(torch.stack(x) for x in zip(*parts, strict=True)))

        got = gradients(merged, whole, grad_out, grad_lse)
        want = gradients(kvk.block_sparse_attention, whole, grad_out, grad_lse)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)

    def test_external_out_and_lse(self):
        first, second, whole = branches(make_case([256], causal=True))
        grad_out, grad_lse = random_grads(whole)
        out, lse = whole.run()
        sums = [torch.zeros_like(x) for x in whole.args[:3]]
        for x in (first, second):
            grads = kvk.block_sparse_attention_backward(
                grad_out, grad_lse, *x.args[:3], out, lse, *x.args[3:], **x.options
            )
            sums = [a + b for a, b in zip(sums, grads, strict=True)]
        want = gradients(kvk.block_sparse_attention, whole, grad_out, grad_lse)
        for x, y in zip(sums, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)

    def test_gradcheck_of_the_reference(self):
        first, second, _ = branches(
            make_case([128], num_kv_heads=1, group=1, head_dim=32, block_q=16, block_k=16)
        )
        leaves = [x.double().requires_grad_() for x in first.args[:3]]

        def merged(*x):
            parts = [reference.block_sparse_attention(*x, *y.args[3:]) for y in (first, second)]
            out, lse = reference.merge_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
            return out, torch.where(lse == -torch.inf, 0.0, lse)

        assert torch.autograd.gradcheck(merged, leaves, fast_mode=True)


def test_empty_rows_get_no_gradient():
    case = make_case([100, 40], [60, 40], causal=True, padding_rows=5)
    dq, dk, dv = backward(case)
    assert (dq[:40] == 0).all() and (dq[140:] == 0).all()
    assert (dk[100:] == 0).all() and (dv[100:] == 0).all()
    unseen = case.with_(row_ptr=torch.zeros_like(case.row_ptr))
    assert all((x == 0).all() for x in backward(unseen))
    out, lse = unseen.run()
    for empty in (-torch.inf, torch.inf):  # FlashAttention-2 writes +inf
        grads = kvk.block_sparse_attention_backward(
            *random_grads(case), *case.args[:3], torch.full_like(out, torch.nan), torch.full_like(lse, empty),
            *case.args[3:], **case.options,
        )  # fmt: skip
        assert all((x == 0).all() for x in grads)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_where_they_are_seen(bad):
    case = make_case([64], density=2.0, causal=True, num_kv_heads=1, group=1)
    dq, dk, dv = backward(case)
    case.k[40], case.v[40] = bad, bad
    got, _, _ = backward(case)
    assert_bit_equal(got[:40], dq[:40])
    assert torch.isnan(got[40:]).any(-1).all()

    case = make_case([64], density=2.0, causal=True, num_kv_heads=1, group=1)
    case.q[20] = bad
    _, got_k, got_v = backward(case)
    assert_bit_equal(got_k[21:], dk[21:])
    assert_bit_equal(got_v[21:], dv[21:])
    assert torch.isnan(got_k[:21]).any(-1).all()


def test_invariance():
    """The same bits alone, in a batch, with one thread, and again."""
    lens = [100, 37, 300]
    case = make_case(lens, causal=True, per_batch=True, group=3)
    grad_out, grad_lse = random_grads(case)
    want = gradients(kvk.block_sparse_attention, case, grad_out, grad_lse)
    with threads(1):
        for x, y in zip(gradients(kvk.block_sparse_attention, case, grad_out, grad_lse), want, strict=True):
            assert_bit_equal(x, y)
    for b in range(3):
        rows = slice(sum(lens[:b]), sum(lens[: b + 1]))
        alone = case.with_(q=case.q[rows], k=case.k[rows], v=case.v[rows], row_ptr=case.row_ptr[b : b + 1],
                           col_idx=case.col_idx[b : b + 1], options={"causal": True})  # fmt: skip
        for x, y in zip(
            gradients(kvk.block_sparse_attention, alone, grad_out[rows], grad_lse[rows]), want, strict=True
        ):
            assert_bit_equal(x, y[rows])


def test_strided_inputs_and_gradients():
    case = make_case([70], head_dim=40, per_head=True)
    grad_out, grad_lse = random_grads(case)
    want = gradients(kvk.block_sparse_attention, case, grad_out, grad_lse)
    out, lse = case.run()

    def spread(x):
        return torch.cat([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., : x.shape[-1]]

    got = kvk.block_sparse_attention_backward(
        spread(grad_out), grad_lse.T.contiguous().T, *map(spread, case.args[:3]), spread(out), lse.T.contiguous().T,
        *case.args[3:],
    )  # fmt: skip
    for x, y in zip(got, want, strict=True):
        assert_bit_equal(x, y)


def test_one_argument_only():
    case = make_case([70])
    grad_out, _ = random_grads(case)
    want = gradients(kvk.block_sparse_attention, case, grad_out, torch.zeros(grad_out.shape[:2]))
    for i in range(3):
        leaves = list(case.args[:3])
        leaves[i] = leaves[i].clone().requires_grad_()
        out, _ = kvk.block_sparse_attention(*leaves, *case.args[3:])
        out.backward(grad_out)
        assert_bit_equal(leaves[i].grad, want[i])


@settings(max_examples=25)
@given(st.data())
def test_random_cases(data):
    draw = data.draw
    batch = draw(st.integers(1, 3))
    lens = st.lists(st.one_of(st.integers(0, 40), st.integers(60, 150)), min_size=batch, max_size=batch)
    case = make_case(
        draw(lens),
        draw(lens),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        head_dim_v=draw(st.sampled_from(HEAD_DIMS)),
        block_q=draw(st.integers(16, 128)),
        block_k=draw(st.integers(16, 128)),
        per_batch=draw(st.booleans()),
        per_head=draw(st.booleans()),
        density=draw(st.sampled_from([0.0, 0.3, 2.0])),
        bias=draw(st.booleans()),
        causal=draw(st.booleans()),
        ragged=True,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    check_gradients(case, *OPS)
