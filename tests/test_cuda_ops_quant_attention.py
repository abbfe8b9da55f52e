"""quant_decode and quant_prefill on CUDA, over the emulator and on the card, against dequantizing and attending."""

from __future__ import annotations

from typing import Any

import kvk
import pytest
import torch
from card import Card
from cuda_record_cases import RecordAttention, check

BF16, F16 = torch.bfloat16, torch.float16
KIVI = kvk.QuantFormat(32, 64)
BIAS = kvk.QuantFormat(16, 32, 8, 2, 16, 40, head_dim_v=40)
FORMATS: dict[str, tuple[kvk.QuantFormat, dict[str, Any]]] = {
    "kivi": (KIVI, {"dtype": BF16, "group": 3}),
    "kivi_many_heads": (KIVI, {"dtype": BF16, "group": 12}),
    "groups_of_17": (
        kvk.QuantFormat(34, 40, 8, 3, 40, 17, "token", "channel", head_dim_v=72),
        {"dtype": F16, "group": 10},
    ),
    "rotated": (
        kvk.QuantFormat(48, 80, 4, 8, 16, 16, "token", "channel", head_dim_v=64, k_rotate=1, v_rotate=1),
        {"dtype": BF16, "group": 9},
    ),
    "biased": (BIAS, {"dtype": F16, "group": 17, "key_bias": "head", "hidden_keys": 0.3}),
}


class TestQuantAttention(RecordAttention):
    FORMATS = FORMATS
    PLAIN = "kivi"
    OPTIONS = kvk.QuantFormat(48, 32, 3, 4, 24, 40, head_dim_v=40)


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("name", ["kivi", "groups_of_17"])
def test_nan_stays_in_the_rows_that_read_it(card: Card, name, part):
    """A group that reads as NaN, in the window and out of it."""
    for window in (-1, 20):
        case = TestQuantAttention.make(name, [150, 150], dense_share=0.0, window_left=window)
        pool = case.k_pool if part == "k" else case.v_pool
        layout = case.fmt.k_layout if part == "k" else case.fmt.v_layout
        nan = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
        pool[int(case.page_indices[0, 0]), 0, layout.min_offset + 6 : layout.min_offset + 8] = nan
        out, _ = check(card, case)
        assert out[1].isfinite().all() and (window >= 0) == bool(out[0].isfinite().all())
