"""block_sparse_attention as torch sees it, its refusals, and the builders of patterns."""

from __future__ import annotations

import inspect

import kvk
import pytest
import torch
from block_sparse_cases import gradients, make_case
from kvk import patterns
from kvk_testing import assert_bit_equal, expect_error
from paged_strategies import DTYPES
from torch import library

OP = "block_sparse_attention"
FORMS = {
    "plain": {},
    "options": {
        "causal": True,
        "bias": True,
        "per_head": True,
        "per_batch": True,
        "ragged": True,
        "softmax_scale": 0.2,
    },
}


def case_of(form: str = "plain", dtype=torch.float32):
    lens = [40, 60] if form == "options" else [70]
    return make_case(lens, head_dim_v=40, dtype=dtype, **FORMS[form])


def backward_args(case):
    out, lse = case.run()
    return (torch.randn_like(out), torch.randn_like(lse), *case.args[:3], out, lse, *case.args[3:])


def positional(case):
    """Arguments in the order of the schema, in which no tensor is keyword-only."""
    options = dict(case.options)
    tensors = [options.pop(name, None) for name in ("cu_seqlens_q", "cu_seqlens_k", "entry_bias")]
    return (*case.args, *tensors), options


@pytest.mark.parametrize("op", [OP, f"{OP}_backward"])
def test_schema(op):
    schema = getattr(torch.ops.kvk, op).default._schema
    parameters = inspect.signature(getattr(kvk, op)).parameters
    assert {a.name for a in schema.arguments} == set(parameters) - ({"out", "lse"} if op == OP else set())
    for a in schema.arguments:
        assert a.has_default_value() == (parameters[a.name].default is not inspect.Parameter.empty)
        assert not a.has_default_value() or a.default_value == parameters[a.name].default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", list(FORMS))
def test_opcheck(form, dtype):
    case = case_of(form, dtype)
    args, options = positional(case)
    for leaf in args[:3]:
        leaf.requires_grad_()
    library.opcheck(torch.ops.kvk.block_sparse_attention.default, args, options)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, lse = torch.zeros(*case.q.shape[:2], 40, dtype=dtype), torch.zeros(case.q.shape[:2])
    library.opcheck(
        torch.ops.kvk.block_sparse_attention.out, tuple(detached), {**options, "out": out, "lse": lse}
    )
    grad_args = (out, lse, *detached[:3], out, lse, *detached[3:])
    library.opcheck(torch.ops.kvk.block_sparse_attention_backward.default, grad_args, options)


@pytest.mark.parametrize("form", list(FORMS))
def test_meta(form):
    case = case_of(form)
    to_meta = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x  # noqa: E731
    options = {name: to_meta(x) for name, x in case.options.items()}
    got = kvk.block_sparse_attention(*map(to_meta, case.args), **options)
    for x, y in zip(got, case.run(), strict=True):
        assert x.device.type == "meta" and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_compile():
    case = case_of("options")
    grads = torch.randn(*case.q.shape[:2], 40), torch.randn(case.q.shape[:2])
    compiled = torch.compile(kvk.block_sparse_attention, fullgraph=True)
    for x, y in zip(compiled(*case.args, **case.options), case.run(), strict=True):
        assert_bit_equal(x, y)
    want = gradients(kvk.block_sparse_attention, case, *grads)
    for x, y in zip(gradients(compiled, case, *grads), want, strict=True):
        assert_bit_equal(x, y)


# Refusals --------------------------------------------------------------------------------------------------


def arguments():
    case = make_case([70, 50], head_dim_v=40, bias=True, per_head=True, per_batch=True, density=2.0)
    names = ("q", "k", "v", "row_ptr", "col_idx", "block_q", "block_k")
    return {**dict(zip(names, case.args, strict=True)), **case.options}


def changed(x: torch.Tensor, at: tuple[int, ...], value: int) -> torch.Tensor:
    x = x.clone()
    x[at] = value
    return x


BAD = {
    "q rank": ("q", lambda x: x[0], "[T, Hq, D]"),
    "q dtype": ("q", lambda x: x.double(), "float64"),
    "q head dim": ("q", lambda x: torch.zeros(120, 4, 60), "60"),
    "q wide": ("q", lambda x: torch.zeros(120, 4, 264), "264"),
    "q heads": ("q", lambda x: torch.zeros(120, 3, 64), "multiple"),
    "q last stride": ("q", lambda x: torch.zeros(120, 4, 128)[..., ::2], "stride"),
    "k dtype": ("k", lambda x: x.half(), "float32"),
    "k head dim": ("k", lambda x: torch.zeros(120, 2, 32), "64"),
    "k no heads": ("k", lambda x: torch.zeros(120, 0, 64), "Hkv=0"),
    "k rank": ("k", lambda x: x[None], "[S"),
    "v tokens": ("v", lambda x: x[1:], "120"),
    "v heads": ("v", lambda x: x[:, :1], "Hkv"),
    "v head dim": ("v", lambda x: x[..., :36], "36"),
    "v dtype": ("v", lambda x: x.bfloat16(), "bfloat16"),
    "v device": ("v", lambda x: x.to("meta"), "meta"),
    "row_ptr dtype": ("row_ptr", lambda x: x.long(), "int64"),
    "row_ptr rank": ("row_ptr", lambda x: x[0], "[B or 1"),
    "row_ptr batch": ("row_ptr", lambda x: x.repeat(2, 1, 1), "B=2"),
    "row_ptr heads": ("row_ptr", lambda x: x[:, :2], "Hq=4"),
    "row_ptr short": ("row_ptr", lambda x: x[..., :2], "1 rows"),
    "row_ptr empty": ("row_ptr", lambda x: x[..., :0], "Mb + 1"),
    "row_ptr negative": ("row_ptr", lambda x: changed(x, (1, 2, 0), -1), "batch 1, head 2"),
    "row_ptr decreasing": ("row_ptr", lambda x: changed(x, (0, 1, 1), 100), "head 1"),
    "row_ptr past the end": ("row_ptr", lambda x: changed(x, (0, 3, -1), 100), "100"),
    "col_idx dtype": ("col_idx", lambda x: x.long(), "int64"),
    "col_idx batch": ("col_idx", lambda x: x[:1], "B or 1=2"),
    "col_idx negative": ("col_idx", lambda x: changed(x, (1, 3, 2), -1), "batch 1, head 3"),
    "col_idx past the keys": ("col_idx", lambda x: changed(x, (0, 0, 0), 3), "of 3"),
    "block_q": ("block_q", lambda x: 15, "15"),
    "block_k": ("block_k", lambda x: 129, "129"),
    "cu_seqlens_q dtype": ("cu_seqlens_q", lambda x: x.long(), "int64"),
    "cu_seqlens_q start": ("cu_seqlens_q", lambda x: changed(x, (0,), 1), "start at 0"),
    "cu_seqlens_q decreasing": ("cu_seqlens_q", lambda x: changed(x, (1,), 121), "decrease"),
    "cu_seqlens_q end": ("cu_seqlens_q", lambda x: changed(x, (2,), 121), "120"),
    "cu_seqlens_q empty": ("cu_seqlens_q", lambda x: x[:0], "[0]"),
    "cu_seqlens_k count": ("cu_seqlens_k", lambda x: x[:2], "3"),
    "cu_seqlens_k alone": ("cu_seqlens_q", lambda x: None, "together"),
    "cu_seqlens_k end": ("cu_seqlens_k", lambda x: changed(x, (2,), 121), "120"),
    "entry_bias dtype": ("entry_bias", lambda x: x.half(), "float16"),
    "entry_bias shape": ("entry_bias", lambda x: x[..., 1:], "NNZ"),
    "softmax_scale": ("softmax_scale", lambda x: float("nan"), "finite"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_refuses(kind):
    name, change, words = BAD[kind]
    args = arguments()
    args[name] = change(args.get(name))
    blame = {"k no heads": "v", "cu_seqlens_k alone": ["cu_seqlens_q", "cu_seqlens_k"]}.get(kind, name)
    blame = [blame] if isinstance(blame, str) else blame
    if args["q"].ndim == 3 and args["v"].ndim == 3:
        out, lse = torch.full((120, args["q"].shape[1], args["v"].shape[2]), 7.0), torch.full((120, 4), 7.0)
        expect_error(lambda: kvk.block_sparse_attention(**args, out=out, lse=lse), OP, [*blame, "out", "lse"])
        assert (out == 7).all() and (lse == 7).all()
    expect_error(lambda: kvk.block_sparse_attention(**args), OP, [*blame, "lse", "out"], words)


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, lambda x: x[1:]),
        (0, lambda x: x.half()),
        (1, lambda x: x.double()),
        (1, lambda x: x[:, :1]),
        (5, lambda x: x[..., :32]),
        (6, lambda x: x.double()),
        (2, lambda x: x[..., :32]),
    ],
)
def test_backward_refuses(index, change):
    case = case_of()
    args = list(backward_args(case))
    args[index] = change(args[index])
    names = ("grad_out", "grad_lse", "q", "k", "v", "out", "lse")
    expect_error(
        lambda: kvk.block_sparse_attention_backward(*args),
        f"{OP}_backward",
        [names[index], "k", "out", "lse"],
    )


def test_out_and_lse_go_together():
    case = case_of()
    expect_error(lambda: kvk.block_sparse_attention(*case.args, out=torch.zeros(70, 4, 40)), OP, "lse")
    wrong = {"out": torch.zeros(1, 4, 40).expand(70, 4, 40), "lse": torch.zeros(70, 4)}
    expect_error(lambda: kvk.block_sparse_attention(*case.args, **wrong), OP, "out", "expanded")


# Patterns --------------------------------------------------------------------------------------------------


def test_csr():
    mask = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1, 1] = False
    row_ptr, col_idx = kvk.block_mask_to_csr(mask)
    assert row_ptr.dtype == col_idx.dtype == torch.int32 and col_idx.shape[2] == mask.sum((2, 3)).max()
    for b in range(3):
        for h in range(2):
            pointer = row_ptr[b, h].tolist()
            assert pointer[0] == 0 and (col_idx[b, h, pointer[-1] :] == -1).all()
            for m in range(5):
                want = mask[b, h, m].nonzero().flatten()
                assert torch.equal(col_idx[b, h, pointer[m] : pointer[m + 1]].long(), want)
    for empty in (torch.zeros(1, 1, 0, 3), torch.zeros(1, 2, 3, 0), torch.zeros(0, 1, 2, 2)):
        row_ptr, col_idx = kvk.block_mask_to_csr(empty.bool())
        assert row_ptr.shape == (*empty.shape[:2], empty.shape[2] + 1) and col_idx.shape[2] == 0
    for bad in (mask.int(), mask[0]):
        with pytest.raises(ValueError, match="block_mask_to_csr"):
            kvk.block_mask_to_csr(bad)


def by_rule(rows, columns, rule):
    """rule(i, j) of the query block's place among the key blocks, and the key block."""
    return torch.tensor([[bool(rule(i + columns - rows, j)) for j in range(columns)] for i in range(rows)])


@pytest.mark.parametrize("shape", [(9, 9), (3, 9)])
def test_masks(shape):
    assert torch.equal(
        patterns.streaming_mask(*shape, 2, 3), by_rule(*shape, lambda i, j: j <= i and (j < 2 or i - j < 3))
    )
    assert torch.equal(
        patterns.power_mask(*shape, 1, 2),
        by_rule(*shape, lambda i, j: j <= i and (j < 1 or i - j < 2 or i - j in (1, 2, 4, 8))),
    )
    assert torch.equal(patterns.block_causal_mask(*shape, 2), by_rule(*shape, lambda i, j: j // 2 <= i // 2))
    strided = patterns.strided_mask(*shape, 8, 2, 4, num_kv_heads=4, num_dense_heads=1)
    for h in range(8):
        kv = h // 2
        want = by_rule(*shape, lambda i, j, kv=kv: j <= i and (i - j < 2 or (j + kv) % 4 == 0 or kv == 3))
        assert torch.equal(strided[h], want)


def test_block_diffusion_mask():
    n, size = 3, 2
    block = lambda i: i % (n * size) // size  # noqa: E731

    def visible(i, j):  # of tokens, as the paper has it
        noised_i, noised_j = i < n * size, j < n * size
        return (
            (noised_i == noised_j and block(i) == block(j))
            or (noised_i and not noised_j and block(i) > block(j))
            or (not noised_i and not noised_j and block(i) >= block(j))
        )

    want = torch.tensor([[visible(i, j) for j in range(2 * n * size)] for i in range(2 * n * size)])
    mask = patterns.block_diffusion_mask(n).repeat_interleave(size, 0).repeat_interleave(size, 1)
    assert torch.equal(mask, want)


def test_masks_refuse():
    for call in (
        lambda: patterns.strided_mask(4, 4, 3, 1, 2, num_kv_heads=2),
        lambda: patterns.strided_mask(4, 4, 2, 1, 0),
        lambda: patterns.block_causal_mask(4, 4, 0),
        lambda: patterns.streaming_mask(-1, 4, 1, 1),
    ):
        with pytest.raises(ValueError, match="kvk: "):
            call()
