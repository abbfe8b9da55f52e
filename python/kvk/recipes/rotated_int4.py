"""Rotated int4: rows of K and V turned by a Hadamard transform, then 4 bits per token (QuaRot; llama.cpp since 2026).

    from kvk.recipes.rotated_int4 import rotated_int4_cache

    model.set_attn_implementation("kvk")
    model.generate(**inputs, past_key_values=rotated_int4_cache())

The transform spreads a row's outliers over all its channels, so that one scale per token and head is enough: 4.5 bits
an element at head dim 64, 4.25 at 128. Attention rotates q the same way, which leaves q.k as it is, and rotates its
output back. It is the plain baseline that finer methods must beat.
"""

from __future__ import annotations

from typing import Any

from kvk.formats.quant import QuantFormat
from kvk.integrations.transformers import KvkCache


def rotated_int4_cache(
    bits: int = 4, *, group: int = 128, page_size: int = 32, tail: int = 0, **options: Any
) -> KvkCache:
    """A transformers cache of rotated rows.

    Args:
        bits: 2, 3, 4 or 8.
        group: channels that share a scale; at most the head dim, which it divides.
        page_size: tokens of a page.
        tail: tokens at the end of each row that stay dense.
        options: of `KvkCache`, for example sinks, max_pages, dtype.

    Raises ValueError with the first tokens if the model's head dim has no Hadamard matrix.
    """

    def new_format(layer: int, head_dim: int, head_dim_v: int) -> QuantFormat:
        return QuantFormat(
            page_size,
            head_dim,
            bits,
            bits,
            min(group, head_dim),
            min(group, head_dim_v),
            "token",
            "token",
            head_dim_v,
            k_rotate=1,
            v_rotate=1,
        )

    return KvkCache(page_size=page_size, new_format=new_format, residual=tail, **options)
