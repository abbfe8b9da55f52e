"""Bitmap-sparse pages: making and reading records of rows that keep the same number of elements each.

Shapes: N pages of P tokens, Hkv kv heads, D / Dv head dims of K / V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvk.formats.sparse import BitmapFormat
from kvk.ops._common import fake, no_results

_ops = torch.ops.kvk


def compress_pages(
    k_pages: Tensor,
    v_pages: Tensor,
    src: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    dst: Tensor,
    fmt: BitmapFormat,
    *,
    k_select: Tensor | None = None,
    v_select: Tensor | None = None,
) -> None:
    """Thins out whole dense pages into records, in place: of every row (one token of one head) ``keep`` elements stay.

    By default those of largest magnitude, of equal ones the lower channels (Mustafar's per-token pruning of keys and
    values). Kept elements are stored bit for bit; zeros, infinities and NaN: docs/formats.md.

    Args:
        k_pages: [M, P, Hkv, D], fmt.dtype, or float32, which is rounded first; any strides with the last one 1.
        v_pages: [M, P, Hkv, Dv], likewise.
        src: int32 [n], the dense pages to compress; all P tokens of each are read.
        k_pool, v_pool: uint8 [N, Hkv, fmt.k_record_bytes] and [N, Hkv, fmt.v_record_bytes], written;
            records on multiples of 16 bytes.
        dst: int32 [n], the page of the pools that each goes to; all different.
        fmt: what the records hold.
        k_select, v_select: what is kept, where magnitude shall not decide (output-aware pruning, channel pruning as in
            ThinK); page i of it belongs to src[i]; any strides with the last one 1, so that one row may be expanded to
            all. float32 [n, P, Hkv, D]: scores, the largest win, NaN first, of equal ones the lower channels. bool
            [n, P, Hkv, D] or, as a bitmap, uint8 [n, P, Hkv, D / 8], low bits first: exactly these, at most ``keep``
            of a row; places that stay free hold zeros. Where the format rotates: channels of the rotated row.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device, stride or value; nothing has been written.
    """
    selects = {name: x for name, x in (("k_select", k_select), ("v_select", v_select)) if x is not None}
    _ops.compress_pages(k_pages, v_pages, src, k_pool, v_pool, dst, fmt.numbers, **selects)


def decompress_pages(k_pool: Tensor, v_pool: Tensor, ids: Tensor, fmt: BitmapFormat) -> tuple[Tensor, Tensor]:
    """Reads records back into dense pages: kept elements in their places, +0 elsewhere; rotated back if rotated.

    Attention does not need it (see sparse_decode): it is for moving a cache elsewhere, and for looking at it.

    Args:
        k_pool, v_pool: as compress_pages writes them.
        ids: int32 [n], pages of the pools.
        fmt: what the records hold.

    Returns:
        k [n, P, Hkv, D] and v [n, P, Hkv, Dv], fmt.dtype.

    Raises:
        RuntimeError: as compress_pages.
    """
    return _ops.decompress_pages(k_pool, v_pool, ids, fmt.numbers)


fake("compress_pages")(no_results)


@fake("decompress_pages")
def _(k_pool, ids, fmt, **_):
    form = BitmapFormat.from_numbers(fmt)
    shape = (ids.shape[0], form.page_size, k_pool.shape[1])
    return tuple(
        k_pool.new_empty((*shape, dim), dtype=form.dtype) for dim in (form.head_dim, form.head_dim_v)
    )
