"""The bitmap-sparse format: records of rows thinned out to the same number of elements (docs/formats.md)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .quant import MAX_PAGE_SIZE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = ("bfloat16", "float16")
# torch's, where it is loaded, as it is with kvk; kvk.array has this file without torch, and goes by their names.
DTYPES: tuple[Any, ...] = (
    tuple(getattr(sys.modules["torch"], name) for name in NAMES) if "torch" in sys.modules else NAMES
)


def dtype_name(dtype: Any) -> str:
    """ "float16" of a string, a NumPy dtype or scalar type, or torch.float16."""
    if isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).removeprefix("torch.")


@dataclass(frozen=True)
class BitmapLayout:
    """Offsets into a record of K or V, in bytes.

    values [page_size][value_row_bytes] from 0, bitmap [page_size][bitmap_row_bytes] from bitmap_offset, padded with
    zeros to a multiple of 16.
    """

    value_row_bytes: int
    bitmap_row_bytes: int
    bitmap_offset: int
    record_bytes: int


@dataclass(frozen=True)
class BitmapFormat:
    """How many elements of each row (one token of one head) are kept. Immutable and hashable; checked when it is made.

    Attributes:
        page_size: tokens of a page.
        head_dim: channels of a key, 32 to 256 in steps of 8.
        k_keep, v_keep: elements of a row that are kept, a multiple of 8 from 8 to the head dim.
        dtype: of the kept values, bfloat16 or float16: of torch or NumPy, or a name. Kept as torch has it, without
            torch as the name.
        head_dim_v: channels of a value, default head_dim.
        k_rotate, v_rotate: 1 stores rows after an orthonormal Hadamard transform of the head dim, 0 as they are.
            Attention rotates q and rotates the output back.

    Raises:
        ValueError: a parameter is out of its range, or does not fit the others.
    """

    page_size: int
    head_dim: int
    k_keep: int
    v_keep: int
    dtype: torch.dtype = DTYPES[0]
    head_dim_v: int = 0
    k_rotate: int = 0
    v_rotate: int = 0

    def __post_init__(self) -> None:
        if self.head_dim_v == 0:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        if not 1 <= self.page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page_size must be 1 to {MAX_PAGE_SIZE}, got {self.page_size}")
        name = dtype_name(self.dtype)
        if name not in NAMES:
            raise ValueError(f"dtype must be bfloat16 or float16, got {self.dtype}")
        object.__setattr__(self, "dtype", DTYPES[NAMES.index(name)])
        self._check("k", "head_dim", self.head_dim)
        self._check("v", "head_dim_v", self.head_dim_v)

    def _check(self, part: str, dim_name: str, dim: int) -> None:
        keep, rotate = getattr(self, f"{part}_keep"), getattr(self, f"{part}_rotate")
        if dim % 8 or not 32 <= dim <= 256:
            raise ValueError(f"{dim_name} must be a multiple of 8 from 32 to 256, got {dim}")
        if keep % 8 or not 8 <= keep <= dim:
            raise ValueError(
                f"{part}_keep must be a multiple of 8 from 8 to the {dim_name} of {dim}, got {keep}"
            )
        if rotate not in (0, 1):
            raise ValueError(f"{part}_rotate must be 0 or 1, got {rotate}")
        if rotate and not any(dim % m == 0 and (dim // m).bit_count() == 1 for m in (1, 12, 20, 28, 40)):
            raise ValueError(
                f"{part}_rotate needs a {dim_name} of m * 2**k with m in {{1, 12, 20, 28, 40}}, got {dim}"
            )

    def _layout(self, dim: int, keep: int) -> BitmapLayout:
        offset = self.page_size * 2 * keep
        return BitmapLayout(2 * keep, dim // 8, offset, offset + -(-(self.page_size * dim // 8) // 16) * 16)

    @property
    def k_layout(self) -> BitmapLayout:
        """Where the parts of a K record lie."""
        return self._layout(self.head_dim, self.k_keep)

    @property
    def v_layout(self) -> BitmapLayout:
        """Where the parts of a V record lie."""
        return self._layout(self.head_dim_v, self.v_keep)

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
        """Stored bits for each element of K and V, kept or not, bitmaps and padding included."""
        elements = self.page_size * (self.head_dim + self.head_dim_v)
        return 8 * (self.k_record_bytes + self.v_record_bytes) / elements

    @property
    def numbers(self) -> list[int]:
        """The integers that stand for the format in torch.ops.kvk."""
        parts = [self.k_keep, self.k_rotate, self.v_keep, self.v_rotate]
        return [self.page_size, self.head_dim, self.head_dim_v, DTYPES.index(self.dtype), *parts]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> BitmapFormat:
        """The format that these integers stand for."""
        page_size, head_dim, head_dim_v, dtype, k_keep, k_rotate, v_keep, v_rotate = numbers
        return cls(page_size, head_dim, k_keep, v_keep, DTYPES[dtype], head_dim_v, k_rotate, v_rotate)

    def new_pool(
        self, num_pages: int, num_kv_heads: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Uninitialised pools of records: uint8 [num_pages, num_kv_heads, k_record_bytes], and of V alike."""
        import torch

        return (
            torch.empty(num_pages, num_kv_heads, self.k_record_bytes, dtype=torch.uint8, device=device),
            torch.empty(num_pages, num_kv_heads, self.v_record_bytes, dtype=torch.uint8, device=device),
        )
