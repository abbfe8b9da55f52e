"""The bitmap-sparse ops as torch sees them: schemas, opcheck, fakes, compile, and bad input of the page ops."""

from __future__ import annotations

import inspect
from typing import Any

import kvk
import pytest
import torch
from kvk_testing import assert_bit_equal, bits, expect_error
from quant_attention_cases import make_quant_case
from torch import library

FORMAT = kvk.BitmapFormat(16, 32, 8, 40, head_dim_v=64)
OPTIONS = {"window_left": 40, "logits_soft_cap": 3.0, "alibi": True, "sinks": True, "key_bias": "head"}


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def compress_args() -> dict[str, Any]:
    k_pool, v_pool = (x.fill_(7) for x in FORMAT.new_pool(4, 2))
    return {
        "k_pages": torch.randn(3, 16, 2, 32).bfloat16(),
        "v_pages": torch.randn(3, 16, 2, 64).bfloat16(),
        "src": int32(0, 2),
        "k_pool": k_pool,
        "v_pool": v_pool,
        "dst": int32(3, 1),
        "fmt": FORMAT,
        "k_select": torch.randn(2, 16, 2, 32),
        "v_select": torch.rand(2, 16, 2, 64) < 0.2,
    }


def decompress_args() -> dict[str, Any]:
    args = compress_args()
    kvk.compress_pages(**args)
    return {"k_pool": args["k_pool"], "v_pool": args["v_pool"], "ids": int32(1, 3, 1), "fmt": FORMAT}


ARGUMENTS = {"compress_pages": compress_args, "decompress_pages": decompress_args}
TENSORS = [
    (op, name) for op, make in ARGUMENTS.items() for name, x in make().items() if isinstance(x, torch.Tensor)
]


def op_args(op: str) -> tuple[list[Any], dict[str, Any]]:
    args = ARGUMENTS[op]()
    options = {name: args.pop(name) for name in list(args) if name.endswith("_select")}
    return [x.numbers if x is FORMAT else x for x in args.values()], options


@pytest.mark.parametrize("op", ["compress_pages", "decompress_pages", "sparse_decode", "sparse_prefill"])
def test_schema(op):
    schema = getattr(torch.ops.kvk, op).default._schema.arguments
    names = [
        p for p in inspect.signature(getattr(kvk, op)).parameters.values() if p.name not in ("out", "lse")
    ]
    assert [a.name for a in schema] == [p.name for p in names]
    for argument, parameter in zip(schema, names, strict=True):
        assert argument.kwarg_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)
        if argument.has_default_value():
            assert argument.default_value == parameter.default
    written = [a.name for a in schema if a.is_write]
    assert written == (["k_pool", "v_pool"] if op == "compress_pages" else [])
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"kvk::{op}", "Autograd")


@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck_and_meta_of_pages(op):
    args, options = op_args(op)
    packet = getattr(torch.ops.kvk, op)
    library.opcheck(packet.default, args, options)
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    got = packet(*meta, **{name: x.to("meta") for name, x in options.items()})
    want = packet(*args, **options)
    for x, y in zip(got or (), want or (), strict=True):
        assert x.device.type == "meta" and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def attention_case(prefill: bool, **options):
    case = make_quant_case([40, 20], [3, 2] if prefill else None, fmt=FORMAT, dtype=torch.bfloat16, **options)
    for name in ("k_pages", "v_pages", "key_bias"):  # opcheck compares with ==, which NaN fails
        if name in case.options:
            case.options[name].nan_to_num_(0.0)
    return case


@pytest.mark.parametrize("prefill", [False, True])
def test_attention_opcheck(prefill):
    case = attention_case(prefill, **OPTIONS)
    packet, args = getattr(torch.ops.kvk, case.name), (*case.args, FORMAT.numbers)
    library.opcheck(packet.default, args, case.options)
    out, lse = case.run()
    library.opcheck(
        packet.out, args, {**case.options, "out": torch.zeros_like(out), "lse": torch.zeros_like(lse)}
    )
    options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    got = getattr(kvk, case.name)(*(x.to("meta") for x in case.args), FORMAT, **options)
    for x, y in zip(got, (out, lse), strict=True):
        assert x.device.type == "meta" and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("prefill", [False, True])
def test_attention_out_and_compile(prefill):
    case = attention_case(prefill, **OPTIONS)
    want = case.run()
    wide = torch.full((*want[0].shape[:2], 70), 7.0, dtype=torch.bfloat16)
    view, lse = wide[..., 3:67], torch.full(want[1].shape, 7.0)
    got = getattr(kvk, case.name)(*case.args, FORMAT, **case.options, out=view, lse=lse)
    assert got[0] is view and got[1] is lse and (wide[..., :3] == 7).all() and (wide[..., 67:] == 7).all()

    def function(*args):
        out, lse = getattr(kvk, case.name)(*args, FORMAT, **case.options)
        return out * 2, lse

    compiled = torch.compile(function, fullgraph=True)(*case.args)
    for a, b in zip((view.contiguous(), lse, *compiled), (*want, want[0] * 2, want[1]), strict=True):
        assert_bit_equal(a, b)


def refused(op: str, args: dict[str, Any], names: str | list[str], *words: str) -> None:
    tensors = {k: x for k, x in args.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
    before = {name: bits(x).clone() for name, x in tensors.items() if x.dtype != torch.bool}
    expect_error(lambda: getattr(kvk, op)(**args), op, names, *words)
    for name, x in before.items():
        assert torch.equal(bits(tensors[name]), x), f"{name} was written"


@pytest.mark.parametrize(("op", "name"), TENSORS)
class TestEveryTensor:
    def names(self, name: str) -> list[str]:
        """Those whose shapes hang together: any of them may be named."""
        together = ["src", "dst", "k_select", "v_select"]
        pools = ["k_pages", "v_pages", "k_pool", "v_pool"]
        return [name, *(together if name in together else pools)]

    def test_rank(self, op, name):
        for change in (lambda x: x[None], lambda x: x.reshape(-1) if x.dim() != 1 else x[0]):
            args = ARGUMENTS[op]()
            args[name] = change(args[name])
            refused(op, args, self.names(name), "got")

    def test_dtype(self, op, name):
        for dtype in (torch.float64, torch.int64, torch.float16):
            args = ARGUMENTS[op]()
            args[name] = args[name].to(dtype)
            refused(op, args, self.names(name), "got")

    def test_device(self, op, name):
        args = ARGUMENTS[op]()
        args[name] = args[name].to("meta")
        refused(op, args, list(args), "got")

    def test_last_stride(self, op, name):
        args = ARGUMENTS[op]()
        if args[name].dim() == 1:
            args[name] = args[name].repeat_interleave(2)[::2]
            getattr(kvk, op)(**args)
            return
        args[name] = args[name].repeat_interleave(2, -1)[..., ::2]
        refused(op, args, name, "stride 1")


class TestPages:
    @pytest.mark.parametrize("name", ["k_pool", "v_pool"])
    @pytest.mark.parametrize("op", ARGUMENTS)
    def test_records_lie_on_16_bytes(self, op, name):
        args = ARGUMENTS[op]()
        n, heads, size = args[name].shape
        whole = torch.zeros(n * heads * (size + 8) + 8, dtype=torch.uint8)
        for offset, gap, word in ((8, 0, "start"), (0, 8, "strides")):
            strides = (heads * (size + gap), size + gap, 1)
            refused(op, {**args, name: whole[offset:].as_strided((n, heads, size), strides)}, name, word)
        refused(op, {**args, name: args[name][..., :-16]}, name, "record_bytes=")

    @pytest.mark.parametrize(("name", "limit"), [("src", 3), ("dst", 4)])
    @pytest.mark.parametrize("page", [-1, 4, 2**31 - 1, -(2**31)])
    def test_page_ids(self, name, limit, page):
        refused("compress_pages", {**compress_args(), name: int32(0, page)}, name, f"got {page} at entry 1")
        refused(
            "decompress_pages", {**decompress_args(), "ids": int32(page)}, "ids", f"got {page} at entry 0"
        )

    def test_expanded_pool(self):
        args = compress_args()
        args["k_pool"] = args["k_pool"][:1].expand(4, -1, -1)
        refused("compress_pages", args, "k_pool", "expanded")

    def test_pages_of_another_dtype(self):
        args = compress_args()
        for name in ("k_pages", "v_pages"):
            args[name] = args[name].half()
        refused("compress_pages", args, "k_pages", "bfloat16 like the format, or float32, got float16")

    @pytest.mark.parametrize("packed", [False, True])
    def test_a_mask_with_too_many(self, packed):
        args = compress_args()
        mask = torch.zeros(2, 16, 2, 32, dtype=torch.bool)
        mask[1, 5, 1, :9] = True
        args["k_select"] = kvk.reference.sparse.pack_bitmap(mask) if packed else mask
        refused("compress_pages", args, "k_select", "at most the 8 elements", "got 9 at [1, 5, 1]")

    def test_bitmaps_of_the_wrong_width(self):
        args = compress_args()
        args["v_select"] = torch.zeros(2, 16, 2, 64, dtype=torch.uint8)
        refused("compress_pages", args, "v_select", "D / 8=8")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": 65537}, "page_size"),
        ({"head_dim": 36}, "head_dim"),
        ({"head_dim_v": 264}, "head_dim_v"),
        ({"k_keep": 0}, "k_keep"),
        ({"k_keep": 20}, "k_keep"),
        ({"v_keep": 72}, "v_keep"),
        ({"dtype": torch.float32}, "dtype"),
        ({"k_rotate": 2}, "k_rotate"),
        ({"v_rotate": 1, "head_dim": 72}, "v_rotate"),
    ],
)
def test_formats_in_python(options, word):
    with pytest.raises(ValueError, match=word):
        kvk.BitmapFormat(**{"page_size": 32, "head_dim": 64, "k_keep": 32, "v_keep": 32, **options})
