"""Gradients of lightning_attention: the formula, finite differences, every argument, strong decays, invariance."""

from __future__ import annotations

from functools import partial

import kvk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, threads
from lightning_cases import CHUNK, DECAYS, LightningCase, groups, int32, make_case, shapes
from paged_strategies import DTYPES

NAMES = ("q", "k", "v", "log_decay", "initial_state")


def gradients(function, case: LightningCase, grad_out, grad_final, dtype=None):
    """By autograd, in the order of NAMES; None for what the case lacks."""
    leaves = [getattr(case, name) for name in NAMES]
    leaves = [
        x if x is None else (x if dtype is None else x.to(dtype)).detach().clone().requires_grad_()
        for x in leaves
    ]
    *first, initial = leaves
    out, final = function(*first, scale=case.scale, initial_state=initial, cu_seqlens=case.cu_seqlens)
    if out.grad_fn is None:  # the recurrence over no tokens
        return [None if x is None else torch.zeros_like(x) for x in leaves]
    outputs, grads = [out], [grad_out.to(out.dtype)]
    if grad_final is not None:
        outputs.append(final)
        grads.append(grad_final.to(final.dtype))
    wanted = [x for x in leaves if x is not None]
    got = iter(torch.autograd.grad(outputs, wanted, grads))
    return [None if x is None else next(got) for x in leaves]


def random_grads(case: LightningCase, with_final: bool, seed: int = 1):
    gen = torch.Generator().manual_seed(seed)
    count = case.q.shape[0] if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    shape = (count, case.q.shape[2], case.q.shape[3], case.v.shape[3])
    grad_out = torch.randn(case.v.shape, generator=gen).to(case.q.dtype)
    return grad_out, torch.randn(shape, generator=gen) if with_final else None


def rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """What the errors of a gradient are relative to the largest element of, as rows."""
    if name == "initial_state":
        return x.flatten(-2)
    return x[None] if x.dim() == 1 else groups(x)


def check(case: LightningCase, with_final: bool = True):
    """Runs the op's gradient and holds it against the formula."""
    grads = random_grads(case, with_final)
    got = gradients(kvk.lightning_attention, case, *grads)
    check_results(case, grads, got)
    return got


def check_results(case: LightningCase, grads, got) -> None:
    """Against the formula in float64. The yardsticks are the formula and autograd through the recurrence, both in the
    case's dtype: a decay's gradient is a sum of many products of both signs, which either may hit well by chance."""
    args, named = case.args
    exact = reference.lightning_attention_backward(*grads, *args, **named)
    formula = reference.lightning_attention_backward(*grads, *args, **named, compute_dtype=case.q.dtype)
    recurrence = gradients(partial(reference.lightning_attention, compute_dtype=case.q.dtype), case, *grads)
    for name, a, b, *plain in zip(NAMES, got, exact, formula, recurrence, strict=True):
        if a is None:
            continue
        assert a.dtype == getattr(case, name).dtype
        plain = [rows(name, x) for x in plain]
        assert_error_rule(rows(name, a), rows(name, b), plain, per_row=True, what=f"gradient of {name}")


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dims", [(32, 24), (40, 72), (7, 5)])
def test_dims_and_decays(decay, dims):
    check(make_case(2, CHUNK + 10, 2, *dims, decay=decay))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", DECAYS)
def test_16_bit_inputs(dtype, decay):
    check(make_case(2, CHUNK + 10, 2, 40, 24, dtype=dtype, decay=decay))


@pytest.mark.parametrize(
    ("dtype", "decay"), [(torch.float32, "mixed"), (torch.bfloat16, "strong"), (torch.float16, "head")]
)
def test_wide_heads(dtype, decay):
    check(make_case(1, CHUNK + 10, 1, 128, 64, dtype=dtype, decay=decay))


@pytest.mark.parametrize("tokens", [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("with_final", [True, False])
def test_lengths(tokens, with_final):
    check(make_case(1, tokens, 2), with_final)
    check(make_case(1, tokens, 2, decay="head", state=False), with_final)


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [(torch.float32, "head"), (torch.float32, "token"), (torch.bfloat16, "token"), (torch.float16, "head")],
)
def test_packed_sequences(dtype, decay):
    starts = int32(0, 0, 1, CHUNK, CHUNK, 2 * CHUNK + 1)  # 0, 1, 63, 0 and 65 tokens
    tail = 4  # tokens of no sequence
    case = make_case(1, int(starts[-1]) + tail, 2, dtype=dtype, decay=decay, starts=starts)
    got = check(case)
    for x in got[: 4 if decay == "token" else 3]:
        assert (x[:, -tail:] == 0).all()


@settings(max_examples=25)
@given(st.data())
def test_random_cases(data):
    draw = data.draw
    case = make_case(
        *draw(shapes(2, 140, (4, 60))),
        dtype=draw(st.sampled_from(DTYPES)),
        decay=draw(st.sampled_from(DECAYS)),
        state=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, -0.5])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    check(case, draw(st.booleans()))


@pytest.mark.parametrize("log", [-0.1, -3.0, -10.0, -30.0, -80.0])
def test_the_decay_gradient_keeps_its_digits(log):
    """dg is about exp(g): gradients that are differences of large sums would have none left."""
    case = make_case(1, 2 * CHUNK + 20, 2).with_(log_decay=torch.full((1, 2 * CHUNK + 20, 2), log))
    grads = random_grads(case, True)
    got = gradients(kvk.lightning_attention, case, *grads)[3]
    args, named = case.args
    want = reference.lightning_attention_backward(*grads, *args, **named)[3]
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_decays_that_forget_all():
    case = make_case(1, 100, 2)
    decay = case.log_decay.clone()
    decay[0, 30] = -torch.inf
    got = check(case.with_(log_decay=decay))
    assert (got[3][0, 30] == 0).all()


# Finite differences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [True, False])
def test_finite_differences(per_head):
    """Central differences of the float64 reference, element by element, against the gradients of the op."""
    case = make_case(1, 5, 2, 3, 2, decay="head" if per_head else "token", starts=int32(0, 3, 5))
    grad_out, grad_final = random_grads(case, True)

    def loss(double: LightningCase) -> float:
        out, final = double.reference()
        return ((out * grad_out).sum() + (final * grad_final).sum()).item()

    double = case.with_(**{name: getattr(case, name).double() for name in NAMES})
    got = gradients(kvk.lightning_attention, case, grad_out, grad_final)
    step = 1e-5
    for name, grad in zip(NAMES, got, strict=True):
        flat = getattr(double, name).view(-1)
        for i in range(flat.numel()):
            value = flat[i].item()
            flat[i] = value + step
            above = loss(double)
            flat[i] = value - step
            below = loss(double)
            flat[i] = value
            assert grad.reshape(-1)[i].item() == pytest.approx(
                (above - below) / (2 * step), rel=1e-4, abs=2e-5
            )


@pytest.mark.parametrize("decay", ["head", "token"])
def test_the_formula_is_the_gradient_of_the_recurrence(decay):
    case = make_case(2, 9, 2, 4, 3, decay=decay)
    case = case.with_(**{name: getattr(case, name).double() for name in NAMES})
    grads = random_grads(case, True)
    args, named = case.args
    want = gradients(reference.lightning_attention, case, *grads)
    for a, b in zip(reference.lightning_attention_backward(*grads, *args, **named), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# Some gradients only ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_for_one_argument_only(name):
    case = make_case(1, 70, 2)
    grad_out, _ = random_grads(case, False)
    want = gradients(kvk.lightning_attention, case, grad_out, None)[NAMES.index(name)]
    leaf = getattr(case, name).clone().requires_grad_()
    out, _ = case.with_(**{name: leaf}).run()
    (got,) = torch.autograd.grad(out, leaf, grad_out)
    assert_bit_equal(got, want)


def test_of_the_final_state_only():
    case = make_case(1, 70, 2)
    _, grad_final = random_grads(case, True)
    want = gradients(kvk.lightning_attention, case, torch.zeros_like(case.v), grad_final)
    leaf = case.k.clone().requires_grad_()
    _, final = case.with_(k=leaf).run()
    (got,) = torch.autograd.grad(final, leaf, grad_final)
    assert_bit_equal(got, want[1])


def test_strided_gradients_and_inputs():
    case = make_case(2, 70, 2)
    grads = random_grads(case, True)
    want = gradients(kvk.lightning_attention, case, *grads)
    other = case.with_(
        q=case.q.transpose(1, 2).contiguous().transpose(1, 2),
        v=torch.cat([case.v, case.v], -1)[..., : case.v.shape[-1]],
        log_decay=case.log_decay.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    )
    wide = [torch.stack([x, x], -1)[..., 0] for x in grads]
    got = gradients(kvk.lightning_attention, other, *wide)
    for a, b in zip(got, want, strict=True):
        assert_bit_equal(a.contiguous(), b)


# Invariance, special values --------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["head", "token"])
def test_number_of_threads(decay):
    case = make_case(3, 150, 2, 64, 64, decay=decay)
    grads = random_grads(case, True)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(gradients(kvk.lightning_attention, case, *grads))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_bit_equal(got, want)


def test_sequences_do_not_depend_on_each_other():
    case = make_case(3, 90, 2)
    grad_out, grad_final = random_grads(case, True)
    whole = gradients(kvk.lightning_attention, case, grad_out, grad_final)
    for n in range(3):
        alone = case.sequence(n, 0, 90).with_(initial_state=case.initial_state[n : n + 1])
        got = gradients(kvk.lightning_attention, alone, grad_out[n : n + 1], grad_final[n : n + 1])
        for a, b in zip(got, whole, strict=True):
            assert_bit_equal(a, b[n : n + 1])


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "initial_state", "grad_out", "grad_final"])
def test_nan_stays_in_its_head_and_sequence(name):
    case = make_case(2, 90, 2)
    grads = dict(zip(("grad_out", "grad_final"), random_grads(case, True), strict=True))
    want = gradients(kvk.lightning_attention, case, **grads)
    if name in grads:
        grads[name] = grads[name].clone()
        x = grads[name]
    else:
        x = getattr(case, name).clone()
        case = case.with_(**{name: x})
    x[(1, 1, 3, 5) if "final" in name or "state" in name else (1, 40, 1)] = torch.nan
    got = gradients(kvk.lightning_attention, case, **grads)
    for key, a, b in zip(NAMES, got, want, strict=True):
        head = 1 if key == "initial_state" else 2
        assert_bit_equal(a[0], b[0])
        assert_bit_equal(a.select(head, 0), b.select(head, 0))
    assert any(a[1].isnan().any() for a in got)


def test_memory_is_linear():
    """4096 tokens of one head, with the decays' gradient: nothing of T x T, which would be 64 MiB here."""
    resource = pytest.importorskip("resource")
    case = make_case(1, 4096, 1, 32, 32, state=False)
    grads = random_grads(case, False)
    small = case.sequence(0, 0, 128)
    gradients(kvk.lightning_attention, small, grads[0][:, :128], None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients(kvk.lightning_attention, case, *grads)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
