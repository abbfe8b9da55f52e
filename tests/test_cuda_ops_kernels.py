"""The emulated library holds no kernel for nothing."""

from __future__ import annotations

import test_cuda_ops_block_sparse
import test_cuda_ops_grid_grad
import test_cuda_ops_hadamard
import test_cuda_ops_lightning
import test_cuda_ops_linear
import test_cuda_ops_neighborhood
import test_cuda_ops_quant
import test_cuda_ops_sparse
import torch
from card import EmulatedCard
from paged_cases import make_case
from test_cuda_ops import ALL, BF16, F16, launched
from test_cuda_ops_quant_attention import TestQuantAttention as QuantAttention
from test_cuda_ops_sparse_attention import TestSparseAttention as SparseAttention
from test_merge_states import random_states


def test_every_kernel_of_the_emulated_library_is_launched():
    """One call for each line KVK_EMULATED_KERNEL of tests/emulator/torch: no instantiation is compiled for nothing."""
    card = EmulatedCard()
    card.ops._launched_kernels()
    parts = ({}, {"logits_soft_cap": 5.0}, {"alibi": True}, {"key_bias": "head"})
    for options in (*parts, {"logits_soft_cap": 5.0, "alibi": True, "key_bias": "page"}):
        card.run(make_case([600], **F16, **options))
    for options in (*parts, {"mask": "tree"}, {**ALL, "mask": "tree"}):
        card.run(make_case([600, 70], [1, 60], **F16, **options))
    card.run(make_case([600], **BF16))
    card.run(make_case([600, 70], [1, 60], **BF16))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pools = [torch.zeros(3, 4, 2, 32, dtype=dtype) for _ in range(2)]
        rows = [torch.ones(1, 2, 32, dtype=dtype) for _ in range(2)]
        card.ops.append_kv(*rows, *pools, torch.tensor([5]))
        out, lse = random_states(1, 2, 3, 2, 8, dtype)
        card.ops.merge_states(out, lse)
        card.ops.merge_states_backward(out[0], lse[0], out, lse)
    try:
        card.ops._check_values(True)
        card.run(make_case([600], **BF16))
        card.ops.append_kv(*rows, *pools, torch.tensor([5]))
        test_cuda_ops_quant.launch_every_kernel(card)
        test_cuda_ops_sparse.launch_every_kernel(card)
        test_cuda_ops_lightning.launch_every_kernel(card)
        test_cuda_ops_linear.launch_every_kernel(card)
        test_cuda_ops_block_sparse.launch_every_kernel(card)
        test_cuda_ops_neighborhood.launch_every_kernel(card)
        test_cuda_ops_grid_grad.launch_every_kernel(card)
    finally:
        card.ops._check_values(False)
    test_cuda_ops_hadamard.launch_every_kernel(card)
    QuantAttention.launch_every_kernel(card)
    SparseAttention.launch_every_kernel(card)
    assert launched(card) == set(card.ops._known_kernels().split())
