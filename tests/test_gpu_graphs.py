"""CUDA graphs: the ops are captured once and replayed with other lengths, tables and tokens."""

from __future__ import annotations

import kvk
import pytest
import torch
from card import CudaCard
from kvk_testing import assert_bit_equal
from paged_cases import PagedCase, check_attention, make_case
from test_gpu_paged import in_a_process
from torch import Tensor

pytestmark = pytest.mark.gpu

OPS = pytest.mark.parametrize("op", ["decode", "prefill"])


@pytest.fixture(scope="module")
def card() -> CudaCard:
    return CudaCard()


def capture(call) -> torch.cuda.CUDAGraph:
    """Warms up on a side stream, as torch asks for, then captures."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def static_case(op: str) -> PagedCase:
    """Room for 2000 keys a request; the lengths of the calls are set later."""
    counts = [3, 70, 1, 40] if op == "prefill" else None
    return make_case([2000] * 4, counts, dtype=torch.bfloat16, head_dim=128, group=4)


@OPS
def test_replays_follow_the_lengths(card, op):
    case = static_case(op)
    args, options = card.put(case.args), card.put_options(case.options)
    out, lse = card.new((*case.q.shape[:2], 128), case.q.dtype), card.new(case.q.shape[:2], torch.float32)
    graph = capture(lambda: getattr(kvk, case.name)(*args, **options, out=out, lse=lse))
    by_name = dict(zip(("kv_lens", "page_indices"), (args[-1], args[-2]), strict=True))
    generator = torch.Generator().manual_seed(4)
    for lens in ([2000, 1, 700, 513], [0, 70, 0, 2000], [64, 1999, 1, 0]):
        now = case.with_(
            q=torch.randn(case.q.shape, generator=generator).to(case.q.dtype),
            kv_lens=torch.tensor(lens, dtype=torch.int32),
            page_indices=case.page_indices[torch.randperm(4, generator=generator)],
        )
        args[0].copy_(now.q)
        by_name["kv_lens"].copy_(now.kv_lens)
        by_name["page_indices"].copy_(now.page_indices)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        check_attention(out.cpu(), lse.cpu(), now)
        want = card.run(now)
        assert_bit_equal(out.cpu(), want[0])
        assert_bit_equal(lse.cpu(), want[1])


def test_a_decode_step_is_captured_whole(card):
    """append, decode, merge with a second cache: the results of a step, from memory that the graph owns."""
    case = static_case("decode")
    args = card.put(case.args)
    q, k_pages, v_pages, table, lens = args
    k, v = (torch.randn(4, 2, 128, device="cuda").bfloat16() for _ in range(2))
    slots = torch.full((4,), -1, device="cuda")
    results: dict[str, Tensor] = {}

    def step() -> None:
        kvk.append_kv(k, v, k_pages, v_pages, slots)
        out, lse = kvk.paged_decode(q, k_pages, v_pages, table, lens)
        parts = torch.stack([out, out]), torch.stack([lse, torch.full_like(lse, -torch.inf)])
        results["out"], results["lse"] = kvk.merge_states(*parts)

    graph = capture(step)
    for length in (5, 640, 1999):
        lens.fill_(length + 1)
        slots.copy_(table[:, length // 16].long() * 16 + length % 16)
        k.copy_(torch.randn(4, 2, 128))
        v.copy_(torch.randn(4, 2, 128))
        graph.replay()
        want = kvk.paged_decode(q, k_pages, v_pages, table, lens)
        assert_bit_equal(results["out"].cpu(), want[0].cpu())
        torch.testing.assert_close(results["lse"], want[1], rtol=1e-6, atol=1e-6)
        page, offset = int(table[2, length // 16]), length % 16
        assert_bit_equal(k_pages[page, offset].cpu(), k[2].cpu())


CAPTURE = """
    import torch, kvk
    q = torch.randn(2, 8, 128, device="cuda").bfloat16()
    pages = torch.randn(8, 16, 2, 128, device="cuda").bfloat16()
    table = torch.arange(8, dtype=torch.int32, device="cuda").view(2, 4)
    lens = torch.tensor([64, 33], dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    {before}
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            got = kvk.paged_decode(q, pages, pages, table, lens)
    except RuntimeError as error:
        print("refused:", error)
    else:
        graph.replay()
        want = kvk.paged_decode(q, pages, pages, table, lens)
        print("captured", torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]))
    # What comes after a refusal works.
    out, lse = kvk.paged_decode(q, pages, pages, table, lens)
    torch.cuda.synchronize()
    print("finite", bool(out.isfinite().all()))
"""


def test_nothing_is_compiled_during_a_capture(tmp_path):
    done = in_a_process(CAPTURE.format(before="pass"), KVK_CACHE=str(tmp_path))
    assert "refused:" in done.stdout, (done.stdout, done.stderr)
    message = done.stdout.split("refused:")[1].split("\n")[0]
    for words in (
        "paged_decode_kernel",
        "nothing is compiled while a CUDA graph is being captured",
        "kvk.precompile()",
    ):
        assert words in message, message
    assert "finite True" in done.stdout, (done.stdout, done.stderr)


def test_a_precompiled_kernel_is_captured_at_its_first_call(tmp_path):
    before = "kvk.precompile(kernels=[k for k in kvk.cuda.default_kernels() if 'bf16, 128' in k.expression])"
    done = in_a_process(CAPTURE.format(before=before), KVK_CACHE=str(tmp_path))
    assert "captured True" in done.stdout and "finite True" in done.stdout, (done.stdout, done.stderr)


def test_a_kernel_of_the_cache_is_loaded_during_a_capture(tmp_path):
    warm = in_a_process(
        CAPTURE.format(before="kvk.paged_decode(q, pages, pages, table, lens)"), KVK_CACHE=str(tmp_path)
    )
    assert "captured True" in warm.stdout, (warm.stdout, warm.stderr)
    done = in_a_process(CAPTURE.format(before="pass"), KVK_CACHE=str(tmp_path))
    assert "captured True" in done.stdout or "12.3 and later can" in done.stdout, (done.stdout, done.stderr)
    assert "finite True" in done.stdout
