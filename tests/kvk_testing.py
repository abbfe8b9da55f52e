"""What all tests share: comparing results, bit for bit or by the error rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

# Allowance on top of the error rule, in units of the output dtype's epsilon times the scale of the row: the
# rule compares two maxima of rounding errors, and where plain torch happens to round nothing (one key, short
# rows) its own error is 0. float32 gets more because the error of the scores (a sum of D products) is of the
# same size as the rounding of the result; in 16 bits it is far below it.
FLOOR_ULPS = {torch.float32: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5}


class ErrorTooLarge(AssertionError):
    """The error rule is broken; NaN and inf stand where they should."""


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's number of threads, and with it that of the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_finite_differences(
    loss: Callable[[], float], x: Tensor, grad: Tensor, *, every: int = 1, abs: float = 2e-5
) -> None:
    """Central differences of the loss in elements of x, float64, against the gradient of an op."""
    step, flat, flat_grad = 1e-5, x.view(-1), grad.reshape(-1)
    for i in range(0, flat.numel(), every):
        value = flat[i].item()
        flat[i] = value + step
        above = loss()
        flat[i] = value - step
        below = loss()
        flat[i] = value
        assert flat_grad[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=abs)


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor as integers, so that NaN equals NaN and 0.0 differs from -0.0."""
    return x.contiguous().view(_BITS[x.element_size()])


def assert_bit_equal(got: Tensor, want: Tensor, what: str = "result") -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype} {list(got.shape)} against {want.dtype} {list(want.shape)}"
    )
    differs = bits(got) != bits(want)
    if differs.any():
        where = torch.nonzero(differs)[0].tolist()
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ; first at {where}: "
            f"{got[tuple(where)].item()} against {want[tuple(where)].item()}"
        )


def assert_same_nonfinite(got: Tensor, want: Tensor, what: str = "result") -> None:
    """NaN, +inf and -inf must stand at exactly the same places."""
    for name, kind in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = kind(got) != kind(want)
        if differs.any():
            where = torch.nonzero(differs)[0].tolist()
            raise AssertionError(
                f"{what}: {name} at {int(differs.sum())} wrong places; first at {where}: "
                f"got {got[tuple(where)].item()}, want {want[tuple(where)].item()}"
            )


def assert_error_rule(
    got: Tensor, exact: Tensor, plain: Tensor | Sequence[Tensor], *, per_row: bool, what: str = "result"
) -> None:
    """err(got, exact) <= 2 err(plain, exact) + a floor, after the places of NaN and inf.

    exact is the float64 reference, plain the same computation in plain torch of got's dtype. Errors are
    relative to the scale of their row: the largest |exact| along the last dimension (per_row, for outputs),
    or max(1, |exact|) of the element (for lse). So rows of small values, as long contexts give, count as
    much as rows of large ones. With several plain results, their largest error counts.
    """
    plains = [plain] if isinstance(plain, Tensor) else plain
    assert all(got.shape == x.shape for x in (exact, *plains)), (
        f"{what}: {list(got.shape)}, {list(exact.shape)}"
    )
    assert_same_nonfinite(got, exact, what)
    if got.numel() == 0:
        return
    finite = torch.isfinite(exact)
    exact = torch.where(finite, exact.double(), 0.0)
    scale = exact.abs().amax(-1, keepdim=True) if per_row else exact.abs().clamp(min=1.0)
    scale = torch.where(scale == 0, 1.0, scale)

    def error(x: Tensor) -> Tensor:
        return torch.where(finite, (x.double() - exact).abs() / scale, 0.0)

    assert all((torch.isfinite(x) | ~finite).all() for x in plains), (
        f"{what}: plain torch is not finite where the reference is; the case is unfit"
    )
    plain_worst = max(error(x).max().item() for x in plains)
    limit = 2 * plain_worst + FLOOR_ULPS[got.dtype] * torch.finfo(got.dtype).eps
    got_error = error(got)
    worst = got_error.max().item()
    if worst > limit:
        where = tuple(torch.nonzero(got_error == got_error.max())[0].tolist())
        raise ErrorTooLarge(
            f"{what}: error {worst:.3e} over the limit {limit:.3e} (plain torch {plain_worst:.3e}); "
            f"at {list(where)}: got {got[where].item()}, want {exact[where].item()}"
        )


def expect_error(call: Callable[[], object], op: str, names: str | Iterable[str], *words: str) -> str:
    """call raises a RuntimeError that names the op, one of the arguments, and holds every given word."""
    with pytest.raises(RuntimeError) as caught:
        call()
    text = str(caught.value)
    names = [names] if isinstance(names, str) else list(names)
    assert f"kvk::{op}: " in text, f"the message does not name kvk::{op}: {text}"
    message = text.split(f"kvk::{op}: ", 1)[1]
    assert any(re.search(rf"\b{name}\b", message) for name in names), (
        f"the message names none of {names}: {text}"
    )
    for word in words:
        assert word in message, f"the message lacks {word!r}: {text}"
    return message
