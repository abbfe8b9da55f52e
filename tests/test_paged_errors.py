"""Bad input: every argument of every op, each kind of wrong. Nothing may be written when an op refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvk
import pytest
import torch
from kvk_testing import bits, expect_error
from torch import Tensor

B, T, HQ, HKV, D, DV, N, P, NNZ = 2, 5, 4, 2, 64, 40, 4, 8, 6
ATTENTION = ("paged_decode", "paged_prefill")


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(op: str) -> dict[str, Any]:
    """A valid call: requests of 10 and 20 keys in pages of 8; every tensor option given."""
    gen = torch.Generator().manual_seed(0)
    pools = {
        "k_pages": torch.randn(N, P, HKV, D, generator=gen),
        "v_pages": torch.randn(N, P, HKV, DV, generator=gen),
    }
    if op == "append_kv":
        k, v = torch.randn(T, HKV, D, generator=gen), torch.randn(T, HKV, DV, generator=gen)
        return {"k": k, "v": v, **pools, "slot_mapping": torch.tensor([0, 9, -1, 31, 5])}
    if op == "merge_states":
        return {"out": torch.randn(3, T, HQ, D, generator=gen), "lse": torch.randn(3, T, HQ, generator=gen)}
    rows = B if op == "paged_decode" else T
    args: dict[str, Any] = {"q": torch.randn(rows, HQ, D, generator=gen)}
    if op == "paged_prefill":
        args["qo_indptr"] = int32(0, 2, 5)
    args |= pools
    args |= {"page_indices": int32([0, 3, -7], [2, 1, 3]), "kv_lens": int32(10, 20)}
    args |= {"alibi_slopes": torch.rand(HQ), "sinks": torch.rand(HQ), "key_bias": torch.rand(N, P)}
    if op == "paged_prefill":
        args["mask_bits"] = torch.full((T, 1), 2**31 - 1, dtype=torch.int32)
    return args


def as_csr(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, "page_indices": int32(0, 3, -7, 2, 1, 3), "page_indptr": int32(0, 3, 6)}


def call(op: str, args: dict[str, Any]) -> Any:
    """Positional up to kv_lens, as the signature has it; the rest by keyword."""
    args = dict(args)
    count = {"paged_decode": 5, "paged_prefill": 6}.get(op, len(args))
    positional = [args.pop(name) for name in list(args)[:count]]
    return getattr(kvk, op)(*positional, **args)


def refused(op: str, args: dict[str, Any], names: str | list[str], *words: str) -> str:
    """The call fails with a message that names the op and an argument, in both forms, and writes nothing."""
    tensors = {k: v for k, v in args.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    before = {name: bits(x).clone() for name, x in tensors.items()}
    if op in ATTENTION and "out" not in args:
        out, lse = torch.full((args_rows(op), HQ, DV), 7.0), torch.full((args_rows(op), HQ), 7.0)
        expect_error(lambda: call(op, {**args, "out": out, "lse": lse}), op, names, *words)
        assert (out == 7).all() and (lse == 7).all(), "something was written"
    message = expect_error(lambda: call(op, args), op, names, *words)
    for name, x in tensors.items():
        assert torch.equal(bits(x), before[name]), f"{name} was written"
    return message


def args_rows(op: str) -> int:
    return B if op == "paged_decode" else T


def sparse_last(x: Tensor) -> Tensor:
    """The same values with stride 2 in the last dimension."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


OPS_AND_TENSORS = [
    (op, name)
    for op in (*ATTENTION, "append_kv", "merge_states")
    for name, value in arguments(op).items()
    if isinstance(value, Tensor)
] + [(op, "page_indptr") for op in ATTENTION]


def valid(op: str, name: str) -> dict[str, Any]:
    args = arguments(op)
    return as_csr(args) if name == "page_indptr" else args


@pytest.mark.parametrize("op", [*ATTENTION, "append_kv", "merge_states"])
def test_the_valid_call_is_valid(op):
    call(op, arguments(op))
    if op in ATTENTION:
        call(op, as_csr(arguments(op)))


@pytest.mark.parametrize(("op", "name"), OPS_AND_TENSORS)
class TestEveryTensor:
    def test_rank_too_high(self, op, name):
        args = valid(op, name)
        args[name] = args[name][None]
        message = refused(op, args, name, "got")
        assert str(list(args[name].shape)) in message

    def test_rank_too_low(self, op, name):
        args = valid(op, name)
        args[name] = args[name][0]
        message = refused(op, args, name, "got")
        assert str(list(args[name].shape)) in message

    def test_dtype(self, op, name):
        args = valid(op, name)
        right = args[name]
        for dtype in (torch.float64, torch.int64, torch.int16, torch.uint8, torch.bool):
            if right.dtype != dtype:
                args[name] = right.to(dtype)
                refused(op, args, name, f"got {str(dtype).removeprefix('torch.')}")
        args[name] = right.to(torch.complex64)
        refused(op, args, name, "got")

    def test_dtype_of_the_other_kind(self, op, name):
        args = valid(op, name)
        args[name] = args[name].to(torch.int32 if args[name].is_floating_point() else torch.float32)
        refused(op, args, name, f"got {str(args[name].dtype).removeprefix('torch.')}")

    def test_device(self, op, name):
        args = valid(op, name)
        args[name] = args[name].to("meta")
        refused(op, args, name, "got", "meta")

    def test_not_a_tensor(self, op, name):
        args = valid(op, name)
        args[name] = args[name].tolist()
        with pytest.raises((RuntimeError, TypeError), match=name):
            call(op, args)


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op in ATTENTION for name in ("q", "k_pages", "v_pages")]
    + [("append_kv", name) for name in ("k", "v", "k_pages", "v_pages")]
    + [("merge_states", "out")],
)
def test_last_stride(op, name):
    args = arguments(op)
    args[name] = sparse_last(args[name])
    refused(op, args, name, "stride 1", "got 2")


# Shapes that do not fit together: (op, argument, shape, arguments that may be named).
def wrong_shapes():
    for op in (*ATTENTION, "append_kv"):
        for name, dim in (("k_pages", D), ("v_pages", DV)):
            for shape in ((N + 1, P, HKV, dim), (N, P + 1, HKV, dim), (N, P, HKV + 1, dim)):
                yield op, name, shape, ["k_pages", "v_pages"]
    for op in ATTENTION:
        rows = args_rows(op)
        for shape in ((rows, HQ, D + 8), (rows, HQ + 1, D), (rows, 1, D)):
            yield op, "q", shape, ["q", "k_pages"]
        yield op, "k_pages", (N, P, HKV, D + 8), ["q", "k_pages"]
        for shape in ((B + 1, 3), (B, HKV + 1, 3), (B + 1, HKV, 3)):
            yield op, "page_indices", shape, ["page_indices"]
        for shape in ((B + 1,), (B, HKV + 1), (B + 1, HKV)):
            yield op, "kv_lens", shape, ["kv_lens"]
        for shape in ((HQ + 1,), (HKV,)):
            yield op, "alibi_slopes", shape, ["alibi_slopes"]
            yield op, "sinks", shape, ["sinks"]
        for shape in ((N + 1, P), (N, P + 1), (N, P, HKV + 1)):
            yield op, "key_bias", shape, ["key_bias"]
        for size in (B, B + 2, B * HKV):
            yield op, "page_indptr", (size,), ["page_indptr"]
    yield "paged_decode", "q", (B + 1, HQ, D), ["q", "page_indices", "kv_lens", "out"]
    yield "paged_prefill", "qo_indptr", (B + 2,), ["qo_indptr", "page_indices", "kv_lens"]
    yield "paged_prefill", "qo_indptr", (0,), ["qo_indptr"]
    yield "paged_prefill", "mask_bits", (T + 1, 1), ["mask_bits"]
    for name, dim in (("k", D), ("v", DV)):
        yield "append_kv", name, (T + 1, HKV, dim), ["k", "v", "slot_mapping"]
        yield "append_kv", name, (T, HKV + 1, dim), ["k", "v"]
        yield "append_kv", name, (T, HKV, dim + 8), [name]
    yield "append_kv", "slot_mapping", (T + 1,), ["slot_mapping"]
    for shape in ((4, T, HQ), (3, T + 1, HQ), (3, T, HQ + 1)):
        yield "merge_states", "lse", shape, ["lse"]


@pytest.mark.parametrize(("op", "name", "shape", "names"), list(wrong_shapes()))
def test_shapes_that_do_not_fit(op, name, shape, names):
    args = valid(op, name)
    args[name] = torch.zeros(shape, dtype=args[name].dtype)
    refused(op, args, names, "got")


@pytest.mark.parametrize("dim", [0, 8, 24, 28, 36, 100, 257, 264, 512])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("op", [*ATTENTION, "append_kv"])
def test_head_dim(op, which, dim):
    args = arguments(op)
    args[f"{which}_pages"] = torch.zeros(N, P, HKV, dim)
    if op == "append_kv":
        args[which] = torch.zeros(T, HKV, dim)
    elif which == "k":
        args["q"] = torch.zeros(args_rows(op), HQ, dim)
    names = [f"{which}_pages", which, "q"]
    if op in ATTENTION:
        expect_error(lambda: call(op, args), op, names, f"got {dim}")
        args = {**args, "out": torch.full((args_rows(op), HQ, dim if which == "v" else DV), 7.0)}
        args["lse"] = torch.full((args_rows(op), HQ), 7.0)
    refused(op, args, names, f"got {dim}")


@pytest.mark.parametrize("op", [*ATTENTION, "append_kv"])
@pytest.mark.parametrize(("page_size", "heads"), [(0, HKV), (P, 0)])
def test_empty_page_or_head_dimension(op, page_size, heads):
    args = arguments(op)
    for name in ("k_pages", "v_pages"):
        args[name] = args[name].new_zeros(N, page_size, heads, args[name].shape[3])
    if heads == 0 and op == "append_kv":
        args |= {"k": torch.zeros(T, 0, D), "v": torch.zeros(T, 0, DV)}
    refused(op, args, ["k_pages", "v_pages"], "got")


@pytest.mark.parametrize(
    ("first", "other"), [("q", "k_pages"), ("q", "v_pages"), ("k_pages", "v_pages"), ("v_pages", "k_pages")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ATTENTION)
def test_mixed_float_dtypes(op, first, other, dtype):
    args = arguments(op)
    args[first] = args[first].to(dtype)
    refused(op, args, ["q", "k_pages", "v_pages"], str(dtype).removeprefix("torch."))
    args[other] = args[other].to(torch.float16 if dtype == torch.bfloat16 else torch.bfloat16)
    refused(op, args, ["q", "k_pages", "v_pages"], "got")


@pytest.mark.parametrize("name", ["k", "v", "k_pages", "v_pages"])
def test_append_dtypes(name):
    args = arguments("append_kv")
    args[name] = args[name].to(torch.bfloat16)
    refused("append_kv", args, ["k", "v", "k_pages", "v_pages"], "bfloat16", "float32")


SCALARS = [
    (op, name, value)
    for op in ATTENTION
    for name, value in [
        ("softmax_scale", float("nan")),
        ("softmax_scale", float("inf")),
        ("softmax_scale", float("-inf")),
        ("logits_soft_cap", -1.0),
        ("logits_soft_cap", -1e-30),
        ("logits_soft_cap", float("nan")),
        ("logits_soft_cap", float("inf")),
        ("window_left", -2),
        ("window_left", -(2**62)),
    ]
] + [("paged_prefill", "mask_width", value) for value in (-2, 33, 2**62)]


@pytest.mark.parametrize(("op", "name", "value"), SCALARS)
def test_scalars(op, name, value):
    names = [name, "mask_bits"] if name == "mask_width" else name
    refused(op, {**arguments(op), name: value}, names, "mask_width" if name == "mask_width" else "got")


def test_mask_without_words():
    args = {**arguments("paged_prefill"), "mask_bits": torch.zeros(T, 0, dtype=torch.int32)}
    refused("paged_prefill", args, "mask_bits", "0 words", "2")


def test_mask_too_narrow_for_the_request():
    gen = torch.Generator().manual_seed(1)
    args = arguments("paged_prefill")
    args |= {"q": torch.randn(40, HQ, D, generator=gen), "qo_indptr": int32(0, 33, 40)}
    args |= {"mask_bits": torch.ones(40, 1, dtype=torch.int32), "out": torch.full((40, HQ, DV), 7.0)}
    args["lse"] = torch.full((40, HQ), 7.0)
    refused("paged_prefill", args, "mask_bits", "33")
    assert (args["out"] == 7).all()


# Values that are read before anything else happens: (what, changes, argument named, words).
TABLE_VALUES: list[tuple[str, Callable[[], dict[str, Any]], str, tuple[str, ...]]] = [
    ("page", lambda: {"page_indices": int32([0, 3, 0], [2, 4, 3])}, "page_indices", ("request 1", "4")),
    ("last_page", lambda: {"page_indices": int32([0, 3, 0], [2, 1, 9])}, "page_indices", ("request 1", "9")),
    ("negative", lambda: {"page_indices": int32([-1, 3, 0], [2, 1, 3])}, "page_indices", ("request 0", "-1")),
    ("page_of_a_head", lambda: {"page_indices": int32([[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [0, 1, 7]])},
     "page_indices", ("request 1", "7")),
    ("length_past_the_table", lambda: {"kv_lens": int32(10, 25)}, "kv_lens", ("request 1", "25")),
    ("length_of_a_head", lambda: {"kv_lens": int32([10, 10], [20, 25])}, "kv_lens", ("request 1", "25")),
    ("largest_length", lambda: {"kv_lens": int32(10, 2**31 - 1)}, "kv_lens", ("request 1",)),
    ("negative_length", lambda: {"kv_lens": int32(-1, 20)}, "kv_lens", ("-1",)),
    ("smallest_length", lambda: {"kv_lens": int32(10, -(2**31))}, "kv_lens", ("-2147483648",)),
    ("no_table", lambda: {"page_indices": torch.empty(2, 0).int()}, "kv_lens", ("request 0",)),
]  # fmt: skip
CSR_VALUES: list[tuple[str, Callable[[], dict[str, Any]], str, tuple[str, ...]]] = [
    ("start", lambda: {"page_indptr": int32(1, 3, 6)}, "page_indptr", ("1",)),
    ("negative_start", lambda: {"page_indptr": int32(-1, 3, 6)}, "page_indptr", ("-1",)),
    ("decreasing", lambda: {"page_indptr": int32(0, 4, 3)}, "page_indptr", ("3",)),
    ("past_the_indices", lambda: {"page_indptr": int32(0, 3, 7)}, "page_indptr", ("7", "6")),
    ("far_past_the_indices", lambda: {"page_indptr": int32(0, 3, 2**31 - 1)}, "page_indptr", ("6",)),
    ("list_too_short", lambda: {"page_indptr": int32(0, 1, 6)}, "kv_lens", ("request 0", "10")),
    ("page", lambda: {"page_indices": int32(0, 3, 0, 2, 1, 4)}, "page_indices", ("request 1", "4")),
    ("per_head", lambda: {"page_indptr": int32(0, 2, 4, 6, 7)}, "page_indptr", ("7",)),
    ("per_head_page", lambda: {"page_indices": int32(0, 1, 0, 1, 0, 1, 2, 0, 1, 9),
                               "page_indptr": int32(0, 2, 4, 7, 10)}, "page_indices", ("request 1", "9")),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE_VALUES, ids=lambda case: case[0])
@pytest.mark.parametrize("op", ATTENTION)
def test_table_values(op, case):
    _, change, name, words = case
    refused(op, {**arguments(op), **change()}, name, *words)


@pytest.mark.parametrize("case", CSR_VALUES, ids=lambda case: case[0])
@pytest.mark.parametrize("op", ATTENTION)
def test_csr_values(op, case):
    _, change, name, words = case
    refused(op, {**as_csr(arguments(op)), **change()}, name, *words)


@pytest.mark.parametrize(
    ("indptr", "word"),
    [((1, 2, 5), "1"), ((-1, 2, 5), "-1"), ((0, 4, 2), "2"), ((0, 2, 6), "6"), ((0, 2, 2**31 - 1), "5")],
)
def test_qo_indptr_values(indptr, word):
    refused("paged_prefill", {**arguments("paged_prefill"), "qo_indptr": int32(*indptr)}, "qo_indptr", word)


@pytest.mark.parametrize("slot", [N * P, N * P + 1, 2**31, 2**62, 2**63 - 1])
@pytest.mark.parametrize("place", [0, 2, T - 1])
def test_slot_past_the_pool(slot, place):
    args = arguments("append_kv")
    args["slot_mapping"][place] = slot
    refused("append_kv", args, "slot_mapping", str(slot))


def test_slot_in_an_empty_pool():
    args = arguments("append_kv")
    args |= {"k_pages": torch.zeros(0, P, HKV, D), "v_pages": torch.zeros(0, P, HKV, DV)}
    refused("append_kv", args, "slot_mapping")


@pytest.mark.parametrize("op", ATTENTION)
class TestOut:
    def outputs(self, op):
        rows = args_rows(op)
        return {"out": torch.full((rows, HQ, DV), 7.0), "lse": torch.full((rows, HQ), 7.0)}

    def bad(self, op, name, tensor, *words):
        outputs = {**self.outputs(op), name: tensor}
        refused(op, {**arguments(op), **outputs}, name, *words)

    def test_dtype(self, op):
        outputs = self.outputs(op)
        self.bad(op, "out", outputs["out"].bfloat16(), "bfloat16")
        self.bad(op, "out", outputs["out"].double(), "float64")
        self.bad(op, "lse", outputs["lse"].bfloat16(), "bfloat16")
        self.bad(op, "lse", outputs["lse"].double(), "float64")

    def test_shape(self, op):
        rows = args_rows(op)
        for shape in (
            (rows + 1, HQ, DV),
            (rows, HQ + 1, DV),
            (rows, HQ, D),
            (rows, HQ * DV),
            (1, rows, HQ, DV),
        ):
            self.bad(op, "out", torch.full(shape, 7.0), "got")
        for shape in ((rows + 1, HQ), (rows, HQ + 1), (rows * HQ,), (rows, HQ, 1)):
            self.bad(op, "lse", torch.full(shape, 7.0), "got")

    def test_strides(self, op):
        rows = args_rows(op)
        self.bad(op, "out", torch.full((rows, HQ, 2 * DV), 7.0)[..., ::2], "stride 1", "got 2")
        self.bad(op, "out", torch.full((rows, 1, DV), 7.0).expand(rows, HQ, DV), "stride 0")
        self.bad(op, "lse", torch.full((rows, 1), 7.0).expand(rows, HQ), "stride 0")

    def test_device(self, op):
        outputs = self.outputs(op)
        for name in ("out", "lse"):
            self.bad(op, name, outputs[name].to("meta"), "meta")

    @pytest.mark.parametrize("given", ["out", "lse"])
    def test_one_without_the_other(self, op, given):
        outputs = self.outputs(op)
        with pytest.raises((RuntimeError, TypeError, ValueError), match="lse" if given == "out" else "out"):
            call(op, {**arguments(op), given: outputs[given]})
        assert (outputs[given] == 7).all()


def test_pages_that_visit_one_element_twice():
    args = arguments("append_kv")
    args["k_pages"] = torch.zeros(N, P, 1, D).expand(N, P, HKV, D)
    refused("append_kv", args, "k_pages", "stride 0")
