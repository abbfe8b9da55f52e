"""Random inputs for the quantized formats."""

from __future__ import annotations

from typing import Any

import kvk
import torch
from hypothesis import strategies as st
from kvk_testing import assert_bit_equal
from torch import Tensor

BITS = (2, 3, 4, 8)
AXES = ("channel", "token")


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: bool = True) -> Tensor:
    """Normal numbers; with spread, every channel has a scale and an offset of its own."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=gen)
    if spread:
        x = x * torch.randn(shape[-1], generator=gen).exp() + 2 * torch.randn(shape[-1], generator=gen)
    return x.to(dtype)


def token_groups(n: int) -> list[int]:
    """Groups along a row of n elements."""
    return [g for g in range(16, 129, 8) if n % g == 0]


def channel_groups(tokens: int) -> list[int]:
    """Groups along so many tokens."""
    return [g for g in range(16, 129) if tokens % g == 0]


@st.composite
def formats(draw: st.DrawFn) -> kvk.QuantFormat:
    """Any valid format of a small page."""
    dims = [d for d in range(32, 257, 8) if token_groups(d)]
    page_size = draw(st.sampled_from([16, 17, 32, 48, 64, 96, 128]))
    dim = {"k": draw(st.sampled_from(dims)), "v": draw(st.sampled_from(dims))}
    options: dict[str, Any] = {}
    for part in ("k", "v"):
        axis = draw(st.sampled_from(AXES))
        groups = channel_groups(page_size) if axis == "channel" else token_groups(dim[part])
        options[f"{part}_axis"] = axis
        options[f"{part}_bits"] = draw(st.sampled_from(BITS))
        options[f"{part}_group"] = draw(st.sampled_from(groups))
        options[f"{part}_clip"] = draw(st.sampled_from([1.0, 1.0, 0.8, 0.95]))
        hadamard = any(dim[part] % m == 0 and (dim[part] // m).bit_count() == 1 for m in (1, 12, 20, 28, 40))
        options[f"{part}_rotate"] = draw(st.sampled_from([0, 1])) if hadamard else 0
    return kvk.QuantFormat(page_size, dim["k"], head_dim_v=dim["v"], **options)


def padded_pool(
    fmt: kvk.QuantFormat, num_pages: int, num_kv_heads: int, fill: int = 0xA5
) -> tuple[Tensor, Tensor]:
    """Pools that are views with gaps between pages and heads, every byte `fill`."""

    def pool(record_bytes: int) -> Tensor:
        whole = torch.full((num_pages + 1, num_kv_heads + 1, record_bytes + 32), fill, dtype=torch.uint8)
        return whole[1:, :num_kv_heads, 16 : 16 + record_bytes]

    return pool(fmt.k_record_bytes), pool(fmt.v_record_bytes)


def assert_same_parts(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Codes, scale and min, to the bit."""
    for name, a, b in zip(("codes", "scale", "min"), got, want, strict=True):
        assert_bit_equal(a, b, name)
