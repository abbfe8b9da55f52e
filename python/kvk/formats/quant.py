"""The quantized format: records of 2, 3, 4 or 8 bit codes with their scales (docs/formats.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # kvk.array has this file without torch
    import torch
    from torch import Tensor

BITS = (2, 3, 4, 8)
AXES = ("channel", "token")
MAX_PAGE_SIZE = 65536
MAX_HADAMARD = 32768


def _round_up(x: int) -> int:
    return -(-x // 16) * 16


@dataclass(frozen=True)
class QuantLayout:
    """Offsets into a record of K or V, in bytes.

    codes [page_size][row_bytes] from 0, scale f16 [num_scales] from scale_offset, min f16 [num_scales] from
    min_offset, each padded with zeros to a multiple of 16.
    """

    row_bytes: int
    num_scales: int
    scale_offset: int
    min_offset: int
    record_bytes: int


@dataclass(frozen=True)
class QuantFormat:
    """How pages of keys and values are quantized. Immutable and hashable; checked when it is made.

    Attributes:
        page_size: tokens of a page.
        head_dim: channels of a key, 32 to 256 in steps of 8.
        k_bits, v_bits: 2, 3, 4 or 8.
        k_group, v_group: elements that share a scale, 16 to 128. Divides the page along tokens, or the head dim along
            channels, where it is also a multiple of 8.
        k_axis, v_axis: "channel": a group is one channel of consecutive tokens (KIVI's keys); "token": consecutive
            channels of one token.
        head_dim_v: channels of a value, default head_dim.
        k_clip, v_clip: over 0 and at most 1; the smallest and the largest element of a group are multiplied by it, and
            what lies beyond saturates (RotateKV: 0.8 at 2 bit). Only quantizing uses it.
        k_rotate, v_rotate: kv heads whose rows are stored after one orthonormal Hadamard transform; 0: rows as they
            are. With 1 attention rotates q and rotates the output back; with m > 1 (RotateKV: 4) it restores the rows
            of m consecutive heads together, whose number divides that of the kv heads. CPU only where over 1.

    Raises:
        ValueError: a parameter is out of its range, or does not fit the others.
    """

    page_size: int
    head_dim: int
    k_bits: int = 2
    v_bits: int = 2
    k_group: int = 32
    v_group: int = 32
    k_axis: str = "channel"
    v_axis: str = "token"
    head_dim_v: int = 0
    k_clip: float = 1.0
    v_clip: float = 1.0
    k_rotate: int = 0
    v_rotate: int = 0

    def __post_init__(self) -> None:
        if self.head_dim_v == 0:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        if not 1 <= self.page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size must be 1 to {MAX_PAGE_SIZE}, got {self.page_size}")
        self._check("k", "head_dim", self.head_dim)
        self._check("v", "head_dim_v", self.head_dim_v)

    def _check(self, part: str, dim_name: str, dim: int) -> None:
        bits, group, axis, clip, rotate = (
            getattr(self, f"{part}_{name}") for name in ("bits", "group", "axis", "clip", "rotate")
        )
        if dim % 8 or not 32 <= dim <= 256:
            raise ValueError(f"{dim_name} must be a multiple of 8 from 32 to 256, got {dim}")
        if bits not in BITS:
            raise ValueError(f"{part}_bits must be 2, 3, 4 or 8, got {bits}")
        if not 16 <= group <= 128:
            raise ValueError(f"{part}_group must be 16 to 128, got {group}")
        if axis not in AXES:
            raise ValueError(f"{part}_axis must be 'channel' or 'token', got {axis!r}")
        if axis == "channel" and self.page_size % group:
            raise ValueError(f"{part}_group must divide the page_size of {self.page_size}, got {group}")
        if axis == "token" and (dim % group or group % 8):
            raise ValueError(
                f"{part}_group must be a multiple of 8 that divides the {dim_name} of {dim}, got {group}"
            )
        if not 0.0 < clip <= 1.0:
            raise ValueError(f"{part}_clip must be over 0 and at most 1, got {clip}")
        if rotate < 0:
            raise ValueError(f"{part}_rotate must not be negative, got {rotate}")
        n = rotate * dim
        fits = n <= MAX_HADAMARD and any(
            n % m == 0 and (n // m).bit_count() == 1 for m in (1, 12, 20, 28, 40)
        )
        if rotate and not fits:
            raise ValueError(
                f"{part}_rotate needs a {dim_name} that gives, times the heads, m * 2**k with m in "
                f"{{1, 12, 20, 28, 40}} and at most {MAX_HADAMARD}, got {rotate} times {dim}"
            )

    def _layout(self, dim: int, bits: int, group: int) -> QuantLayout:
        row_bytes, num_scales = dim * bits // 8, self.page_size * dim // group
        scale_offset = _round_up(self.page_size * row_bytes)
        min_offset = scale_offset + _round_up(2 * num_scales)
        return QuantLayout(
            row_bytes, num_scales, scale_offset, min_offset, min_offset + _round_up(2 * num_scales)
        )

    @property
    def k_layout(self) -> QuantLayout:
        """Where the parts of a K record lie."""
        return self._layout(self.head_dim, self.k_bits, self.k_group)

    @property
    def v_layout(self) -> QuantLayout:
        """Where the parts of a V record lie."""
        return self._layout(self.head_dim_v, self.v_bits, self.v_group)

    @property
    def k_record_bytes(self) -> int:
        """Bytes of K of one page and kv head."""
        return self.k_layout.record_bytes

    @property
    def v_record_bytes(self) -> int:
        """Bytes of V of one page and kv head."""
        return self.v_layout.record_bytes

    @property
    def bits_per_element(self) -> float:
        """Stored bits for each element of K and V, scales and padding included."""
        elements = self.page_size * (self.head_dim + self.head_dim_v)
        return 8 * (self.k_record_bytes + self.v_record_bytes) / elements

    @property
    def numbers(self) -> list[int]:
        """The integers that stand for the format in torch.ops.kvk; clips travel apart, where they are used."""
        parts = [
            (self.k_bits, self.k_group, AXES.index(self.k_axis), self.k_rotate),
            (self.v_bits, self.v_group, AXES.index(self.v_axis), self.v_rotate),
        ]
        return [self.page_size, self.head_dim, self.head_dim_v, *parts[0], *parts[1]]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> QuantFormat:
        """The format that these integers stand for; its clips are 1."""
        page_size, head_dim, head_dim_v, *parts = numbers
        k_bits, k_group, k_axis, k_rotate, v_bits, v_group, v_axis, v_rotate = parts
        return cls(
            page_size,
            head_dim,
            k_bits,
            v_bits,
            k_group,
            v_group,
            AXES[k_axis],
            AXES[v_axis],
            head_dim_v,
            k_rotate=k_rotate,
            v_rotate=v_rotate,
        )

    def new_pool(
        self, num_pages: int, num_kv_heads: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Uninitialised pools of records: uint8 [num_pages, num_kv_heads, k_record_bytes], and of V alike."""
        import torch

        return (
            torch.empty(num_pages, num_kv_heads, self.k_record_bytes, dtype=torch.uint8, device=device),
            torch.empty(num_pages, num_kv_heads, self.v_record_bytes, dtype=torch.uint8, device=device),
        )
