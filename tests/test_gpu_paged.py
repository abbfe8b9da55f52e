"""The paged ops on a card: what the emulator cannot run, be it for size, time, or because it is no card.

tests/test_cuda_ops.py runs on the card, too.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap

import kvk
import pytest
import torch
from building import ROOT
from card import CudaCard
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule, expect_error
from paged_cases import PagedCase, make_case
from test_merge_states import gradients, random_states
from test_paged_torch import no_poison
from torch import Tensor, library

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
OPS = pytest.mark.parametrize("op", ["decode", "prefill"])
ALL = {"window_left": 300, "logits_soft_cap": 8.0, "alibi": True, "sinks": True, "key_bias": "head"}


@pytest.fixture(scope="module")
def card() -> CudaCard:
    return CudaCard()


def queries(op: str, counts: list[int]) -> list[int] | None:
    return counts if op == "prefill" else None


def same_bits(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rows: slice = slice(None)) -> None:
    assert_bit_equal(got[0], want[0][rows].contiguous(), "out")
    assert_bit_equal(got[1], want[1][rows].contiguous(), "lse")


# Values -----------------------------------------------------------------------------------------------------


@OPS
@pytest.mark.parametrize("head_dim", [32, 40, 72, 80, 96, 112, 128, 160, 192, 248, 256])
def test_head_dims(card, op, head_dim):
    for dtype in (torch.bfloat16, torch.float16)[:: 1 if head_dim in (128, 256) else 2]:
        case = make_case([1, 70, 600], queries(op, [1, 33, 70]), dtype=dtype, head_dim=head_dim)
        card.check(case)


@OPS
@pytest.mark.parametrize("dims", [(192, 128), (128, 64), (64, 256), (40, 72), (256, 32)])
def test_value_dim_differs(card, op, dims):
    lens, counts = [1, 70, 600], queries(op, [1, 33, 70])
    card.check(make_case(lens, counts, dtype=torch.bfloat16, head_dim=dims[0], head_dim_v=dims[1]))


@OPS
@DTYPES
@pytest.mark.parametrize(
    "options",
    [{"logits_soft_cap": 8.0}, {"alibi": True}, {"key_bias": "page", "hidden_keys": 0.3}, ALL],
    ids=str,
)
def test_options_at_head_dim_128(card, op, dtype, options):
    lens, counts = [1, 700, 0, 130], queries(op, [1, 40, 2, 128])
    mask = {"mask": "tree"} if op == "prefill" and "sinks" in options else {}
    card.check(make_case(lens, counts, dtype=dtype, head_dim=128, group=4, **options, **mask))


@DTYPES
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_long_requests(card, dtype, group):
    """Tens of splits, each of many tiles."""
    case = make_case(
        [33000, 5, 40961, 8192], dtype=dtype, num_kv_heads=1, group=group, head_dim=128, page_size=64
    )
    card.check(case)


@DTYPES
def test_long_prefill(card, dtype):
    card.check(make_case([1500, 2600], [1500, 300], dtype=dtype, num_kv_heads=1, group=4, head_dim=128))


@OPS
def test_many_requests(card, op):
    rng = random.Random(3)
    lens = [rng.choice([0, 1, 17, 130, 514, rng.randrange(900)]) for _ in range(200)]
    counts = queries(op, [rng.choice([0, 1, 1, 3, 20]) for _ in lens])
    card.check(make_case(lens, counts, dtype=torch.bfloat16, head_dim=128, num_kv_heads=2, group=4))


@DTYPES
def test_gradients_of_merge_states(dtype):
    out, lse = random_states(8, 4, 70, 3, 40, dtype, unseen=0.3)
    gen = torch.Generator().manual_seed(9)
    grad_out, grad_lse = torch.randn(70, 3, 40, generator=gen).to(dtype), torch.randn(70, 3, generator=gen)
    on_card = [x.cuda() for x in (out, lse, grad_out, grad_lse)]
    got = [x.cpu() for x in gradients(kvk.merge_states, *on_card)]
    exact = gradients(reference.merge_states, out.double(), lse.double(), grad_out, grad_lse)

    def in_dtype(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return reference.merge_states(out, lse, compute_dtype=dtype)

    plain = gradients(in_dtype, out, lse, grad_out, grad_lse)
    assert_error_rule(got[0], exact[0], plain[0], per_row=True, what="gradient of out")
    assert_error_rule(got[1], exact[1], plain[1], per_row=False, what="gradient of lse")


# Invariance -------------------------------------------------------------------------------------------------


@OPS
@DTYPES
def test_result_does_not_depend_on_the_batch(card, op, dtype):
    lens = [3000, 0, 1, 70, 20000, 513, 64]
    case = make_case(lens, queries(op, [1, 3, 1, 70, 2, 200, 9]), dtype=dtype, head_dim=128, group=4)
    whole = card.run(case)
    for request in range(len(lens)):
        same_bits(card.run(case.select([request])), whole, case.rows(request))
    crowd = case.select([0, 4, 5, 3, 6, 2, 1] * 30)
    got = card.run(crowd)
    for place in range(0, 210, 11):
        request, rows = [0, 4, 5, 3, 6, 2, 1][place % 7], crowd.rows(place)
        same_bits((got[0][rows], got[1][rows]), whole, case.rows(request))
    for _ in range(10):
        same_bits(card.run(case), whole)


# Offsets ----------------------------------------------------------------------------------------------------


def room_for(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB on the card, {free:.1f} are free")


def large_pools(layout: str, heads: int, page: int, dim: int) -> tuple[Tensor, Tensor]:
    """k_pages and v_pages whose last pages lie past 2^31 elements."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    if layout == "halves":
        both = empty((1 << 31) // (2 * page * heads * dim) + 1000, 2, page, heads, dim)
        return both[:, 0], both[:, 1]
    pages = (1 << 31) // (page * heads * dim) + 1000
    if layout == "nhd":
        return empty(pages, page, heads, dim), empty(pages, page, heads, dim)
    return empty(pages, heads, page, dim).transpose(1, 2), empty(pages, heads, page, dim).transpose(1, 2)


@OPS
@pytest.mark.parametrize("layout", ["nhd", "hnd", "halves"])
def test_offsets_past_2_31_elements(card, op, layout):
    room_for(9.5)
    heads, page, dim = 2, 16, 64
    case = make_case(
        [170, 33, 600],
        queries(op, [40, 3, 1]),
        dtype=torch.bfloat16,
        num_kv_heads=heads,
        head_dim=dim,
        page_size=page,
        layout=layout,
        seed=5,
    )
    want = card.check(case)
    k_pages, v_pages = large_pools(layout, heads, page, dim)
    small, large = case.k_pages.shape[0], k_pages.shape[0]
    place = torch.cat([torch.arange(2), torch.arange(large - small + 2, large)])
    assert int(place[-1]) * k_pages.stride(0) > 1 << 31
    k_pages[place.cuda()], v_pages[place.cuda()] = case.k_pages.cuda(), case.v_pages.cuda()
    table = case.page_indices.clone()
    known = (table >= 0) & (table < small)
    table[known] = place[table[known].long()].int()
    args = [x.cuda() for x in case.args]
    args[-4:] = [k_pages, v_pages, table.cuda(), case.kv_lens.cuda()]
    got = getattr(kvk, case.name)(*args)
    same_bits((got[0].cpu(), got[1].cpu()), want)


def test_append_past_2_31_elements():
    room_for(9.5)
    heads, page, dim = 2, 16, 64
    k_pages, v_pages = large_pools("nhd", heads, page, dim)
    last = k_pages.shape[0] - 1
    places = [(0, 3), (last, page - 1), (last - 500, 0), (last, 0)]
    k, v = (torch.randn(4, heads, dim, device="cuda").bfloat16() for _ in range(2))
    slots = torch.tensor([at * page + offset for at, offset in places], device="cuda")
    kvk.append_kv(k, v, k_pages, v_pages, slots)
    for token, (at, offset) in enumerate(places):
        assert_bit_equal(k_pages[at, offset].cpu(), k[token].cpu())
        assert_bit_equal(v_pages[at, offset].cpu(), v[token].cpu())


# Streams ----------------------------------------------------------------------------------------------------

# Longer than any of these ops: about half a second at 2 GHz.
LONG = 1_000_000_000


def prepared(card: CudaCard, case: PagedCase) -> list[Tensor]:
    args = card.put(case.args)
    getattr(kvk, case.name)(*args)  # compiles and loads
    torch.cuda.synchronize()
    return args


@OPS
def test_the_host_waits_for_nothing(card, op):
    case = make_case([600, 70], queries(op, [3, 70]), dtype=torch.bfloat16, head_dim=128)
    args = prepared(card, case)
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(LONG)
        getattr(kvk, case.name)(*args)
        done.record()
        assert not done.query(), "the op came back only after the card had finished"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_append_and_merge_wait_for_nothing():
    k, v = (torch.randn(4, 2, 64, device="cuda").bfloat16() for _ in range(2))
    pools = [torch.zeros(4, 16, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.arange(4, device="cuda")
    out, lse = torch.randn(3, 8, 2, 64, device="cuda"), torch.randn(3, 8, 2, device="cuda")
    kvk.append_kv(k, v, *pools, slots)
    kvk.merge_states(out, lse)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(LONG)
    kvk.append_kv(k, v, *pools, slots)
    kvk.merge_states(out, lse)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@OPS
def test_two_streams_at_once(card, op):
    """An op runs on the stream that is current, beside the work of another."""
    cases = [make_case([600 + i, 70], queries(op, [3, 70]), dtype=torch.bfloat16, seed=i) for i in range(2)]
    wants = [card.run(case) for case in cases]
    args = [prepared(card, case) for case in cases]
    busy, free = torch.cuda.Stream(), torch.cuda.Stream()
    results = {}
    with torch.cuda.stream(busy):
        torch.cuda._sleep(LONG)
        results[0] = getattr(kvk, cases[0].name)(*args[0])
        busy_done = torch.cuda.Event()
        busy_done.record()
    with torch.cuda.stream(free):
        results[1] = getattr(kvk, cases[1].name)(*args[1])
    free.synchronize()
    assert not busy_done.query(), "the op on the free stream waited for the busy one"
    same_bits(tuple(x.cpu() for x in results[1]), wants[1])
    busy.synchronize()
    same_bits(tuple(x.cpu() for x in results[0]), wants[0])


def test_many_streams_and_rounds(card):
    """Partial results of calls in flight are kept apart."""
    cases = [make_case([3000, 70], dtype=torch.bfloat16, head_dim=128, seed=i) for i in range(4)]
    wants = [card.run(case) for case in cases]
    args = [prepared(card, case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in cases]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(kvk.paged_decode(*args[i]))
    torch.cuda.synchronize()
    for got, want in zip(results, wants, strict=True):
        for out, lse in got:
            same_bits((out.cpu(), lse.cpu()), want)


# torch ------------------------------------------------------------------------------------------------------


@OPS
def test_opcheck(card, op):
    case = no_poison(make_case([60, 7], queries(op, [3, 7]), dtype=torch.bfloat16, sinks=True))
    overload = getattr(torch.ops.kvk, case.name).default
    library.opcheck(overload, tuple(card.put(case.args)), card.put_options(case.options))


@OPS
def test_compile_fullgraph(card, op):
    case = make_case([600, 7], queries(op, [3, 7]), dtype=torch.bfloat16)
    args = card.put(case.args)
    compiled = torch.compile(lambda *a: getattr(kvk, case.name)(*a)[0] * 2, fullgraph=True)
    want = getattr(kvk, case.name)(*args)[0] * 2
    assert_bit_equal(compiled(*args).cpu(), want.cpu())


@pytest.mark.parametrize("name", ["k_pages", "v_pages", "page_indices", "kv_lens"])
def test_a_tensor_on_the_cpu_is_named(card, name):
    case = make_case([9, 5], dtype=torch.bfloat16)
    names = ["q", "k_pages", "v_pages", "page_indices", "kv_lens"]
    args = dict(zip(names, card.put(case.args), strict=True))
    args[name] = args[name].cpu()
    expect_error(lambda: kvk.paged_decode(*args.values()), "paged_decode", name, "cuda:0", "cpu")


def test_cpu_and_card_agree(card):
    """Two backends, one result but for rounding; the CPU's from the same pages."""
    case = make_case([900, 33], dtype=torch.bfloat16, head_dim=128, group=4)
    (out, lse), (cpu_out, cpu_lse) = card.check(case), case.check()
    torch.testing.assert_close(lse, cpu_lse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.float(), cpu_out.float(), rtol=2e-2, atol=2e-2)


# Processes --------------------------------------------------------------------------------------------------


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "tests"), str(ROOT / "python"), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )


DECODE = """
    import torch, kvk
    from card import CudaCard
    from paged_cases import make_case
    case = make_case([600, 70], dtype=torch.bfloat16, head_dim=128)
    out, lse = CudaCard().check(case)
    print("right")
"""


def test_a_second_process_finds_the_kernels_in_the_cache(tmp_path):
    first = in_a_process(DECODE, KVK_CACHE=str(tmp_path), KVK_LOG="1")
    assert first.returncode == 0 and "right" in first.stdout, first.stderr
    assert "compiled: kvk::device::paged_decode_kernel<" in first.stderr
    kept = sorted(path.name for path in tmp_path.glob("*.cubin"))
    assert len(kept) >= 2  # decode, and the merge of its splits
    second = in_a_process(DECODE, KVK_CACHE=str(tmp_path), KVK_LOG="1")
    assert second.returncode == 0 and "right" in second.stdout, second.stderr
    assert "cache: kvk::device::paged_decode_kernel<" in second.stderr
    assert "compiled: " not in second.stderr
    assert sorted(path.name for path in tmp_path.glob("*.cubin")) == kept


def test_check_mode_names_the_first_bad_value():
    """KVK_CHECK=1: every call of tests/test_cuda_check.py is refused with the CPU's message, good ones pass."""
    done = in_a_process(
        """
        import torch
        from card import CudaCard
        from paged_cases import make_case
        from test_cuda_check import BAD_CALLS, assert_named_alike
        card = CudaCard()
        for op, what, args in BAD_CALLS:
            assert_named_alike(card, op, args)
        card.check(make_case([600, 0, 70], dtype=torch.bfloat16, head_dim=128))
        card.check(make_case([600, 0, 70], [70, 2, 1], mask="tree", dtype=torch.bfloat16, head_dim=128))
        print("named", len(BAD_CALLS))
        """,
        KVK_CHECK="1",
    )
    assert done.returncode == 0 and "named" in done.stdout, (done.stdout, done.stderr)


def test_check_mode_refuses_a_capture():
    """What the check finds must be read back, which a graph cannot hold."""
    done = in_a_process(
        """
        import torch, kvk
        pages = torch.zeros(4, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
        k = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device="cuda")
        slots = torch.zeros(1, dtype=torch.int64, device="cuda")
        kvk.append_kv(k, k, pages, pages.clone(), slots)
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                kvk.append_kv(k, k, pages, pages, slots)
        except RuntimeError as error:
            print("caught", error)
        """,
        KVK_CHECK="1",
    )
    assert "caught kvk: KVK_CHECK=1 reads back" in done.stdout, (done.stdout, done.stderr)
