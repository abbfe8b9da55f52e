"""Reference of the bitmap-sparse format: selection and records, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from kvk.formats.sparse import BitmapFormat
from kvk.reference.quant import rotate


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast from float32; a NaN becomes the positive quiet one without a payload."""
    quiet = torch.tensor(torch.nan, dtype=dtype)
    return torch.where(x.isnan(), quiet, x.to(dtype))


def largest(keys: Tensor, keep: int) -> Tensor:
    """bool [..., n]: the `keep` largest integers of each row, of equal ones the first."""
    order = torch.sort(keys, dim=-1, descending=True, stable=True).indices
    return torch.zeros(keys.shape, dtype=torch.bool).scatter_(-1, order[..., :keep], True)


def magnitude(x: Tensor) -> Tensor:
    """|x| of 16-bit floats as an integer, the 15 bits below the sign: NaN comes above infinity."""
    return x.contiguous().view(torch.int16).int() & 0x7FFF


def score_key(scores: Tensor) -> Tensor:
    """float32 scores as int64 that sort like them: +0 is -0, NaN comes above infinity."""
    bits = torch.where(scores == 0, 0.0, scores).contiguous().view(torch.int32).long()
    key = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return torch.where(scores.isnan(), 1 << 40, key)


def unpack_bitmap(bitmap: Tensor) -> Tensor:
    """uint8 [..., n / 8] -> bool [..., n], low bits first."""
    return (bitmap[..., None].int() >> torch.arange(8) & 1).bool().flatten(-2)


def pack_bitmap(mask: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., n / 8], low bits first."""
    return (mask.unflatten(-1, (-1, 8)).int() << torch.arange(8)).sum(-1).to(torch.uint8)


def selection(x: Tensor, keep: int, select: Tensor | None) -> Tensor:
    """bool [..., n], at most `keep` of a row: by magnitude, by scores, or as a mask or bitmaps say."""
    if select is None:
        return largest(magnitude(x), keep)
    if select.dtype == torch.float32:
        return largest(score_key(select), keep)
    return select if select.dtype == torch.bool else unpack_bitmap(select)


def _record(rows: Tensor, dtype: torch.dtype, keep: int, rotated: int, select: Tensor | None) -> Tensor:
    """[..., P, D] -> uint8 [..., record_bytes]."""
    x = rotate(rows) if rotated else rows
    x = x if x.dtype == dtype else rounded(x, dtype)
    mask = selection(x, keep, select)
    # Selected elements in the order of their channels, then zeros.
    order = torch.sort(mask.int(), dim=-1, descending=True, stable=True).indices[..., :keep]
    bits = x.contiguous().view(torch.int16)
    values = torch.where(mask.gather(-1, order), bits.gather(-1, order), 0)
    bitmap = pack_bitmap(mask).flatten(-2)
    parts = [values.flatten(-2).contiguous().view(torch.uint8), bitmap]
    return torch.nn.functional.pad(torch.cat(parts, -1), (0, -bitmap.shape[-1] % 16))


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
    """Records of the dense pages src, written to the pools' pages dst; see kvk.compress_pages."""
    for pages, pool, keep, rotated, select in (
        (k_pages, k_pool, fmt.k_keep, fmt.k_rotate, k_select),
        (v_pages, v_pool, fmt.v_keep, fmt.v_rotate, v_select),
    ):
        rows = pages[src.long()].transpose(1, 2)
        by_head = None if select is None else select.transpose(1, 2)
        pool[dst.long()] = _record(rows, fmt.dtype, keep, rotated, by_head)


def read_records(pool: Tensor, ids: Tensor, fmt: BitmapFormat, which: str) -> Tensor:
    """Records of "k" or "v" in fmt.dtype, [n, P, Hkv, D], still rotated if the format rotates."""
    keep = fmt.k_keep if which == "k" else fmt.v_keep
    dim, layout = (fmt.head_dim, fmt.k_layout) if which == "k" else (fmt.head_dim_v, fmt.v_layout)
    records = pool[ids.long()]
    values = records[..., : layout.bitmap_offset].contiguous().view(fmt.dtype).unflatten(-1, (-1, keep))
    bitmap = records[..., layout.bitmap_offset :][..., : fmt.page_size * layout.bitmap_row_bytes]
    mask = unpack_bitmap(bitmap.unflatten(-1, (fmt.page_size, dim // 8)))
    place = (mask.int().cumsum(-1) - 1).clamp(min=0, max=keep - 1)
    bits = torch.where(mask, values.view(torch.int16).gather(-1, place), 0)
    return bits.view(fmt.dtype).transpose(1, 2)


def decompress_pages(k_pool: Tensor, v_pool: Tensor, ids: Tensor, fmt: BitmapFormat) -> tuple[Tensor, Tensor]:
    """(k [n, P, Hkv, D], v [n, P, Hkv, Dv]) in fmt.dtype; see kvk.decompress_pages."""
    k, v = read_records(k_pool, ids, fmt, "k"), read_records(v_pool, ids, fmt, "v")
    k = rounded(rotate(k, transpose=True), fmt.dtype) if fmt.k_rotate else k
    v = rounded(rotate(v, transpose=True), fmt.dtype) if fmt.v_rotate else v
    return k.contiguous(), v.contiguous()
