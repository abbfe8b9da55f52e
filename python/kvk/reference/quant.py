"""Reference of the quantized format: codes, scales and records, in the float32 steps that define them bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvk.formats.quant import QuantFormat
from kvk.reference.hadamard import hadamard_matrix, hadamard_order

F16_MAX = 65504.0


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """[..., n] codes -> uint8 [..., n * bits / 8]: code j is bits [j * bits, (j + 1) * bits) of its row, low first."""
    each = (codes.long()[..., None] >> torch.arange(bits)) & 1
    octets = each.flatten(-2).unflatten(-1, (-1, 8))
    return (octets << torch.arange(8)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., n * bits / 8] -> int64 codes [..., n]."""
    each = (packed.long()[..., None] >> torch.arange(8)) & 1
    codes = each.flatten(-2).unflatten(-1, (-1, bits))
    return (codes << torch.arange(bits)).sum(-1)


def _grouped(x: Tensor, group: int, axis: int) -> tuple[Tensor, int]:
    """x with dimension `axis` as (groups, group), and the dimension of the second."""
    dim = x.dim() + axis
    return x.unflatten(dim, (x.shape[dim] // group, group)), dim + 1


def quantize(
    x: Tensor, bits: int, group: int, axis: int = -1, *, clip: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [..., n * bits / 8], scale, min float16); see kvk.quantize.

    In float32, every operation rounded by itself:

    1. low and high are the smallest and largest element of the group, each times clip unless they are equal;
    2. min = low, at most 65504 in magnitude, rounded to float16; -0 becomes 0;
    3. scale = (high - min) / (2**bits - 1), from +0 to 65504, rounded to float16;
    4. code = round_half_even(t / scale), t = x - min cut to [0, (2**bits - 1) * scale]; scale 0: code 0.

    A group that holds a NaN or an infinity has min NaN, scale 0 and codes 0: all of it reads back as NaN.
    """
    levels = 2**bits - 1
    groups, dim = _grouped(x.float(), group, axis)
    sick = ~torch.isfinite(groups).all(dim, keepdim=True)
    groups = torch.where(sick, 0.0, groups)
    low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
    varies = low != high
    low = torch.where(varies, low * torch.tensor(clip), low)
    high = torch.where(varies, high * torch.tensor(clip), high)
    minimum = (low.clamp(-F16_MAX, F16_MAX) + 0.0).half()
    scale = (((high - minimum.float()) / levels).clamp(0.0, F16_MAX) + 0.0).half()
    top = scale.float() * levels
    t = torch.minimum((groups - minimum.float()).clamp(min=0.0), top)
    codes = torch.round(t / torch.where(scale == 0, 1.0, scale.float()))
    minimum = torch.where(sick, torch.nan, minimum)
    scale = torch.where(sick, 0.0, scale)
    codes = codes.flatten(dim - 1, dim)
    return pack_bits(codes, bits), scale.squeeze(dim), minimum.squeeze(dim)


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
    """code * scale + min in float32, rounded to dtype; float16 saturates. The product is exact."""
    values, dim = _grouped(unpack_bits(codes, bits).float(), group, axis)
    x = values * scale.float().unsqueeze(dim) + min.float().unsqueeze(dim)
    return _rounded(x.flatten(dim - 1, dim), dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.clamp(-F16_MAX, F16_MAX) if dtype == torch.float16 else x).to(dtype)


def rotate(x: Tensor, *, transpose: bool = False) -> Tensor:
    """The orthonormal Hadamard transform in the float32 steps of the kernels: float32 [..., n].

    Scaled first; then butterflies of strides 1, 2, 4, ... inside each of the m chunks; then H_m, whose sums run over
    the chunks in order (H_40: first the pairs of its two-fold).
    """
    n = x.shape[-1]
    m = hadamard_order(n)
    x = x.float() * torch.tensor(n**-0.5, dtype=torch.float32)
    stride = 1
    while stride < n // m:
        a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        stride *= 2
    if m == 1:
        return x
    chunks = x.unflatten(-1, (m, n // m))
    if m == 40:
        a, b = chunks.unflatten(-2, (2, 20)).unbind(-3)
        matrix = hadamard_matrix(40)[:20, :20]
        halves = [_ordered_sums(h, matrix.T if transpose else matrix) for h in (a + b, a - b)]
        return torch.cat(halves, -2).flatten(-2)
    matrix = hadamard_matrix(m)
    return _ordered_sums(chunks, matrix.T if transpose else matrix).flatten(-2)


def _ordered_sums(chunks: Tensor, signs: Tensor) -> Tensor:
    """out[i] = sum over j, in order, of signs[i, j] * chunks[j], for chunks [..., m, c]."""
    out = torch.zeros_like(chunks)
    for j in range(chunks.shape[-2]):
        out = out + signs[:, j, None].float() * chunks[..., j : j + 1, :]
    return out


def stored_rows(x: Tensor, rotated: int, permutation: Tensor | None = None) -> Tensor:
    """Rows as they are quantized, from float [..., Hkv, P, D]: rotated over `rotated` heads, channels reordered."""
    joint = max(rotated, 1)
    rows = x.unflatten(-3, (-1, joint)).transpose(-3, -2).flatten(-2)  # [..., Hkv / m, P, m * D]
    rows = rotate(rows) if rotated else rows
    if permutation is not None:
        rows = rows.gather(-1, permutation.long()[:, None, :].expand_as(rows))
    return rows.unflatten(-1, (joint, -1)).transpose(-3, -2).flatten(-4, -3)


def restored_rows(
    x: Tensor, rotated: int, permutation: Tensor | None, transform: Callable[[Tensor], Tensor]
) -> Tensor:
    """What stored_rows was given, from what it gave; `transform` is the transposed rotation."""
    joint = max(rotated, 1)
    rows = x.unflatten(-3, (-1, joint)).transpose(-3, -2).flatten(-2)
    if permutation is not None:
        rows = torch.zeros_like(rows).scatter(-1, permutation.long()[:, None, :].expand_as(rows), rows)
    rows = transform(rows) if rotated else rows
    return rows.unflatten(-1, (joint, -1)).transpose(-3, -2).flatten(-4, -3)


def _record(x: Tensor, bits: int, group: int, axis: str, clip: float, size: int) -> Tensor:
    """[..., P, D] -> uint8 [..., record_bytes]."""
    parts = quantize(x, bits, group, -2 if axis == "channel" else -1, clip=clip)
    padded = []
    for part in parts:
        octets = part.flatten(-2).contiguous().view(torch.uint8)
        padded.append(torch.nn.functional.pad(octets, (0, -octets.shape[-1] % 16)))
    record = torch.cat(padded, -1)
    assert record.shape[-1] == size
    return record


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
    """Records of the dense pages src, written to the pools' pages dst; see kvk.quantize_pages."""
    k, v = (pages[src.long()].transpose(1, 2).float() for pages in (k_pages, v_pages))
    k, v = stored_rows(k, fmt.k_rotate, k_permutation), stored_rows(v, fmt.v_rotate)
    k_pool[dst.long()] = _record(k, fmt.k_bits, fmt.k_group, fmt.k_axis, fmt.k_clip, fmt.k_record_bytes)
    v_pool[dst.long()] = _record(v, fmt.v_bits, fmt.v_group, fmt.v_axis, fmt.v_clip, fmt.v_record_bytes)


def read_records(pool: Tensor, ids: Tensor, fmt: QuantFormat, which: str) -> Tensor:
    """Records of "k" or "v" as float32 [n, P, Hkv, D], still rotated if the format rotates."""
    bits, group, axis = (getattr(fmt, f"{which}_{name}") for name in ("bits", "group", "axis"))
    dim, layout = (fmt.head_dim, fmt.k_layout) if which == "k" else (fmt.head_dim_v, fmt.v_layout)
    records = pool[ids.long()]
    codes = records[..., : fmt.page_size * layout.row_bytes].unflatten(-1, (fmt.page_size, layout.row_bytes))
    channel = axis == "channel"
    shape = (fmt.page_size // group, dim) if channel else (fmt.page_size, dim // group)

    def halves(offset: int) -> Tensor:
        part = records[..., offset : offset + 2 * layout.num_scales].contiguous()
        return part.view(torch.float16).unflatten(-1, shape)

    scale, minimum = halves(layout.scale_offset), halves(layout.min_offset)
    return dequantize(codes, scale, minimum, bits, group, -2 if channel else -1).transpose(1, 2)


def dequantize_pages(
    k_pool: Tensor,
    v_pool: Tensor,
    ids: Tensor,
    fmt: QuantFormat,
    dtype: torch.dtype,
    *,
    k_permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(k [n, P, Hkv, D], v [n, P, Hkv, Dv]); see kvk.dequantize_pages."""

    def back(pool: Tensor, which: str, rotated: int, permutation: Tensor | None) -> Tensor:
        stored = read_records(pool, ids, fmt, which).transpose(1, 2)
        rows = restored_rows(stored, rotated, permutation, lambda x: rotate(x, transpose=True))
        return _rounded(rows.transpose(1, 2), dtype).contiguous()

    return back(k_pool, "k", fmt.k_rotate, k_permutation), back(v_pool, "v", fmt.v_rotate, None)
