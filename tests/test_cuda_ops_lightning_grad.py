"""Gradients of lightning attention on CUDA, over the device emulator and on the card."""

from __future__ import annotations

import pytest
import torch
from card import Card, EmulatedCard, same_message
from kvk import reference
from kvk_testing import assert_bit_equal
from lightning_cases import CHUNK, DECAYS, LightningCase, int32, make_case
from test_cuda_ops_lightning import BF16, F16
from test_lightning_grad import check_results, random_grads

# Dtype, Dk and Dv; the emulator has the kernels of both.
KINDS = {"bf16": (BF16, 32, 24), "f16": (F16, 40, 48), "bf16_wide": (BF16, 128, 128)}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, batch: int, tokens: int, heads: int, **options) -> LightningCase:
    dtype, dk, dv = KINDS[kind]
    return make_case(batch, tokens, heads, dk, dv, dtype=dtype, **options)


def run(card: Card, case: LightningCase, grads, decay_grad: bool = True):
    """The gradients in the order of NAMES on the CPU; None for what the case lacks."""
    args, named = case.args
    q, k, v, log_decay = card.put(args)
    named = card.put_options(named)
    grad_out, grad_final = card.put(grads)
    got = card.ops.lightning_attention_backward(
        grad_out, grad_final, q, k, v, log_decay, decay_grad=decay_grad, **named
    )
    *of_rows, of_decay, of_state = (x.cpu() for x in got)
    if case.log_decay is None or not decay_grad:
        assert of_decay.numel() == 0
        of_decay = None
    return [*of_rows, of_decay, None if case.initial_state is None else of_state]


def check(card: Card, case: LightningCase, with_final: bool = True):
    grads = random_grads(case, with_final)
    got = run(card, case, grads)
    check_results(case, grads, got)
    return got


@EACH_KIND
@pytest.mark.parametrize("decay", DECAYS)
def test_decays(card: Card, kind, decay):
    check(card, make(kind, 1, CHUNK + 10, 2 if "wide" not in kind else 1, decay=decay))


@pytest.mark.parametrize("tokens", [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 3])
@pytest.mark.parametrize("with_final", [True, False])
def test_lengths(card: Card, tokens, with_final):
    check(card, make("bf16", 1, tokens, 2), with_final)
    check(card, make("bf16", 1, tokens, 1, decay="head", state=False), with_final)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_packed_sequences(card: Card, decay):
    """0, 1, 63, 0 and 65 tokens, and some of no sequence; each has the bits that it has alone."""
    starts = int32(0, 0, 1, CHUNK, CHUNK, 2 * CHUNK + 1)
    case = make("bf16", 1, int(starts[-1]) + 4, 2, decay=decay, starts=starts)
    grads = random_grads(case, True)
    got = check(card, case)
    for x in got[: 4 if decay == "token" else 3]:
        assert (x[:, -4:] == 0).all()
    for n in range(5):
        tokens = slice(int(starts[n]), int(starts[n + 1]))
        alone = case.sequence(0, tokens.start, tokens.stop).with_(initial_state=case.initial_state[n : n + 1])
        want = run(card, alone, (grads[0][:, tokens], grads[1][n : n + 1]))
        for a, b in zip(got[: len(got) - 1], want, strict=False):
            if a is not None and a.dim() > 1:
                assert_bit_equal(a[:, tokens].contiguous(), b)
        assert_bit_equal(got[4][n : n + 1], want[4])


@pytest.mark.parametrize("log", [-1.0, -50.0, -torch.inf])
def test_no_decay_overflows(card: Card, log):
    case = make("bf16", 1, 100, 2, decay="head")
    for decay in (torch.full((2,), log), torch.full((1, 100, 2), log)):
        check(card, case.with_(log_decay=decay))


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.0])
def test_scales(card: Card, scale):
    check(card, make("bf16", 1, 70, 1, scale=scale))


def test_batch_and_strides(card: Card):
    """Rows of a batch have the bits that they have alone; heads before tokens, and a gradient that is expanded."""
    case = make("bf16", 3, 70, 2)
    grads = random_grads(case, True)
    want = check(card, case)
    for b in range(3):
        alone = case.sequence(b, 0, 70).with_(initial_state=case.initial_state[b : b + 1])
        got = run(card, alone, [x[b : b + 1] for x in grads])
        for name in range(5):
            assert_bit_equal(got[name], want[name][b : b + 1])
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v, grads[0])]
    got = run(card, case.with_(q=apart[0], k=apart[1], v=apart[2]), (apart[3], grads[1]))
    for name in range(5):
        assert_bit_equal(got[name], want[name])


@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out"])
def test_a_bad_value_stays_in_its_head(card: Card, name):
    case = make("bf16", 1, CHUNK + 50, 2)
    grads = list(random_grads(case, True))
    want = run(card, case, grads)
    x = (grads[0] if name == "grad_out" else getattr(case, name)).clone()
    x[0, CHUNK + 20, 1, 5] = torch.nan
    bad, bad_grads = (case, [x, grads[1]]) if name == "grad_out" else (case.with_(**{name: x}), grads)
    got = run(card, bad, bad_grads)
    for i in range(4):
        assert_bit_equal(got[i][:, :, 0].contiguous(), want[i][:, :, 0].contiguous())
    assert_bit_equal(got[4][:, 0], want[4][:, 0])
    assert any(got[i][:, :, 1].isnan().any() for i in (0, 1, 2))


def test_schedule_does_not_matter():
    """The emulator runs threads and blocks in other orders."""
    card, case = EmulatedCard(), make("bf16", 1, 150, 1)
    grads = random_grads(case, True)
    want = run(card, case, grads)
    try:
        card.ops._emulate(4, 5)
        for got, right in zip(run(card, case, grads), want, strict=True):
            if got is not None:
                assert_bit_equal(got, right)
    finally:
        card.ops._emulate(4, -1)


def test_channels_in_two_tiles(card: Card):
    """256 channels of k in two tiles of the decays' gradient, and of v in four: sums over all of them."""
    case = make_case(1, 70, 1, 256, 256, dtype=F16, decay="token")
    grads = random_grads(case, True)
    args, named = case.args
    got = run(card, case, grads)[3]
    exact = reference.lightning_attention_backward(*grads, *args, **named)[3]
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("log", [-0.1, -3.0, -10.0, -30.0, -80.0])
def test_the_decay_gradient_keeps_its_digits(card: Card, log):
    """As on the CPU: dg is about exp(g), of which differences of large sums would leave nothing."""
    case = make("bf16", 1, CHUNK + 20, 1).with_(log_decay=torch.full((1, CHUNK + 20, 1), log))
    grads = random_grads(case, True)
    args, named = case.args
    want = reference.lightning_attention_backward(*grads, *args, **named)[3]
    assert (run(card, case, grads)[3] - want).abs().max() <= 1e-5 * want.abs().max()


@EACH_KIND
def test_without_that_of_the_decays(card: Card, kind):
    """The others have the same bits."""
    case = make(kind, 1, 70, 1)
    grads = random_grads(case, True)
    got = run(card, case, grads, decay_grad=False)
    assert got[3] is None
    for name in (0, 1, 2, 4):
        assert_bit_equal(got[name], run(card, case, grads)[name])


def test_kvk_check_names_the_first_bad_start(checked):
    case = make("bf16", 1, 20, 1, starts=int32(0, 7, 5))
    args, named = case.args
    grad = random_grads(case, False)[0]
    same_message(
        checked,
        lambda ops: ops.lightning_attention_backward(grad, None, *args, **named),
    )
