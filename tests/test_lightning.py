"""lightning_attention and lightning_decode: values, lengths, decays, states, strides, invariance, special values."""

from __future__ import annotations

import math
import mmap

import kvk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, threads
from lightning_cases import CHUNK, DECAYS, LightningCase, check, decays, int32, make_case, shapes
from paged_strategies import DTYPES

NAN, INF = torch.nan, torch.inf
LENGTHS = [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 201]


@pytest.mark.parametrize("dtype", DTYPES)
class TestValues:
    @pytest.mark.parametrize("decay", DECAYS)
    @pytest.mark.parametrize("dims", [(32, 24), (7, 5)])
    def test_dims_and_decays(self, dtype, decay, dims):
        check(make_case(2, 140, 2, *dims, dtype=dtype, decay=decay))

    @pytest.mark.parametrize("decay", DECAYS)
    @pytest.mark.parametrize("dims", [(128, 128), (64, 200), (256, 33)])
    def test_wide_heads(self, dtype, decay, dims):
        check(make_case(1, CHUNK + 10, 1, *dims, dtype=dtype, decay=decay))

    @pytest.mark.parametrize("tokens", LENGTHS)
    def test_lengths(self, dtype, tokens):
        check(make_case(1, tokens, 3, dtype=dtype))
        check(make_case(1, tokens, 3, dtype=dtype, decay="head", state=False))

    @pytest.mark.parametrize("shape", [(0, 5, 2), (2, 5, 0), (3, 1, 1)])
    def test_shapes(self, dtype, shape):
        out, final = check(make_case(*shape, dtype=dtype))
        assert out.shape[:3] == shape and final.shape[:2] == (shape[0], shape[2])

    def test_packed_sequences(self, dtype):
        lengths = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 0, 131, 7]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        tail = 5  # tokens of no sequence
        for decay in DECAYS:
            case = make_case(1, int(starts[-1]) + tail, 2, dtype=dtype, decay=decay, starts=starts)
            out, final = check(case)
            assert (out[:, -tail:] == 0).all()
            for n, length in enumerate(lengths):
                start = int(starts[n])
                alone = case.sequence(0, start, start + length).with_(
                    initial_state=case.initial_state[n : n + 1]
                )
                got_out, got_final = alone.run()
                assert_bit_equal(got_out, out[:, start : start + length].contiguous())
                assert_bit_equal(got_final, final[n : n + 1])
                if length == 0:
                    assert_bit_equal(final[n], case.initial_state[n])


def test_by_hand():
    q, k, v = (torch.tensor(x).view(1, 3, 1, 1) for x in ([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], [5.0, 7.0, 11.0]))
    out, final = kvk.lightning_attention(q, k, v, torch.tensor([math.log(0.5)]), scale=2.0)
    # S: 5; 2.5 + 7; 4.75 + 22
    torch.testing.assert_close(out.flatten(), torch.tensor([10.0, 38.0, 160.5]))
    torch.testing.assert_close(final.flatten(), torch.tensor([26.75]))


@settings(max_examples=60)
@given(st.data())
def test_random_cases(data):
    draw = data.draw
    case = make_case(
        *draw(shapes(3, 150, (1, 80))),
        dtype=draw(st.sampled_from(DTYPES)),
        decay=draw(st.sampled_from(DECAYS)),
        state=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.125, -2.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    out, final = check(case)
    n = draw(st.integers(0, case.q.shape[0] - 1))
    alone = case.sequence(n, 0, case.q.shape[1])
    if case.initial_state is not None:
        alone = alone.with_(initial_state=case.initial_state[n : n + 1])
    for got, want in zip(alone.run(), (out, final), strict=True):
        assert_bit_equal(got, want[n : n + 1])


# Decays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [-1e-6, -0.01, -1.0, -8.0, -50.0, -1e4, -INF])
def test_no_decay_overflows(log):
    case = make_case(1, 200, 2, decay="head")
    for decay in (torch.full((2,), log), torch.full((1, 200, 2), log)):
        out, final = check(case.with_(log_decay=decay))
        assert torch.isfinite(out).all() and torch.isfinite(final).all()


def test_forgetting_all_and_then_nothing():
    """Running sums of the log decays reach -3000 here; what comes after must not feel their rounding."""
    decay = torch.full((1, 3 * CHUNK, 2), -50.0)
    decay[:, CHUNK - 6 : CHUNK] = decay[:, -6:] = -1e-3
    decay[:, CHUNK + 9] = -INF
    check(make_case(1, 3 * CHUNK, 2).with_(log_decay=decay))


def test_a_decay_per_head_is_one_per_token():
    case = make_case(2, 130, 3, decay="head")
    spread = case.with_(log_decay=case.log_decay.expand(2, 130, 3))
    for got, want in zip(spread.run(), case.run(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    none, zero = case.with_(log_decay=None), case.with_(log_decay=torch.zeros(3))
    for got, want in zip(none.run(), zero.run(), strict=True):
        assert_bit_equal(got, want)


# States ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", DECAYS)
def test_restart_at_any_token(decay):
    tokens = 3 * CHUNK + 7
    case = make_case(1, tokens, 2, decay=decay)
    out, final = case.run()
    scale = out.abs().amax()
    for at in (0, 1, 13, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 150, tokens):
        first, state = case.sequence(0, 0, at).with_(initial_state=case.initial_state).run()
        second, end = case.sequence(0, at, tokens).with_(initial_state=state).run()
        joined = torch.cat([first, second], dim=1)
        if at % CHUNK == 0 or at == tokens:
            assert_bit_equal(joined, out)
            assert_bit_equal(end, final)
        torch.testing.assert_close(joined, out, rtol=0, atol=2e-6 * scale.item())
        torch.testing.assert_close(end, final, rtol=0, atol=4e-6 * final.abs().amax().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_prefill_then_decode_is_a_longer_prefill(decay, dtype):
    n, m, heads = 70, 40, 2
    case = make_case(1, n + m, heads, dtype=dtype, decay=decay)
    out, final = case.run()
    _, state = case.sequence(0, 0, n).with_(initial_state=case.initial_state).run()
    pool = torch.full((3, *state.shape[1:]), 7.0)
    pool[1] = state[0]
    rows = []
    for t in range(n, n + m):
        log = case.log_decay
        step = log if log is None or log.dim() == 1 else log[:, t].contiguous()
        rows.append(
            kvk.lightning_decode(
                case.q[:, t], case.k[:, t], case.v[:, t], pool, int32(1), step, scale=case.scale
            )
        )
    eps = torch.finfo(dtype).eps
    atol = (2 * eps if dtype != torch.float32 else 1e-5) * out.float().abs().amax().item()
    torch.testing.assert_close(torch.stack(rows, 1).float(), out[:, n:].float(), rtol=0, atol=atol)
    torch.testing.assert_close(pool[1], final[0], rtol=1e-5, atol=1e-5 * final.abs().amax().item())
    assert (pool[0] == 7).all() and (pool[2] == 7).all()


def test_slices_of_the_key_dim_add_up():
    case = make_case(1, 150, 2, 96, 16, state=False)
    parts = [case.with_(q=case.q[..., s], k=case.k[..., s]).run()[0] for s in (slice(0, 40), slice(40, 96))]
    torch.testing.assert_close(parts[0] + parts[1], case.run()[0], rtol=1e-5, atol=1e-4)


def test_out_overload():
    case = make_case(2, 70, 2)
    want = case.run()
    args, named = case.args
    wide, state = torch.full((2, 70, 2, 40), 7.0), case.initial_state.clone()
    named["initial_state"] = state
    out, final = kvk.lightning_attention(*args, **named, out=wide[..., 8:32], final_state=state)
    assert out.data_ptr() == wide[..., 8:32].data_ptr() and final is state
    assert_bit_equal(out.contiguous(), want[0])
    assert_bit_equal(state, want[1])
    assert (wide[..., :8] == 7).all() and (wide[..., 32:] == 7).all()


# Strides and invariance ------------------------------------------------------------------------------------


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, heads before tokens, rows longer than needed and NaN between."""
    order = (0, 2, 1, 3) if x.dim() == 4 else (0, 2, 1)
    wide = torch.full((*[x.shape[i] for i in order[:-1]], x.shape[order[-1]] + 3), NAN, dtype=x.dtype)
    view = wide[..., : x.shape[order[-1]]].permute(order)
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    case = make_case(2, 130, 3, dtype=dtype)
    want = case.run()
    got = case.with_(
        q=strided(case.q),
        k=strided(case.k),
        v=strided(case.v),
        log_decay=strided(case.log_decay),
        initial_state=strided(case.initial_state),
    ).run()
    for a, b in zip(got, want, strict=True):
        assert_bit_equal(a, b)
    starts = int32(0, 9, 0, 9, 60, 9, 130, 9)[::2]
    packed = case.sequence(0, 0, 130).with_(cu_seqlens=starts)
    for a, b in zip(packed.run(), packed.with_(cu_seqlens=starts.contiguous()).run(), strict=True):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("heads", [1, 3])
def test_number_of_threads(heads):
    """One head of many columns is cut into slices of them, by the number of threads; no bit may change."""
    case = make_case(1, 300, heads, 64, 200)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count):
            results.append(case.run())
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_bit_equal(got, want)


# Special values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "initial_state"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_value_stays_where_it_is_read(name, bad):
    """In its sequence and head, at its token and after; v also in its column. Elsewhere no bit changes."""
    case = make_case(2, 2 * CHUNK, 2)
    want, want_state = case.run()
    at = CHUNK + 20
    x = getattr(case, name).clone()
    if name == "log_decay":
        x[1, at, 1] = NAN
    elif name == "initial_state":
        x[1, 1, 3, 5] = bad
    else:
        x[1, at, 1, 5] = bad
    got, state = case.with_(**{name: x}).run()
    touched = torch.zeros_like(want, dtype=torch.bool)
    touched_state = torch.zeros_like(state, dtype=torch.bool)
    first = 0 if name == "initial_state" else at
    column = 5 if name in ("v", "initial_state") else slice(None)
    touched[1, first : (at + 1 if name == "q" else None), 1, column] = True
    if name != "q":
        touched_state[1, 1, :, column] = True
    assert_bit_equal(got[~touched], want[~touched])
    assert_bit_equal(state[~touched_state], want_state[~touched_state])
    assert not torch.isfinite(got[touched]).any() or bad == INF
    if name in ("q", "log_decay") or bad != INF:
        assert not torch.isfinite(got[1, at, 1]).all()


def test_padding_is_not_read():
    """What lies past a sequence's end, and tokens of no sequence, may hold anything."""
    case = make_case(1, 150, 2, starts=int32(0, 30, 100))
    want = case.run()
    poisoned = {name: getattr(case, name).clone() for name in ("q", "k", "v", "log_decay")}
    for x in poisoned.values():
        x[:, 100:] = NAN
    for got, expected in zip(case.with_(**poisoned).run(), want, strict=True):
        assert_bit_equal(got, expected)


# Decode ----------------------------------------------------------------------------------------------------


def decode_case(batch=5, heads=3, dk=40, dv=24, *, dtype=torch.float32, decay="token", slots=None, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, heads, dk, generator=gen).to(dtype) for _ in range(2))
    v = torch.randn(batch, heads, dv, generator=gen).to(dtype)
    pool = torch.randn(batch + 3, heads, dk, dv, generator=gen)
    if slots is None:
        slots = torch.randperm(batch + 3, generator=gen)[:batch].to(torch.int32)
        slots[1::3] = -1
    log = decays(decay, (1, batch, heads), gen)
    return [q, k, v, pool, slots, log[0] if log is not None and log.dim() == 3 else log]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dims", [(40, 24), (128, 128), (1, 7), (256, 250)])
def test_decode(dtype, decay, dims):
    args = decode_case(dk=dims[0], dv=dims[1], dtype=dtype, decay=decay)
    exact, exact_pool = reference.lightning_decode(*args, scale=0.3)
    plain, plain_pool = reference.lightning_decode(*args, scale=0.3, compute_dtype=dtype)
    before = args[3].clone()
    out = kvk.lightning_decode(*args, scale=0.3)
    assert out.dtype == dtype
    assert_error_rule(*(x.flatten(-2) for x in (out, exact, plain)), per_row=True, what="out")
    assert_error_rule(*(x.flatten(-2) for x in (args[3], exact_pool, plain_pool)), per_row=True, what="state")
    skipped = args[4] < 0
    assert skipped.any() and (out[skipped] == 0).all()
    unused = torch.ones(len(before), dtype=torch.bool)
    unused[args[4][~skipped].long()] = False
    assert_bit_equal(args[3][unused], before[unused])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_does_not_depend_on_the_batch(dtype):
    args = decode_case(7, dtype=dtype)
    pool = args[3].clone()
    want = kvk.lightning_decode(*args)
    for b in reversed(range(7)):
        one = [x[b : b + 1] for x in (args[0], args[1], args[2], args[4], args[5])]
        assert_bit_equal(kvk.lightning_decode(*one[:3], pool, *one[3:]), want[b : b + 1])
    assert_bit_equal(pool, args[3])


def test_decode_strides_and_out():
    args = decode_case(4, 3)
    want_args = [None if x is None else x.clone() for x in args]
    want = kvk.lightning_decode(*want_args)
    q, k, v = (torch.stack([x, x], 1)[:, 1] for x in args[:3])
    pool = strided(args[3])
    slots, log = torch.stack([args[4], args[4]], 1)[:, 0], args[5].T.contiguous().T
    wide = torch.full((4, 3, 30), 7.0)
    got = kvk.lightning_decode(q, k, v, pool, slots, log, out=wide[..., :24])
    assert got.data_ptr() == wide.data_ptr()
    assert_bit_equal(got.contiguous(), want)
    assert_bit_equal(pool.contiguous(), want_args[3])
    assert (wide[..., 24:] == 7).all()


def test_decode_of_nothing():
    args = decode_case(0)
    assert kvk.lightning_decode(*args).shape == (0, 3, 24)
    args = decode_case(3, slots=int32(-1, -5, -(2**31)))
    before = args[3].clone()
    assert (kvk.lightning_decode(*args) == 0).all()
    assert_bit_equal(args[3], before)


def test_decode_skips_without_reading():
    args = decode_case(3, slots=int32(0, -1, 2))
    want = kvk.lightning_decode(*[x.clone() for x in args])
    for x in (*args[:3], args[5]):
        x[1] = NAN
    got = kvk.lightning_decode(*args)
    assert_bit_equal(got, want)


# Large offsets ---------------------------------------------------------------------------------------------


def lazy(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are touched."""
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)


def test_offsets_past_two_to_the_31():
    case = make_case(2, 70, 2, 32, 32, dtype=torch.bfloat16)
    want = case.run()
    rows = (1 << 30) // 32 + 5

    def far(x: torch.Tensor) -> torch.Tensor:
        """Batch rows 2^31 elements apart and more."""
        memory = lazy(2, 2 * rows, 32, dtype=x.dtype)
        assert memory.stride(0) > 1 << 31
        view = memory[:, : 70 * 2].unflatten(1, (70, 2))
        view.copy_(x)
        return view

    far_case: LightningCase = case.with_(q=far(case.q), k=far(case.k), v=far(case.v))
    for got, expected in zip(far_case.run(), want, strict=True):
        assert_bit_equal(got, expected)

    args = decode_case(2, 1, 32, 32, slots=int32(1, 0))
    want_args = [x.clone() for x in args]
    expected = kvk.lightning_decode(*want_args)
    pool = lazy(2, 1, 2 * rows, 32, dtype=torch.float32)[:, :, :32]
    pool.copy_(args[3][:2])
    assert pool.stride(0) > 1 << 31
    args[3] = pool
    assert_bit_equal(kvk.lightning_decode(*args), expected)
    assert_bit_equal(pool.contiguous(), want_args[3][:2])


# Slopes ----------------------------------------------------------------------------------------------------


class TestSlopes:
    def test_alibi(self):
        """OpenNLPLab's and vLLM's: s_h = 2**(-8 (h + 1) / H) times 1 - l / (L - 1) + 1e-5."""
        got = kvk.lightning_slopes(8, 0, 80)
        torch.testing.assert_close(got, -torch.tensor([2.0 ** -(h + 1) for h in range(8)]) * (1 + 1e-5))
        torch.testing.assert_close(
            kvk.lightning_slopes(8, 79, 80), got / (1 + 1e-5) * 1e-5, rtol=1e-4, atol=0
        )
        torch.testing.assert_close(kvk.lightning_slopes(8, 0, 1), got)

    def test_alibi_of_any_number_of_heads(self):
        # 12 heads: the slopes of 8, then the first four of every second slope of 16.
        want = [2.0**-n for n in range(1, 9)] + [2.0 ** (-n / 2) for n in (1, 3, 5, 7)]
        torch.testing.assert_close(kvk.lightning_slopes(12, 0, 2), -torch.tensor(want) * (1 + 1e-5))
        for heads in range(1, 40):
            slopes = kvk.lightning_slopes(heads, 1, 4)
            assert slopes.shape == (heads,) and (slopes < 0).all() and len(set(slopes.tolist())) == heads

    def test_alibi_hf(self):
        layer, layers = 7, 12
        want = [-(2.0 ** (-8 * (h + 1) / 4)) * (1 - layer / (layers - 1 + 1e-5) + 1e-5) for h in range(4)]
        got = kvk.lightning_slopes(4, layer, layers, "alibi_hf")
        torch.testing.assert_close(got, torch.tensor(want))
        last = kvk.lightning_slopes(4, 11, 12, "alibi_hf")
        assert (last < 0).all() and (last > -1e-5).all()

    def test_tnl(self):
        got = kvk.lightning_slopes(4, 3, 12, "tnl")
        torch.testing.assert_close(got, torch.tensor([0.0, -1.5, -3.0, -4.5]))

    def test_retnet(self):
        got = kvk.lightning_slopes(3, 5, 6, "retnet")
        torch.testing.assert_close(got.exp(), torch.tensor([31 / 32, 63 / 64, 127 / 128]))
        # The decay of a late head is not rounded to none.
        assert kvk.lightning_slopes(40, 0, 1, "retnet")[-1] == pytest.approx(-(2.0**-44), rel=1e-6)

    def test_ready_for_the_op(self):
        for variant in ("alibi", "alibi_hf", "tnl", "retnet"):
            check(make_case(1, 80, 4).with_(log_decay=kvk.lightning_slopes(4, 1, 3, variant)))

    @pytest.mark.parametrize(
        ("args", "word"),
        [
            ((0, 0, 1), "num_heads"),
            ((4, 3, 3), "layer"),
            ((4, -1, 3), "layer"),
            ((4, 0, 0), "layer"),
            ((4, 0, 1, "alibi2"), "variant"),
            ((6, 0, 1, "alibi_hf"), "power of two"),
        ],
    )
    def test_bad_arguments(self, args, word):
        with pytest.raises(ValueError, match=word):
            kvk.lightning_slopes(*args)
