"""sparse_decode and sparse_prefill on CUDA, over the emulator and on the card, against decompressing and attending."""

from __future__ import annotations

from typing import Any

import kvk
import pytest
import torch
from card import Card
from cuda_record_cases import RecordAttention, check, run

BF16, F16 = torch.bfloat16, torch.float16
HALF = kvk.BitmapFormat(32, 64, 32, 16)
FORMATS: dict[str, tuple[kvk.BitmapFormat, dict[str, Any]]] = {
    "half": (HALF, {"dtype": BF16, "group": 3}),
    "half_many_heads": (HALF, {"dtype": BF16, "group": 12}),
    # Bitmaps of 5 and 9 bytes a row; every key whole.
    "odd_rows": (kvk.BitmapFormat(17, 40, 40, 24, F16, head_dim_v=72), {"dtype": F16, "group": 10}),
    "rotated": (
        kvk.BitmapFormat(48, 80, 40, 24, head_dim_v=64, k_rotate=1, v_rotate=1),
        {"dtype": BF16, "group": 9},
    ),
    "biased": (
        kvk.BitmapFormat(16, 32, 8, 40, F16, head_dim_v=40),
        {"dtype": F16, "group": 17, "key_bias": "head", "hidden_keys": 0.3},
    ),
}


class TestSparseAttention(RecordAttention):
    FORMATS = FORMATS
    PLAIN = "half"
    OPTIONS = kvk.BitmapFormat(48, 32, 16, 24, F16, head_dim_v=40)


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("name", ["half", "odd_rows"])
def test_nan_stays_in_the_rows_that_read_it(card: Card, name, part):
    """A kept value that is NaN, in the window and out of it."""
    for window in (-1, 20):
        case = TestSparseAttention.make(name, [150, 150], dense_share=0.0, window_left=window)
        pool = case.k_pool if part == "k" else case.v_pool
        nan = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)
        pool[int(case.page_indices[0, 0]), 0, 6:8] = nan
        out, _ = check(card, case)
        assert out[1].isfinite().all() and (window >= 0) == bool(out[0].isfinite().all())


@pytest.mark.parametrize("queries", [None, [70, 3]])
def test_other_values_behind_the_kept_ones_do_not_matter(card: Card, queries):
    """A mask that selects little leaves zeros in a row, whatever they become: nothing reads them."""
    case = TestSparseAttention.make("half", [170, 64], queries, dense_share=0.0)
    layout = case.fmt.k_layout
    bitmaps = case.k_pool[..., layout.bitmap_offset :]
    bitmaps[:, :, 1::2] = 0  # half of the bytes of every row
    want = check(card, case)
    counts = (
        torch.tensor([byte.bit_count() for byte in range(256)])[bitmaps.long()].unflatten(-1, (32, 8)).sum(-1)
    )
    values = case.k_pool[..., : layout.bitmap_offset].unflatten(-1, (32, 64))
    unread = torch.arange(64) // 2 >= counts[..., None]
    values.masked_fill_(unread, 0xFF)  # NaN
    got = run(card, case)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
