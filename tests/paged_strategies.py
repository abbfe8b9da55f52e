"""Hypothesis strategies for paged_cases.make_case: they draw its arguments, so that a failure prints them."""

from __future__ import annotations

import random
from typing import Any

import torch
from hypothesis import strategies as st
from paged_cases import LAYOUTS, Q_LAYOUTS, TABLES, PagedCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = tuple(range(32, 257, 8))
PAGE_SIZES = (1, 2, 3, 5, 7, 16, 64, 128)
# Kernels work in blocks of 64 keys and split long requests, so lengths stand close to such borders.
BORDERS = (63, 64, 65, 127, 128, 129, 191, 193, 511, 512, 513, 575, 577)


def _length(longest: int) -> st.SearchStrategy[int]:
    short = st.integers(0, 40)
    border = st.sampled_from([length for length in BORDERS if length <= longest] or [1])
    choices = [short, short, border, st.integers(0, min(longest, 600))]
    if longest > 1100:
        choices.append(st.integers(1100, longest))
    return st.one_of(choices)


@st.composite
def case_params(draw: st.DrawFn, *, prefill: bool) -> dict[str, Any]:
    num_kv_heads = draw(st.integers(1, 4))
    group = draw(st.integers(1, 8))
    batch = draw(st.integers(0, 5))
    table = draw(st.sampled_from(TABLES))
    # One long request at most, and few heads beside it, keep the reference quick.
    longest = 1500 if num_kv_heads * group <= 8 and batch <= 2 else 600
    if prefill:
        longest = min(longest, 1500 if group <= 2 else 200)
    length = _length(longest)
    if draw(st.booleans()) and draw(st.booleans()):  # per-head lengths, with any form of the table
        kv_lens: list[Any] = [[draw(length) for _ in range(num_kv_heads)] for _ in range(batch)]
    else:
        kv_lens = [draw(length) for _ in range(batch)]
    params: dict[str, Any] = {
        "kv_lens": kv_lens,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": draw(st.sampled_from(HEAD_DIMS)),
        "head_dim_v": draw(st.none() | st.sampled_from(HEAD_DIMS)),
        "page_size": draw(st.sampled_from(PAGE_SIZES)),
        "table": table,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "q_layout": draw(st.sampled_from(Q_LAYOUTS)),
        "share_pages": draw(st.booleans()),
        "q_scale": draw(st.sampled_from([1.0, 1.0, 4.0])),
        "window_left": draw(st.sampled_from([-1, -1, -1, 0, 1, 5, 63, 64, 100, 1000])),
        "logits_soft_cap": draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
    }
    if draw(st.booleans()):
        params["softmax_scale"] = draw(st.sampled_from([0.05, 0.125, 0.3, -0.1, 0.0]))
    if draw(st.booleans()):
        params["key_bias"] = draw(st.sampled_from(["page", "head"]))
        params["hidden_keys"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
    if prefill:
        longest_q = 100 if group <= 4 else 40
        params["q_lens"] = [draw(st.integers(0, 12) | st.integers(0, longest_q)) for _ in range(batch)]
        params["padding_rows"] = draw(st.integers(0, 3))
        params["causal"] = draw(st.booleans())
        params["mask"] = draw(st.sampled_from([None, None, "tree", "random"]))
        if params["mask"] == "random":
            params["mask_width"] = draw(st.just(-1) | st.integers(0, 100))
    return params


def sprinkle_nonfinite(case: PagedCase, seed: int, count: int) -> PagedCase:
    """Put NaN, inf and -inf at random places of q, k_pages, v_pages and key_bias, used slots or not."""
    rng = random.Random(seed)
    names = ["q", "k_pages", "v_pages"]
    tensors = {name: getattr(case, name).clone() for name in names}
    options = {}
    if "key_bias" in case.options:
        options["key_bias"] = tensors["key_bias"] = case.options["key_bias"].clone()
        names.append("key_bias")
    for _ in range(count):
        target = tensors[rng.choice(names)]
        if target.numel():
            where = tuple(rng.randrange(size) for size in target.shape)
            target[where] = rng.choice([float("nan"), float("inf"), float("-inf")])
    return case.with_(q=tensors["q"], k_pages=tensors["k_pages"], v_pages=tensors["v_pages"], options=options)
