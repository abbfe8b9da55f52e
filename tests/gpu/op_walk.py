#!/usr/bin/env python3
"""Every op once or twice, small: what compute-sanitizer watches.

python tests/gpu/op_walk.py              on the card
python tests/gpu/op_walk.py --emulated   over the device emulator, to see that the program itself is right
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kvk
import torch
from block_sparse_cases import make_case as make_blocks
from card import Card, CudaCard, EmulatedCard
from grid_card import check as check_grid
from kvk import reference
from kvk.reference.sparse import pack_bitmap
from kvk_testing import assert_bit_equal
from lightning_cases import int32
from paged_cases import make_case
from quant_attention_cases import make_quant_case
from test_cuda_ops_grid_grad import check as check_grid_gradients
from test_cuda_ops_lightning import check as check_forward
from test_cuda_ops_lightning import make
from test_cuda_ops_lightning_grad import check as check_backward
from test_cuda_ops_linear import check as check_linear
from test_cuda_ops_linear import make as make_linear
from test_lightning import decode_case
from test_neighborhood import make_case as make_boxes

BF16 = {"dtype": torch.bfloat16, "head_dim": 64}
F16 = {"dtype": torch.float16, "head_dim": 32, "head_dim_v": 40}
ALL = {"window_left": 300, "logits_soft_cap": 8.0, "alibi": True, "sinks": True, "key_bias": "head"}


def walk(card: Card) -> int:
    """Runs and checks; how many calls."""
    # Several splits, several tiles a split, odd pages, empty requests, every form of the table.
    cases = [
        make_case([600, 0, 1, 1100, 70], group=7, page_size=5, layout="hnd", **BF16),
        make_case([600, 33], group=4, table="csr_per_head", **ALL, **F16),
        make_case([600, 0, 70, 130], [1, 3, 70, 40], page_size=7, padding_rows=2, **BF16),
        make_case([300, 90], [40, 3], group=3, table="per_head", mask="tree", **ALL, **F16),
    ]
    for case in cases:
        card.check(case)
    gen = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        pools = [torch.zeros(6, 5, 3, dim, dtype=dtype) for dim in (64, 40)]
        rows = [torch.randn(17, 3, dim, generator=gen).to(dtype) for dim in (64, 40)]
        slots = torch.randperm(30, generator=gen)[:17]
        slots[3] = -1
        want = [pages.clone() for pages in pools]
        reference.append_kv(*rows, *want, slots)
        on_card = card.put([*rows, *pools, slots])
        card.ops.append_kv(*on_card)
        for got, right in zip(on_card[2:4], want, strict=True):
            assert_bit_equal(got.cpu(), right)
        out, lse = torch.randn(5, 9, 3, 33, generator=gen).to(dtype), torch.randn(5, 9, 3, generator=gen)
        parts = card.put([out, lse])
        merged = card.ops.merge_states(*parts)
        exact = reference.merge_states(out, lse)
        torch.testing.assert_close(merged[1].cpu().double(), exact[1], rtol=1e-4, atol=1e-4)
        grads = card.ops.merge_states_backward(*merged, *parts)
        assert all(bool(grad.isfinite().all()) for grad in grads)
    return len(cases) + 6 + walk_quantized(card) + walk_sparse(card) + walk_lightning(card) + walk_grid(card)


def walk_quantized(card: Card) -> int:
    """Records and attention over them, and the transform of rows in lanes, over shared memory, and in two parts."""
    gen = torch.Generator().manual_seed(0)
    for n in (128, 96, 2048, 32768):
        x = torch.randn(3, n, generator=gen)
        assert_bit_equal(card.ops.hadamard(*card.put([x])).cpu(), kvk.hadamard(x))
    src, dst = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    rotated = kvk.QuantFormat(32, 96, 4, 4, 32, 32, "token", k_rotate=1, v_rotate=1)
    for fmt, dtype in ((kvk.QuantFormat(32, 64), torch.float32), (rotated, torch.bfloat16)):
        pages = torch.randn(2, 4, 32, 3, fmt.head_dim, generator=gen).to(dtype)
        want = [pool.zero_() for pool in fmt.new_pool(3, 3)]
        kvk.quantize_pages(pages[0], pages[1], src, *want, dst, fmt)
        pools = card.put([torch.zeros_like(pool) for pool in want])
        k, v, *ids = card.put([pages[0], pages[1], src, dst])
        card.ops.quantize_pages(k, v, ids[0], *pools, ids[1], fmt.numbers)
        for got, right in zip(pools, want, strict=True):
            assert_bit_equal(got.cpu(), right)
        back = card.ops.dequantize_pages(*pools, ids[1], fmt.numbers, pages.dtype)
        for got, right in zip(back, kvk.dequantize_pages(*want, dst, fmt, pages.dtype), strict=True):
            assert_bit_equal(got.cpu(), right)
    return 8 + walk_attention(card, kvk.QuantFormat(32, 64))


def walk_sparse(card: Card) -> int:
    """Records of bitmaps, by magnitude, scores and a mask, and attention over them."""
    gen = torch.Generator().manual_seed(0)
    src, dst = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    fmt, small = kvk.BitmapFormat(32, 64, 32, 16), kvk.BitmapFormat(37, 32, 16, 24)
    scores = torch.randn(2, 37, 3, 32, generator=gen)
    mask = torch.zeros(2, 37, 3, 32, dtype=torch.bool)
    mask[..., 5:21] = True
    selects: list[tuple[kvk.BitmapFormat, torch.dtype, dict[str, torch.Tensor]]] = [
        (fmt, torch.float32, {}),
        (small, torch.bfloat16, {"k_select": mask, "v_select": pack_bitmap(mask)}),
        (small, torch.bfloat16, {"k_select": scores}),
        (kvk.BitmapFormat(5, 80, 40, 24, k_rotate=1, v_rotate=1), torch.bfloat16, {}),
    ]
    for records, dtype, select in selects:
        pages = torch.randn(2, 4, records.page_size, 3, records.head_dim, generator=gen).to(dtype)
        want = [pool.zero_() for pool in records.new_pool(3, 3)]
        kvk.compress_pages(pages[0], pages[1], src, *want, dst, records, **select)
        pools = card.put([torch.zeros_like(pool) for pool in want])
        k, v, *ids = card.put([pages[0], pages[1], src, dst])
        card.ops.compress_pages(k, v, ids[0], *pools, ids[1], records.numbers, **card.put_options(select))
        for got, right in zip(pools, want, strict=True):
            assert_bit_equal(got.cpu(), right)
        back = card.ops.decompress_pages(*pools, ids[1], records.numbers)
        for got, right in zip(back, kvk.decompress_pages(*want, dst, records), strict=True):
            assert_bit_equal(got.cpu(), right)
    return 8 + walk_attention(card, fmt)


def walk_lightning(card: Card) -> int:
    """The decode step on a pool of states, rows of it skipped, packed sequences in one stage and in two; normalised."""
    for kind, tokens in (("bf16", 200), ("f16_wide", 130)):
        case = make(kind, 1, tokens, 2, starts=int32(0, 1, 1, tokens - 3))
        check_forward(card, case)
    check_backward(card, make("bf16", 2, 150, 2))
    for mask in ("causal", "blocks-of-7", "all"):
        check_linear(card, make_linear("bf16", 1, 130, 2, mask=mask, apart=mask == "all"))
    for dtype in (torch.float32, torch.bfloat16):
        args = decode_case(dk=64, dv=40, dtype=dtype)
        q, k, v, pool, *rest = card.put([x.clone() for x in args])
        out = card.ops.lightning_decode(q, k, v, pool, *rest)
        right = kvk.lightning_decode(*args)
        torch.testing.assert_close(out.cpu().float(), right.float(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(pool.cpu(), args[3], rtol=1e-5, atol=1e-5)
    return 11


def walk_grid(card: Card) -> int:
    """Blocks in tiles of 128 rows and of 64, boxes in three dimensions, and their gradients."""
    lens = [70, 0, 129], [164, 40, 60]
    options = {"causal": True, "bias": True, "padding_rows": 2}
    blocks = [make_blocks(*lens, block_q=block_q, **options, **F16) for block_q in (16, 96)]
    boxes = make_boxes((5, 6, 9), (3, 2, 4), stride=(2, 1, 3), is_causal=(False, True, True), **BF16)
    for case in (*blocks, boxes):
        check_grid(card, case)
    for case in (blocks[1], boxes):
        check_grid_gradients(card, case)
    return 5


def walk_attention(card: Card, fmt: kvk.QuantFormat | kvk.BitmapFormat) -> int:
    """Decode and prefill over records and dense pages."""
    for queries in (None, [1, 0, 40]):
        case = make_quant_case([600, 0, 70], queries, fmt=fmt, dtype=torch.bfloat16, group=3)
        op = getattr(card.ops, case.name)
        out, lse = op(*card.put(case.args), case.fmt.numbers, **card.put_options(case.options))
        right_out, right_lse = case.run()
        torch.testing.assert_close(out.cpu(), right_out, rtol=0.03, atol=0.02)
        torch.testing.assert_close(lse.cpu(), right_lse, rtol=1e-2, atol=1e-2)
    return 2


def main() -> int:
    parser = argparse.ArgumentParser(description="a small call of every op")
    parser.add_argument("--emulated", action="store_true", help="over the device emulator")
    card = EmulatedCard() if parser.parse_args().emulated else CudaCard()
    calls = walk(card)
    if card.name == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls, all right ({card.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
