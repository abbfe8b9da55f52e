"""Normalised linear attention on a card: long sequences and their gradients against the CPU, and graphs.

tests/test_cuda_ops_linear.py makes the small calls there too.
"""

from __future__ import annotations

import kvk
import pytest
import torch
from card import CudaCard
from kvk_testing import assert_bit_equal
from linear_cases import LinearCase, make_case
from test_cuda_ops_linear import backward, run
from test_gpu_graphs import capture
from test_linear_grad import NAMES, by_formula, random_grads

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def card() -> CudaCard:
    return CudaCard()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within what the dtype and the largest element allow."""
    rtol = 1e-4 if got.dtype == torch.float32 else 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=rtol * want.abs().amax().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (96, 200)])
@pytest.mark.parametrize("mask", ["causal", "blocks-of-7", "blocks-of-100", "all"])
def test_long_sequences(card, dtype, dims, mask):
    """Against the CPU's op and formula, which tests hold to the reference elsewhere."""
    case = make_case(1, 2000, 2, *dims, dtype=dtype, mask=mask, apart=True)
    wide = {name: None if x is None else x.float() for name, x in vars(case).items() if name in NAMES}
    for got, want in zip(run(card, case), case.with_(**wide).run(), strict=True):
        close(got, want)
    grads = random_grads(case)
    for got, want in zip(backward(card, case, grads), by_formula(case, grads), strict=True):
        close(got, want)


def test_through_autograd(card):
    case = make_case(1, 300, 2, 64, 64, dtype=torch.bfloat16, state=False)
    leaves = [x.cuda().requires_grad_() for x in (case.q, case.k, case.v)]
    kvk.linear_attention(*leaves)[0].float().square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in leaves)


def test_the_same_bits_every_time(card):
    case: LinearCase = make_case(2, 1000, 16, 128, 128, dtype=torch.bfloat16)
    grads = random_grads(case)
    want = [*run(card, case), *backward(card, case, grads)]
    for got, right in zip([*run(card, case), *backward(card, case, grads)], want, strict=True):
        assert got is right is None or assert_bit_equal(got, right) is None


def test_a_graph_replays(card):
    case = make_case(1, 200, 4, 64, 64, dtype=torch.bfloat16, state=False)
    q, k, v = (x.cuda() for x in (case.q, case.k, case.v))
    found = []
    graph = capture(lambda: found.append(kvk.linear_attention(q, k, v)))
    q.copy_(q.flip(1))
    graph.replay()
    for got, want in zip(found[-1], kvk.linear_attention(q, k, v), strict=True):
        assert_bit_equal(got.cpu(), want.cpu())
