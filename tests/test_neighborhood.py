"""neighborhood_attention: NATTEN's mask, values, gradients, merging, strides, NaN, invariance, torch, refusals."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import kvk
import pytest
import torch
from block_sparse_cases import check_gradients, check_results, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from kvk import reference
from kvk_testing import assert_bit_equal, assert_finite_differences, expect_error, threads
from paged_strategies import DTYPES, HEAD_DIMS
from torch import Tensor, library

OP = "neighborhood_attention"
OPS = kvk.neighborhood_attention, reference.neighborhood_attention


@dataclass
class NeighborhoodCase:
    q: Tensor
    k: Tensor
    v: Tensor
    kernel_size: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.kernel_size

    def with_(self, **changes: Any) -> NeighborhoodCase:
        return replace(self, **changes)

    def run(self) -> tuple[Tensor, Tensor]:
        return kvk.neighborhood_attention(*self.args, **self.options)


def make_case(extents, kernel_size, *, batch=1, num_kv_heads=1, group=2, head_dim=32, head_dim_v=None,
              dtype=torch.float32, seed=0, **options):  # fmt: skip
    gen = torch.Generator().manual_seed(seed)

    def draw(heads, dim):
        return torch.randn(batch, *extents, heads, dim, generator=gen).to(dtype)

    q, k = draw(num_kv_heads * group, head_dim), draw(num_kv_heads, head_dim)
    return NeighborhoodCase(q, k, draw(num_kv_heads, head_dim_v or head_dim), kernel_size, options)


def check(case):
    return check_results(case, *case.run(), reference.neighborhood_attention)


class TestMask:
    """The reference's mask against what NATTEN documents and the specification records."""

    def test_by_hand(self):
        seen = [row.nonzero().flatten().tolist() for row in reference.axis_mask(7, 3)]
        assert seen == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [4, 5, 6]]
        even = [row.nonzero().flatten().tolist() for row in reference.axis_mask(6, 4)]
        assert even == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5]]
        dilated = [row.nonzero().flatten().tolist() for row in reference.axis_mask(7, 2, 1, 3)]
        assert dilated == [[0, 3], [1, 4], [2, 5], [0, 3], [1, 4], [2, 5], [3, 6]]
        blocked = [row.nonzero().flatten().tolist() for row in reference.axis_mask(5, 2, 2)]
        assert blocked == [[0, 1], [0, 1], [2, 3], [2, 3], [3, 4]]  # the last block shifts inward

    @pytest.mark.parametrize(
        ("kernel", "counts"),
        [(4, [1, 2, 3, 4] * 4), (6, [1, 2, 3, 4, 3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5, 6])],
    )
    def test_causal_strided(self, kernel, counts):
        assert reference.axis_mask(16, kernel, 4, 1, True).sum(1).tolist() == counts

    def test_inverse_counts(self):
        assert reference.axis_mask(16, 5).sum(0).tolist() == [3, 4, 5, 6, 7, 5, 5, 5, 5, 5, 5, 7, 6, 5, 4, 3]

    @pytest.mark.parametrize("extent", [7, 8, 13])
    def test_invariants(self, extent):
        for w in range(1, 6):
            for s in range(1, w + 1):
                for d in range(1, extent // w + 1):
                    for causal in (False, True):
                        mask = reference.axis_mask(extent, w, s, d, causal)
                        assert mask.diagonal().all()
                        assert causal or (mask.sum(1) == w).all()
                        assert not (causal and mask.triu(1).any())


# (extents, kernel_size, stride, dilation, is_causal)
SHAPES = [
    ((1,), 1, 1, 1, False),
    ((300,), 65, 1, 1, False),
    ((300,), 64, 7, 1, True),
    ((125,), 12, 5, 10, False),
    ((125,), 11, 11, 11, True),
    ((200,), 200, 1, 1, False),
    ((19, 29), (8, 7), 1, 1, False),
    ((84, 19), (3, 19), (2, 1), (11, 1), (True, False)),
    ((33, 20), (13, 6), (13, 6), 1, False),
    ((17, 31), (4, 5), (1, 3), (4, 6), (False, True)),
    ((40, 1), (9, 1), 1, 1, False),
    ((7, 9, 11), (3, 4, 5), 1, 1, False),
    ((8, 8, 12), (4, 8, 3), (2, 8, 3), (2, 1, 4), False),
    ((6, 10, 9), (2, 5, 9), (1, 4, 2), (3, 2, 1), (True, False, True)),
    ((3, 1, 70), (3, 1, 33), (1, 1, 5), (1, 1, 2), True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestShapes:
    def test_values(self, shape, dtype):
        extents, kernel, stride, dilation, causal = shape
        check(make_case(extents, kernel, stride=stride, dilation=dilation, is_causal=causal, dtype=dtype))

    def test_gradients(self, shape, dtype):
        extents, kernel, stride, dilation, causal = shape
        case = make_case(extents, kernel, stride=stride, dilation=dilation, is_causal=causal, dtype=dtype)
        check_gradients(case, *OPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (2, 3), (1, 7)])
def test_heads(heads, dtype):
    case = make_case(
        (9, 10), 5, batch=2, num_kv_heads=heads[0], group=heads[1], head_dim=40, head_dim_v=72, dtype=dtype
    )
    check(case)
    check_gradients(case, *OPS)


def test_head_dims():
    for dim in HEAD_DIMS[::4]:
        check(make_case((5, 6), (3, 4), head_dim=dim, head_dim_v=HEAD_DIMS[-1] + 32 - dim))


def test_softmax_scale():
    for scale in (0.0, -0.4, 1.5):
        check(make_case((9, 9), 5, softmax_scale=scale))


def test_empty_batch():
    out, lse = make_case((9, 9), 5, batch=0).run()
    assert out.shape == (0, 9, 9, 2, 32) and lse.shape == (0, 9, 9, 2)


def test_full_window_is_dense_attention():
    case = make_case((6, 7), (6, 7))
    q, k, v = (x.double().flatten(1, 2).transpose(1, 2) for x in (case.q, case.k, case.v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
    torch.testing.assert_close(case.run()[0].flatten(1, 2).double(), want.transpose(1, 2), rtol=0, atol=2e-6)


def test_one_dimension_is_block_sparse_attention():
    """Stride and kernel of one block: a diagonal of blocks."""
    case = make_case((128,), 32, stride=32)
    pattern = kvk.block_mask_to_csr(torch.eye(4, dtype=torch.bool)[None, None])
    out, lse = kvk.block_sparse_attention(case.q[0], case.k[0], case.v[0], *pattern, 32, 32)
    torch.testing.assert_close(case.run()[0][0], out)
    torch.testing.assert_close(case.run()[1][0], lse)


def test_extra_keys_by_merging():
    """Keys that every query sees: dense attention over both, and its gradient through the merge."""
    case = make_case((8, 9), 5, group=1)
    gen = torch.Generator().manual_seed(5)
    extra_k, extra_v = torch.randn(20, 1, 32, generator=gen), torch.randn(20, 1, 32, generator=gen)
    tokens = 72
    pattern = kvk.block_mask_to_csr(torch.ones(1, 1, 2, 1, dtype=torch.bool))

    def merged(q, k, v, kernel_size):
        near_out, near_lse = kvk.neighborhood_attention(q, k, v, kernel_size)
        far_out, far_lse = kvk.block_sparse_attention(q.flatten(0, 2), extra_k, extra_v, *pattern, 64, 64)
        out = torch.stack([near_out.reshape(tokens, 1, 32), far_out])
        return kvk.merge_states(out, torch.stack([near_lse.reshape(tokens, 1), far_lse]))

    def dense(q, k, v, kernel_size):
        keys, values = (
            torch.cat([x.reshape(tokens, 32), y[:, 0].to(x)]) for x, y in ((k, extra_k), (v, extra_v))
        )
        near = reference.neighborhood_mask((8, 9), kernel_size)
        seen = torch.cat([near, torch.ones(tokens, 20, dtype=torch.bool)], 1)
        scores = (q.reshape(tokens, 32) @ keys.T * 32**-0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ values)[:, None], scores.logsumexp(-1)[:, None]

    grads = torch.randn(tokens, 1, 32, generator=gen), torch.randn(tokens, 1, generator=gen)
    exact = case.with_(q=case.q.double(), k=case.k.double(), v=case.v.double())
    for got, want in zip(merged(*case.args), dense(*exact.args), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(merged, case, *grads), gradients(dense, exact, *grads), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_finite_differences():
    case = make_case((4, 5), 3, group=1, is_causal=(True, False))
    gen = torch.Generator().manual_seed(1)
    grad_out, grad_lse = torch.randn(1, 4, 5, 1, 32, generator=gen), torch.randn(1, 4, 5, 1, generator=gen)
    got = gradients(kvk.neighborhood_attention, case, grad_out, grad_lse)
    exact = case.with_(q=case.q.double(), k=case.k.double(), v=case.v.double())

    def loss():
        out, lse = reference.neighborhood_attention(*exact.args, **exact.options)
        return ((out * grad_out).sum() + (lse * grad_lse).sum()).item()

    for x, grad in zip((exact.q, exact.k, exact.v), got, strict=True):
        assert_finite_differences(loss, x, grad, every=29)


def test_strides():
    case = make_case((5, 6, 7), 3, batch=2, num_kv_heads=2, dilation=(1, 2, 1))
    gen = torch.Generator().manual_seed(1)
    grads = torch.randn(2, 5, 6, 7, 4, 32, generator=gen), torch.randn(2, 5, 6, 7, 4, generator=gen)
    want = *case.run(), *gradients(kvk.neighborhood_attention, case, *grads)

    def turned(x):  # heads and space in another order, and gaps
        order = (4, 3, 1, 0, 2, 5) if x.ndim == 6 else (4, 3, 1, 0, 2)
        wide = x.permute(order).repeat_interleave(2, 0)[::2]
        return wide.permute(*[order.index(i) for i in range(x.ndim)])

    strided = case.with_(q=turned(case.q), k=turned(case.k), v=turned(case.v))
    out, lse = strided.run()
    grad = kvk.neighborhood_attention_backward(
        turned(grads[0]), turned(grads[1]), *strided.args[:3], turned(out), turned(lse), 3, dilation=(1, 2, 1)
    )
    for x, y in zip((out, lse, *grad), want, strict=True):
        assert_bit_equal(x, y)
    wide_out, wide_lse = torch.full((2, 5, 6, 7, 5, 40), 7.0), torch.full((2, 5, 6, 7, 5), 7.0)
    kvk.neighborhood_attention(*case.args, **case.options, out=wide_out[..., 1:, 4:36], lse=wide_lse[..., 1:])
    assert_bit_equal(wide_out[..., 1:, 4:36].contiguous(), want[0])
    assert_bit_equal(wide_lse[..., 1:].contiguous(), want[1])
    assert (
        (wide_out[..., 0, :] == 7).all() and (wide_out[..., 36:] == 7).all() and (wide_lse[..., 0] == 7).all()
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_where_they_are_seen(bad):
    case = make_case((9, 9), 3, group=1)
    grads = torch.ones(1, 9, 9, 1, 32), torch.ones(1, 9, 9, 1)
    clean_out, _ = case.run()
    clean = gradients(kvk.neighborhood_attention, case, *grads)
    mask = reference.neighborhood_mask((9, 9), 3)
    here = 4 * 9 + 4
    case.k[0, 4, 4], case.v[0, 4, 4] = bad, bad
    sees = mask[:, here]
    out, dq = case.run()[0], gradients(kvk.neighborhood_attention, case, *grads)[0]
    assert_bit_equal(out.view(81, 32)[~sees], clean_out.view(81, 32)[~sees])
    assert_bit_equal(dq.view(81, 32)[~sees], clean[0].view(81, 32)[~sees])
    assert not torch.isfinite(dq.view(81, 32)[sees]).all(-1).any()
    case = make_case((9, 9), 3, group=1)
    case.q[0, 4, 4] = bad
    seen = mask[here]
    for got, want in zip(gradients(kvk.neighborhood_attention, case, *grads)[1:], clean[1:], strict=True):
        assert_bit_equal(got.view(81, 32)[~seen], want.view(81, 32)[~seen])
        assert not torch.isfinite(got.view(81, 32)[seen]).all(-1).any()


def test_invariance():
    case = make_case((20, 21), 7, batch=3, num_kv_heads=2, group=3)
    gen = torch.Generator().manual_seed(1)
    grads = torch.randn(3, 20, 21, 6, 32, generator=gen), torch.randn(3, 20, 21, 6, generator=gen)
    whole = *case.run(), *gradients(kvk.neighborhood_attention, case, *grads)
    with threads(1):
        again = *case.run(), *gradients(kvk.neighborhood_attention, case, *grads)
    for x, y in zip(again, whole, strict=True):
        assert_bit_equal(x, y)
    one = case.with_(q=case.q[1:2], k=case.k[1:2], v=case.v[1:2])
    alone = *one.run(), *gradients(kvk.neighborhood_attention, one, *(x[1:2] for x in grads))
    for x, y in zip(alone, whole, strict=True):
        assert_bit_equal(x, y[1:2])


def draw_axes(draw, most):
    """Extents up to most[dimensions], kernel_size and the other options of every dimension."""
    n = draw(st.integers(1, 3))
    axes = []
    for _ in range(n):
        extent = draw(st.integers(1, most[n]))
        dilation = draw(st.integers(1, max(1, extent // 2)))
        kernel = draw(st.integers(1, extent // dilation))
        axes.append((extent, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())))
    extents, kernel, stride, dilation, causal = zip(*axes, strict=True)
    return extents, kernel, {"stride": stride, "dilation": dilation, "is_causal": causal}


@settings(max_examples=60)
@given(st.data())
def test_random_cases(data):
    draw = data.draw
    extents, kernel, options = draw_axes(draw, {1: 300, 2: 24, 3: 9})
    case = make_case(
        extents,
        kernel,
        batch=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from(HEAD_DIMS[:8])),
        head_dim_v=draw(st.sampled_from(HEAD_DIMS[:8])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**32 - 1)),
        **options,
    )
    check(case)
    check_gradients(case, *OPS)


# As torch sees it ------------------------------------------------------------------------------------------


def test_schema():
    for op in (OP, f"{OP}_backward"):
        schema = getattr(torch.ops.kvk, op).default._schema
        names = [
            p for p in inspect.signature(getattr(kvk, op)).parameters if op != OP or p not in ("out", "lse")
        ]
        assert [a.name for a in schema.arguments] == names


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    case = make_case((5, 6), 3, dtype=dtype)
    lists = {"stride": [2, 1], "dilation": [1, 2], "is_causal": [1, 0], "softmax_scale": 0.3}
    leaves = [x.requires_grad_() for x in case.args[:3]]
    library.opcheck(torch.ops.kvk.neighborhood_attention.default, (*leaves, [3]), lists)
    tensors = [x.detach() for x in leaves]
    out, lse = torch.zeros_like(tensors[0]), torch.zeros(case.q.shape[:-1])
    library.opcheck(
        torch.ops.kvk.neighborhood_attention.out, (*tensors, [3]), {**lists, "out": out, "lse": lse}
    )
    library.opcheck(
        torch.ops.kvk.neighborhood_attention_backward.default, (out, lse, *tensors, out, lse, [3]), lists
    )


def test_meta_and_compile():
    case = make_case((5, 6), 3, stride=(1, 2), is_causal=(False, True), head_dim_v=40)
    want = case.run()
    got = kvk.neighborhood_attention(*(x.to("meta") for x in case.args[:3]), 3, **case.options)
    for x, y in zip(got, want, strict=True):
        assert x.device.type == "meta" and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
    compiled = torch.compile(kvk.neighborhood_attention, fullgraph=True)
    for x, y in zip(compiled(*case.args, **case.options), want, strict=True):
        assert_bit_equal(x, y)
    grads = torch.randn(want[0].shape), torch.randn(want[1].shape)
    for x, y in zip(gradients(compiled, case, *grads), gradients(OPS[0], case, *grads), strict=True):
        assert_bit_equal(x, y)


BAD = {
    "q rank": ({"q": torch.zeros(6, 2, 32)}, "q", "1, 2 or 3 dimensions"),
    "q dtype": ({"q": torch.zeros(1, 5, 6, 2, 32).double()}, "q", "float64"),
    "q head dim": ({"q": torch.zeros(1, 5, 6, 2, 36)}, "q", "36"),
    "q heads": ({"k": torch.zeros(1, 5, 6, 3, 32), "v": torch.zeros(1, 5, 6, 3, 32)}, "q", "multiple"),
    "k extent": ({"k": torch.zeros(1, 5, 7, 1, 32)}, "k", "Y=6"),
    "k batch": ({"k": torch.zeros(2, 5, 6, 1, 32)}, "k", "B=1"),
    "k dtype": ({"k": torch.zeros(1, 5, 6, 1, 32).half()}, "k", "float16"),
    "v rank": ({"v": torch.zeros(1, 5, 1, 32)}, "v", "dimensions"),
    "v heads": ({"v": torch.zeros(1, 5, 6, 2, 32)}, "v", "Hkv=1"),
    "v head dim": ({"v": torch.zeros(1, 5, 6, 1, 20)}, "v", "20"),
    "v device": ({"v": torch.zeros(1, 5, 6, 1, 32, device="meta")}, "v", "meta"),
    "kernel_size 0": ({"kernel_size": 0}, "kernel_size", "at least 1"),
    "kernel_size large": ({"kernel_size": (3, 7)}, "kernel_size", "7 * 1 in dimension Y"),
    "kernel_size dilated": ({"dilation": (2, 1)}, "dilation", "3 * 2 in dimension X"),
    "kernel_size count": ({"kernel_size": (3, 3, 3)}, "kernel_size", "3 of them"),
    "stride 0": ({"stride": 0}, "stride", "0"),
    "stride large": ({"stride": (1, 4)}, "stride", "4 in dimension Y"),
    "stride count": ({"stride": (1, 1, 1)}, "stride", "3 of them"),
    "dilation 0": ({"dilation": (1, 0)}, "dilation", "0 in dimension Y"),
    "dilation count": ({"dilation": (1, 1, 1)}, "dilation", "3 of them"),
    "dilation huge": ({"dilation": 2**62}, "dilation", str(2**62)),
    "is_causal count": ({"is_causal": ()}, "is_causal", "0 of them"),
    "softmax_scale": ({"softmax_scale": float("inf")}, "softmax_scale", "finite"),
    "no lse": ({"out": torch.zeros(1, 5, 6, 2, 32)}, "lse", "together"),
    "out shape": ({"out": torch.zeros(1, 5, 6, 2, 40), "lse": torch.zeros(1, 5, 6, 2)}, "out", "32"),
    "lse dtype": (
        {"out": torch.zeros(1, 5, 6, 2, 32), "lse": torch.zeros(1, 5, 6, 2).half()},
        "lse",
        "float16",
    ),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_refuses(kind):
    changes, name, words = BAD[kind]
    case = make_case((5, 6), 3)
    args = {**dict(zip(("q", "k", "v", "kernel_size"), case.args, strict=True)), **changes}
    expect_error(lambda: kvk.neighborhood_attention(**args), OP, name, words)


def test_backward_refuses():
    case = make_case((5, 6), 3)
    out, lse = case.run()
    good = [out, lse, *case.args[:3], out, lse, 3]
    for i, name in enumerate(("grad_out", "grad_lse", "q", "k", "v", "out", "lse")):
        bad = list(good)
        bad[i] = bad[i][:, :4]
        blame = [name, "k", "out", "lse"] if name == "q" else name
        expect_error(lambda bad=bad: kvk.neighborhood_attention_backward(*bad), f"{OP}_backward", blame, "5")
