"""Random formats and pages of the bitmap-sparse family."""

from __future__ import annotations

import kvk
import torch
from hypothesis import strategies as st
from torch import Tensor

VALUE_DTYPES = (torch.bfloat16, torch.float16)
HADAMARD_DIMS = tuple(
    d for d in range(32, 257, 8) if any(d % m == 0 and (d // m).bit_count() == 1 for m in (1, 12, 20, 28, 40))
)


@st.composite
def formats(draw: st.DrawFn, dtype: torch.dtype | None = None) -> kvk.BitmapFormat:
    """Any valid format of a small page."""
    dims = [draw(st.sampled_from(range(32, 257, 8))) for _ in range(2)]
    keeps = [draw(st.sampled_from(range(8, dim + 1, 8))) for dim in dims]
    rotates = [draw(st.sampled_from([0, 0, 1])) if dim in HADAMARD_DIMS else 0 for dim in dims]
    return kvk.BitmapFormat(
        draw(st.sampled_from([1, 3, 16, 17, 32, 64, 128])),
        dims[0],
        *keeps,
        dtype or draw(st.sampled_from(VALUE_DTYPES)),
        dims[1],
        *rotates,
    )


def value_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of a format for q of this dtype."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def all_bits(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers whose bits are random: every magnitude, zeros of both signs, infinities and NaN."""
    gen = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 1 << 16, (count,), generator=gen)
    special = torch.tensor([0, 0x8000, 0x7F80, 0xFF80, 0x7C00, 0xFC00, 0x7FC0, 0xFFFF, 0x3F80, 0xBF80])
    chosen = torch.rand(count, generator=gen) < 0.3
    bits = torch.where(chosen, special[torch.randint(0, len(special), (count,), generator=gen)], bits)
    return bits.to(torch.uint16).view(dtype)


def pages(fmt: kvk.BitmapFormat, count: int, heads: int, seed: int = 0, dtype: torch.dtype | None = None):
    """(k, v) dense pages [count, P, heads, D]: random bits in the format's dtype, normal numbers in float32."""
    result = []
    for i, dim in enumerate((fmt.head_dim, fmt.head_dim_v)):
        shape = (count, fmt.page_size, heads, dim)
        if dtype in (None, fmt.dtype) and not (fmt.k_rotate or fmt.v_rotate):
            x = all_bits(torch.Size(shape).numel(), fmt.dtype, seed + i).view(shape)
        else:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)).to(dtype or fmt.dtype)
        result.append(x)
    return result
