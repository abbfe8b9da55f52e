"""Normalised linear attention on CUDA, over the device emulator and on the card: results and gradients.

The emulator has a few instantiations (tests/emulator/torch/linear_kernels.cc).
"""

from __future__ import annotations

import pytest
import torch
from card import Card, EmulatedCard, same_message
from kvk_testing import assert_bit_equal, expect_error
from lightning_cases import BAD_STARTS
from linear_cases import MASKS, LinearCase, check_results, make_case
from test_linear_grad import check_results as check_gradients
from test_linear_grad import random_grads

BF16, F16 = torch.bfloat16, torch.float16
# Dtype, Dk and Dv of the emulator's instantiations; both dims are of one.
KINDS = {"bf16": (BF16, 32, 24), "f16": (F16, 40, 48), "bf16_wide": (BF16, 160, 152)}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
masks = pytest.mark.parametrize("mask", MASKS)


def make(kind: str, batch: int, tokens: int, heads: int, **options) -> LinearCase:
    dtype, dk, dv = KINDS[kind]
    return make_case(batch, tokens, heads, dk, dv, dtype=dtype, **options)


def run(card: Card, case: LinearCase) -> list[torch.Tensor]:
    """(out, den, final state, final z) on the CPU; all hold NaN before."""
    (heads, dk), dv = case.q.shape[2:], case.v.shape[3]
    shapes = (case.v.shape, case.q.shape[:3], (case.count, heads, dk, dv), (case.count, heads, dk))
    results = [card.new(shape, torch.float32 if i else case.q.dtype) for i, shape in enumerate(shapes)]
    names = ("out", "den", "final_state", "final_z")
    card.ops.linear_attention.out(
        *card.put([case.q, case.k, case.v]),
        **card.put_options(case.named),
        **dict(zip(names, results, strict=True)),
    )
    return [x.cpu() for x in results]


def backward(card: Card, case: LinearCase, grads) -> list[torch.Tensor | None]:
    """The gradients of all inputs on the CPU; None for what the case lacks."""
    got = card.ops.linear_attention_backward(
        *card.put(grads), *card.put([case.q, case.k, case.v]), **card.put_options(case.named)
    )
    return [x.cpu() if x.numel() or i < 3 else None for i, x in enumerate(got)]


def check(card: Card, case: LinearCase) -> list[torch.Tensor]:
    """Results and gradients against the reference."""
    got = run(card, case)
    check_results(case, got)
    grads = random_grads(case)
    check_gradients(case, grads, backward(card, case, grads))
    return got


@masks
@EACH_KIND
def test_masks(card: Card, kind, mask):
    check(card, make(kind, 1, 140 if kind == "bf16" else 75, 1, mask=mask))


@masks
def test_options(card: Card, mask):
    check(card, make("bf16", 2, 75, 1, mask=mask, apart=True, scale=0.3, eps=0.1))
    check(card, make("bf16", 1, 40, 2, mask=mask, normalize=False, state=False, scale=-0.5))


@pytest.mark.parametrize("tokens", [0, 1, 2, 31, 63, 64, 65, 201])
@pytest.mark.parametrize("mask", ["causal", "blocks-of-7", "blocks-of-100", "all"])
def test_lengths(card: Card, tokens, mask):
    check(card, make("bf16", 1, tokens, 1, mask=mask))


@pytest.mark.parametrize("mask", ["causal", "blocks-of-7", "blocks-of-33", "all"])
def test_packed_sequences(card: Card, mask):
    """Any lengths, tokens of no sequence; each has the bits that it has alone."""
    lengths, tail = [0, 1, 64, 130, 0, 7], 5
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    case = make("bf16", 1, int(starts[-1]) + tail, 2, mask=mask, starts=starts, apart=True)
    got, grads = check(card, case), random_grads(case)
    assert all((x[:, -tail:] == 0).all() for x in got[:2])
    of_case = backward(card, case, grads)
    assert all((x[:, -tail:] == 0).all() for x in of_case[:5])
    for n, length in enumerate(lengths):
        tokens = slice(int(starts[n]), int(starts[n]) + length)
        alone = case.sequence(0, tokens.start, tokens.stop).with_(**case.states_of(n))
        for i, x in enumerate(run(card, alone)):
            assert_bit_equal(x, (got[i][:, tokens] if i < 2 else got[i][n : n + 1]).contiguous())
        own = [g[:, tokens] if i < 2 else g[n : n + 1] for i, g in enumerate(grads)]
        for i, x in enumerate(backward(card, alone, own)):
            if length:  # a gradient of no tokens is empty, and so None
                assert_bit_equal(x, (of_case[i][:, tokens] if i < 5 else of_case[i][n : n + 1]).contiguous())


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 5, 0), (3, 1, 1)])
def test_shapes(card: Card, shape):
    out, den, final, z = run(card, make("bf16", *shape))
    assert out.shape[:3] == den.shape == shape
    assert final.shape[:2] == z.shape[:2] == (shape[0], shape[2])


@pytest.mark.parametrize(("mask", "cut"), [("causal", 64), ("causal", 128), ("blocks-of-100", 100)])
def test_one_run_or_two(card: Card, mask, cut):
    """Cut between two chunks and started anew from the states, which may be written in place: the same bits."""
    case = make("bf16", 1, 201, 1, mask=mask)
    want = run(card, case)
    first, rest = case.sequence(0, 0, cut), case.sequence(0, cut, 201)
    head = run(card, first.with_(**case.states_of(0)))
    state, z = card.put(head[2:])
    rest = rest.with_(initial_state=state, initial_z=z)
    out, den = card.new(rest.v.shape, BF16), card.new(rest.q.shape[:3], torch.float32)
    card.ops.linear_attention.out(
        *card.put([rest.q, rest.k, rest.v]),
        **{**card.put_options(rest.named), "initial_state": state, "initial_z": z},
        out=out, den=den, final_state=state, final_z=z,
    )  # fmt: skip
    assert_bit_equal(torch.cat([head[0], out.cpu()], 1), want[0])
    assert_bit_equal(torch.cat([head[1], den.cpu()], 1), want[1])
    for x, y in zip((state, z), want[2:], strict=True):
        assert_bit_equal(x.cpu(), y)


def test_batch_and_strides(card: Card):
    """Rows of a batch have the bits that they have alone, and heads may lie before tokens."""
    case = make("bf16", 2, 70, 2, mask="blocks-of-7", apart=True)
    grads = random_grads(case)
    want = [*run(card, case), *backward(card, case, grads)]
    names = ("q", "k", "v", "q_den", "k_den")
    apart = {name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in names}
    turned = [grads[0].transpose(1, 2).contiguous().transpose(1, 2), *grads[1:]]
    other = case.with_(**apart)
    for x, y in zip([*run(card, other), *backward(card, other, turned)], want, strict=True):
        assert_bit_equal(x.contiguous(), y)
    for n in range(2):
        alone = case.sequence(n, 0, 70).with_(**case.states_of(n))
        got = [*run(card, alone), *backward(card, alone, [g[n : n + 1] for g in grads])]
        for x, y in zip(got, want, strict=True):
            assert_bit_equal(x, y[n : n + 1])


@pytest.mark.parametrize("mask", ["causal", "blocks-of-7", "blocks-of-100"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values_reach_those_who_see_them(card: Card, mask, name, value):
    case = make("bf16", 1, 130, 2, mask=mask, normalize=False)
    want = run(card, case)
    x = getattr(case, name).clone()
    at = 70
    x[0, at, 1, 5] = value
    bad = case.with_(**{name: x})
    got = run(card, bad)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert_bit_equal(a[:, :, 0].contiguous(), b[:, :, 0].contiguous())
    size = {"causal": 1, "blocks-of-7": 7, "blocks-of-100": 100}[mask]
    first = at // size * size
    assert_bit_equal(got[0][:, :first].contiguous(), want[0][:, :first].contiguous())
    wide = bad.with_(q=bad.q.float(), k=bad.k.float(), v=bad.v.float())
    for a, b in zip(got, wide.run(), strict=True):  # the CPU's, held to what a token sees elsewhere
        assert torch.equal(a.isfinite(), b.isfinite())


def test_nothing_under_the_fraction(card: Card):
    case = make("bf16", 1, 20, 1, state=False, eps=0.0)
    zeros = case.with_(q=torch.zeros_like(case.q))
    out, den, *_ = run(card, zeros)
    assert (den == 0).all() and out.isnan().all()


def test_schedule_does_not_matter():
    """The emulator runs threads and blocks in other orders."""
    card = EmulatedCard()
    for mask in ("causal", "all"):
        case = make("bf16", 1, 150, 1, mask=mask)
        grads = random_grads(case)
        want = [*run(card, case), *backward(card, case, grads)]
        try:
            card.ops._emulate(4, 5)
            for got, right in zip([*run(card, case), *backward(card, case, grads)], want, strict=True):
                assert got is right is None or assert_bit_equal(got, right) is None
        finally:
            card.ops._emulate(4, -1)


def test_errors(card: Card):
    case = make("bf16", 1, 20, 1)
    q, k, v = card.put([case.q, case.k, case.v])
    op = card.ops.linear_attention
    expect_error(lambda: op(q[..., :20], k[..., :20], v), "linear_attention", "q", "steps of 8")
    expect_error(lambda: op(q.float(), k.float(), v.float()), "linear_attention", "q", "on a card")
    wide = torch.zeros(1, 20, 1, 36, dtype=BF16, device=q.device)[..., :32]
    expect_error(lambda: op(q, wide, v), "linear_attention", "k", "16 bytes")


@pytest.mark.parametrize("starts", [starts for starts, words in BAD_STARTS[:3]])
def test_kvk_check_names_the_first_bad_start(checked, starts):
    case = make("bf16", 1, 6, 1, starts=starts, state=False)
    args = (case.q, case.k, case.v)
    same_message(checked, lambda ops: ops.linear_attention(*args, **case.named))
    grads = random_grads(case)
    same_message(checked, lambda ops: ops.linear_attention_backward(*grads, *args, **case.named))


def launch_every_kernel(card: Card) -> None:
    """One call for each kernel of tests/emulator/torch/linear_kernels.cc."""
    for kind in KINDS:
        case = make(kind, 1, 1, 1)
        card.ops.linear_attention(case.q, case.k, case.v)
        card.ops.linear_attention_backward(*random_grads(case), case.q, case.k, case.v)
