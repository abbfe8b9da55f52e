"""append_kv and merge_states on CUDA through torch's tensors, over the device emulator and on the card."""

from __future__ import annotations

import pytest
import torch
from card import Card
from kvk import reference
from kvk_testing import assert_bit_equal, assert_error_rule
from test_append_kv import filled_pool, random_bytes
from test_cuda_ops import LAYOUTS
from test_merge_states import gradients, random_states


class TestAppend:
    @pytest.mark.parametrize("layout", [*LAYOUTS, "padded"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_layouts(self, card: Card, layout, dtype):
        gen = torch.Generator().manual_seed(0)
        k_pages, v_pages = filled_pool(layout, 6, 5, 3, 64, 40, dtype, gen)
        slots = torch.randperm(30, generator=gen)[:17]
        slots[3] = slots[8] = -1
        slots[5] = -(2**63)
        qkv = random_bytes((17, 3, 112), dtype, gen)
        k, v = qkv[..., :64], qkv[..., 69:109] if layout == "padded" else qkv[..., 72:]
        want_k, want_v = k_pages.clone(), v_pages.clone()
        reference.append_kv(k, v, want_k, want_v, slots)
        k, v, k_pages, v_pages, slots = card.put([k, v, k_pages, v_pages, slots])
        card.ops.append_kv(k, v, k_pages, v_pages, slots)
        assert_bit_equal(k_pages.cpu(), want_k, "k_pages")
        assert_bit_equal(v_pages.cpu(), want_v, "v_pages")

    @pytest.mark.parametrize("odd", ["k", "v", "k_pages", "v_pages"])
    def test_rows_off_16_bytes(self, card: Card, odd):
        """One tensor whose rows cannot be read or written 16 bytes at a time, among aligned ones."""
        gen = torch.Generator().manual_seed(3)

        def rows(name, *shape):
            start = 3 if name == odd else 0
            return random_bytes((*shape, 80), torch.bfloat16, gen)[..., start : start + 64]

        k, v = (rows(name, 9, 2) for name in ("k", "v"))
        k_pages, v_pages = (rows(name, 3, 7, 2) for name in ("k_pages", "v_pages"))
        slots = torch.randperm(21, generator=gen)[:9]
        want_k, want_v = k_pages.clone(), v_pages.clone()
        reference.append_kv(k, v, want_k, want_v, slots)
        on_card = card.put([k, v, k_pages, v_pages, slots])
        card.ops.append_kv(*on_card)
        assert_bit_equal(on_card[2].cpu(), want_k, "k_pages")
        assert_bit_equal(on_card[3].cpu(), want_v, "v_pages")

    def test_slots_past_the_pool_are_skipped(self, card: Card):
        """Values on a card are trusted, but can never make a kernel write outside its output."""
        pools = [torch.zeros(3, 4, 2, 32, dtype=torch.float16) for _ in range(2)]
        rows = [torch.ones(4, 2, 32, dtype=torch.float16) for _ in range(2)]
        k, v, k_pages, v_pages, slots = card.put([*rows, *pools, torch.tensor([12, 5, 2**62, 10**6])])
        card.ops.append_kv(k, v, k_pages, v_pages, slots)
        for pages in (k_pages.cpu(), v_pages.cpu()):
            assert (pages[1, 1] == 1).all() and pages.count_nonzero() == 64

    def test_no_tokens(self, card: Card):
        pools = [torch.ones(3, 4, 2, 32, dtype=torch.float16) for _ in range(2)]
        rows = [torch.empty(0, 2, 32, dtype=torch.float16) for _ in range(2)]
        k, v, k_pages, v_pages, slots = card.put([*rows, *pools, torch.empty(0, dtype=torch.int64)])
        card.ops.append_kv(k, v, k_pages, v_pages, slots)
        assert (k_pages == 1).all() and (v_pages == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
class TestMerge:
    @pytest.mark.parametrize("dim", [1, 3, 8, 31, 40, 128, 257])
    def test_values(self, card: Card, dtype, dim):
        out, lse = random_states(dim, 5, 9, 3, dim, dtype, unseen=0.3)
        merged, merged_lse = (x.cpu() for x in card.ops.merge_states(*card.put([out, lse])))
        exact, exact_lse = reference.merge_states(out, lse)
        plain, plain_lse = reference.merge_states(out, lse, compute_dtype=dtype)
        assert merged.dtype == dtype and merged_lse.dtype == torch.float32
        assert_error_rule(merged_lse, exact_lse, plain_lse, per_row=False, what="lse")
        assert_error_rule(merged, exact, plain, per_row=True, what="out")

    @pytest.mark.parametrize("shape", [(0, 3, 2, 8), (3, 0, 2, 8), (1, 1, 1, 1)])
    def test_shapes(self, card: Card, dtype, shape):
        out, lse = random_states(1, *shape, dtype)
        merged, merged_lse = (x.cpu() for x in card.ops.merge_states(*card.put([out, lse])))
        assert merged.shape == shape[1:] and merged_lse.shape == shape[1:3]
        if shape[0] == 0:
            assert (merged == 0).all() and torch.isneginf(merged_lse).all()

    @pytest.mark.parametrize("unseen", [0.0, 0.4])
    def test_gradients(self, card: Card, dtype, unseen):
        out, lse = random_states(8, 4, 7, 3, 33, dtype, unseen=unseen)
        gen = torch.Generator().manual_seed(9)
        grad_out, grad_lse = torch.randn(7, 3, 33, generator=gen).to(dtype), torch.randn(7, 3, generator=gen)
        on_card = card.put([grad_out, grad_lse, out, lse])
        got = [x.cpu() for x in card.ops.merge_states_backward(*on_card)]
        exact = gradients(reference.merge_states, out.double(), lse.double(), grad_out, grad_lse)

        def in_dtype(out, lse):
            return reference.merge_states(out, lse, compute_dtype=dtype)

        plain = gradients(in_dtype, out, lse, grad_out, grad_lse)
        unread = torch.isinf(lse)
        assert (got[0][unread] == 0).all() and (got[1][unread] == 0).all()
        assert_error_rule(got[0], exact[0], plain[0], per_row=True, what="gradient of out")
        assert_error_rule(got[1], exact[1], plain[1], per_row=False, what="gradient of lse")
