"""merge_states: values, special values, strides, gradients, and that it joins what attention splits."""

from __future__ import annotations

import math
from functools import partial

import kvk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule
from paged_cases import make_case
from paged_strategies import DTYPES

INF, NAN = torch.inf, torch.nan


def random_states(seed, n, tokens, heads, dim, dtype, *, unseen=0.0, spread=3.0):
    """Partial results; a share `unseen` of the parts has lse -inf or +inf, and NaN in its out."""
    gen = torch.Generator().manual_seed(seed)
    out = torch.randn(n, tokens, heads, dim, generator=gen).to(dtype)
    lse = spread * torch.randn(n, tokens, heads, generator=gen)
    pick = torch.rand(lse.shape, generator=gen)
    lse[pick < unseen] = -INF
    lse[pick < unseen / 3] = INF
    out[pick < unseen] = NAN
    return out, lse


def check(out, lse):
    got_out, got_lse = kvk.merge_states(out, lse)
    assert got_out.dtype == out.dtype and got_lse.dtype == torch.float32
    exact_out, exact_lse = reference.merge_states(out, lse)
    plain_out, plain_lse = reference.merge_states(out, lse, compute_dtype=out.dtype)
    assert_error_rule(got_lse, exact_lse, plain_lse, per_row=False, what="lse")
    assert_error_rule(got_out, exact_out, plain_out, per_row=True, what="out")
    return got_out, got_lse


def one_row(values, lses):
    """Merge of n parts of one row, head dim 1."""
    out, lse = kvk.merge_states(torch.tensor(values).view(-1, 1, 1, 1), torch.tensor(lses).view(-1, 1, 1))
    return out.item(), lse.item()


class TestByHand:
    def test_equal_parts_average(self):
        out, lse = one_row([1.0, 3.0], [0.5, 0.5])
        assert out == pytest.approx(2.0, rel=1e-6) and lse == pytest.approx(0.5 + math.log(2), rel=1e-6)

    def test_weights(self):
        out, lse = one_row([1.0, 3.0, 10.0], [0.0, math.log(2), math.log(5)])
        assert out == pytest.approx((1 + 6 + 50) / 8, rel=1e-6) and lse == pytest.approx(
            math.log(8), rel=1e-6
        )

    def test_single_part_is_itself(self):
        assert one_row([7.0], [-3.5]) == (7.0, -3.5)

    def test_large_and_far_apart(self):
        assert one_row([1.0, 2.0], [3e38, 0.0]) == (1.0, pytest.approx(3e38, rel=1e-6))
        out, lse = one_row([1.0, 2.0], [-1e5, -1e5])
        assert out == pytest.approx(1.5) and lse == pytest.approx(-1e5 + math.log(2), rel=1e-6)

    @pytest.mark.parametrize("unseen", [-INF, INF])
    @pytest.mark.parametrize("value", [5.0, NAN, INF, -INF])
    def test_unseen_part_is_not_read(self, unseen, value):
        assert one_row([value, 2.0], [unseen, 1.5]) == (2.0, 1.5)
        assert one_row([2.0, value], [1.5, unseen]) == (2.0, 1.5)
        assert one_row([value, value], [unseen, -INF]) == (0.0, -INF)

    def test_nan_lse(self):
        out, lse = one_row([1.0, 2.0], [NAN, 0.0])
        assert math.isnan(out) and math.isnan(lse)

    def test_nan_out_of_a_seen_part(self):
        out, lse = one_row([NAN, 2.0], [0.0, 0.0])
        assert math.isnan(out) and lse == pytest.approx(math.log(2), rel=1e-6)

    def test_no_parts(self):
        out, lse = kvk.merge_states(torch.empty(0, 3, 2, 8), torch.empty(0, 3, 2))
        assert out.shape == (3, 2, 8) and (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
class TestValues:
    @pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 9, 16, 31, 64, 100, 128, 256, 257, 1000])
    def test_dims(self, dtype, dim):
        check(*random_states(dim, 3, 4, 2, dim, dtype))

    @pytest.mark.parametrize("n", [1, 2, 3, 17, 100])
    def test_number_of_parts(self, dtype, n):
        check(*random_states(n, n, 5, 3, 40, dtype, unseen=0.2))

    @pytest.mark.parametrize("shape", [(3, 0, 2, 8), (3, 4, 0, 8), (1, 1, 1, 1), (2, 700, 3, 8)])
    def test_shapes(self, dtype, shape):
        out, lse = check(*random_states(0, *shape, dtype))
        assert out.shape == shape[1:] and lse.shape == shape[1:3]

    def test_strides(self, dtype):
        out, lse = random_states(5, 3, 6, 4, 40, dtype, unseen=0.2)
        want = kvk.merge_states(out, lse)
        wide = torch.full((6, 5, 4, 48), NAN, dtype=dtype)
        wide[:, 1:4, :, 3:43] = out.transpose(0, 1)
        lse_t = lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        got = kvk.merge_states(wide[:, 1:4, :, 3:43].transpose(0, 1), lse_t)
        assert_bit_equal(got[0], want[0])
        assert_bit_equal(got[1], want[1])


def test_rows_do_not_depend_on_each_other():
    out, lse = random_states(6, 5, 40, 3, 24, torch.float32, unseen=0.2)
    whole = kvk.merge_states(out, lse)
    for t in range(40):
        alone = kvk.merge_states(out[:, t : t + 1], lse[:, t : t + 1])
        assert_bit_equal(alone[0], whole[0][t : t + 1])
        assert_bit_equal(alone[1], whole[1][t : t + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_joins_what_attention_splits(dtype):
    """Decode over two halves of the pages, merged, is decode over all of them."""
    whole = make_case([160, 200], dtype=dtype, page_size=16)
    length = torch.tensor([64, 64], dtype=torch.int32)
    first = whole.with_(kv_lens=length).run()
    rest = whole.with_(kv_lens=whole.kv_lens - 64, page_indices=whole.page_indices[:, 4:].contiguous()).run()
    empty = whole.with_(kv_lens=torch.zeros_like(length)).run()
    out, lse = kvk.merge_states(*(torch.stack(parts) for parts in zip(first, empty, rest, strict=True)))
    want_out, want_lse = whole.run()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), want_out.float(), rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_out_overload():
    out, lse = random_states(7, 3, 6, 4, 40, torch.float32, unseen=0.2)
    want = kvk.merge_states(out, lse)
    wide, lse_t = torch.full((6, 6, 48), 7.0), torch.full((4, 6), 7.0)
    got = kvk.merge_states(out, lse, merged_out=wide[:, 1:5, 4:44], merged_lse=lse_t.T)
    assert got[0].data_ptr() == wide[:, 1:5, 4:44].data_ptr() and got[1].data_ptr() == lse_t.data_ptr()
    assert_bit_equal(wide[:, 1:5, 4:44].contiguous(), want[0])
    assert_bit_equal(lse_t.T.contiguous(), want[1])
    rest = torch.ones_like(wide, dtype=torch.bool)
    rest[:, 1:5, 4:44] = False
    assert (wide[rest] == 7.0).all()


@given(st.data())
def test_random_cases(data):
    draw = data.draw
    out, lse = random_states(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 9)),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 5)),
        draw(st.integers(1, 300)),
        draw(st.sampled_from(DTYPES)),
        unseen=draw(st.sampled_from([0.0, 0.3, 1.0])),
        spread=draw(st.sampled_from([0.1, 3.0, 40.0])),
    )
    check(out, lse)


# Gradients -------------------------------------------------------------------------------------------------


def gradients(function, out, lse, grad_out, grad_lse):
    out, lse = out.clone().requires_grad_(), lse.clone().requires_grad_()
    merged, merged_lse = function(out, lse)
    outputs, grads = [merged], [grad_out.to(merged.dtype)]
    if grad_lse is not None:
        outputs.append(merged_lse)
        grads.append(grad_lse.to(merged_lse.dtype))
    return torch.autograd.grad(outputs, [out, lse], grads, allow_unused=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("unseen", [0.0, 0.4])
def test_gradients_against_the_reference(dtype, with_lse, unseen):
    out, lse = random_states(8, 4, 7, 3, 33, dtype, unseen=unseen)
    gen = torch.Generator().manual_seed(9)
    grad_out = torch.randn(7, 3, 33, generator=gen).to(dtype)
    grad_lse = torch.randn(7, 3, generator=gen) if with_lse else None
    got = gradients(kvk.merge_states, out, lse, grad_out, grad_lse)
    exact = gradients(reference.merge_states, out.double(), lse.double(), grad_out, grad_lse)
    plain = gradients(partial(reference.merge_states, compute_dtype=dtype), out, lse, grad_out, grad_lse)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    unread = torch.isinf(lse)
    assert (got[0][unread] == 0).all() and (got[1][unread] == 0).all()
    assert_error_rule(got[0], exact[0], plain[0], per_row=True, what="gradient of out")
    assert_error_rule(got[1], exact[1], plain[1], per_row=False, what="gradient of lse")


def test_gradients_against_finite_differences():
    """Central differences of the float64 reference, element by element, against the gradients of the op."""
    out, lse = random_states(10, 3, 2, 2, 3, torch.float32)
    lse[1, 0, 0] = -INF
    out[1, 0, 0] = NAN
    gen = torch.Generator().manual_seed(11)
    grad_out, grad_lse = torch.randn(2, 2, 3, generator=gen), torch.randn(2, 2, generator=gen)

    def loss(o, s):
        merged, merged_lse = reference.merge_states(o, s)
        return ((merged * grad_out).sum() + (merged_lse * grad_lse).sum()).item()

    got = gradients(kvk.merge_states, out, lse, grad_out, grad_lse)
    inputs, step = (out.double(), lse.double()), 1e-5
    for x, grad in zip(inputs, got, strict=True):
        flat, flat_grad = x.view(-1), grad.reshape(-1)
        for i in range(flat.numel()):
            value = flat[i].item()
            flat[i] = value + step
            above = loss(*inputs)
            flat[i] = value - step
            below = loss(*inputs)
            flat[i] = value
            assert flat_grad[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-5)


def test_reference_gradients():
    out, lse = random_states(12, 3, 2, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(
        reference.merge_states,
        (out.requires_grad_(), lse.double().requires_grad_()),
        check_batched_grad=False,
    )


def test_gradient_zero_where_nothing_is_seen():
    out = torch.full((2, 1, 1, 4), NAN)
    lse = torch.tensor([-INF, INF]).view(2, 1, 1)
    grads = gradients(kvk.merge_states, out, lse, torch.ones(1, 1, 4), torch.ones(1, 1))
    assert (grads[0] == 0).all() and (grads[1] == 0).all()


def test_gradient_for_one_argument_only():
    out, lse = random_states(13, 3, 4, 2, 8, torch.float32)
    want = gradients(kvk.merge_states, out, lse, torch.ones(4, 2, 8), None)
    leaf = out.clone().requires_grad_()
    kvk.merge_states(leaf, lse)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, want[0])
    leaf = lse.clone().requires_grad_()
    kvk.merge_states(out, leaf)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, want[1])


def test_gradients_of_strided_inputs():
    out, lse = random_states(14, 3, 4, 2, 8, torch.float32, unseen=0.2)
    gen = torch.Generator().manual_seed(15)
    grad_out, grad_lse = torch.randn(4, 2, 16, generator=gen)[..., ::2], torch.randn(2, 4, generator=gen).T
    want = gradients(kvk.merge_states, out, lse, grad_out.contiguous(), grad_lse.contiguous())
    got = gradients(
        kvk.merge_states,
        out.transpose(0, 1).contiguous().transpose(0, 1),
        lse.transpose(0, 2).contiguous().transpose(0, 2),
        grad_out,
        grad_lse,
    )
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
