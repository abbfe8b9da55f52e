"""linear_attention and taylor_feature_map as torch sees them, and bad input for every argument."""

from __future__ import annotations

import kvk
import pytest
import torch
from kvk_testing import expect_error
from lightning_cases import BAD_STARTS, int32
from linear_cases import MASKS, OPTIONAL, RESULTS, LinearCase, make_case
from paged_strategies import DTYPES
from torch import library

OPS = torch.ops.kvk
GIVEN = ("q", "k", "v", *OPTIONAL)


def positional(case: LinearCase) -> list[torch.Tensor | None]:
    return [getattr(case, name) for name in GIVEN]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    for mask in ("causal", "blocks-of-4", "all"):
        case = make_case(2, 9, 2, 16, 8, dtype=dtype, mask=mask, apart=True)
        wanted = [x.clone().requires_grad_() for x in positional(case)]
        library.opcheck(OPS.linear_attention.default, tuple(wanted), {**MASKS[mask], "scale": 0.5})
    packed = make_case(1, 9, 2, 16, 8, dtype=dtype, starts=int32(0, 4, 4, 9), state=False)
    args = (*positional(packed), packed.cu_seqlens)
    library.opcheck(OPS.linear_attention.default, args, {"normalize": False})
    results = dict(zip(RESULTS, (torch.zeros_like(x) for x in packed.run()), strict=True))
    library.opcheck(OPS.linear_attention.out, args, results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_backward(dtype):
    case = make_case(2, 9, 2, 16, 8, dtype=dtype, apart=True)
    grads = tuple(torch.ones_like(x) for x in case.run())
    library.opcheck(OPS.linear_attention_backward.default, (*grads, *positional(case)), {"block_size": 3})
    library.opcheck(
        OPS.linear_attention_backward.default, (grads[0], None, None, None, case.q, case.k, case.v)
    )


def test_compile():
    case = make_case(2, 70, 2, 15, 8, apart=True)
    case = case.with_(q=case.q[..., :4], k=case.k[..., :4])  # 15 features

    def loss(q, k, v, q_den, k_den, state, z):
        named = {"q_den": q_den, "k_den": k_den, "initial_state": state, "initial_z": z, "block_size": 5}
        out, den, final, final_z = kvk.linear_attention(
            *(kvk.taylor_feature_map(x * 2) for x in (q, k)), v, **named
        )
        return (out * out).sum() + den.sum() + final.sum() + final_z.sum()

    inputs = [x.clone().requires_grad_() for x in positional(case)]
    want = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_meta():
    case = make_case(2, 9, 2, 16, 8, dtype=torch.bfloat16)
    got = kvk.linear_attention(*(x.to("meta") for x in (case.q, case.k, case.v)))
    for a, b in zip(got, case.run(), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


# Bad input -------------------------------------------------------------------------------------------------


def arguments() -> dict[str, torch.Tensor]:
    case = make_case(2, 6, 3, 16, 8, apart=True)
    results = {name: torch.full_like(x, 7.0) for name, x in zip(RESULTS, case.run(), strict=True)}
    return {**dict(zip(GIVEN, positional(case), strict=True)), **results}


def refused(args, names, *words):
    before = {name: args[name].clone() for name in RESULTS if args.get(name) is not None}
    expect_error(lambda: kvk.linear_attention(**args), "linear_attention", names, *words)
    for name, x in before.items():
        assert args[name].device.type != "cpu" or torch.equal(args[name], x)


ALL = list(arguments())


@pytest.mark.parametrize("name", ALL)
class TestArguments:
    def test_shape(self, name):
        args = arguments()
        good = args[name]
        for d in range(good.dim()):
            shape = list(good.shape)
            shape[d] += 1
            # The last extents of q and v are free: what follows them does not fit then.
            names = {"q": ["q", "k"], "v": ["v", "initial_state"]}.get(name, name)
            refused({**args, name: torch.ones(shape, dtype=good.dtype)}, names)
        refused({**args, name: good[..., None]}, name)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
    def test_dtype(self, name, dtype):
        args = arguments()
        refused({**args, name: args[name].to(dtype)}, ["q", "k"] if name == "q" else name)

    def test_last_stride(self, name):
        args = arguments()
        if name == "den":
            return  # any strides
        args[name] = torch.stack([args[name], args[name]], -1)[..., 0]
        refused(args, name, "stride 1")

    def test_device(self, name):
        args = arguments()
        args[name] = args[name].to("meta")
        expect_error(lambda: kvk.linear_attention(**args), "linear_attention", [name, "k"], "meta")

    def test_expanded(self, name):
        if name in RESULTS:
            args = arguments()
            refused({**args, name: args[name][:1].expand(args[name].shape)}, name, "expanded")

    def test_results_go_together(self, name):
        if name in RESULTS:
            args = arguments()
            args[name] = None
            refused(args, name, "go together")


@pytest.mark.parametrize(
    ("options", "name", "word"),
    [
        ({"block_size": 0}, "block_size", "at least 1, got 0"),
        ({"block_size": -3}, "block_size", "got -3"),
        ({"block_size": 2, "causal": False}, "block_size", "without causal"),
        ({"scale": torch.nan}, "scale", "finite"),
        ({"eps": torch.inf}, "eps", "finite"),
        ({"eps": -1e-3}, "eps", "not be negative"),
    ],
)
def test_options(options, name, word):
    refused({**arguments(), **options}, name, word)
    case = make_case(1, 3, 1, 4, 4, state=False)
    args = (case.run()[0], None, None, None, case.q, case.k, case.v)
    expect_error(
        lambda: OPS.linear_attention_backward(*args, **options), "linear_attention_backward", name, word
    )


@pytest.mark.parametrize(("name", "dim"), [("q", 0), ("q", 257), ("v", 0), ("v", 264)])
def test_head_dims(name, dim):
    case = make_case(1, 3, 1, 16, 16, state=False)
    big = torch.zeros(1, 3, 1, dim)
    changed = {"q": big, "k": big} if name == "q" else {"v": big}
    expect_error(lambda: case.with_(**changed).run(), "linear_attention", name, "from 1 to 256", f"got {dim}")


@pytest.mark.parametrize(("starts", "words"), BAD_STARTS)
def test_cu_seqlens(starts, words):
    case = make_case(1, 6, 2, 16, 8, state=False)
    call = lambda: kvk.linear_attention(case.q, case.k, case.v, cu_seqlens=starts)  # noqa: E731
    expect_error(call, "linear_attention", "cu_seqlens", *words)


def test_cu_seqlens_and_a_batch():
    case = make_case(2, 6, 2, 16, 8, state=False, starts=int32(0, 6))
    expect_error(case.run, "linear_attention", "q", "B = 1")


BACKWARD = ("grad_out", "grad_den", "grad_final_state", "grad_final_z", *GIVEN)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_arguments(name):
    case = make_case(2, 6, 3, 16, 8, apart=True)
    good = dict(zip(BACKWARD, [*(torch.ones_like(x) for x in case.run()), *positional(case)], strict=True))
    names = {"q": ["q", "k"], "v": ["v", "initial_state"]}.get(name, name)

    def refuse(bad, names=names):
        call = lambda: OPS.linear_attention_backward(*{**good, name: bad}.values())  # noqa: E731
        expect_error(call, "linear_attention_backward", names)

    for d in range(good[name].dim()):
        shape = list(good[name].shape)
        shape[d] += 1
        refuse(torch.ones(shape))
    refuse(good[name].double())
    refuse(good[name].to("meta"), [name, "grad_out"])
    if name != "grad_den":
        refuse(torch.stack([good[name], good[name]], -1)[..., 0])
