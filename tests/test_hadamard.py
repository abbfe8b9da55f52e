"""hadamard: the matrices, values, strides, in place, special values, gradients, torch's view of it, bad input."""

from __future__ import annotations

import hashlib
import math

import kvk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, expect_error, threads
from paged_strategies import DTYPES
from torch import library

INF, NAN = torch.inf, torch.nan
ORDERS = (1, 12, 20, 28, 40)
SIZES = sorted({m * 2**k for m in ORDERS for k in range(16) if m * 2**k <= 32768})
SMALL = [n for n in SIZES if n <= 2048]
# SHA-256 of the signs of fast-hadamard-transform's matrices (csrc/code_gen.py), row by row as + and -.
SIGNS = {
    12: "b7f9940f91ba7d5372604ecf83a5a8c73b4431022d664e7925891a1933f3d7bf",
    20: "24bb576bf0242627e871dbc3fcbe6c0542c2016fa224b13b6669c4fd74f1a124",
    28: "975c266beac71c048afb423010d8cb13b6d1cbe9d4dd88b1f212bd6c7529fbbf",
    40: "f4f11581471d77d936720840ab39d86d66ec5432f57f26a0608a3f1ebddf42d2",
}


def values(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: torch.Tensor, **options) -> torch.Tensor:
    got = kvk.hadamard(x, **options)
    assert got.dtype == x.dtype and got.shape == x.shape and got.is_contiguous()
    exact = reference.hadamard(x, **options)
    plain = reference.hadamard(x, **options, compute_dtype=x.dtype)
    assert_error_rule(got, exact, plain, per_row=True)
    return got


class TestMatrices:
    @pytest.mark.parametrize("m", [2, 12, 20, 28, 40])
    def test_reference_is_a_hadamard_matrix(self, m):
        matrix = reference.hadamard_matrix(m)
        assert (matrix.abs() == 1).all()
        assert torch.equal(matrix @ matrix.T, m * torch.eye(m, dtype=torch.float64))
        assert torch.equal(matrix, matrix.T) == (m in (2, 12))

    @pytest.mark.parametrize("m", SIGNS)
    def test_the_signs_are_those_of_fast_hadamard_transform(self, m):
        text = "".join("+" if sign > 0 else "-" for sign in reference.hadamard_matrix(m).flatten())
        assert hashlib.sha256(text.encode()).hexdigest() == SIGNS[m]

    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 16, 20, 24, 28, 40, 64, 80, 96, 112, 128, 160, 224, 256])
    def test_the_kernel_multiplies_by_it(self, n, transpose):
        """With scale 1 and unit vectors every result is a sign: columns of H, or of its transpose, to the bit."""
        m = next(m for m in reversed(ORDERS) if n % m == 0 and (n // m).bit_count() == 1)
        matrix = reference.hadamard_matrix(m)
        for _ in range(int(math.log2(n // m))):
            matrix = torch.kron(matrix, reference.hadamard_matrix(2))
        got = kvk.hadamard(torch.eye(n), scale=1.0, transpose=transpose)
        assert torch.equal(got.double(), matrix if transpose else matrix.T)

    def test_by_hand(self):
        got = kvk.hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert got.tolist() == [5.0, -1.0, -2.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
class TestValues:
    @pytest.mark.parametrize("n", SIZES)
    def test_sizes(self, dtype, n):
        rows = 3 if n > 4096 else 17
        check(values(rows, n, dtype=dtype))
        check(values(rows, n, dtype=dtype, seed=1), transpose=True, scale=0.3)

    @pytest.mark.parametrize("n", SMALL)
    def test_transpose_undoes_it(self, dtype, n):
        x = values(40, n, dtype=dtype)
        back = kvk.hadamard(kvk.hadamard(x), transpose=True)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(back.float(), x.float(), rtol=0, atol=6 * eps * max(1.0, n**0.25))

    @pytest.mark.parametrize(
        "shape", [(0, 64), (3, 0, 64), (64,), (1, 1, 1, 1, 64), (2, 3, 4, 5, 16), (300, 8)]
    )
    def test_shapes(self, dtype, shape):
        check(values(*shape, dtype=dtype))

    @pytest.mark.parametrize("n", [1, 8, 12, 20, 64, 128, 160, 1024])
    def test_strides(self, dtype, n):
        wide = values(5, 4, 3, n + 3, dtype=dtype)
        x = wide[1:, ::2, :, 2 : 2 + n].permute(2, 0, 1, 3)
        got = kvk.hadamard(x)
        assert got.is_contiguous()
        assert_bit_equal(got, kvk.hadamard(x.contiguous()))
        one = values(1, n, dtype=dtype).expand(6, n)
        assert_bit_equal(kvk.hadamard(one), kvk.hadamard(one.contiguous()))

    @pytest.mark.parametrize("n", [1, 4, 12, 40, 64, 128, 96, 80, 512, 2048, 20 * 64])
    def test_in_place_and_out(self, dtype, n):
        x = values(9, 2, n, dtype=dtype)
        want = kvk.hadamard(x)
        wide = torch.full((2, 11, n + 5), 7.0, dtype=dtype)
        view = wide[:, 1:10, 3 : 3 + n].transpose(0, 1)
        assert kvk.hadamard(x, out=view) is view
        assert_bit_equal(view.contiguous(), want)
        rest = torch.ones_like(wide, dtype=torch.bool)
        rest[:, 1:10, 3 : 3 + n] = False
        assert (wide[rest] == 7.0).all()
        view.copy_(x)
        assert kvk.hadamard(view, out=view) is view
        assert_bit_equal(view.contiguous(), want)
        assert (wide[rest] == 7.0).all()

    @pytest.mark.parametrize("n", [4, 8, 20, 64, 128, 160, 4096])
    def test_rows_do_not_depend_on_each_other(self, dtype, n):
        x = values(70, n, dtype=dtype)
        whole = kvk.hadamard(x)
        with threads(1):
            assert_bit_equal(kvk.hadamard(x), whole)
        for i in (0, 1, 33, 69):
            assert_bit_equal(kvk.hadamard(x[i]), whole[i])


@pytest.mark.parametrize("n", [2, 8, 12, 20, 28, 40, 64, 128, 96, 80, 1024])
def test_special_values(n):
    """One NaN or infinity reaches every element of its row; two infinities meet as their signs say."""
    x = values(6, n)
    x[0, n // 2] = NAN
    x[1, n - 1] = INF
    x[2, 0] = -INF
    x[3, 0], x[3, n - 1] = INF, INF
    x[4, 0], x[4, 1] = INF, -INF
    got = check(x)
    assert got[0].isnan().all() and got[1].isinf().all() and got[2].isinf().all()
    assert got[3].isnan().any() and got[5].isfinite().all()


def test_large_values_do_not_overflow_on_the_way():
    """The row is scaled before it is summed."""
    x = torch.full((128,), 3e37)
    assert kvk.hadamard(x)[0] == pytest.approx(3e37 * math.sqrt(128), rel=1e-6)
    x = torch.full((128,), 3e38)
    x[2:] = 0.0
    assert kvk.hadamard(x)[0] == pytest.approx(6e38 / math.sqrt(128), rel=1e-6)


@given(st.data())
def test_random_cases(data):
    draw = data.draw
    leading = draw(st.lists(st.integers(0, 6), max_size=4))
    n = draw(st.sampled_from(SMALL))
    dtype = draw(st.sampled_from(DTYPES))
    x = values(*leading, n, dtype=dtype, seed=draw(st.integers(0, 2**32 - 1)))
    if leading and draw(st.booleans()):
        order = draw(st.permutations(range(len(leading))))
        x = x.permute(*order, len(leading))
    if draw(st.booleans()):
        x = torch.cat([x.new_full((*x.shape[:-1], 1), NAN), x, x.new_full((*x.shape[:-1], 2), NAN)], -1)[
            ..., 1:-2
        ]
    scale = draw(st.sampled_from([None, 1.0, 0.25, -0.5, 0.0]))
    check(x, scale=scale, transpose=draw(st.booleans()))


# Gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [16, 12, 20, 28, 40, 80])
def test_gradient_is_the_transpose(n, transpose):
    x, grad = values(3, n).requires_grad_(), values(3, n, seed=1)
    (got,) = torch.autograd.grad(kvk.hadamard(x, scale=0.7, transpose=transpose), x, grad)
    assert_bit_equal(got, kvk.hadamard(grad, scale=0.7, transpose=not transpose))
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(
        reference.hadamard(exact, scale=0.7, transpose=transpose), exact, grad.double()
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_gradient_of_expanded_and_strided_gradients():
    x = values(3, 20).requires_grad_()
    kvk.hadamard(x).sum().backward()
    want = kvk.hadamard(torch.ones(3, 20), transpose=True)
    torch.testing.assert_close(x.grad, want)
    x.grad = None
    kvk.hadamard(x).T.contiguous().sum().backward()
    torch.testing.assert_close(x.grad, want)


def test_reference_gradients():
    x = values(2, 40).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: reference.hadamard(t), (x,))


def test_second_derivative():
    x = values(2, 20).requires_grad_()
    (first,) = torch.autograd.grad((kvk.hadamard(x) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full((2, 20), 2.0), rtol=1e-5, atol=1e-5)


# As torch sees it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x = values(3, 4, 20, dtype=dtype)
    library.opcheck(torch.ops.kvk.hadamard.default, (x,), {"scale": 0.5, "transpose": True})
    library.opcheck(torch.ops.kvk.hadamard.default, (x.clone().requires_grad_(),))
    library.opcheck(torch.ops.kvk.hadamard.default, (x.transpose(0, 1),))
    library.opcheck(torch.ops.kvk.hadamard.out, (x,), {"out": torch.zeros_like(x)})
    library.opcheck(torch.ops.kvk.hadamard_.default, (x.clone(),))


def test_compile():
    def function(x, y):
        z = kvk.hadamard(x, transpose=True) + 1
        kvk.hadamard(y, out=y)
        return z, y * 2

    x, y = values(3, 40), values(5, 64)
    want = function(x, y.clone())
    got = torch.compile(function, fullgraph=True)(x, y.clone())
    for a, b in zip(got, want, strict=True):
        assert_bit_equal(a, b)


def test_meta():
    x = torch.empty(3, 4, 40, device="meta", dtype=torch.bfloat16)
    got = kvk.hadamard(x)
    assert got.shape == x.shape and got.dtype == x.dtype and got.device.type == "meta"


# Bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 3, 5, 6, 7, 10, 14, 18, 36, 44, 60, 100, 32769, 36864, 40960, 65536])
def test_sizes_without_a_matrix(n):
    message = expect_error(lambda: kvk.hadamard(torch.zeros(2, n)), "hadamard", "x", "m * 2**k")
    assert message.endswith(f"got {n}")
    with pytest.raises(ValueError, match=f"got {n}"):
        reference.hadamard(torch.zeros(2, n))


def test_bad_x():
    expect_error(lambda: kvk.hadamard(torch.tensor(1.0)), "hadamard", "x", "got []")
    for dtype in (torch.float64, torch.int32, torch.uint8, torch.bool):
        expect_error(lambda dtype=dtype: kvk.hadamard(torch.zeros(4).to(dtype)), "hadamard", "x", "float32")
    expect_error(lambda: kvk.hadamard(torch.zeros(4, 4).T), "hadamard", "x", "stride 1")


@pytest.mark.parametrize("scale", [INF, -INF, NAN])
def test_bad_scale(scale):
    expect_error(lambda: kvk.hadamard(torch.zeros(4), scale=scale), "hadamard", "scale", "finite")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.zeros(3, 8), "[2, 8]"),
        (torch.zeros(2, 1, 8), "[2, 8]"),
        (torch.zeros(2, 8, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(8, 2).T, "stride 1"),
        (torch.zeros(1, 8).expand(2, 8), "expanded"),
        (torch.zeros(2, 8, device="meta"), "meta"),
    ],
    ids=["extent", "rank", "dtype", "stride", "expanded", "device"],
)
def test_bad_out(out, words):
    before = out.clone()
    expect_error(lambda: kvk.hadamard(torch.ones(2, 8), out=out), "hadamard", "out", words)
    assert out.device.type == "meta" or torch.equal(out, before)
