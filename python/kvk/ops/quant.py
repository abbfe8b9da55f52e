"""Quantized pages: making and reading records, and the same codes for any tensor.

Shapes: N pages of P tokens, Hkv kv heads, D / Dv head dims of K / V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvk.formats.quant import QuantFormat
from kvk.ops._common import fake, no_results

_ops = torch.ops.kvk


def quantize_pages(
    k_pages: Tensor,
    v_pages: Tensor,
    src: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    dst: Tensor,
    fmt: QuantFormat,
    *,
    k_permutation: Tensor | None = None,
) -> None:
    """Quantizes whole dense pages into records, in place.

    Every group of elements gets ``min`` and ``scale = (max - min) / (2**bits - 1)``, stored as float16, and codes
    ``round_half_even((x - min) / scale)``, made with the stored numbers (KIVI's formula). Constant groups, values
    beyond float16, infinities and NaN: docs/formats.md.

    Args:
        k_pages: [M, P, Hkv, D], float32, bfloat16 or float16, any strides with the last one 1.
        v_pages: [M, P, Hkv, Dv], likewise.
        src: int32 [n], the dense pages to quantize; all P tokens of each are read.
        k_pool, v_pool: uint8 [N, Hkv, fmt.k_record_bytes] and [N, Hkv, fmt.v_record_bytes], written;
            records on multiples of 16 bytes.
        dst: int32 [n], the page of the pools that each goes to; all different.
        fmt: what the records hold.
        k_permutation: int32 [Hkv / m, m * D], m the heads that fmt rotates K over (1 where it does not): channel i of
            a group's keys, as they are quantized, is channel k_permutation[group, i] of the rotated ones (RotateKV's
            reordering, so that channels of like size share a scale). CPU only.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value; nothing has been written.
    """
    _ops.quantize_pages(
        k_pages,
        v_pages,
        src,
        k_pool,
        v_pool,
        dst,
        fmt.numbers,
        k_clip=fmt.k_clip,
        v_clip=fmt.v_clip,
        k_permutation=k_permutation,
    )


def dequantize_pages(
    k_pool: Tensor,
    v_pool: Tensor,
    ids: Tensor,
    fmt: QuantFormat,
    dtype: torch.dtype,
    *,
    k_permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads records back into dense pages: ``x = code * scale + min`` in float32, rotated back if the format rotates.

    Attention does not need it (see quant_decode): it is for moving a cache elsewhere, and for looking at it.

    Args:
        k_pool, v_pool: as quantize_pages writes them.
        ids: int32 [n], pages of the pools.
        fmt: what the records hold.
        dtype: float32, bfloat16 or float16, which saturates at its largest number.
        k_permutation: as quantize_pages had it.

    Returns:
        k [n, P, Hkv, D] and v [n, P, Hkv, Dv].

    Raises:
        RuntimeError: as quantize_pages.
    """
    return _ops.dequantize_pages(k_pool, v_pool, ids, fmt.numbers, dtype, k_permutation=k_permutation)


def quantize(
    x: Tensor, bits: int, group: int, axis: int = -1, *, clip: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes any tensor, with the numbers of quantize_pages.

    Args:
        x: [..., n], float32, bfloat16 or float16, any leading strides, last stride 1; n a multiple of 8.
        bits: 2, 3, 4 or 8. group: 16 to 128.
        axis: the dimension along which groups run, which they divide: -1 (token style; group a multiple of 8) or
            -2 (channel style; x is [..., T, n]).
        clip: over 0 and at most 1; the ends of a group are multiplied by it first.

    Returns:
        codes uint8 [..., n * bits / 8], element j in bits [j * bits, (j + 1) * bits) of its row, low bits first;
        scale and min float16, x's shape with dimension `axis` divided by group.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value.
    """
    return _ops.quantize(x, bits, group, axis, clip=clip)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    min: Tensor,
    bits: int,
    group: int,
    axis: int = -1,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Reads back what quantize made: ``x = code * scale + min`` in float32, rounded to dtype (float16 saturates).

    Args:
        codes, scale, min, bits, group, axis: of quantize; contiguous.
        dtype: float32, bfloat16 or float16.

    Returns:
        [..., n].

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value.
    """
    return _ops.dequantize(codes, scale, min, bits, group, axis, dtype=dtype)


fake("quantize_pages")(no_results)


@fake("dequantize_pages")
def _(k_pool, ids, fmt, dtype, **_):
    form = QuantFormat.from_numbers(fmt)
    shape = (ids.shape[0], form.page_size, k_pool.shape[1])
    return tuple(k_pool.new_empty((*shape, dim), dtype=dtype) for dim in (form.head_dim, form.head_dim_v))


@fake("quantize")
def _(x, bits, group, axis=-1, **_):
    scales = list(x.shape)
    scales[axis] = scales[axis] // group
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] * bits // 8), dtype=torch.uint8)
    return codes, x.new_empty(scales, dtype=torch.float16), x.new_empty(scales, dtype=torch.float16)


@fake("dequantize")
def _(codes, bits, dtype=torch.float32, **_):
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits), dtype=dtype)
