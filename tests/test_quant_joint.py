"""Rotation over several kv heads, reordered channels and keys stored before their rotary embedding, on the CPU."""

from __future__ import annotations

import kvk
import pytest
import torch
from kvk import reference
from kvk_testing import assert_bit_equal, threads
from paged_cases import make_case
from paged_strategies import DTYPES
from quant_attention_cases import QuantCase, quantized
from quant_cases import values
from torch import library

FORMATS = {  # (format, kv heads)
    "pairs": (kvk.QuantFormat(16, 64, 4, 4, 64, 64, "token", "token", k_rotate=2, v_rotate=2), 4),
    "rotatekv": (kvk.QuantFormat(32, 128, 2, 2, 128, 128, "token", "token", k_clip=0.8, k_rotate=4), 4),
    "channels": (kvk.QuantFormat(32, 40, 3, 8, 32, 32, head_dim_v=64, k_rotate=2, v_rotate=4), 4),
    "one_head": (kvk.QuantFormat(16, 96, 4, 2, 48, 32, "token", "token", k_rotate=1), 3),
    "unrotated": (kvk.QuantFormat(16, 32, 8, 4, 16, 32), 3),
}


def permutation_for(fmt: kvk.QuantFormat, heads: int, seed: int = 0) -> torch.Tensor:
    joint, gen = max(fmt.k_rotate, 1), torch.Generator().manual_seed(seed)
    rows = [torch.randperm(joint * fmt.head_dim, generator=gen) for _ in range(heads // joint)]
    return torch.stack(rows).int()


def rope_for(length: int, dim: int) -> torch.Tensor:
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


def joint_case(
    name: str,
    kv_lens,
    q_lens=None,
    *,
    permuted: bool = True,
    rope: int = 1,
    dense_share: float = 0.3,
    **params,
) -> QuantCase:
    """rope: 0 none, 1 over the whole head dim, 2 over half of it."""
    fmt, heads = FORMATS[name]
    case = make_case(
        kv_lens,
        q_lens,
        page_size=fmt.page_size,
        head_dim=fmt.head_dim,
        head_dim_v=fmt.head_dim_v,
        num_kv_heads=heads,
        **{"group": 2, **params},
    )
    table = rope_for(max(kv_lens) + 3, fmt.head_dim // rope) if rope else None
    return quantized(case, fmt, dense_share, 0, permutation_for(fmt, heads) if permuted else None, table)


def pages_of(fmt: kvk.QuantFormat, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        values(3, fmt.page_size, heads, fmt.head_dim, dtype=dtype, seed=1),
        values(3, fmt.page_size, heads, fmt.head_dim_v, dtype=dtype, seed=2),
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_records_are_the_references(name: str, permuted: bool, dtype: torch.dtype) -> None:
    """Bit for bit, and back."""
    fmt, heads = FORMATS[name]
    order = permutation_for(fmt, heads) if permuted else None
    k, v = pages_of(fmt, heads, dtype)
    src, dst = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1, 3], dtype=torch.int32)
    got, want = ([x.zero_() for x in fmt.new_pool(4, heads)] for _ in range(2))
    kvk.quantize_pages(k, v, src, *got, dst, fmt, k_permutation=order)
    reference.quantize_pages(k, v, src, *want, dst, fmt, k_permutation=order)
    assert_bit_equal(got[0], want[0], "k_pool")
    assert_bit_equal(got[1], want[1], "v_pool")
    back = kvk.dequantize_pages(*got, dst, fmt, dtype, k_permutation=order)
    for x, y in zip(
        back, reference.dequantize_pages(*got, dst, fmt, dtype, k_permutation=order), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    if fmt.v_bits == 8:
        assert (back[1].double() - v[src.long()].double()).abs().max() < 0.2 * v.double().abs().max()


@pytest.mark.parametrize("name", FORMATS)
class TestAttention:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("permuted", "rope"), [(True, 1), (False, 2), (True, 0)])
    def test_decode(self, name: str, dtype: torch.dtype, permuted: bool, rope: int) -> None:
        joint_case(name, [300, 1, 64, 0, 600], dtype=dtype, permuted=permuted, rope=rope).check()

    def test_prefill(self, name: str) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            joint_case(name, [300, 90, 0], [120, 3, 0], dtype=dtype, padding_rows=2).check()

    @pytest.mark.parametrize(
        "options",
        [
            {"window_left": 40, "sinks": True},
            {"logits_soft_cap": 3.0, "alibi": True},
            {"key_bias": "head", "hidden_keys": 0.4},
            {"table": "csr", "share_pages": True, "layout": "hnd"},
            {"group": 5},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_options(self, name: str, options) -> None:
        joint_case(name, [210, 33, 0], **options).check()
        joint_case(name, [210, 33, 5], [40, 2, 5], mask="tree", **options).check()

    def test_batch_invariance_and_threads(self, name: str) -> None:
        case = joint_case(name, [1200, 40, 700], dtype=torch.bfloat16)
        out, lse = case.run()
        with threads(1):
            alone = case.run()
        assert_bit_equal(alone[0], out)
        assert_bit_equal(alone[1], lse)
        for b in range(3):
            one = case.with_(
                q=case.q[b : b + 1],
                page_indices=case.page_indices[b : b + 1],
                kv_lens=case.kv_lens[b : b + 1],
            )
            assert_bit_equal(one.run()[0], out[b : b + 1])


def test_identity_options_change_nothing() -> None:
    """The channels' own order and angles of 0: what a call without them gives, but for the order of sums."""
    _, heads = FORMATS["unrotated"]
    plain = joint_case("unrotated", [200, 70], permuted=False, rope=0)
    order = torch.arange(32, dtype=torch.int32).expand(heads, 32).contiguous()
    still = torch.cat([torch.ones(200, 8), torch.zeros(200, 8)], 1)
    got = plain.with_(options={"k_permutation": order, "k_rope": still}).run()
    for x, y in zip(got, plain.run(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def test_per_head_pages_with_one_head_at_a_time() -> None:
    joint_case("one_head", [100, 40], table="per_head").check()


class TestErrors:
    def message(self, case: QuantCase, **changes) -> str:
        with pytest.raises(RuntimeError) as error:
            case.with_(**changes).run()
        return str(error.value)

    def test_heads(self) -> None:
        fmt = kvk.QuantFormat(16, 64, k_axis="token", k_rotate=2)
        k, ids, pools = torch.zeros(1, 16, 3, 64), torch.zeros(1, dtype=torch.int32), fmt.new_pool(1, 3)
        with pytest.raises(RuntimeError, match="k_rotate must divide the number of kv heads, 3, got 2"):
            kvk.quantize_pages(k, k, ids, *pools, ids, fmt)
        with pytest.raises(RuntimeError, match="k_rotate must divide the number of kv heads, 3, got 2"):
            kvk.dequantize_pages(*pools, ids, fmt, torch.float32)
        with pytest.raises(ValueError, match="k_rotate needs a head_dim that gives, times the heads"):
            kvk.QuantFormat(16, 64, k_axis="token", k_rotate=3 * 7)
        with pytest.raises(ValueError, match="v_rotate must not be negative, got -1"):
            kvk.QuantFormat(16, 64, v_rotate=-1, k_axis="token")

    def test_permutation(self) -> None:
        case = joint_case("pairs", [40])
        order = case.options["k_permutation"]
        for bad, words in (
            (order.long(), "k_permutation must be int32"),
            (order[:, :-1], "k_permutation must have shape"),
            (order[:1], "k_permutation must have shape"),
            (
                order.fill_(0),
                "k_permutation must hold each of 0 to 127 once in a row, got 0 at entry 1 of row 0",
            ),
        ):
            assert words in self.message(case, options={"k_permutation": bad})

    def test_rope(self) -> None:
        case = joint_case("pairs", [40])
        rope = case.options["k_rope"]
        for bad, words in (
            (rope.double(), "k_rope must be float32"),
            (rope[0], "k_rope must have shape"),
            (rope[:, :7].contiguous(), "k_rope must have an even rotary_dim of 2 to 64, got 7"),
            (torch.zeros(50, 66), "k_rope must have an even rotary_dim of 2 to 64, got 66"),
            (rope[:39], "k_rope has 39 positions, request 0 has 40 keys"),
            (rope.repeat_interleave(2, 1)[:, ::2], "stride 1"),
        ):
            assert words in self.message(case, options={"k_rope": bad})

    def test_pages_of_each_head(self) -> None:
        case = joint_case("pairs", [40, 20])
        per_head = case.page_indices[:, None].expand(-1, 4, -1).contiguous()
        assert "the same for all kv heads" in self.message(case, page_indices=per_head)


def test_opcheck_and_compile() -> None:
    case = joint_case("pairs", [40, 20])
    args = (*case.args, case.fmt.numbers)
    library.opcheck(torch.ops.kvk.quant_decode.default, args, case.options)
    k, v = torch.randn(2, 2, 16, 4, 64)
    ids, pools = torch.tensor([0, 1], dtype=torch.int32), [x.zero_() for x in case.fmt.new_pool(2, 4)]
    order = {"k_permutation": case.options["k_permutation"]}
    library.opcheck(torch.ops.kvk.quantize_pages.default, (k, v, ids, *pools, ids, case.fmt.numbers), order)
    library.opcheck(
        torch.ops.kvk.dequantize_pages.default, (*pools, ids, case.fmt.numbers, torch.float32), order
    )

    def function(*args):
        out, lse = kvk.quant_decode(*args, case.fmt, **case.options)
        return out * 2, lse

    out, lse = torch.compile(function, fullgraph=True)(*case.args)
    want = case.run()
    assert torch.equal(out, want[0] * 2) and torch.equal(lse, want[1])
