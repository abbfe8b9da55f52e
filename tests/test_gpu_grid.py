"""Block-sparse and neighborhood attention on a card: long inputs against the CPU, usual sizes, far offsets, graphs.

tests/test_cuda_ops_block_sparse.py and tests/test_cuda_ops_neighborhood.py make the small calls there too.
"""

from __future__ import annotations

from typing import Any

import kvk
import pytest
import torch
from block_sparse_cases import make_case as make_blocks
from card import CudaCard
from grid_card import name_of, run
from kvk_testing import assert_bit_equal
from test_gpu_graphs import capture
from test_gpu_paged import room_for
from test_neighborhood import make_case as make_boxes

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def card() -> CudaCard:
    return CudaCard()


def check_long(card: CudaCard, case: Any) -> None:
    """Against the CPU's op in fp32, which is held to the reference elsewhere."""
    out, lse = run(card, case)
    want, want_lse = case.with_(q=case.q.float(), k=case.k.float(), v=case.v.float()).run()
    eps = torch.finfo(case.q.dtype).eps
    torch.testing.assert_close(out.float(), want, rtol=0, atol=2 * eps * want.abs().amax().item())
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (96, 200)])
@pytest.mark.parametrize("blocks", [(16, 16), (64, 128), (128, 64), (48, 80)])
def test_long_block_sparse(card, dtype, dims, blocks):
    form = {"head_dim": dims[0], "head_dim_v": dims[1], "block_q": blocks[0], "block_k": blocks[1]}
    check_long(
        card, make_blocks([3000, 1, 1700], causal=True, per_head=True, density=0.2, dtype=dtype, **form)
    )
    check_long(card, make_blocks([2500], [3100], group=5, bias=True, density=0.2, dtype=dtype, **form))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize(
    "shape",
    [
        ((5000,), 257, {"stride": 16, "is_causal": True}),
        ((64, 65), 13, {"dilation": (1, 3)}),
        ((12, 24, 25), (7, 9, 9), {"stride": (1, 2, 3)}),
    ],
)
def test_large_neighborhoods(card, dtype, dim, shape):
    extents, kernel, options = shape
    check_long(
        card, make_boxes(extents, kernel, batch=2, num_kv_heads=2, head_dim=dim, dtype=dtype, **options)
    )


def autograd(case: Any, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """dq, dk and dv of a random sum of out and lse, by the op's own autograd."""
    gen = torch.Generator().manual_seed(1)
    leaves = [x.to(device, dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    rest = [x.to(device) if isinstance(x, torch.Tensor) else x for x in case.args[3:]]
    options = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in case.options.items()}
    out, lse = getattr(kvk, name_of(case))(*leaves, *rest, **options)
    grads = [torch.randn(x.shape, generator=gen).to(device, x.dtype) for x in (out, lse)]
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    return [x.float().cpu() for x in torch.autograd.grad([out, lse], leaves, grads)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (96, 200)])
@pytest.mark.parametrize("family", ["blocks", "boxes"])
def test_gradients_of_large_inputs(card, dtype, dims, family):
    """Through autograd, against the CPU's in fp32."""
    form = {"head_dim": dims[0], "head_dim_v": dims[1], "dtype": dtype}
    if family == "blocks":
        case = make_blocks([1500, 1, 900], causal=True, per_head=True, block_q=64, block_k=48, **form)
    else:
        case = make_boxes((40, 45), 9, dilation=(1, 2), num_kv_heads=2, **form)
    wants = autograd(case, "cpu", torch.float32)
    eps = torch.finfo(dtype).eps
    for got, want in zip(autograd(case, "cuda", dtype), wants, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=4 * eps * want.abs().amax().item())


def test_the_same_bits_every_time(card):
    for case in (
        make_blocks([4000], causal=True, num_kv_heads=8, dtype=torch.bfloat16),
        make_boxes((64, 64), 13, num_kv_heads=4, head_dim=64, dtype=torch.bfloat16),
    ):
        want = *run(card, case), *autograd(case, "cuda", torch.bfloat16)
        for _ in range(5):
            again = *run(card, case), *autograd(case, "cuda", torch.bfloat16)
            for got, right in zip(again, want, strict=True):
                assert_bit_equal(got, right)


def test_offsets_past_2_31_elements(card):
    """Batch entries that far apart."""
    room_for(20)
    case = make_boxes((9, 10), 5, batch=2, head_dim=64, dtype=torch.bfloat16)
    want = run(card, case)
    apart = (1 << 31) + 512

    def far(x: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(apart + x[0].numel(), dtype=x.dtype, device="cuda")
        return memory.as_strided(x.shape, (apart, *x.stride()[1:])).copy_(x)

    got = kvk.neighborhood_attention(far(case.q), far(case.k), far(case.v), 5)
    for x, right in zip(got, want, strict=True):
        assert_bit_equal(x.cpu(), right)


def test_a_graph_follows_lengths_and_lists(card):
    """A captured call reads both on the card."""
    case = make_blocks([300, 200], density=0.5, dtype=torch.bfloat16)
    other = make_blocks([100, 400], density=0.2, seed=1, dtype=torch.bfloat16)
    args, options = card.put(case.args), card.put_options(case.options)
    args[4] = torch.zeros(1, 1, 1000, dtype=torch.int32, device="cuda")
    args[3] = torch.zeros(1, 1, 20, dtype=torch.int32, device="cuda")
    out, lse = card.new(case.q.shape, torch.bfloat16), card.new(case.q.shape[:2], torch.float32)

    def follow(x: Any) -> None:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            options[name].copy_(x.options[name])
        args[3][..., : x.row_ptr.shape[2]].copy_(x.row_ptr)
        args[3][..., x.row_ptr.shape[2] :] = int(x.row_ptr.max())
        args[4][..., : x.col_idx.shape[2]].copy_(x.col_idx)

    follow(case)
    graph = capture(lambda: kvk.block_sparse_attention(*args, **options, out=out, lse=lse))
    for x in (case, other):
        follow(x)
        graph.replay()
        want = run(card, x.with_(q=case.q, k=case.k, v=case.v))
        assert_bit_equal(out.cpu(), want[0])
        assert_bit_equal(lse.cpu(), want[1])
