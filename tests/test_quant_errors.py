"""Bad input of the quantized ops and formats: every argument, each kind of wrong. Nothing is written on refusal."""

from __future__ import annotations

from typing import Any

import kvk
import pytest
import torch
from kvk_testing import bits, expect_error

FORMAT = kvk.QuantFormat(32, 64, 2, 4, head_dim_v=32)
HEADS = 2


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def quantize_pages_args() -> dict[str, Any]:
    k_pool, v_pool = (x.fill_(7) for x in FORMAT.new_pool(4, HEADS))
    return {
        "k_pages": torch.randn(3, 32, HEADS, 64),
        "v_pages": torch.randn(3, 32, HEADS, 32),
        "src": int32(0, 2),
        "k_pool": k_pool,
        "v_pool": v_pool,
        "dst": int32(3, 1),
        "fmt": FORMAT,
    }


def dequantize_pages_args() -> dict[str, Any]:
    args = quantize_pages_args()
    kvk.quantize_pages(**args)
    return {
        "k_pool": args["k_pool"],
        "v_pool": args["v_pool"],
        "ids": int32(1, 3, 1),
        "fmt": FORMAT,
        "dtype": torch.float32,
    }


def quantize_args() -> dict[str, Any]:
    return {"x": torch.randn(3, 64, 32), "bits": 4, "group": 32, "axis": -1}


def dequantize_args() -> dict[str, Any]:
    codes, scale, minimum = kvk.quantize(**quantize_args())
    return {"codes": codes, "scale": scale, "min": minimum, "bits": 4, "group": 32, "axis": -1}


ARGUMENTS = {
    "quantize_pages": quantize_pages_args,
    "dequantize_pages": dequantize_pages_args,
    "quantize": quantize_args,
    "dequantize": dequantize_args,
}
TENSORS = [
    (op, name) for op, make in ARGUMENTS.items() for name, x in make().items() if isinstance(x, torch.Tensor)
]


def refused(op: str, args: dict[str, Any], names: str | list[str], *words: str) -> None:
    tensors = {k: x for k, x in args.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
    before = {name: bits(x).clone() for name, x in tensors.items()}
    expect_error(lambda: getattr(kvk, op)(**args), op, names, *words)
    for name, x in tensors.items():
        assert torch.equal(bits(x), before[name]), f"{name} was written"


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_valid_call_is_valid(op):
    getattr(kvk, op)(**ARGUMENTS[op]())


@pytest.mark.parametrize(("op", "name"), TENSORS)
class TestEveryTensor:
    def names(self, op: str, name: str) -> list[str]:
        """Those whose shapes hang together: any of them may be named."""
        if op == "quantize":
            return ["x"]
        if op == "dequantize":
            return ["codes", "scale", "min", "x"]
        return (
            [name, "src", "dst"]
            if name in ("src", "dst")
            else [name, "k_pages", "v_pages", "v_pool", "k_pool"]
        )

    def test_rank(self, op, name):
        for change in (lambda x: x[None], lambda x: x.reshape(-1) if x.dim() != 1 else x[0]):
            args = ARGUMENTS[op]()
            args[name] = change(args[name])
            if op == "quantize":  # any rank is a tensor to quantize
                kvk.quantize(**args)
            else:
                refused(op, args, self.names(op, name), "got")

    def test_dtype(self, op, name):
        for dtype in (torch.float64, torch.int64, torch.int16, torch.bool):
            args = ARGUMENTS[op]()
            args[name] = args[name].to(dtype)
            refused(op, args, self.names(op, name), "got")

    def test_device(self, op, name):
        if op == "quantize":
            return
        args = ARGUMENTS[op]()
        args[name] = args[name].to("meta")
        refused(op, args, self.names(op, name) + list(args), "got")


class TestPools:
    @pytest.mark.parametrize("name", ["k_pages", "v_pages", "k_pool", "v_pool"])
    def test_last_stride(self, name):
        args = quantize_pages_args()
        args[name] = args[name].repeat_interleave(2, -1)[..., ::2]
        refused("quantize_pages", args, name, "stride 1")

    @pytest.mark.parametrize("name", ["k_pool", "v_pool"])
    @pytest.mark.parametrize("op", ["quantize_pages", "dequantize_pages"])
    def test_records_lie_on_16_bytes(self, op, name):
        for shift, gap, word in ((8, 0, "start"), (0, 8, "strides")):
            args = ARGUMENTS[op]()
            n, heads, size = args[name].shape
            whole = torch.zeros(n, heads, size + shift + gap, dtype=torch.uint8)
            args[name] = whole.view(-1)[shift:].as_strided(
                (n, heads, size), (heads * (size + gap), size + gap, 1)
            )
            refused(op, args, name, word)

    def test_record_size(self):
        for op in ("quantize_pages", "dequantize_pages"):
            args = ARGUMENTS[op]()
            args["k_pool"] = args["k_pool"][..., :-16]
            refused(op, args, "k_pool", f"record_bytes={FORMAT.k_record_bytes}")

    def test_expanded_pool(self):
        args = quantize_pages_args()
        args["k_pool"] = args["k_pool"][:1].expand(4, -1, -1)
        refused("quantize_pages", args, "k_pool", "expanded")

    @pytest.mark.parametrize(("name", "limit"), [("src", 3), ("dst", 4)])
    @pytest.mark.parametrize("page", [-1, 3, 4, 2**31 - 1, -(2**31)])
    def test_page_ids(self, name, limit, page):
        args = quantize_pages_args()
        if 0 <= page < limit:
            return
        args[name] = int32(0, page)
        refused("quantize_pages", args, name, f"got {page} at entry 1")

    def test_ids_of_dequantize(self):
        args = dequantize_pages_args()
        args["ids"] = int32(0, 4)
        refused("dequantize_pages", args, "ids", "got 4 at entry 1")

    def test_src_and_dst_differ_in_length(self):
        args = quantize_pages_args()
        args["dst"] = int32(1)
        refused("quantize_pages", args, "dst", "n=2")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
    def test_dtype_of_the_result(self, dtype):
        expect_error(
            lambda: kvk.dequantize_pages(**{**dequantize_pages_args(), "dtype": dtype}),
            "dequantize_pages",
            "k",
        )
        expect_error(lambda: kvk.dequantize(**dequantize_args(), dtype=dtype), "dequantize", "x", "float32")

    @pytest.mark.parametrize("name", ["k_clip", "v_clip"])
    @pytest.mark.parametrize("clip", [0.0, -1.0, 1.01, float("nan"), float("inf")])
    def test_clip(self, name, clip):
        args = quantize_pages_args()
        fmt = args.pop("fmt")
        expect_error(
            lambda: torch.ops.kvk.quantize_pages(*args.values(), fmt.numbers, **{name: clip}),
            "quantize_pages",
            name,
        )
        with pytest.raises(ValueError, match=f"{name} must be"):
            kvk.QuantFormat(32, 64, **{name: clip})


NUMBERS = FORMAT.numbers
BAD_NUMBERS = [
    (0, 0, "page_size"),
    (0, 65537, "page_size"),
    (0, 48, "k_group"),
    (1, 36, "D"),
    (1, 24, "D"),
    (1, 264, "D"),
    (2, 0, "Dv"),
    (3, 1, "k_bits"),
    (3, 5, "k_bits"),
    (3, -2, "k_"),
    (4, 8, "k_group"),
    (4, 256, "k_group"),
    (4, 2**40, "k_"),
    (5, 2, "k_axis"),
    (6, 11, "k_rotate"),
    (7, 6, "v_bits"),
    (8, 12, "v_group"),
    (8, 20, "v_group"),
    (9, 3, "v_axis"),
    (10, 13, "v_rotate"),
]


@pytest.mark.parametrize(("at", "number", "word"), BAD_NUMBERS)
def test_numbers_of_a_format(at, number, word):
    numbers = list(NUMBERS)
    numbers[at] = number
    message = expect_error(lambda: torch.ops.kvk._quant_layout(numbers), "_quant_layout", "fmt", word)
    assert "got" in message
    args = quantize_pages_args()
    args.pop("fmt")
    expect_error(lambda: torch.ops.kvk.quantize_pages(*args.values(), numbers), "quantize_pages", "fmt", word)
    assert (args["k_pool"] == 7).all()


def test_count_of_numbers():
    for numbers in ([], NUMBERS[:-1], [*NUMBERS, 0]):
        expect_error(
            lambda numbers=numbers: torch.ops.kvk._quant_layout(numbers), "_quant_layout", "fmt", "11"
        )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": 40}, "k_group"),
        ({"head_dim": 36}, "head_dim"),
        ({"head_dim_v": 257}, "head_dim_v"),
        ({"k_bits": 5}, "k_bits"),
        ({"v_bits": 1}, "v_bits"),
        ({"k_group": 8}, "k_group"),
        ({"v_group": 48}, "v_group"),
        ({"v_group": 20, "head_dim": 40}, "v_group"),
        ({"k_axis": "row"}, "k_axis"),
        ({"v_axis": 0}, "v_axis"),
        ({"k_rotate": 11}, "k_rotate"),
        ({"k_rotate": 1, "head_dim": 72, "v_group": 72}, "k_rotate"),
    ],
)
def test_formats_in_python(options, word):
    with pytest.raises(ValueError, match=word):
        kvk.QuantFormat(**{"page_size": 32, "head_dim": 64, **options})


class TestAnyTensor:
    @pytest.mark.parametrize(
        ("options", "names"),
        [
            ({"bits": 5}, "bits"),
            ({"bits": 0}, ["bits"]),
            ({"bits": -(2**40)}, "bits"),
            ({"group": 0}, "group"),
            ({"group": 8}, "group"),
            ({"group": 129}, "group"),
            ({"group": 2**40}, "group"),
            ({"group": 24}, "group"),
            ({"group": 48, "axis": -2}, "group"),
            ({"axis": 0}, "axis"),
            ({"axis": -3}, "axis"),
            ({"axis": 1}, "axis"),
            ({"x": torch.zeros(3, 36)}, "x"),
            ({"x": torch.tensor(1.0)}, "x"),
            ({"x": torch.zeros(32), "axis": -2}, "x"),
            ({"x": torch.zeros(32, 64).T}, "x"),
            ({"clip": 0.0}, "clip"),
            ({"clip": 1.5}, "clip"),
        ],
    )
    def test_quantize(self, options, names):
        refused("quantize", {**quantize_args(), **options}, names, "got")

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            ({"bits": 0}, "bits"),
            ({"bits": 8}, ["scale", "group"]),
            ({"group": 16}, "scale"),
            ({"axis": -2}, "scale"),
            ({"axis": 5}, "axis"),
            ({"scale": torch.zeros(3, 64, 2).half()}, "scale"),
            ({"min": torch.zeros(3, 1, 64).half().transpose(1, 2).expand(3, 64, 1)[:, :1]}, "min"),
            ({"codes": torch.zeros(64, 3, 16, dtype=torch.uint8).transpose(0, 1)}, "codes"),
        ],
    )
    def test_dequantize(self, options, names):
        refused("dequantize", {**dequantize_args(), **options}, names, "got")
