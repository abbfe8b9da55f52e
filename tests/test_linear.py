"""linear_attention: values under every mask, lengths, states, streaming, strides, invariance, special values."""

from __future__ import annotations

import kvk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk_testing import assert_bit_equal, threads
from lightning_cases import int32, shapes
from linear_cases import MASKS, LinearCase, check, features, make_case
from paged_strategies import DTYPES

NAN = torch.nan
LENGTHS = [0, 1, 2, 31, 63, 64, 65, 130]
masks = pytest.mark.parametrize("mask", MASKS)


@masks
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype, mask):
    check(make_case(2, 140, 2, mask=mask, dtype=dtype))
    check(make_case(1, 140, 1, 7, 5, mask=mask, dtype=dtype, apart=True, state=False, scale=0.3, eps=0.1))
    check(make_case(1, 75, 1, mask=mask, dtype=dtype, normalize=False, apart=True, scale=-0.5))


@masks
@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths(tokens, mask):
    check(make_case(1, tokens, 2, mask=mask))


@pytest.mark.parametrize("dims", [(153, 64), (112, 112), (64, 200), (256, 33), (1, 1)])
@pytest.mark.parametrize("mask", ["causal", "blocks-of-7", "all"])
def test_dims(dims, mask):
    check(make_case(1, 74, 1, *dims, mask=mask))


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 5, 0), (3, 1, 1)])
def test_shapes(shape):
    out, den, *_ = check(make_case(*shape))
    assert out.shape[:3] == shape and den.shape == shape


@masks
def test_packed_sequences(mask):
    lengths = [0, 1, 63, 64, 65, 0, 107]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tail = 5  # tokens of no sequence
    case = make_case(1, int(starts[-1]) + tail, 2, mask=mask, starts=starts)
    out, den, final, z = check(case)
    assert (out[:, -tail:] == 0).all() and (den[:, -tail:] == 0).all()
    for n, length in enumerate(lengths):
        at = slice(int(starts[n]), int(starts[n]) + length)
        alone = case.sequence(0, at.start, at.stop).with_(**case.states_of(n))
        want = (out[:, at], den[:, at], final[n : n + 1], z[n : n + 1])
        for got, expected in zip(alone.run(), want, strict=True):
            assert_bit_equal(got, expected.contiguous())
    assert_bit_equal(final[0], case.initial_state[0])
    assert_bit_equal(z[0], case.initial_z[0])


def test_by_hand():
    q, k, v = (torch.tensor(x).view(1, 3, 1, 1) for x in ([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], [5.0, 7.0, 11.0]))
    out, den, final, z = kvk.linear_attention(q, k, v, eps=0.0, scale=2.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 6.0, 8.5]))
    torch.testing.assert_close(den.flatten(), torch.tensor([2.0, 8.0, 24.0]))
    assert final.item() == 34 and z.item() == 4
    out, *_ = kvk.linear_attention(q, k, v, block_size=2, eps=0.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 6.0, 8.5]))
    out, *_ = kvk.linear_attention(q, k, v, causal=False, eps=1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([34 / 5, 68 / 9, 102 / 13]))
    out, *_ = kvk.linear_attention(q, k, v, normalize=False)
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 24.0, 102.0]))


def test_the_average_of_equal_values_is_their_value():
    case = make_case(1, 300, 2, state=False, eps=0.0).with_(v=torch.full((1, 300, 2, 24), 3.0))
    for mask in MASKS.values():
        out = case.with_(options=dict(mask, eps=0.0)).run()[0]
        torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=1e-5, atol=0)


def test_long_sums_keep_their_digits():
    """A million equal keys and values: one chain of float32 adds is off by a percent, one of chunks by 1e-4."""
    ones = torch.ones(1, 1_000_000, 1, 1)
    for mask in ({}, {"causal": False}):
        out, den, *_ = kvk.linear_attention(ones, ones, 0.1 * ones, eps=0.0, **mask)
        torch.testing.assert_close(out, torch.full_like(out, 0.1), rtol=2e-4, atol=0)
        assert den[0, -1, 0] == 1e6


@settings(max_examples=50)
@given(st.data())
def test_random_cases(data):
    draw = data.draw
    case = make_case(
        *draw(shapes(3, 150, (1, 80))),
        dtype=draw(st.sampled_from(DTYPES)),
        apart=draw(st.booleans()),
        state=draw(st.booleans()),
        normalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.125])),
        eps=draw(st.sampled_from([0.0, 1e-6, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    causal = draw(st.booleans())
    case.options |= {"causal": causal, "block_size": draw(st.integers(1, 200)) if causal else 1}
    results = check(case)
    n = draw(st.integers(0, case.q.shape[0] - 1))
    alone = case.sequence(n, 0, case.q.shape[1]).with_(**case.states_of(n))
    for got, want in zip(alone.run(), results, strict=True):
        assert_bit_equal(got, want[n : n + 1])


# States ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "at"), [(1, 64), (1, 128), (1, 13), (4, 64), (7, 63), (40, 80), (40, 40)])
def test_restart(block, at):
    """Blocks are counted from the start: a sequence is cut between two of them."""
    case = make_case(1, 150, 2, apart=True)
    case.options["block_size"] = block
    whole = case.run()
    first = case.sequence(0, 0, at).with_(**case.states_of(0)).run()
    second = case.sequence(0, at, 150).with_(initial_state=first[2], initial_z=first[3]).run()
    joined = [*(torch.cat(x, 1) for x in zip(first[:2], second[:2], strict=True)), *second[2:]]
    for got, want in zip(joined, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().amax().item())
        if at % (64 // block * block if block <= 32 else block) == 0:
            assert_bit_equal(got, want)


def test_block_by_block_without_a_mask_is_block_causal():
    """SANA-Video's generation: all tokens of a block see the sum of the blocks before and of their own."""
    case = make_case(1, 130, 2, mask="blocks-of-33", state=False)
    want = case.run()
    state, outs = {}, []
    for start in range(0, 130, 33):
        step = case.sequence(0, start, start + 33).with_(options={"causal": False}, **state)
        out, _, final, z = step.run()
        outs.append(out)
        state = {"initial_state": final, "initial_z": z}
    assert_bit_equal(torch.cat(outs, 1), want[0])
    assert_bit_equal(final, want[2])
    assert_bit_equal(z, want[3])


def test_decode_by_lightning_decode():
    """A state with one column more, whose value is 1, holds z."""
    n, m = 70, 20
    case = make_case(1, n + m, 2)
    out, _, final, z = case.run()
    start = case.sequence(0, 0, n).with_(**case.states_of(0)).run()
    pool = torch.cat([start[2], start[3][..., None]], -1)
    slots, rows = int32(0), []
    for t in range(n, n + m):
        v = torch.nn.functional.pad(case.v[:, t], (0, 1), value=1.0)
        got = kvk.lightning_decode(case.q[:, t], case.k[:, t], v, pool, slots, None)
        rows.append(got[..., :-1] / (got[..., -1:] + 1e-6))
    torch.testing.assert_close(torch.stack(rows, 1), out[:, n:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool[..., :-1], final, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool[..., -1], z, rtol=1e-5, atol=1e-5)


@masks
def test_given_results_and_states_in_place(mask):
    case = make_case(3, 90, 1, 32, 96, mask=mask)
    want = case.run()
    state, z = case.initial_state.clone(), case.initial_z.clone()
    wide, den = torch.full((3, 90, 1, 120), 7.0), torch.full((3, 90, 1, 2), 7.0)[..., 1]
    named = {"out": wide[..., 8:104], "den": den, "final_state": state, "final_z": z}
    with threads(4):  # so that one head's columns are cut
        got = case.with_(initial_state=state, initial_z=z).run(**named)
    assert got[2] is state and got[3] is z
    for a, b in zip(got, want, strict=True):
        assert_bit_equal(a.contiguous(), b)
    assert (wide[..., :8] == 7).all() and (wide[..., 104:] == 7).all()


# Strides and invariance ------------------------------------------------------------------------------------


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, the first dimensions in another order, rows longer than needed and NaN between."""
    order = (0, 2, 1, 3) if x.dim() == 4 else (1, 0, 2)
    wide = torch.full((*[x.shape[i] for i in order[:-1]], x.shape[-1] + 3), NAN, dtype=x.dtype)
    view = wide[..., : x.shape[-1]].permute(order)
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    case = make_case(2, 130, 3, dtype=dtype, apart=True)
    names = ("q", "k", "v", "q_den", "k_den", "initial_state", "initial_z")
    got = case.with_(**{name: strided(getattr(case, name)) for name in names}).run()
    for a, b in zip(got, case.run(), strict=True):
        assert_bit_equal(a, b)
    starts = int32(0, 9, 0, 9, 60, 9, 130, 9)[::2]
    packed = case.sequence(0, 0, 130).with_(cu_seqlens=starts)
    for a, b in zip(packed.run(), packed.with_(cu_seqlens=starts.contiguous()).run(), strict=True):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("mask", ["causal", "all"])
def test_number_of_threads(mask):
    """One head of many columns is cut into slices of them, by the number of threads; no bit may change."""
    case = make_case(1, 300, 1, 64, 200, mask=mask)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count):
            results.append(case.run())
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_bit_equal(got, want)


# Special values --------------------------------------------------------------------------------------------


def seen(case: LinearCase, at: int) -> torch.Tensor:
    """Which tokens see token `at`."""
    block, tokens = case.options.get("block_size", 1), torch.arange(case.q.shape[1])
    return tokens >= (at // block * block if case.options.get("causal", True) else 0)


@masks
@pytest.mark.parametrize("name", ["q", "k", "v", "q_den", "k_den"])
def test_nan_stays_where_it_is_read(name, mask):
    """In its sequence and head, at the tokens that see it; v also in its column. Elsewhere no bit changes."""
    case = make_case(2, 130, 2, mask=mask, apart=True, normalize=True)
    want = case.run()
    at = 85
    x = getattr(case, name).clone()
    x[1, at, 1, 5] = NAN
    got = case.with_(**{name: x}).run()
    tokens = torch.arange(130) == at if name in ("q", "q_den") else seen(case, at)
    touched = torch.zeros_like(want[0], dtype=torch.bool)
    touched[1, tokens, 1, 5 if name == "v" else slice(None)] = True
    assert got[0][touched].isnan().all()
    assert_bit_equal(got[0][~touched], want[0][~touched])
    of_den = touched.any(-1) if name.endswith("_den") else torch.zeros_like(touched[..., 0])
    assert got[1][of_den].isnan().all()
    assert_bit_equal(got[1][~of_den], want[1][~of_den])


def test_padding_is_not_read():
    """What lies past a sequence's end, and tokens of no sequence, may hold anything."""
    case = make_case(1, 150, 2, starts=int32(0, 30, 100), apart=True)
    want = case.run()
    poisoned = {name: getattr(case, name).clone() for name in ("q", "k", "v", "q_den", "k_den")}
    for x in poisoned.values():
        x[:, 100:] = NAN
    for got, expected in zip(case.with_(**poisoned).run(), want, strict=True):
        assert_bit_equal(got, expected)


def test_no_denominator():
    """A token that nothing weighs: 0 over eps is 0, and without eps it is NaN as 0 / 0 is."""
    case = make_case(1, 70, 1, state=False)
    k = torch.zeros_like(case.k)
    assert (case.with_(k=k).run()[0] == 0).all()
    assert case.with_(k=k, options={"eps": 0.0}).run()[0].isnan().all()


def test_memory_is_linear():
    """16384 tokens of one head: nothing of T x T, which would be a GiB here."""
    resource = pytest.importorskip("resource")
    gen = torch.Generator().manual_seed(0)
    q, k, v = (features((1, 16384, 1, 32), gen) for _ in range(3))
    kvk.linear_attention(q[:, :128], k[:, :128], v[:, :128])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    leaves = [x.requires_grad_() for x in (q, k, v)]
    kvk.linear_attention(*leaves)[0].sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
