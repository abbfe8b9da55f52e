"""KIVI (Liu et al., ICML 2024): keys per channel, values per token, 2 or 4 bits, the newest tokens dense.

    from kvk.recipes.kivi import kivi_cache

    model.set_attn_implementation("kvk")
    model.generate(**inputs, past_key_values=kivi_cache(bits=2))

Keys have channels of outliers, the same for all tokens: a group is 32 tokens of one channel, so an outlier costs
nobody else. Values have none: a group is 32 channels of one token. The authors advise 4 bits for models whose query
heads share kv heads, 2 bits for others.

Where it departs from the paper's code: keys and values of a page are packed together, when the page has left the tail,
so the tail is `tail` tokens and up to a page more; a constant group is stored exactly (there it divides by zero).
"""

from __future__ import annotations

from typing import Any

from kvk.formats.quant import QuantFormat
from kvk.integrations.transformers import KvkCache


def kivi_cache(bits: int = 2, *, group: int = 32, tail: int = 128, **options: Any) -> KvkCache:
    """A transformers cache that stores K and V as KIVI does.

    Args:
        bits: 2 or 4 in the paper; 3 and 8 work too.
        group: elements that share a scale, and tokens of a page. Divides the model's head dim.
        tail: tokens at the end of each row that stay dense, the paper's residual length.
        options: of `KvkCache`, for example sinks, max_pages, dtype.

    Raises ValueError with the first tokens if the model's head dim and group do not go together.
    """

    def new_format(layer: int, head_dim: int, head_dim_v: int) -> QuantFormat:
        return QuantFormat(group, head_dim, bits, bits, group, group, "channel", "token", head_dim_v)

    return KvkCache(page_size=group, new_format=new_format, residual=tail, **options)
