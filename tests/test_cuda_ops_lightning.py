"""Lightning attention on CUDA, over the device emulator and on the card.

The emulator has a few instantiations (tests/emulator/torch/lightning_kernels.cc).
"""

from __future__ import annotations

import pytest
import torch
from card import Card, EmulatedCard, same_message
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, expect_error
from lightning_cases import CHUNK, DECAYS, LightningCase, check_results, int32, make_case
from paged_strategies import DTYPES
from test_lightning import decode_case, strided

BF16, F16 = torch.bfloat16, torch.float16
# Dtype, Dk and Dv of the emulator's instantiations.
KINDS = {
    "bf16": (BF16, 32, 24),
    "f16": (F16, 40, 72),
    "bf16_wide": (BF16, 128, 128),
    "f16_wide": (F16, 256, 8),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, batch: int, tokens: int, heads: int, **options) -> LightningCase:
    dtype, dk, dv = KINDS[kind]
    return make_case(batch, tokens, heads, dk, dv, dtype=dtype, **options)


def run(card: Card, case: LightningCase):
    """(out, final state) on the CPU; both hold NaN before."""
    args, named = case.args
    named = card.put_options(named)
    count = len(case.cu_seqlens) - 1 if case.cu_seqlens is not None else len(case.q)
    out = card.new(case.v.shape, case.v.dtype)
    final = card.new((count, case.q.shape[2], case.q.shape[3], case.v.shape[3]), torch.float32)
    card.ops.lightning_attention.out(*card.put(args), **named, out=out, final_state=final)
    return out.cpu(), final.cpu()


def check(card: Card, case: LightningCase):
    got = run(card, case)
    check_results(case, *got)
    return got


class TestForward:
    @EACH_KIND
    @pytest.mark.parametrize("decay", DECAYS)
    def test_decays(self, card: Card, kind, decay):
        check(card, make(kind, 1, 140, 2 if "wide" not in kind else 1, decay=decay))

    @pytest.mark.parametrize("tokens", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 201])
    @pytest.mark.parametrize("kind", ["bf16", "f16"])
    def test_lengths(self, card: Card, kind, tokens):
        check(card, make(kind, 1, tokens, 2))
        check(card, make(kind, 1, tokens, 1, decay="head", state=False))

    @pytest.mark.parametrize("shape", [(0, 5, 2), (2, 5, 0), (3, 1, 1)])
    def test_shapes(self, card: Card, shape):
        out, final = check(card, make("bf16", *shape))
        assert out.shape[:3] == shape and final.shape[:2] == (shape[0], shape[2])

    @pytest.mark.parametrize("decay", ["none", "head", "token"])
    @pytest.mark.parametrize("kind", ["bf16", "f16"])
    def test_packed_sequences(self, card: Card, kind, decay):
        """Any lengths, tokens of no sequence; each has the bits that it has alone."""
        lengths = [0, 1, CHUNK, 130, 0, 7]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        case = make(kind, 1, int(starts[-1]) + 5, 2, decay=decay, starts=starts)
        out, final = check(card, case)
        assert (out[:, -5:] == 0).all()
        for n, length in enumerate(lengths):
            start = int(starts[n])
            alone = case.sequence(0, start, start + length).with_(initial_state=case.initial_state[n : n + 1])
            got_out, got_final = run(card, alone)
            assert_bit_equal(got_out, out[:, start : start + length].contiguous())
            assert_bit_equal(got_final, final[n : n + 1])
            if length == 0:
                assert_bit_equal(final[n], case.initial_state[n])

    @pytest.mark.parametrize("log", [-1e-6, -1.0, -8.0, -50.0, -1e4, -torch.inf])
    def test_no_decay_overflows(self, card: Card, log):
        case = make("bf16", 1, 100, 2, decay="head")
        for decay in (torch.full((2,), log), torch.full((1, 100, 2), log)):
            check(card, case.with_(log_decay=decay))

    def test_forgetting_all_and_then_nothing(self, card: Card):
        """Running sums of the log decays reach -3000 here; what comes after must not feel their rounding."""
        decay = torch.full((1, 2 * CHUNK, 2), -50.0)
        decay[:, CHUNK - 6 : CHUNK] = decay[:, -6:] = -1e-3
        decay[:, CHUNK + 9] = -torch.inf
        check(card, make("bf16", 1, 2 * CHUNK, 2).with_(log_decay=decay))

    @EACH_KIND
    def test_restart(self, card: Card, kind):
        """At a multiple of a chunk the same bits, elsewhere the same up to rounding."""
        tokens = 2 * CHUNK + 7
        case = make(kind, 1, tokens, 1)
        out, final = run(card, case)
        eps = torch.finfo(case.q.dtype).eps
        for at in (0, 13, CHUNK, tokens):
            first, state = run(card, case.sequence(0, 0, at).with_(initial_state=case.initial_state))
            second, end = run(card, case.sequence(0, at, tokens).with_(initial_state=state))
            joined = torch.cat([first, second], dim=1)
            if at % CHUNK == 0 or at == tokens:
                assert_bit_equal(joined, out)
                assert_bit_equal(end, final)
            atol = 2 * eps * out.float().abs().amax().item()
            torch.testing.assert_close(joined.float(), out.float(), rtol=0, atol=atol)
            torch.testing.assert_close(end, final, rtol=0, atol=4e-6 * final.abs().amax().item())

    @EACH_KIND
    @pytest.mark.parametrize("decay", ["head", "token"])
    def test_prefill_then_decode_is_a_longer_prefill(self, card: Card, kind, decay):
        n, m = 70, 5
        case = make(kind, 1, n + m, 1, decay=decay)
        out, final = run(card, case)
        _, pool = run(card, case.sequence(0, 0, n).with_(initial_state=case.initial_state))
        rows = []
        for t in range(n, n + m):
            log = case.log_decay if decay == "head" else case.log_decay[:, t].contiguous()
            step = [case.q[:, t], case.k[:, t], case.v[:, t], pool, int32(0), log]
            row, pool = decode(card, step, scale=case.scale)
            rows.append(row)
        atol = 2 * torch.finfo(case.q.dtype).eps * out.float().abs().amax().item()
        torch.testing.assert_close(torch.stack(rows, 1).float(), out[:, n:].float(), rtol=0, atol=atol)
        torch.testing.assert_close(pool, final, rtol=1e-5, atol=1e-5 * final.abs().amax().item())

    def test_strides(self, card: Card):
        """Heads before tokens, rows longer than needed, a state with gaps, every second start."""
        case = make("bf16", 2, 70, 3)
        want = run(card, case)

        def apart(x: torch.Tensor) -> torch.Tensor:
            wide = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 8), torch.nan, dtype=x.dtype)
            return wide.transpose(1, 2)[..., : x.shape[3]].copy_(x)

        state = torch.full((2, 3, 32, 28), torch.nan)[..., :24].copy_(case.initial_state)
        log = case.log_decay.transpose(1, 2).contiguous().transpose(1, 2)
        far = case.with_(
            q=apart(case.q), k=apart(case.k), v=apart(case.v), log_decay=log, initial_state=state
        )
        for got, right in zip(run(card, far), want, strict=True):
            assert_bit_equal(got, right)
        packed = case.sequence(0, 0, 70)
        starts = int32(0, 9, 30, 9, 70, 9)
        results = [run(card, packed.with_(cu_seqlens=x)) for x in (starts[::2], starts[::2].contiguous())]
        for got, right in zip(*results, strict=True):
            assert_bit_equal(got, right)

    def test_state_in_place(self, card: Card):
        case = make("bf16", 2, 70, 2)
        want = run(card, case)
        args, named = case.args
        args, named = card.put(args), card.put_options(named)
        out = card.new(case.v.shape, BF16)
        card.ops.lightning_attention.out(*args, **named, out=out, final_state=named["initial_state"])
        assert_bit_equal(out.cpu(), want[0])
        assert_bit_equal(named["initial_state"].cpu(), want[1])

    @pytest.mark.parametrize("kind", ["bf16", "f16"])
    @pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "initial_state"])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_bad_value_stays_where_it_is_read(self, card: Card, kind, name, bad):
        """In its sequence and head, at its token and after; v also in its column. Elsewhere no bit changes."""
        case = make(kind, 1, CHUNK + 50, 2)
        want, want_state = run(card, case)
        at = CHUNK + 20
        x = getattr(case, name).clone()
        if name == "log_decay":
            x[0, at, 1] = torch.nan
        elif name == "initial_state":
            x[0, 1, 3, 5] = bad
        else:
            x[0, at, 1, 5] = bad
        got, state = run(card, case.with_(**{name: x}))
        touched = torch.zeros_like(want, dtype=torch.bool)
        touched_state = torch.zeros_like(state, dtype=torch.bool)
        first = 0 if name == "initial_state" else at
        column = 5 if name in ("v", "initial_state") else slice(None)
        touched[0, first : (at + 1 if name == "q" else None), 1, column] = True
        if name != "q":
            touched_state[0, 1, :, column] = True
        assert_bit_equal(got[~touched], want[~touched])
        assert_bit_equal(state[~touched_state], want_state[~touched_state])
        assert not torch.isfinite(got[touched]).any() or bad == torch.inf
        if name in ("q", "log_decay") or bad != torch.inf:
            assert not torch.isfinite(got[0, at, 1]).all()

    def test_large_numbers(self, card: Card):
        """Scores and states that no f16 holds."""
        case = make("f16", 1, CHUNK + 9, 1, scale=1e-6)
        check(card, case.with_(q=case.q * 100, k=case.k * 2000, v=case.v * 50))

    def test_starts_out_of_range_write_nothing_else(self, card: Card):
        """Values on a card are trusted, but can never make a kernel write outside its output."""
        case = make("bf16", 1, 20, 1, starts=int32(0, 9, 20))
        memory = torch.full((1, 60, 1, 24), 7.0, dtype=BF16)
        args, named = case.args
        named["cu_seqlens"] = int32(-5, 12, 2**31 - 1)
        out, named = card.put([memory])[0], card.put_options(named)
        final = card.new((2, 1, 32, 24), torch.float32)
        card.ops.lightning_attention.out(*card.put(args), **named, out=out[:, 20:40], final_state=final)
        assert (out[:, :20] == 7).all() and (out[:, 40:] == 7).all()
        assert not final.isnan().any()

    def test_errors(self, card: Card):
        case = make("bf16", 1, 20, 1)
        q, k, v = card.put([case.q, case.k, case.v])
        words = "lightning_attention", "q"
        expect_error(
            lambda: card.ops.lightning_attention(q.float(), k.float(), v.float(), None), *words, "float32"
        )
        expect_error(
            lambda: card.ops.lightning_attention(q[..., :4], k[..., :4], v, None), *words, "steps of 8"
        )

    @pytest.mark.parametrize("starts", [(1, 5, 9), (0, 7, 5), (0, 5, 21)])
    def test_kvk_check_names_the_first_bad_start(self, checked, starts):
        case = make("bf16", 1, 20, 1, starts=int32(*starts))
        args, named = case.args
        same_message(checked, lambda ops: ops.lightning_attention(*args, **named))
        named["cu_seqlens"] = int32(0, 5, 20)
        checked.ops.lightning_attention(*args, **named)


@pytest.mark.parametrize("seed", [3, 8])
@pytest.mark.parametrize("kind", ["bf16", "f16_wide"])
def test_schedule_does_not_matter(kind, seed):
    """The emulator runs threads and blocks in other orders."""
    card, case = EmulatedCard(), make(kind, 1, 150, 1)
    want = run(card, case)
    try:
        card.ops._emulate(4, seed)
        for got, right in zip(run(card, case), want, strict=True):
            assert_bit_equal(got, right)
    finally:
        card.ops._emulate(4, -1)


# Decode ----------------------------------------------------------------------------------------------------


def decode(card: Card, args, **options):
    """(out, the pool after it), on the CPU; out holds NaN before."""
    q, k, v, pool, *rest = card.put(args)
    out = card.new(v.shape, v.dtype)
    card.ops.lightning_decode.out(q, k, v, pool, *rest, **options, out=out)
    return out.cpu(), pool.cpu()


def check_decode(card: Card, args) -> None:
    """The error rule for the rows that have a slot, 0 for the others, and the rest of the pool as it was."""
    args = [x if x is None else x.clone() for x in args]
    exact, exact_pool = reference.lightning_decode(*args, scale=0.3)
    plain, plain_pool = reference.lightning_decode(*args, scale=0.3, compute_dtype=args[0].dtype)
    before, slots = args[3].clone(), args[4]
    out, pool = decode(card, args, scale=0.3)
    assert_error_rule(*(x.flatten(-2) for x in (out, exact, plain)), per_row=True, what="out")
    assert_error_rule(*(x.flatten(-2) for x in (pool, exact_pool, plain_pool)), per_row=True, what="state")
    assert (out[slots < 0] == 0).all()
    unused = torch.ones(len(before), dtype=torch.bool)
    unused[slots[slots >= 0].long()] = False
    assert_bit_equal(pool[unused], before[unused])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_decode(card: Card, dtype, decay):
    check_decode(card, decode_case(dk=40, dv=24, dtype=dtype, decay=decay))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(128, 128), (8, 72), (256, 8), (136, 256)])
def test_decode_dims(card: Card, dtype, dims):
    check_decode(card, decode_case(2, 1, *dims, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_does_not_depend_on_the_batch(card: Card, dtype):
    args = decode_case(5, dk=72, dv=64, dtype=dtype)
    want, want_pool = decode(card, [x.clone() for x in args])
    for b in range(5):
        one = [x[b : b + 1].clone() for x in args]
        one[3] = args[3].clone()
        out, pool = decode(card, one)
        assert_bit_equal(out, want[b : b + 1])
        if args[4][b] >= 0:
            assert_bit_equal(pool[int(args[4][b])], want_pool[int(args[4][b])])


def test_decode_strides(card: Card):
    """Heads before rows, a pool with gaps, every second slot of a list."""
    args = decode_case(4, 3, dk=40, dv=24, dtype=BF16)
    want, want_pool = decode(card, [x.clone() for x in args])
    q, k, v = (torch.stack([x, x], 1)[:, 1].transpose(0, 1).contiguous().transpose(0, 1) for x in args[:3])
    pool = torch.full((len(args[3]), 2, 3, 40, 28), torch.nan)[:, 1, ..., :24]
    pool.copy_(args[3])
    slots, log = torch.stack([args[4], args[4]], 1)[:, 0], args[5].T.contiguous().T
    out, pool = decode(card, [q, k, v, pool, slots, log])
    assert_bit_equal(out, want)
    assert_bit_equal(pool.contiguous(), want_pool)


def test_decode_of_nothing(card: Card):
    out, _ = decode(card, decode_case(0, dk=40, dv=24))
    assert out.shape == (0, 3, 24)
    args = decode_case(3, slots=int32(-1, -5, -(2**31)), dk=40, dv=24)
    before = args[3].clone()
    out, pool = decode(card, args)
    assert (out == 0).all()
    assert_bit_equal(pool, before)


def test_decode_skips_without_reading(card: Card):
    args = decode_case(3, slots=int32(0, -1, 2), dk=40, dv=24)
    want, _ = decode(card, [x.clone() for x in args])
    for x in (*args[:3], args[5]):
        x[1] = torch.nan
    assert_bit_equal(decode(card, args)[0], want)


def test_slots_past_the_pool_are_skipped(card: Card):
    """Values on a card are trusted, but can never make a kernel write outside its pool."""
    args = decode_case(3, slots=int32(6, 1, 2**31 - 1), dk=40, dv=24)
    before = args[3].clone()
    out, pool = decode(card, args)
    assert (out[::2] == 0).all() and (out[1] != 0).any()
    keep = torch.arange(6) != 1
    assert_bit_equal(pool[keep], before[keep])


def test_decode_errors(card: Card):
    q, k, v, pool, slots, log = card.put(decode_case(4, dk=40, dv=24, dtype=BF16))
    expect_error(
        lambda: card.ops.lightning_decode(q[..., :20], k[..., :20], v, pool[:, :, :20], slots, log),
        "lightning_decode", "q", "steps of 8",
    )  # fmt: skip
    wide = card.put([strided(pool.cpu())])[0]
    expect_error(
        lambda: card.ops.lightning_decode(q, k, v, wide, slots, log), "lightning_decode", "state", "16"
    )


@pytest.mark.parametrize("slots", [(0, 7, 9), (0, -1, 2**31 - 1), (4, -1, 4), (3, 3, 9)])
def test_kvk_check_names_the_first_bad_slot(checked, slots):
    args = decode_case(3, slots=int32(*slots), dk=40, dv=24)[:6]
    before = args[3].clone()
    same_message(checked, lambda ops: ops.lightning_decode(*args))
    assert_bit_equal(args[3], before)
    args[4] = int32(5, -1, 0)
    checked.ops.lightning_decode(*args)


def launch_every_kernel(card: Card) -> None:
    """One call for each kernel of tests/emulator/torch/lightning_kernels.cc."""
    for kind in KINDS:
        args, named = make(kind, 1, 1, 1).args
        card.ops.lightning_attention(*args, **named)
    for dtype, dk, dv in ((BF16, 32, 24), (F16, 40, 48), (BF16, 128, 128), (F16, 256, 256)):
        args, named = make_case(1, 1, 1, dk, dv, dtype=dtype).args
        card.ops.lightning_attention_backward(args[2], None, *args, **named)
    packed = make("bf16", 1, 1, 1, starts=int32(0, 1)).args
    card.ops.lightning_attention(*packed[0], **packed[1])  # under KVK_CHECK
    for dtype in DTYPES:
        card.ops.lightning_decode(*decode_case(1, 1, dk=8, dv=8, dtype=dtype, slots=int32(0)))
