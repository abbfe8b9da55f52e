"""The quantized ops as torch sees them: schemas, opcheck, fakes, compile."""

from __future__ import annotations

import inspect

import kvk
import pytest
import torch
from kvk_testing import assert_bit_equal
from paged_strategies import DTYPES
from quant_cases import values
from torch.library import opcheck

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
    opcheck(
        torch.ops.kvk.quantize_pages.default,
        (*pages(dtype), IDS, *pools, IDS, FORMAT.numbers),
        {"k_clip": 0.9},
    )
    opcheck(torch.ops.kvk.dequantize_pages.default, (*pools, IDS, FORMAT.numbers, dtype))
    for axis in (-1, -2):
        x = values(2, 32, 64, dtype=dtype)
        opcheck(torch.ops.kvk.quantize.default, (x, 3, 16, axis))
        parts = kvk.quantize(x, 3, 16, axis)
        opcheck(torch.ops.kvk.dequantize.default, (*parts, 3, 16, axis), {"dtype": dtype})


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
