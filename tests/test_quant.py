"""quantize and dequantize: the codes bit for bit, the rounding, what is special, and how large the error may be."""

from __future__ import annotations

import kvk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, threads
from paged_strategies import DTYPES
from quant_cases import BITS, assert_same_parts, channel_groups, token_groups, values

INF, NAN = torch.inf, torch.nan
F16_MAX = 65504.0


def check(x, bits, group, axis, clip=1.0):
    """Against the reference, and back."""
    got = kvk.quantize(x, bits, group, axis, clip=clip)
    assert_same_parts(got, reference.quantize(x, bits, group, axis, clip=clip))
    for dtype in DTYPES:
        back = kvk.dequantize(*got, bits, group, axis, dtype=dtype)
        want = reference.dequantize(*got, bits, group, axis, dtype=dtype)
        torch.testing.assert_close(back, want, rtol=0, atol=0, equal_nan=True)
        assert back.shape == x.shape and back.dtype == dtype
    return got


def one_group(*numbers: float, bits: int = 2, dtype=torch.float32):
    """A group of 16 of these numbers, the last of them repeated: (codes, scale, min, what it reads back as)."""
    x = torch.tensor([*numbers, *[numbers[-1]] * (16 - len(numbers))], dtype=dtype)
    packed, scale, minimum = check(x, bits, 16, -1)
    codes = reference.quant.unpack_bits(packed, bits).tolist()
    return codes, scale.item(), minimum.item(), kvk.dequantize(packed, scale, minimum, bits, 16)


class TestByHand:
    def test_the_words_of_kivi(self):
        """KIVI's own packing of this group (jy-yuan/KIVI, quant/new_pack.py): int32 words, first element lowest."""
        x = torch.tensor([((37 * i) % 101 - 50) / 25 for i in range(32)], dtype=torch.float16)
        codes, scale, minimum = kvk.quantize(x, 2, 32)
        assert [word & 0xFFFFFFFF for word in codes.view(torch.int32).tolist()] == [0x89279D24, 0x79E249E7]
        assert minimum.item() == -2.0 and scale.item() == torch.tensor(4 / 3).half().item()

    @pytest.mark.parametrize(
        ("bits", "octets"),
        [
            (2, [0b11100100, 0b11100100]),
            (3, [0b10001000, 0b11000110, 0b11111010]),
            (4, [0x10, 0x32, 0x54, 0x76]),
            (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ],
    )
    def test_order_of_the_bits(self, bits, octets):
        """Codes 0 1 2 3 4 5 6 7 (2 bit: 0 1 2 3 0 1 2 3), low bits first."""
        count = min(8, 2**bits)
        x = (torch.arange(16) % count).float()
        x[15] = 2**bits - 1  # so that the scale is 1
        codes, scale, minimum = kvk.quantize(x, bits, 16)
        assert scale.item() == 1.0 and minimum.item() == 0.0
        assert codes[:bits].tolist() == octets

    def test_halves_round_to_even(self):
        assert one_group(0.0, 0.5, 1.5, 2.5, 3.0)[0][:5] == [0, 0, 2, 2, 3]
        assert one_group(0.0, 1.0, 3.0, 5.0, 6.0, bits=2)[0][:5] == [0, 0, 2, 2, 3]

    def test_constant_group(self):
        codes, scale, minimum, back = one_group(1.5)
        assert (set(codes), scale, minimum) == ({0}, 0.0, 1.5) and (back == 1.5).all()

    @pytest.mark.parametrize("numbers", [(0.0,), (-0.0,), (0.0, -0.0), (-0.0, 0.0)])
    def test_zeros(self, numbers):
        codes, scale, minimum, back = one_group(*numbers)
        assert set(codes) == {0} and scale == 0.0 and str(minimum) == "0.0" and not back.signbit().any()

    def test_constant_that_float16_does_not_hold(self):
        """The scale makes up for the rounding of min where it can."""
        for x in (0.1, 1000.3, -77.77):
            back = one_group(x, bits=8)[3]
            assert abs(back[0].item() - x) <= abs(x) * 2**-11

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    @pytest.mark.parametrize("bits", BITS)
    def test_a_group_with_nan_or_infinity_reads_as_nan(self, bits, bad):
        x = values(2, 64)
        x[0, 37] = bad
        codes, scale, minimum = check(x, bits, 32, -1)
        assert minimum[0, 1].isnan() and scale[0, 1] == 0 and minimum.isnan().sum() == 1
        assert (codes[0, 4 * bits : 8 * bits] == 0).all()
        back = kvk.dequantize(codes, scale, minimum, bits, 32)
        assert back[0, 32:].isnan().all() and back.isnan().sum() == 32

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_values_beyond_float16_saturate(self, dtype):
        codes, scale, minimum, back = one_group(-1e30, 0.0, 1e30, bits=2, dtype=dtype)
        assert (scale, minimum) == (F16_MAX, -F16_MAX) and codes[:3] == [0, 1, 3] and back.isfinite().all()
        codes, scale, minimum, back = one_group(1e30, bits=2, dtype=dtype)
        assert (scale, minimum) == (F16_MAX, F16_MAX) and set(codes) == {3}

    def test_reading_as_float16_saturates(self):
        codes, scale, minimum = kvk.quantize(torch.tensor([-F16_MAX] * 8 + [F16_MAX] * 8), 2, 16)
        back = kvk.dequantize(codes, scale, minimum, 2, 16, dtype=torch.float16)
        assert back.isfinite().all() and back[15] == F16_MAX

    def test_a_range_below_float16(self):
        """A scale that rounds to 0: the group reads as its min."""
        codes, scale, _, back = one_group(0.0, 1e-9)
        assert scale == 0.0 and set(codes) == {0} and (back == 0).all()

    def test_clip(self):
        x = torch.tensor([-10.0] + [1.0] * 14 + [10.0])
        codes, scale, minimum = kvk.quantize(x, 2, 16, clip=0.8)
        assert minimum.item() == -8.0 and scale.item() == torch.tensor(16 / 3).half().item()
        assert reference.quant.unpack_bits(codes, 2)[[0, 15]].tolist() == [0, 3]
        constant = kvk.quantize(torch.full((16,), 3.0), 2, 16, clip=0.8)
        assert constant[2].item() == 3.0  # nothing to cut off


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
class TestAgainstTheReference:
    @pytest.mark.parametrize("n", [16, 24, 32, 40, 64, 96, 112, 128, 160, 200, 256, 1024])
    def test_token_groups(self, bits, dtype, n):
        for group in token_groups(n):
            check(values(5, n, dtype=dtype), bits, group, -1)

    @pytest.mark.parametrize("n", [8, 24, 40, 64, 128, 136, 264])
    def test_channel_groups(self, bits, dtype, n):
        for tokens in (16, 34, 64, 128):
            for group in channel_groups(tokens):
                check(values(tokens, n, dtype=dtype), bits, group, -2)

    def test_clip(self, bits, dtype):
        for clip in (0.8, 0.95, 1e-3):
            check(values(64, 64, dtype=dtype), bits, 32, -1, clip)
            check(values(64, 64, dtype=dtype), bits, 32, -2, clip)

    @pytest.mark.parametrize("shape", [(32,), (0, 64), (3, 0, 64), (2, 3, 64, 64), (0, 64, 64), (200, 16)])
    def test_shapes(self, bits, dtype, shape):
        check(values(*shape, dtype=dtype), bits, 16, -1)
        if len(shape) > 1 and shape[-2] % 32 == 0:
            check(values(*shape, dtype=dtype), bits, 32, -2)

    @pytest.mark.parametrize("axis", [-1, -2])
    def test_strides_and_threads(self, bits, dtype, axis):
        wide = values(4, 70, 3, 75, dtype=dtype)
        x = wide[:, 3:67, 1:, 5:69].permute(2, 0, 1, 3)
        want = kvk.quantize(x.contiguous(), bits, 32, axis)
        assert_same_parts(kvk.quantize(x, bits, 32, axis), want)
        with threads(1):
            assert_same_parts(kvk.quantize(x, bits, 32, axis), want)
        row = values(1, 64, dtype=dtype).expand(64, 64)
        assert_same_parts(kvk.quantize(row, bits, 32, axis), kvk.quantize(row.contiguous(), bits, 32, axis))

    @pytest.mark.parametrize("axis", [-1, -2])
    def test_extreme_values(self, bits, dtype, axis):
        """Every binade of the dtype, subnormals included, against each other."""
        gen = torch.Generator().manual_seed(1)
        info = torch.finfo(dtype)
        low, high = torch.tensor([info.smallest_normal / 4, info.max]).log2().tolist()
        exponent = torch.rand(64, 64, generator=gen) * (high - low) + low
        x = (torch.randn(64, 64, generator=gen).sign() * exponent.exp2()).clamp(-info.max, info.max).to(dtype)
        check(x, bits, 32, axis)
        check(x * 0 + info.max, bits, 32, axis)
        check(x.abs().clamp(max=1e-6), bits, 32, axis)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_half_a_step(bits, axis):
    """Whatever float16 does to min and scale: half the stored step, and what the roundings of the ends cut off."""
    x = values(64, 64) * 3
    codes, scale, minimum = kvk.quantize(x, bits, 32, axis)
    error = (kvk.dequantize(codes, scale, minimum, bits, 32, axis) - x).abs()
    step = scale.float().repeat_interleave(32, axis)
    ends = minimum.float().abs().repeat_interleave(32, axis) + step * 2**bits
    assert (error <= step / 2 + ends * 2**-11 + 1e-7).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_channel_times_twenty_does_not_hurt_the_others_per_channel(bits):
    """KIVI's reason for keys per channel: an outlier channel stays alone with its scale."""
    x = values(64, 128, spread=False)
    loud = x.clone()
    loud[:, 17] *= 20
    rest = torch.arange(128) != 17
    for axis, same in ((-2, True), (-1, False)):
        plain = kvk.dequantize(*kvk.quantize(x, bits, 32, axis), bits, 32, axis)
        with_loud = kvk.dequantize(*kvk.quantize(loud, bits, 32, axis), bits, 32, axis)
        assert torch.equal(plain[:, rest], with_loud[:, rest]) == same


def test_groups_do_not_see_each_other():
    x = values(128, 64)
    codes, scale, minimum = kvk.quantize(x, 4, 32, -2)
    other = x.clone()
    other[32:64] = NAN
    got = kvk.quantize(other, 4, 32, -2)
    keep = torch.tensor([i for i in range(128) if not 32 <= i < 64])
    assert_bit_equal(got[0][keep], codes[keep])
    assert_bit_equal(got[1][[0, 2, 3]], scale[[0, 2, 3]])
    assert_bit_equal(got[2][[0, 2, 3]], minimum[[0, 2, 3]])


@given(st.data())
def test_random_cases(data):
    draw = data.draw
    axis = draw(st.sampled_from([-1, -2]))
    leading = draw(st.lists(st.integers(0, 3), max_size=3))
    n = draw(st.sampled_from(range(8, 200, 8)))
    tokens = draw(st.integers(1, 130))
    groups = token_groups(n) if axis == -1 else channel_groups(tokens)
    if not groups:
        n, tokens, groups = 64, 64, [16, 32, 64]
    seed = draw(st.integers(0, 2**32 - 1))
    x = values(
        *leading, tokens, n, dtype=draw(st.sampled_from(DTYPES)), seed=seed, spread=draw(st.booleans())
    )
    gen = torch.Generator().manual_seed(seed)
    for _ in range(draw(st.integers(0, 4))):
        if x.numel():
            where = int(torch.randint(x.numel(), (1,), generator=gen))
            x.view(-1)[where] = draw(st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 3e4, -1e-7]))
    check(
        x, draw(st.sampled_from(BITS)), draw(st.sampled_from(groups)), axis, draw(st.sampled_from([1.0, 0.8]))
    )
