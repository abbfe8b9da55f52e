"""The lightning ops as torch sees them, and bad input for every argument."""

from __future__ import annotations

import kvk
import pytest
import torch
from kvk_testing import assert_bit_equal, expect_error
from lightning_cases import BAD_STARTS, int32, make_case
from paged_strategies import DTYPES
from torch import library

OPS = torch.ops.kvk


def decode_args(dtype=torch.float32):
    case = make_case(1, 4, 2, 16, 8, dtype=dtype)
    pool = torch.randn(5, 2, 16, 8, generator=torch.Generator().manual_seed(3))
    return [case.q[0], case.k[0], case.v[0], pool, int32(3, -1, 0, 4), case.log_decay[0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_attention(dtype):
    for decay in ("none", "head", "token"):
        case = make_case(2, 9, 2, 16, 8, dtype=dtype, decay=decay)
        args = (case.q, case.k, case.v, case.log_decay, case.initial_state)
        library.opcheck(OPS.lightning_attention.default, args, {"scale": 0.5})
        wanted = tuple(x if x is None else x.clone().requires_grad_() for x in args)
        library.opcheck(OPS.lightning_attention.default, wanted, {"scale": 0.5})
    packed = make_case(1, 9, 2, 16, 8, dtype=dtype, starts=int32(0, 4, 4, 9))
    args = (packed.q, packed.k, packed.v, packed.log_decay.clone().requires_grad_(), None, packed.cu_seqlens)
    library.opcheck(OPS.lightning_attention.default, args)
    out, final = torch.zeros_like(packed.v), torch.zeros(3, 2, 16, 8)
    library.opcheck(
        OPS.lightning_attention.out,
        (*args[:3], None, None, packed.cu_seqlens),
        {"out": out, "final_state": final},
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_backward(dtype):
    case = make_case(2, 9, 2, 16, 8, dtype=dtype)
    args = (torch.ones_like(case.v), torch.ones_like(case.initial_state), case.q, case.k, case.v)
    library.opcheck(OPS.lightning_attention_backward.default, (*args, case.log_decay, case.initial_state))
    library.opcheck(
        OPS.lightning_attention_backward.default, (args[0], None, *args[2:], None), {"scale": 2.0}
    )
    library.opcheck(OPS.lightning_attention_backward.default, (*args, case.log_decay), {"decay_grad": False})


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_decode(dtype):
    args = decode_args(dtype)
    library.opcheck(OPS.lightning_decode.default, tuple(args), {"scale": 0.5})
    library.opcheck(OPS.lightning_decode.default, (*args[:5], None))
    library.opcheck(OPS.lightning_decode.out, tuple(args), {"out": torch.zeros_like(args[2])})


def test_compile():
    case = make_case(2, 70, 2, 16, 8)
    named = {"scale": 0.5}

    def loss(q, k, v, log_decay, initial_state):
        out, final = kvk.lightning_attention(q, k, v, -log_decay.exp(), initial_state=initial_state, **named)
        return (out * out).sum() + final.sum()

    inputs = [
        x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.log_decay, case.initial_state)
    ]
    want = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compile_decode():
    def step(q, k, v, pool, slots, log_decay):
        out = kvk.lightning_decode(q, k, v, pool, slots, log_decay)
        return out + kvk.lightning_decode(q, k, v, pool, slots, None), pool * 2

    args = decode_args()
    want_args = [x.clone() for x in args]
    want = step(*want_args)
    got = torch.compile(step, fullgraph=True)(*args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(args[3], want_args[3])


def test_meta():
    case = make_case(2, 9, 2, 16, 8, dtype=torch.bfloat16)
    out, final = kvk.lightning_attention(*(x.to("meta") for x in (case.q, case.k, case.v)), None)
    assert out.shape == case.v.shape and out.dtype == torch.bfloat16
    assert final.shape == (2, 2, 16, 8) and final.dtype == torch.float32


# Bad input -------------------------------------------------------------------------------------------------


def attention_args():
    case = make_case(2, 6, 3, 16, 8)
    return {
        "q": case.q,
        "k": case.k,
        "v": case.v,
        "log_decay": case.log_decay,
        "initial_state": case.initial_state,
        "out": torch.full_like(case.v, 7.0),
        "final_state": torch.full_like(case.initial_state, 7.0),
    }


def refused(args, name, *words, op="lightning_attention"):
    call = getattr(kvk, op)
    before = {key: x.clone() for key, x in args.items() if isinstance(x, torch.Tensor)}
    expect_error(lambda: call(**args), op, name, *words)
    written = ("out", "final_state") if op == "lightning_attention" else ("out",)
    for result in written:
        if result in args and args[result].device.type == "cpu":
            assert (args[result] == before[result]).all()


def extents(x):
    """Shapes one off in each dimension, and another rank."""
    for d in range(x.dim()):
        shape = list(x.shape)
        shape[d] += 8
        yield torch.ones(shape, dtype=x.dtype)
    yield torch.ones((*x.shape, 1), dtype=x.dtype)


ATTENTION = list(attention_args())
DECODE = ["q", "k", "v", "state", "slots", "log_decay", "out"]


@pytest.mark.parametrize("name", ATTENTION)
class TestAttentionArguments:
    def test_shape(self, name):
        for bad in extents(attention_args()[name]):
            if name in ("q", "v") and bad.dim() == 4 and bad.shape[3] != attention_args()[name].shape[3]:
                names = {"q": "k", "v": ["initial_state", "out"]}[
                    name
                ]  # its own last extent is free: others follow
            else:
                names = {"q": ["q", "k"]}.get(name, name)
            bad = bad if name != "log_decay" else -bad
            refused({**attention_args(), name: bad}, names)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
    def test_dtype(self, name, dtype):
        names = ["q", "k"] if name == "q" else name
        refused({**attention_args(), name: attention_args()[name].to(dtype)}, names)

    def test_last_stride(self, name):
        args = attention_args()
        if name == "log_decay":
            return  # any strides
        wide = torch.stack([args[name], args[name]], -1)
        args[name] = wide[..., 0]
        refused(args, name, "stride 1")

    def test_device(self, name):
        args = attention_args()
        args[name] = args[name].to("meta")
        expect_error(lambda: kvk.lightning_attention(**args), "lightning_attention", [name, "k"], "meta")


class TestAttentionValues:
    @pytest.mark.parametrize(("name", "dim"), [("q", 0), ("q", 257), ("v", 0), ("v", 264)])
    def test_head_dims(self, name, dim):
        case = make_case(1, 3, 1, 16, 16, state=False)
        big = torch.zeros(1, 3, 1, dim)
        changed = {"q": big, "k": big} if name == "q" else {"v": big}
        expect_error(lambda: case.with_(**changed).run(), "lightning_attention", name, f"got {dim}")

    @pytest.mark.parametrize("scale", [torch.inf, torch.nan])
    def test_scale(self, scale):
        refused({**attention_args(), "scale": scale}, "scale", "finite")

    def test_positive_decay(self):
        args = attention_args()
        args["log_decay"][1, 2, 0] = 1e-3
        refused(args, "log_decay", "positive", "element 24")
        args["log_decay"] = torch.tensor([-1.0, 0.0, 0.5])
        refused(args, "log_decay", "positive", "got 0.5 at element 2")

    def test_written_tensors(self):
        args = attention_args()
        args["out"] = torch.full((1, 6, 3, 8), 7.0).expand(2, 6, 3, 8)
        refused(args, "out", "expanded")
        args = attention_args()
        args["final_state"] = torch.full((1, 3, 16, 8), 7.0).expand(2, 3, 16, 8)
        refused(args, "final_state", "expanded")

    def test_out_without_final_state(self):
        args = attention_args()
        del args["final_state"]
        refused(args, "final_state", "go together")
        args = attention_args()
        del args["out"]
        refused(args, "out", "go together")

    @pytest.mark.parametrize(("starts", "words"), BAD_STARTS)
    def test_cu_seqlens(self, starts, words):
        case = make_case(1, 6, 2, 16, 8, state=False)
        call = lambda: kvk.lightning_attention(case.q, case.k, case.v, None, cu_seqlens=starts)  # noqa: E731
        expect_error(call, "lightning_attention", "cu_seqlens", *words)

    def test_cu_seqlens_and_a_batch(self):
        case = make_case(2, 6, 2, 16, 8, state=False, starts=int32(0, 6))
        expect_error(case.run, "lightning_attention", "q", "B = 1")

    def test_states_of_another_number_of_sequences(self):
        case = make_case(1, 6, 2, 16, 8, starts=int32(0, 2, 6))
        short = case.with_(initial_state=case.initial_state[:1])
        expect_error(short.run, "lightning_attention", "initial_state", "N=2")


def backward_args():
    case = make_case(2, 6, 3, 16, 8)
    first = [torch.ones_like(case.v), torch.ones_like(case.initial_state)]
    return [*first, case.q, case.k, case.v, case.log_decay, case.initial_state, None]


@pytest.mark.parametrize(
    ("at", "name"),
    list(enumerate(["grad_out", "grad_final_state", "q", "k", "v", "log_decay", "initial_state"])),
)
def test_backward_arguments(at, name):
    def refuse(bad, *names):
        args = backward_args()
        args[at] = bad
        expect_error(
            lambda: OPS.lightning_attention_backward(*args), "lightning_attention_backward", [name, *names]
        )

    good = backward_args()[at]
    for bad in extents(good):
        refuse(-bad, "k", "grad_out", "grad_final_state")
    refuse(good.to(torch.float64), "k")
    refuse(good.to("meta"), "grad_out", "k")
    if name != "log_decay":
        refuse(torch.stack([good, good], -1)[..., 0])


def test_backward_values():
    args = backward_args()
    args[5] = torch.ones(3)
    expect_error(
        lambda: OPS.lightning_attention_backward(*args),
        "lightning_attention_backward",
        "log_decay",
        "positive",
    )
    args = [x if x is None else x[:1] for x in backward_args()]
    args[7] = int32(0, 9)
    expect_error(
        lambda: OPS.lightning_attention_backward(*args),
        "lightning_attention_backward",
        "cu_seqlens",
        "6 tokens",
    )
    expect_error(
        lambda: OPS.lightning_attention_backward(*backward_args(), scale=torch.inf),
        "lightning_attention_backward",
        "scale",
    )


@pytest.mark.parametrize("name", DECODE)
class TestDecodeArguments:
    def args(self):
        args = dict(zip(DECODE, decode_args(), strict=False))
        return {**args, "out": torch.full_like(args["v"], 7.0)}

    def test_shape(self, name):
        for bad in extents(self.args()[name]):
            if name == "state" and bad.dim() == 4 and bad.shape[0] == 13:
                continue  # a pool of any number of slots
            names = {"q": ["q", "k"], "v": ["v", "state", "out"]}.get(name, name)
            refused({**self.args(), name: -bad}, names, op="lightning_decode")

    def test_dtype(self, name):
        names = ["q", "k"] if name == "q" else name
        for dtype in (torch.float64, torch.int64):
            refused({**self.args(), name: self.args()[name].to(dtype)}, names, op="lightning_decode")

    def test_last_stride(self, name):
        args = self.args()
        if name in ("slots", "log_decay"):
            return  # any strides
        args[name] = torch.stack([args[name], args[name]], -1)[..., 0]
        refused(args, name, "stride 1", op="lightning_decode")

    def test_device(self, name):
        args = self.args()
        args[name] = args[name].to("meta")
        expect_error(lambda: kvk.lightning_decode(**args), "lightning_decode", [name, "k"], "meta")


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ((3, -1, 5, 4), ["row 2", "slot 5", "pool of 5"]),
        ((3, -1, 3, 4), ["slot 3", "again at row 2"]),
        ((2**31 - 1, 0, 1, 2), ["row 0", "pool of 5"]),
    ],
)
def test_bad_slots(slots, words):
    args = decode_args()
    args[4] = int32(*slots)
    before = args[3].clone()
    expect_error(lambda: kvk.lightning_decode(*args), "lightning_decode", "slots", *words)
    assert_bit_equal(args[3], before)


def test_bad_values_of_decode():
    args = decode_args()
    args[5] = torch.tensor([-1.0, 1.0])
    expect_error(lambda: kvk.lightning_decode(*args), "lightning_decode", "log_decay", "positive")
    expect_error(lambda: kvk.lightning_decode(*decode_args(), scale=torch.nan), "lightning_decode", "scale")
    args = decode_args()
    args[3] = args[3][:1].expand(5, 2, 16, 8)
    expect_error(lambda: kvk.lightning_decode(*args), "lightning_decode", "state", "expanded")
