"""taylor_feature_map: its product, values, gradients, strides, torch, Based's attention, bad input."""

from __future__ import annotations

import kvk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, expect_error, threads
from paged_strategies import DTYPES
from torch import library

OPS = torch.ops.kvk
DIMS = [1, 2, 3, 7, 8, 16, 17, 33, 64]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: torch.Tensor) -> None:
    """Features and gradient by the error rule; a gradient is a sum that may cancel, so by tensor."""
    got = kvk.taylor_feature_map(x)
    exact, plain = reference.taylor_feature_map(x), reference.taylor_feature_map(x, compute_dtype=x.dtype)
    assert got.dtype == x.dtype and got.is_contiguous()
    assert_error_rule(got, exact, plain, per_row=True, what="features")
    grad = random(*got.shape, dtype=x.dtype, seed=1)
    leaf = x.detach().clone().requires_grad_()
    (got,) = torch.autograd.grad(kvk.taylor_feature_map(leaf), leaf, grad)
    exact = reference.taylor_feature_map_backward(grad, x)
    plain = reference.taylor_feature_map_backward(grad, x, compute_dtype=x.dtype)
    assert_error_rule(*(y.reshape(1, -1) for y in (got, exact, plain)), per_row=True, what="gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", DIMS)
def test_values(dtype, d):
    check(random(3, 5, d, dtype=dtype))


def test_the_widest():
    check(random(2, 256))


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 4), max_size=3), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 99)
)
def test_random_shapes(shape, d, dtype, seed):
    check(random(*shape, d, dtype=dtype, seed=seed))


def test_the_features_of_16_channels():
    assert kvk.taylor_feature_map(random(4, 16)).shape == (4, 153)


@pytest.mark.parametrize("d", DIMS)
def test_the_product_is_the_series(d):
    x, y = random(50, d), random(50, d, seed=1)
    got = (kvk.taylor_feature_map(x).double() * kvk.taylor_feature_map(y).double()).sum(-1)
    s = (x.double() * y.double()).sum(-1) / d**0.5
    torch.testing.assert_close(got, 1 + s + s * s / 2, rtol=0, atol=2e-6 * (1 + s.abs().max().item() ** 2))


def test_by_hand():
    got = kvk.taylor_feature_map(torch.tensor([2.0, 3.0]))
    root = 2**0.5
    want = torch.tensor([1.0, 2 / root**0.5, 3 / root**0.5, 4 / 2, 6 / root, 9 / 2])
    torch.testing.assert_close(got, want)


def test_finite_differences():
    x, grad = random(2, 5), random(2, 21, seed=1)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(kvk.taylor_feature_map(leaf), leaf, grad)
    double, step = x.double(), 1e-5
    for i in range(x.numel()):
        ends = []
        for sign in (1, -1):
            moved = double.clone()
            moved.view(-1)[i] += sign * step
            ends.append((reference.taylor_feature_map(moved) * grad).sum().item())
        assert got.view(-1)[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-5)


def test_attention_of_based():
    """Causal attention with weights 1 + s + s^2 / 2, which are never negative."""
    q, k, v = random(1, 100, 2, 16), random(1, 100, 2, 16, seed=1), random(1, 100, 2, 64, seed=2)
    out, *_ = kvk.linear_attention(kvk.taylor_feature_map(q), kvk.taylor_feature_map(k), v)
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 4
    weights = (1 + s + s * s / 2).tril()
    want = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_out(dtype):
    x = random(3, 4, 16, dtype=dtype)
    want = kvk.taylor_feature_map(x)
    wide = torch.full((4, 3, 160), 7.0, dtype=dtype)
    strided = torch.full((4, 3, 20), torch.nan, dtype=dtype)[..., 2:18].transpose(0, 1)
    strided.copy_(x)
    out = wide[..., 3:156].transpose(0, 1)
    assert kvk.taylor_feature_map(strided, out=out) is out
    assert_bit_equal(out.contiguous(), want)
    assert (wide[..., :3] == 7).all() and (wide[..., 156:] == 7).all()
    grad = random(*want.shape, dtype=dtype, seed=1)
    got = OPS.taylor_feature_map_backward(grad.transpose(0, 1).contiguous().transpose(0, 1), strided)
    assert_bit_equal(got.contiguous(), OPS.taylor_feature_map_backward(grad, x))


def test_number_of_threads():
    x = random(3000, 16)
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(kvk.taylor_feature_map(x))
    assert_bit_equal(*results)


def test_a_bad_value_stays_in_its_row():
    x = random(4, 16)
    want = kvk.taylor_feature_map(x)
    x[2, 5] = torch.nan
    got = kvk.taylor_feature_map(x)
    # x_5, its 16 products; the rest is as it was
    assert got[2].isnan().sum() == 17 and not got[[0, 1, 3]].isnan().any()
    assert_bit_equal(got[~got.isnan()], want[~got.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = random(2, 3, 7, dtype=dtype)
    library.opcheck(OPS.taylor_feature_map.default, (x.clone().requires_grad_(),))
    features = OPS.taylor_feature_map(x)
    library.opcheck(OPS.taylor_feature_map.out, (x,), {"out": torch.zeros_like(features)})
    library.opcheck(OPS.taylor_feature_map_backward.default, (features, x))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.tensor(1.0), ["shape [..., d]"]),
        (torch.zeros(2, 0), ["from 1 to 256", "got 0"]),
        (torch.zeros(2, 257), ["from 1 to 256", "got 257"]),
        (torch.zeros(2, 4, dtype=torch.float64), ["float64"]),
        (torch.zeros(2, 4, dtype=torch.int32), ["int32"]),
        (torch.zeros(4, 8)[:, ::2], ["stride 1"]),
    ],
)
def test_bad_x(x, words):
    expect_error(lambda: kvk.taylor_feature_map(x), "taylor_feature_map", "x", *words)
    call = lambda: OPS.taylor_feature_map_backward(torch.zeros(2, 15), x)  # noqa: E731
    expect_error(call, "taylor_feature_map_backward", "x", *words)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 14),
        torch.zeros(3, 15),
        torch.zeros(2, 15, 1),
        torch.zeros(2, 15, dtype=torch.float64),
        torch.zeros(2, 30)[:, ::2],
        torch.zeros(2, 15, device="meta"),
    ],
)
def test_bad_features(bad):
    x = torch.zeros(2, 4)
    expect_error(lambda: kvk.taylor_feature_map(x, out=bad), "taylor_feature_map", ["out", "x"])
    call = lambda: OPS.taylor_feature_map_backward(bad, x)  # noqa: E731
    expect_error(call, "taylor_feature_map_backward", ["grad", "x"])


def test_expanded_out():
    bad = torch.zeros(1, 15).expand(2, 15)
    expect_error(
        lambda: kvk.taylor_feature_map(torch.zeros(2, 4), out=bad), "taylor_feature_map", "out", "expanded"
    )
