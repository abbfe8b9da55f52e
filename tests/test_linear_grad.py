"""Gradients of linear_attention: the formula, finite differences, every result and argument, invariance."""

from __future__ import annotations

from functools import partial

import kvk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, assert_finite_differences, threads
from lightning_cases import int32, shapes
from linear_cases import MASKS, LinearCase, as_rows, make_case
from paged_strategies import DTYPES

NAMES = ("q", "k", "v", "q_den", "k_den", "initial_state", "initial_z")
masks = pytest.mark.parametrize("mask", MASKS)


def random_grads(case: LinearCase, seed: int = 1) -> list[torch.Tensor]:
    """Of out, den, final_state and final_z."""
    gen = torch.Generator().manual_seed(seed)
    count, (heads, dk), dv = case.count, case.q.shape[2:], case.v.shape[3]
    of_results = (case.v.shape, case.q.shape[:3], (count, heads, dk, dv), (count, heads, dk))
    first, *rest = (torch.randn(shape, generator=gen) for shape in of_results)
    return [first.to(case.q.dtype), *rest]


def gradients(function, case: LinearCase, grads, of=slice(None)) -> list[torch.Tensor | None]:
    """By autograd, in the order of NAMES, of some of the results; None for what the case lacks."""
    leaves = {name: getattr(case, name) for name in NAMES}
    leaves = {name: x if x is None else x.detach().clone().requires_grad_() for name, x in leaves.items()}
    q, k, v, *_ = leaves.values()
    named = {**case.named, **{name: leaves[name] for name in NAMES[3:]}}
    results = list(function(q, k, v, **named))[of]
    grads = [g.to(x.dtype) for g, x in zip(grads[of], results, strict=True)]
    wanted = [x for x in leaves.values() if x is not None]
    got = iter(torch.autograd.grad(results, wanted, grads, allow_unused=True))
    found = [None if x is None else next(got) for x in leaves.values()]
    return [
        x if g is None and x is None else torch.zeros_like(x) if g is None else g
        for g, x in zip(found, leaves.values(), strict=True)
    ]


def by_formula(case: LinearCase, grads, dtype: torch.dtype = torch.float64):
    return reference.linear_attention_backward(
        *grads, case.q, case.k, case.v, **case.named, compute_dtype=dtype
    )


def check(case: LinearCase) -> list[torch.Tensor | None]:
    """Against the formula in float64. The yardsticks are the formula and autograd, both in the case's dtype."""
    grads = random_grads(case)
    got = gradients(kvk.linear_attention, case, grads)
    check_results(case, grads, got)
    return got


def check_results(case: LinearCase, grads, got) -> None:
    """Holds gradients to the error rule."""
    exact, formula = by_formula(case, grads), by_formula(case, grads, case.q.dtype)
    plain = gradients(partial(reference.linear_attention, compute_dtype=case.q.dtype), case, grads)
    for name, a, b, *others in zip(NAMES, got, exact, formula, plain, strict=True):
        if a is None:
            assert b.numel() == 0
            continue
        assert a.dtype == getattr(case, name).dtype
        others = [as_rows(name, x) for x in others]
        assert_error_rule(
            as_rows(name, a), as_rows(name, b), others, per_row=True, what=f"gradient of {name}"
        )


@masks
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype, mask):
    check(make_case(1, 110, 2, mask=mask, dtype=dtype))
    check(make_case(2, 75, 1, 7, 5, mask=mask, dtype=dtype, apart=True, scale=0.3, eps=0.1))
    check(make_case(1, 40, 1, 24, 40, mask=mask, dtype=dtype, normalize=False, state=False, scale=-0.5))


@masks
@pytest.mark.parametrize("tokens", [0, 1, 63, 65])
def test_lengths(tokens, mask):
    check(make_case(1, tokens, 2, mask=mask))


@pytest.mark.parametrize("mask", ["causal", "blocks-of-7", "blocks-of-100", "all"])
def test_packed_sequences(mask):
    starts = int32(0, 0, 1, 64, 64, 129)  # 0, 1, 63, 0 and 65 tokens
    tail = 4  # tokens of no sequence
    got = check(make_case(1, int(starts[-1]) + tail, 2, mask=mask, starts=starts, apart=True))
    assert all((x[:, -tail:] == 0).all() for x in got[:5])


@settings(max_examples=25)
@given(st.data())
def test_random_cases(data):
    draw = data.draw
    causal = draw(st.booleans())
    case = make_case(
        *draw(shapes(2, 140, (4, 60))),
        dtype=draw(st.sampled_from(DTYPES)),
        apart=draw(st.booleans()),
        state=draw(st.booleans()),
        normalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.25])),
        eps=draw(st.sampled_from([1e-6, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    case.options |= {"causal": causal, "block_size": draw(st.integers(1, 150)) if causal else 1}
    check(case)


@pytest.mark.parametrize("mask", [{}, {"block_size": 2}, {"causal": False}, {"normalize": False}])
def test_finite_differences(mask):
    """Central differences of the float64 reference, element by element, against the gradients of the op."""
    case = make_case(1, 5, 2, 3, 2, starts=int32(0, 3, 5), apart=True, scale=0.7, eps=0.1)
    case.options |= mask
    grads = random_grads(case)
    double = case.with_(**{name: getattr(case, name).double() for name in NAMES})

    def loss() -> float:
        return sum((x * g).sum() for x, g in zip(double.reference(), grads, strict=True)).item()

    for name, grad in zip(NAMES, gradients(kvk.linear_attention, case, grads), strict=True):
        assert_finite_differences(loss, getattr(double, name), grad, abs=5e-5)


@masks
def test_the_formula_is_the_gradient_of_the_reference(mask):
    case = make_case(2, 9, 2, 4, 3, mask=mask, apart=True)
    case = case.with_(**{name: getattr(case, name).double() for name in NAMES})
    grads = random_grads(make_case(2, 9, 2, 4, 3))
    grads = [g.double() for g in grads]
    want = gradients(reference.linear_attention, case, grads)
    for a, b in zip(by_formula(case, grads), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("at", range(4))
def test_of_one_result_only(at):
    """As with gradients of zero for the others."""
    case = make_case(1, 70, 2, apart=True)
    grads = random_grads(case)
    only = [g if i == at else torch.zeros_like(g) for i, g in enumerate(grads)]
    want = gradients(kvk.linear_attention, case, only)
    for a, b in zip(gradients(kvk.linear_attention, case, grads, slice(at, at + 1)), want, strict=True):
        assert_bit_equal(a + 0.0, b + 0.0)  # -0 is 0


def test_strided_gradients_and_inputs():
    case = make_case(2, 70, 2, apart=True)
    grads = random_grads(case)
    want = gradients(kvk.linear_attention, case, grads)
    turned = {name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in NAMES[:5]}
    got = gradients(
        kvk.linear_attention, case.with_(**turned), [torch.stack([x, x], -1)[..., 0] for x in grads]
    )
    for a, b in zip(got, want, strict=True):
        assert_bit_equal(a.contiguous(), b)


@pytest.mark.parametrize("mask", ["causal", "all"])
def test_number_of_threads(mask):
    case = make_case(3, 150, 2, 64, 64, mask=mask)
    grads, results = random_grads(case), []
    for count in (1, 2, 5):
        with threads(count):
            results.append(gradients(kvk.linear_attention, case, grads))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert got is want is None or assert_bit_equal(got, want) is None


def test_sequences_do_not_depend_on_each_other():
    case = make_case(3, 90, 2, mask="blocks-of-7", apart=True)
    grads = random_grads(case)
    whole = gradients(kvk.linear_attention, case, grads)
    for n in range(3):
        alone = case.sequence(n, 0, 90).with_(**case.states_of(n))
        got = gradients(kvk.linear_attention, alone, [g[n : n + 1] for g in grads])
        for a, b in zip(got, whole, strict=True):
            assert_bit_equal(a, b[n : n + 1])


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_head_and_sequence(name):
    case = make_case(2, 90, 2, apart=True)
    grads = random_grads(case)
    want = gradients(kvk.linear_attention, case, grads)
    x = getattr(case, name).clone()
    x[(1, 1, 3) if "initial" in name else (1, 40, 1)] = torch.nan
    got = gradients(kvk.linear_attention, case.with_(**{name: x}), grads)
    for key, a, b in zip(NAMES, got, want, strict=True):
        head = 1 if "initial" in key else 2
        assert_bit_equal(a[0], b[0])
        assert_bit_equal(a.select(head, 0), b.select(head, 0))
    assert any(a[1].isnan().any() for a in got)
