"""Mustafar (Joo et al., 2025): the smallest elements of every key and value pruned, the newest tokens dense.

    from kvk.recipes.mustafar import mustafar_cache

    model.set_attn_implementation("kvk")
    model.generate(**inputs, past_key_values=mustafar_cache(0.5))

Of each token and kv head the elements of largest magnitude stay, as many in every row, and attention runs over that
form: 0.56 of bf16 at 50%, 0.375 at 70% of 128 channels. Keys are pruned after their rotary embedding, as they are
stored.

Where it departs from the paper's code: ties go to the lower channel instead of being kept beyond the count; the count
is a multiple of 8, rounded up; pages of 64 tokens, not of 256, are packed as they leave the dense window.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kvk.formats.sparse import BitmapFormat
from kvk.integrations.transformers import KvkCache


def kept(sparsity: float, dim: int) -> int:
    """Elements of a row of `dim` that stay at this share of zeros: at least that many, a multiple of 8."""
    return max(8, 8 * math.ceil(round((1 - sparsity) * dim / 8, 6)))


def mustafar_cache(
    sparsity: float = 0.5,
    v_sparsity: float | None = None,
    *,
    rotated: bool = False,
    page_size: int = 64,
    tail: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> KvkCache:
    """A transformers cache that prunes K and V as Mustafar does.

    Args:
        sparsity, v_sparsity: share of every key, and every value, that is pruned, 0 to below 1; of values by default
            that of keys. The paper: 0.5 and 0.7.
        rotated: prune rows after a Hadamard transform; the head dim must have one.
        page_size: tokens of a page.
        tail: tokens at the end of each row that stay dense, the paper's residual length.
        dtype: of dense pages and of kept elements, bfloat16 or float16. float32 pages are kept as bfloat16.
        options: of `KvkCache`, for example sinks and max_pages.

    Raises ValueError if a share is out of its range.
    """
    v_sparsity = sparsity if v_sparsity is None else v_sparsity
    for name, share in (("sparsity", sparsity), ("v_sparsity", v_sparsity)):
        if not 0.0 <= share < 1.0:
            raise ValueError(f"{name} must be at least 0 and below 1, got {share}")
    values = torch.bfloat16 if dtype == torch.float32 else dtype

    def new_format(layer: int, head_dim: int, head_dim_v: int) -> BitmapFormat:
        keep, v_keep = kept(sparsity, head_dim), kept(v_sparsity, head_dim_v)
        return BitmapFormat(page_size, head_dim, keep, v_keep, values, head_dim_v, int(rotated), int(rotated))

    return KvkCache(page_size=page_size, new_format=new_format, residual=tail, dtype=dtype, **options)
