"""KVK_CHECK=1: values on a card are checked there, and the first bad one is named in the CPU's words.

Here over the device emulator; tests/test_gpu_paged.py makes the same calls on a card.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvk
import pytest
import torch
from building import ROOT
from card import Card, EmulatedCard
from kvk_testing import assert_bit_equal, bits
from paged_cases import TABLES, make_case
from test_cuda_ops import BF16, F16, launched
from test_paged_errors import ATTENTION, CSR_VALUES, TABLE_VALUES, D, N, P, T, arguments, as_csr, int32
from torch import Tensor

BIG = 2**31 - 1


def on_bf16(args: dict[str, Any]) -> dict[str, Any]:
    """The tensors that may be of any dtype, as a card takes them."""
    names = ("q", "k", "v", "k_pages", "v_pages")
    return {name: x.bfloat16() if name in names else x for name, x in args.items()}


def bad_attention(op: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, arguments) of calls with a bad value, and some with several."""
    for what, change, *_ in TABLE_VALUES:
        yield what, {**arguments(op), **change()}
    for what, change, *_ in CSR_VALUES:
        yield f"csr_{what}", {**as_csr(arguments(op)), **change()}
    strided = int32([0, -9, 3, -9, -7, -9], [2, -9, 1, -9, 9, -9])[:, ::2]
    yield "strided_table", {**arguments(op), "page_indices": strided}
    yield "strided_lens", {**arguments(op), "kv_lens": int32(10, -9, 25, -9)[::2]}
    per_head = {"page_indices": int32([[0, 1], [2, 7]], [[0, 9], [0, 1]]), "kv_lens": int32([10, 8], [10, 9])}
    yield "used_entries_alone", {**arguments(op), **per_head}
    head_lens = {"kv_lens": int32([10, 9], [3, -4])}
    yield "lens_of_heads_over_one_csr_list", {**as_csr(arguments(op)), **head_lens}
    several = {"page_indices": int32([0, 9, 8], [-1, 1, 3]), "kv_lens": int32(20, -2)}
    yield "first_of_several_pages", {**arguments(op), **several}
    yield "length_before_its_pages", {**arguments(op), "page_indices": int32([9, 9], [9, 9])}
    yield (
        "starts_before_lists",
        {**as_csr(arguments(op)), "page_indptr": int32(0, 4, 3), "kv_lens": int32(-1, 2)},
    )
    if op == "paged_prefill":
        starts = [(1, 2, 5), (-1, 2, 5), (0, 4, 2), (0, 2, 6), (0, 2, BIG), (0, -1, 3), (0, 9, 2)]
        for values in starts:
            yield f"qo_indptr_{values}", {**arguments(op), "qo_indptr": int32(*values)}
        yield "lists_before_queries", {**arguments(op), "qo_indptr": int32(1, 2, 5), "kv_lens": int32(1, -1)}
        yield "mask_without_words", {**arguments(op), "mask_bits": torch.zeros(T, 0, dtype=torch.int32)}
        many = {
            "q": torch.zeros(80, 4, D),
            "qo_indptr": int32(0, 33, 80),
            "mask_bits": torch.ones(80, 1).int(),
        }
        yield "mask_too_narrow", {**arguments(op), **many}


def bad_slots() -> Iterator[tuple[str, dict[str, Any]]]:
    for slot in (N * P, N * P + 1, 2**31, 2**62, 2**63 - 1):
        for place in (0, 2, T - 1):
            args = arguments("append_kv")
            args["slot_mapping"][place] = slot
            yield f"{slot}_at_{place}", args
    yield "first_of_several", {**arguments("append_kv"), "slot_mapping": torch.tensor([0, -1, 99, 98, 77])}
    strided = torch.tensor([0, 99, 1, 99, 2, 99, 33, 99, 3, 99])[::2]
    yield "strided", {**arguments("append_kv"), "slot_mapping": strided}
    empty = {"k_pages": torch.zeros(0, P, 2, 64), "v_pages": torch.zeros(0, P, 2, 40)}
    yield "empty_pool", {**arguments("append_kv"), **empty}


def bad_calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for op in ATTENTION:
        yield from ((op, what, on_bf16(args)) for what, args in bad_attention(op))
    yield from (("append_kv", what, on_bf16(args)) for what, args in bad_slots())


BAD_CALLS = list(bad_calls())


def message(ops: Any, op: str, args: dict[str, Any]) -> str:
    """What the op refuses the call with; '' if it takes it."""
    try:
        getattr(ops, op)(**args) if op == "append_kv" else getattr(ops, op).out(**args)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def with_outputs(op: str, args: dict[str, Any]) -> dict[str, Any]:
    if op == "append_kv":
        return args
    rows, heads, _ = args["q"].shape
    out = torch.full((rows, heads, args["v_pages"].shape[-1]), 7.0, dtype=args["q"].dtype)
    return {**args, "out": out, "lse": torch.full((rows, heads), 7.0)}


def assert_named_alike(card: Card, op: str, args: dict[str, Any]) -> str:
    """The card refuses the call with the CPU's message, and writes nothing."""
    args = with_outputs(op, args)
    want = message(torch.ops.kvk, op, args)
    assert want, "the CPU takes the call"
    on_card = card.put_options(args)
    got = message(card.ops, op, on_card)
    assert got == want
    for name, x in args.items():
        if isinstance(x, Tensor):
            assert torch.equal(bits(on_card[name].cpu()), bits(x)), f"{name} was written"
    return got


@pytest.fixture
def checked() -> Iterator[EmulatedCard]:
    card = EmulatedCard()
    card.ops._check_values(True)
    yield card
    card.ops._check_values(False)


@pytest.mark.parametrize(
    ("op", "args"), [pytest.param(op, args, id=f"{op}-{what}") for op, what, args in BAD_CALLS]
)
def test_the_first_bad_value_is_named(checked, op, args):
    assert_named_alike(checked, op, args)


def test_wording(checked):
    args = on_bf16({**arguments("paged_decode"), "page_indices": int32([0, 3, 0], [2, 7, 3])})
    text = (
        "kvk::paged_decode: page_indices: request 1 needs page 7 of a pool of 4 pages (entry 1 of its list)"
    )
    assert assert_named_alike(checked, "paged_decode", args) == text


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_first_of_many(checked, seed, per_head):
    """More lists than the block has warps, longer ones than a warp has lanes, bad values anywhere."""
    rng = random.Random(seed)
    lens = [rng.choice([0, 1, 40, 333]) for _ in range(60)]
    table = "csr_per_head" if per_head else "csr" if seed % 2 else "dense"
    case = make_case(lens, page_size=3, table=table, share_pages=True, seed=seed, **BF16)
    for _ in range(3):
        bad = case.with_(page_indices=case.page_indices.clone(), kv_lens=case.kv_lens.clone())
        entries = bad.page_indices.view(-1)
        for _ in range(rng.randint(1, 40)):
            entries[rng.randrange(len(entries))] = rng.choice([-1, -BIG, case.k_pages.shape[0], BIG])
        if rng.random() < 0.5:
            bad.kv_lens.view(-1)[rng.randrange(bad.kv_lens.numel())] = rng.choice([-1, 900, BIG])
        names = ("q", "k_pages", "v_pages", "page_indices", "kv_lens")
        args = {**dict(zip(names, bad.args, strict=True)), **bad.options}
        if message(torch.ops.kvk, "paged_decode", with_outputs("paged_decode", args)):
            assert_named_alike(checked, "paged_decode", args)


@pytest.mark.parametrize("seed", range(3))
def test_first_of_many_starts_and_slots(checked, seed):
    rng = random.Random(seed)
    count = 1300
    starts = torch.arange(count + 1, dtype=torch.int32)
    for place in rng.sample(range(2, count), 3):
        starts[place] -= 2
    lens, table = torch.zeros(count, dtype=torch.int32), torch.zeros(count, 1, dtype=torch.int32)
    pools = {name: torch.zeros(2, 4, 1, 64, dtype=torch.bfloat16) for name in ("k_pages", "v_pages")}
    q = torch.zeros(count, 1, 64, dtype=torch.bfloat16)
    args = {"q": q, "qo_indptr": starts, **pools, "page_indices": table, "kv_lens": lens}
    assert "at entry" in assert_named_alike(checked, "paged_prefill", args)
    slots = torch.full((count,), -1, dtype=torch.int64)
    for place in rng.sample(range(count), 3):
        slots[place] = 8 + place
    assert_named_alike(checked, "append_kv", {"k": q, "v": q, **pools, "slot_mapping": slots})


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("per_head_lens", [False, True])
def test_good_values_pass(checked, table, per_head_lens):
    """Garbage in entries that no request uses is no bad value, and results are the same."""
    lens: Any = [[70, 0], [1, 600]] if per_head_lens else [70, 0, 600]
    queries = [40, 2] if per_head_lens else [40, 2, 1]
    decode = make_case(lens, table=table, page_size=5, **BF16)
    prefill = make_case(lens, queries, table=table, padding_rows=2, mask="tree", **F16)
    for case in (decode, prefill):
        checked.ops._check_values(False)
        want = checked.run(case)
        checked.ops._check_values(True)
        launched(checked)
        out, lse = checked.check(case)
        assert "kvk::device::check_table_kernel<512>" in launched(checked)
        assert_bit_equal(out, want[0], "out")
        assert_bit_equal(lse, want[1], "lse")


@pytest.mark.parametrize("slots", [[0, 9, -1, 31, 5], [-1] * 5, [-(2**63), 31, 30, 0, -2], []])
def test_good_slots_pass(checked, slots):
    args = on_bf16(arguments("append_kv"))
    args |= {"k": args["k"][: len(slots)], "v": args["v"][: len(slots)]}
    args["slot_mapping"] = torch.tensor(slots, dtype=torch.int64)
    want = {name: x.clone() for name, x in args.items()}
    kvk.append_kv(**want)
    checked.ops.append_kv(**args)
    for name, x in want.items():
        assert_bit_equal(args[name], x, name)


def test_empty_batches(checked):
    out, lse = checked.check(make_case([], **BF16))
    assert out.shape[0] == lse.shape[0] == 0
    args = on_bf16({**arguments("paged_prefill"), "q": torch.zeros(0, 4, D), "qo_indptr": int32(3)})
    args |= {"page_indices": torch.zeros(0, 3).int(), "kv_lens": torch.zeros(0).int()}
    args["mask_bits"] = torch.zeros(0, 1, dtype=torch.int32)
    assert "must start at 0, got 3" in assert_named_alike(checked, "paged_prefill", args)


def test_checks_take_a_launch_only_when_asked():
    card = EmulatedCard()
    launched(card)
    card.run(make_case([70], **BF16))
    rows, pools = (torch.zeros(*shape, 32, dtype=torch.float16) for shape in ((1, 2), (3, 4, 2)))
    card.ops.append_kv(rows, rows, pools, pools.clone(), torch.tensor([5]))
    assert not any("check" in kernel for kernel in launched(card))


IN_A_PROCESS = """
import torch
from card import EmulatedCard
from paged_cases import make_case
case = make_case([40, 40], dtype=torch.bfloat16, head_dim=64)
card = EmulatedCard()
card.check(case)
try:
    card.run(case.with_(kv_lens=torch.tensor([40, -3], dtype=torch.int32)))
    print("taken")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(("value", "word"), [("1", "kv_lens must not be negative, got -3"), ("0", "taken")])
def test_the_variable(value, word):
    path = os.pathsep.join([str(ROOT / "tests"), str(Path(kvk.__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        env={**os.environ, "PYTHONPATH": path, "KVK_CHECK": value},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and word in done.stdout, done.stdout + done.stderr
