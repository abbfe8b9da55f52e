"""The quantized ops as torch sees them: schemas, opcheck, fakes, compile."""

from __future__ import annotations

import inspect

import kvk
import pytest
import torch
from kvk_testing import assert_bit_equal
from paged_strategies import DTYPES
from quant_attention_cases import QuantCase, make_quant_case
from quant_cases import values
from torch import library

FORMAT = kvk.QuantFormat(16, 32, 3, 4, 16, 32, head_dim_v=64)
IDS = torch.tensor([2, 0], dtype=torch.int32)


def pages(dtype=torch.float32):
    return values(3, 16, 2, 32, dtype=dtype), values(3, 16, 2, 64, dtype=dtype)


def zero_pools():
    return tuple(x.zero_() for x in FORMAT.new_pool(3, 2))


@pytest.mark.parametrize("op", ["quantize_pages", "dequantize_pages", "quantize", "dequantize"])
def test_python_and_torch_agree(op):
    """The same names and order; clips are in the format in Python."""
    schema = [
        a for a in getattr(torch.ops.kvk, op).default._schema.arguments if a.name not in ("k_clip", "v_clip")
    ]
    parameters = inspect.signature(getattr(kvk, op)).parameters.values()
    assert [a.name for a in schema] == [p.name for p in parameters]
    for argument, parameter in zip(schema, parameters, strict=True):
        assert argument.kwarg_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)


def test_only_pools_are_written():
    for op, names in (("quantize_pages", ["k_pool", "v_pool"]), ("dequantize_pages", []), ("quantize", []),
                      ("dequantize", [])):  # fmt: skip
        schema = getattr(torch.ops.kvk, op).default._schema
        assert [a.name for a in schema.arguments if a.is_write] == names
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"kvk::{op}", "Autograd"), op


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    pools = zero_pools()
    library.opcheck(
        torch.ops.kvk.quantize_pages.default,
        (*pages(dtype), IDS, *pools, IDS, FORMAT.numbers),
        {"k_clip": 0.9},
    )
    library.opcheck(torch.ops.kvk.dequantize_pages.default, (*pools, IDS, FORMAT.numbers, dtype))
    for axis in (-1, -2):
        x = values(2, 32, 64, dtype=dtype)
        library.opcheck(torch.ops.kvk.quantize.default, (x, 3, 16, axis))
        parts = kvk.quantize(x, 3, 16, axis)
        library.opcheck(torch.ops.kvk.dequantize.default, (*parts, 3, 16, axis), {"dtype": dtype})


def test_meta():
    fmt = FORMAT.numbers
    meta = [x.to("meta") for x in (*pages(), IDS, *zero_pools(), IDS)]
    assert torch.ops.kvk.quantize_pages(*meta, fmt) is None
    got = torch.ops.kvk.dequantize_pages(meta[3], meta[4], meta[2], fmt, torch.bfloat16)
    want = torch.ops.kvk.dequantize_pages(*zero_pools(), IDS, fmt, torch.bfloat16)
    x = values(2, 32, 64)
    got += kvk.quantize(x.to("meta"), 4, 32, -2)
    want += kvk.quantize(x, 4, 32, -2)
    got += (kvk.dequantize(*(y.to("meta") for y in want[2:]), 4, 32, -2),)
    want += (kvk.dequantize(*want[2:], 4, 32, -2),)
    for a, b in zip(got, want, strict=True):
        assert a.device.type == "meta" and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_compile():
    def function(k, v, k_pool, v_pool):
        kvk.quantize_pages(k, v, IDS, k_pool, v_pool, IDS, FORMAT)
        back = kvk.dequantize_pages(k_pool, v_pool, IDS, FORMAT, torch.float32)
        codes, scale, minimum = kvk.quantize(k, 4, 32)
        return *back, kvk.dequantize(codes, scale, minimum, 4, 32) + 1

    got_pools, want_pools = zero_pools(), zero_pools()
    got = torch.compile(function, fullgraph=True)(*pages(), *got_pools)
    want = function(*pages(), *want_pools)
    for a, b in zip((*got, *got_pools), (*want, *want_pools), strict=True):
        assert_bit_equal(a, b)


# Attention -------------------------------------------------------------------------------------------------

OPTIONS = {"window_left": 40, "logits_soft_cap": 3.0, "alibi": True, "sinks": True, "key_bias": "head"}


def attention_case(prefill: bool, dtype=torch.float32, **options) -> QuantCase:
    fmt = kvk.QuantFormat(16, 32, 4, 2, 16, 32, head_dim_v=64)
    case = make_quant_case([40, 20], [3, 2] if prefill else None, fmt=fmt, dtype=dtype, **options)
    for name in ("k_pages", "v_pages", "key_bias"):  # opcheck compares with ==, which NaN fails
        if name in case.options:
            case.options[name].nan_to_num_(0.0)
    return case


def as_ops_take_it(case: QuantCase) -> tuple:
    return (*case.args, case.fmt.numbers)


@pytest.mark.parametrize("op", ["quant_decode", "quant_prefill"])
def test_attention_schema(op):
    schema = getattr(torch.ops.kvk, op).default._schema.arguments
    parameters = [
        p for p in inspect.signature(getattr(kvk, op)).parameters.values() if p.name not in ("out", "lse")
    ]
    assert [a.name for a in schema] == [p.name for p in parameters]
    for argument, parameter in zip(schema, parameters, strict=True):
        assert argument.kwarg_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)
        if argument.has_default_value():
            assert argument.default_value == parameter.default
    out = getattr(torch.ops.kvk, op).out._schema
    assert [a.name for a in out.arguments if a.is_write] == ["out", "lse"]
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"kvk::{op}", "Autograd")


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("prefill", [False, True])
def test_attention_opcheck(prefill, options):
    case = attention_case(prefill, **options)
    packet = getattr(torch.ops.kvk, case.name)
    library.opcheck(packet.default, as_ops_take_it(case), case.options)
    out, lse = case.run()
    outputs = {"out": torch.zeros_like(out), "lse": torch.zeros_like(lse)}
    library.opcheck(packet.out, as_ops_take_it(case), {**case.options, **outputs})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefill", [False, True])
def test_attention_meta(prefill, dtype):
    case = attention_case(prefill, dtype)
    want = case.run()
    options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    got = getattr(kvk, case.name)(*(x.to("meta") for x in case.args), case.fmt, **options)
    for x, y in zip(got, want, strict=True):
        assert x.device.type == "meta" and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("prefill", [False, True])
def test_attention_out_and_compile(prefill):
    case = attention_case(prefill, **OPTIONS)
    want = case.run()
    wide, lse = torch.full((*want[0].shape[:2], 70), 7.0), torch.full(want[1].shape, 7.0)
    view = wide[..., 3:67]
    got = getattr(kvk, case.name)(*case.args, case.fmt, **case.options, out=view, lse=lse)
    assert got[0] is view and got[1] is lse and (wide[..., :3] == 7).all() and (wide[..., 67:] == 7).all()

    def function(*args):
        out, lse = getattr(kvk, case.name)(*args, case.fmt, **case.options)
        return out * 2, lse

    compiled = torch.compile(function, fullgraph=True)(*case.args)
    for a, b in zip((view.contiguous(), lse, *compiled), (*want, want[0] * 2, want[1]), strict=True):
        assert_bit_equal(a, b)
