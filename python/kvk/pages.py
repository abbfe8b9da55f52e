"""Page pools: the tensors under a paged cache, one store per layer. `DensePages` keeps K and V as they come.

A store is everything a cache must know of a page format: how to grow, copy a page, append tokens and attend. Further
formats are further classes with the same members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvk.ops.paged import append_kv, paged_decode, paged_prefill


class DensePages:
    """K and V of one layer in pages of their own dtype.

    `k_pages` [num_pages, page_size, num_kv_heads, head_dim] and `v_pages` [..., head_dim_v], contiguous, so a token's
    heads lie in one row (NHD). The memory of a page is undefined until it is written.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        page_size: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.head_dim_v = head_dim if head_dim_v is None else head_dim_v
        self.k_pages = torch.empty(0, page_size, num_kv_heads, self.head_dim, dtype=dtype, device=device)
        self.v_pages = torch.empty(0, page_size, num_kv_heads, self.head_dim_v, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """dtype that q, k and v must have."""
        return self.k_pages.dtype

    @property
    def num_pages(self) -> int:
        """Pages there is memory for."""
        return self.k_pages.shape[0]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of this layer, K and V together."""
        _, page_size, heads, _ = self.k_pages.shape
        return page_size * heads * (self.head_dim + self.head_dim_v) * self.dtype.itemsize

    def resize(self, num_pages: int) -> None:
        """Grow to `num_pages` pages, keeping what is stored. Old and new memory of one tensor exist side by side."""
        for name in ("k_pages", "v_pages"):
            old = getattr(self, name)
            new = old.new_empty(num_pages, *old.shape[1:])
            new[: old.shape[0]].copy_(old)
            setattr(self, name, new)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (source, destination) each; no destination is also a source."""
        source, target = torch.tensor(copies, dtype=torch.int64, device=self.k_pages.device).unbind(1)
        for pool in (self.k_pages, self.v_pages):
            pool[target] = pool[source]

    def append(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write k [T, Hkv, D] and v [T, Hkv, Dv] to their slots, see `kvk.append_kv`."""
        append_kv(k, v, self.k_pages, self.v_pages, slot_mapping)

    def decode(
        self, q: torch.Tensor, page_indices: torch.Tensor, kv_lens: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`kvk.paged_decode` of q [B, Hq, D] over these pages."""
        return paged_decode(q, self.k_pages, self.v_pages, page_indices, kv_lens, **options)

    def prefill(
        self,
        q: torch.Tensor,
        qo_indptr: torch.Tensor,
        page_indices: torch.Tensor,
        kv_lens: torch.Tensor,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`kvk.paged_prefill` of q [T, Hq, D] over these pages."""
        return paged_prefill(q, qo_indptr, self.k_pages, self.v_pages, page_indices, kv_lens, **options)
