"""vertical_slash_attention: the mask, values against the reference, lists, invariance, torch, refusals."""

from __future__ import annotations

from functools import partial

import kvk
import pytest
import torch
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, expect_error, threads
from paged_strategies import DTYPES
from torch import library

OP = "vertical_slash_attention"


def make_case(lens_q, lens_k=None, *, lists=(1, 1), group=2, head_dim=32, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    lens_k = lens_q if lens_k is None else lens_k

    def draw(tokens, heads, dim):
        return torch.randn(tokens, heads, dim, generator=gen).to(dtype)

    q, k, v = draw(sum(lens_q), 2 * group, head_dim), draw(sum(lens_k), 2, head_dim), draw(sum(lens_k), 2, 40)
    shape = (len(lens_q) if lists[0] > 1 else 1, 2 * group if lists[1] > 1 else 1)
    vertical = torch.randint(-1, 400, (*shape, 30), generator=gen, dtype=torch.int32)
    slash = torch.randint(-1, 300, (*shape, 4), generator=gen, dtype=torch.int32)
    options = {}
    if len(lens_q) > 1:
        for name, lens in (("cu_seqlens_q", lens_q), ("cu_seqlens_k", lens_k)):
            options[name] = torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32)
    return (q, k, v, vertical, slash), options


def check(args, options):
    out, lse = kvk.vertical_slash_attention(*args, **options)
    exact_out, exact_lse = reference.vertical_slash_attention(*args, **options)
    plain = partial(reference.vertical_slash_attention, compute_dtype=args[0].dtype)
    plain_out, plain_lse = plain(*args, **options)
    assert_error_rule(lse, exact_lse, plain_lse, per_row=False, what="lse")
    assert_error_rule(out, exact_out, plain_out, per_row=True, what="out")
    return out, lse


def seen_by(tokens, vertical, slash):
    """Which keys get weight, read off one-hot values: [tokens, tokens]."""
    q, k = torch.zeros(tokens, 1, 32), torch.zeros(tokens, 1, 32)
    lists = (torch.tensor([[x]], dtype=torch.int32).view(1, 1, -1) for x in (vertical, slash))
    out, _ = kvk.vertical_slash_attention(q, k, torch.eye(tokens)[:, None], *lists)
    return out[:, 0] > 0


def test_every_wish_is_granted_and_nothing_above_the_diagonal():
    vertical, slash = [3, 70, 71, 200], [5, 64, 130]
    seen = seen_by(256, vertical, slash)
    row, column = torch.arange(256)[:, None], torch.arange(256)[None, :]
    wanted = torch.isin(column, torch.tensor(vertical)) | torch.isin(row - column, torch.tensor(slash))
    assert seen[wanted & (column <= row)].all() and not seen[column > row].any()
    band = (row // 64 * 64 - torch.tensor(slash)[:, None, None] - column).neg()
    asked = torch.isin(column, torch.tensor(vertical)) | ((band >= 0) & (band < 64)).any(0)
    assert torch.equal(seen, asked & (column <= row))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lists", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_values(lists, dtype):
    check(*make_case([300, 0, 65, 130], [300, 20, 200, 64], lists=lists, dtype=dtype))
    check(*make_case([200], lists=lists, group=7, head_dim=104, dtype=dtype, seed=1))


def test_no_key_counts_twice_and_order_is_free():
    (q, k, v, vertical, slash), _ = make_case([300])
    want = kvk.vertical_slash_attention(q, k, v, vertical, slash)
    twice = torch.cat([vertical, vertical, torch.full_like(vertical, 10**6)], -1).flip(-1).contiguous()
    for x, y in zip(
        kvk.vertical_slash_attention(q, k, v, twice, torch.cat([slash.flip(-1), slash], -1)),
        want,
        strict=True,
    ):
        assert_bit_equal(x, y)


def test_empty_lists():
    (q, k, v, vertical, slash), _ = make_case([100])
    out, lse = kvk.vertical_slash_attention(q, k, v, vertical[..., :0], slash[..., :0])
    assert (out == 0).all() and torch.isneginf(lse).all()
    check((q, k, v, vertical, slash[..., :0]), {})
    check((q, k, v, vertical[..., :0], slash), {})


def test_invariance_and_strides():
    args, options = make_case([300, 90], lists=(2, 2))
    want = kvk.vertical_slash_attention(*args, **options)
    with threads(1):
        for x, y in zip(kvk.vertical_slash_attention(*args, **options), want, strict=True):
            assert_bit_equal(x, y)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in args]
    out, lse = torch.zeros(4, 390, 40).transpose(0, 1), torch.zeros(4, 390).T
    kvk.vertical_slash_attention(*turned, **options, out=out, lse=lse)
    assert_bit_equal(out.contiguous(), want[0])
    assert_bit_equal(lse.contiguous(), want[1])


def test_torch():
    args, options = make_case([70, 50], lists=(2, 2))
    library.opcheck(torch.ops.kvk.vertical_slash_attention.default, args, options)
    outputs = {"out": torch.zeros(120, 4, 40), "lse": torch.zeros(120, 4)}
    library.opcheck(torch.ops.kvk.vertical_slash_attention.out, args, {**options, **outputs})
    compiled = torch.compile(kvk.vertical_slash_attention, fullgraph=True)
    want = kvk.vertical_slash_attention(*args, **options)
    for x, y in zip(compiled(*args, **options), want, strict=True):
        assert_bit_equal(x, y)


@pytest.mark.parametrize(
    ("index", "change", "name", "words"),
    [
        (0, lambda x: x.double(), "q", "float64"),
        (0, lambda x: x[:, :3], "q", "multiple"),
        (1, lambda x: x.half(), "k", "float16"),
        (2, lambda x: x[1:], "v", "S=120"),
        (3, lambda x: x.long(), "vertical", "int64"),
        (3, lambda x: x[:, :3], "vertical", "Hq=4"),
        (3, lambda x: x[0], "vertical", "NV"),
        (3, lambda x: torch.cat([x, x]), "vertical", "B=2"),
        (4, lambda x: x.float(), "slash", "float32"),
        (4, lambda x: x[:1], "slash", "B or 1=2"),
    ],
)
def test_refuses(index, change, name, words):
    args, options = make_case([70, 50], lists=(2, 2))
    args = list(args)
    args[index] = change(args[index])
    expect_error(lambda: kvk.vertical_slash_attention(*args, **options), OP, name, words)
    del options["cu_seqlens_k"]
    args, _ = make_case([70, 50], lists=(2, 2))
    expect_error(lambda: kvk.vertical_slash_attention(*args, **options), OP, "cu_seqlens_q", "together")
