"""A paged KV cache for a stack of layers: requests that grow, share prefixes, fork, roll back and end.

One forward pass is one `Step`:

    cache = kvk.PagedCache(num_layers=30, num_kv_heads=3, head_dim=64, page_size=16, max_pages=4096)
    a = cache.create()
    step = cache.extend([a], [len(prompt)])          # room for the new tokens, page tables
    for layer in range(30):
        cache.append(layer, k, v, step)              # k, v [T, Hkv, D]
        out, lse = cache.attend(layer, q, step)      # q [T, Hq, D]
    b = cache.fork(a)                                # shares a's pages, copies none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvk.block_table import BlockTable, OutOfPagesError
from kvk.pages import DensePages

__all__ = ["OutOfPagesError", "PagedCache", "Step"]


@dataclass(frozen=True)
class Step:
    """One forward pass of a batch: where its new tokens go and what they see. Valid until the cache changes.

    The new tokens of the B requests are packed one request after another, T in all.
    """

    requests: tuple[int, ...]
    num_tokens: tuple[int, ...]  # new tokens of each request
    slot_mapping: torch.Tensor  # int64 [T], page * page_size + offset
    qo_indptr: torch.Tensor  # int32 [B + 1], where each request's new tokens begin
    page_indices: torch.Tensor  # int32 [B, max_pages], entries past a request's pages are undefined
    kv_lens: torch.Tensor  # int32 [B], stored tokens including the new ones

    @property
    def is_decode(self) -> bool:
        """Whether every request has exactly one new token."""
        return all(n == 1 for n in self.num_tokens)


class PageTable:
    """Page lists as int32 tensors, kept in step with a BlockTable by writing only what changed.

    Every live request has a row of a host tensor. The rows of the latest batch are kept gathered as well, so that a
    decode step of an unchanged batch writes at most one entry per request, and copies nothing.
    """

    def __init__(self, blocks: BlockTable, device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._rows = torch.zeros(0, 0, dtype=torch.int32)
        self._row_of: dict[int, int] = {}
        self._free_rows: list[int] = []
        self._batch: tuple[int, ...] = ()
        self._batch_rows = self._rows
        self._batch_on_device = self._rows.to(device)

    def drop(self, request: int) -> None:
        """Give back the row of a request that ends."""
        row = self._row_of.pop(request, None)
        if row is not None:
            self._free_rows.append(row)

    def _ensure_shape(self, num_rows: int, width: int) -> None:
        rows, columns = self._rows.shape
        if num_rows <= rows and width <= columns:
            return
        grown = torch.zeros(
            rows if num_rows <= rows else max(num_rows, 2 * rows),
            columns if width <= columns else max(width, 2 * columns),
            dtype=torch.int32,
        )
        grown[:rows, :columns] = self._rows
        self._free_rows.extend(range(grown.shape[0] - 1, rows - 1, -1))
        self._rows = grown
        self._batch = ()

    def gather(self, requests: tuple[int, ...]) -> torch.Tensor:
        """int32 [B, max_pages] on the device: the page ids of each request. Rewritten in place by the next call."""
        width = max((len(self._blocks.pages(request)) for request in requests), default=0)
        absent = sum(request not in self._row_of for request in requests)
        self._ensure_shape(len(self._row_of) + absent, width)
        known = requests == self._batch
        changed = not known
        for i, request in enumerate(requests):
            if request not in self._row_of:
                self._row_of[request] = self._free_rows.pop()
            start, pages = self._blocks.take_changes(request)
            if not pages:
                continue
            entries = torch.tensor(pages, dtype=torch.int32)
            self._rows[self._row_of[request], start : start + len(pages)] = entries
            if known:
                self._batch_rows[i, start : start + len(pages)] = entries
                changed = True
        if not known:
            index = torch.tensor([self._row_of[request] for request in requests], dtype=torch.int64)
            self._batch, self._batch_rows = requests, self._rows.index_select(0, index)
        if changed:
            self._batch_on_device = self._batch_rows.to(self._device)
        return self._batch_on_device


class PagedCache:
    """K and V of many requests in a pool of pages per layer; all layers share one page table.

    Args:
        num_layers: layers made at once; further ones can come by `add_layer`.
        num_kv_heads, head_dim, head_dim_v: of those layers (head_dim_v None: as head_dim).
        page_size: tokens per page.
        max_pages: most pages in use at a time (a page counts once, whatever the number of layers); None: no limit.
        initial_pages: pages there is memory for from the start. The pools grow by about an eighth when they are full;
            with initial_pages = max_pages their addresses never change (graph capture).
        dtype, device: of the pages; q, k and v must match.

    Raises `OutOfPagesError` from `extend` when the limit is reached; the cache is then unchanged.
    """

    def __init__(
        self,
        num_layers: int = 0,
        num_kv_heads: int = 1,
        head_dim: int = 64,
        *,
        head_dim_v: int | None = None,
        page_size: int = 16,
        max_pages: int | None = None,
        initial_pages: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.blocks = BlockTable(page_size, max_pages)
        if initial_pages < 0 or (max_pages is not None and initial_pages > max_pages):
            raise ValueError(
                f"kvk.PagedCache: initial_pages must be 0 to max_pages ({max_pages}), got {initial_pages}"
            )
        self.device = torch.device(device)
        self.layers: list[DensePages] = []
        self._num_pages = initial_pages
        self._table = PageTable(self.blocks, self.device)
        for _ in range(num_layers):
            self.add_layer(num_kv_heads, head_dim, head_dim_v=head_dim_v, dtype=dtype)

    def add_layer(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """One more layer of dense pages; returns its index. Layers may differ in heads and dims."""
        pages = DensePages(
            num_kv_heads,
            head_dim,
            page_size=self.page_size,
            head_dim_v=head_dim_v,
            dtype=dtype,
            device=self.device,
        )
        pages.resize(self._num_pages)
        self.layers.append(pages)
        return len(self.layers) - 1

    # -- size ---------------------------------------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.blocks.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return sum(layer.page_bytes for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes the page pools hold now, pages that are free included."""
        return sum(layer.num_pages * layer.page_bytes for layer in self.layers)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages that requests hold now; a shared page counts once."""
        return self.blocks.allocator.num_used * self.page_bytes

    def length(self, request: int) -> int:
        """Tokens stored for the request."""
        return self.blocks.length(request)

    # -- requests -----------------------------------------------------------------------------------------------------

    def create(self) -> int:
        """A new, empty request."""
        return self.blocks.create()

    def fork(self, request: int, length: int | None = None) -> int:
        """A new request with the first `length` tokens of `request` (None: all of them), sharing their pages.

        Costs O(pages) on the host and no device work; a shared last page is copied when one of its owners appends.
        """
        return self.blocks.fork(request, length)

    def truncate(self, request: int, length: int) -> None:
        """Forget the tokens of a request from `length` on (rejected draft tokens, say)."""
        self.blocks.truncate(request, length)

    def free(self, request: int) -> None:
        """End a request; pages that no other request shares are free again."""
        self.blocks.free(request)
        self._table.drop(request)

    # -- a forward pass -----------------------------------------------------------------------------------------------

    def _reserve(self, num_pages: int) -> None:
        if num_pages <= self._num_pages:
            return
        target = max(num_pages, self._num_pages + self._num_pages // 8)
        if self.blocks.allocator.max_pages is not None:
            target = min(target, self.blocks.allocator.max_pages)
        for layer in self.layers:
            if layer.num_pages < target:
                layer.resize(target)
        self._num_pages = target

    def extend(self, requests: Sequence[int], num_tokens: Sequence[int]) -> Step:
        """Make room for `num_tokens[i]` more tokens of `requests[i]` (0 is allowed) and say where they go.

        The slots are undefined memory until `append` has written them in every layer. All or nothing: on an error
        (OutOfPagesError, no memory, a request given twice or not live, a negative count) nothing has changed.
        """
        wanted = self.blocks.pages_wanted(requests, num_tokens)
        self._reserve(self.blocks.allocator.high_water_after(wanted))
        extension = self.blocks.extend(requests, num_tokens)
        if extension.page_copies:
            for layer in self.layers:
                layer.copy_pages(extension.page_copies)
        batch = tuple(requests)
        qo_indptr = [0]
        for count in num_tokens:
            qo_indptr.append(qo_indptr[-1] + count)
        return Step(
            requests=batch,
            num_tokens=tuple(num_tokens),
            slot_mapping=torch.tensor(extension.slots, dtype=torch.int64, device=self.device),
            qo_indptr=torch.tensor(qo_indptr, dtype=torch.int32, device=self.device),
            page_indices=self._table.gather(batch),
            kv_lens=torch.tensor([self.length(r) for r in batch], dtype=torch.int32, device=self.device),
        )

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        slot_mapping: torch.Tensor | None = None,
    ) -> None:
        """Store the step's new tokens of a layer: k [T, Hkv, D], v [T, Hkv, Dv] in the layer's dtype.

        `slot_mapping` in place of the step's own serves rows that are not packed: as many slots as k has rows,
        negative where a row is padding.
        """
        self.layers[layer].append(k, v, step.slot_mapping if slot_mapping is None else slot_mapping)

    def attend(
        self, layer: int, q: torch.Tensor, step: Step, *, causal: bool = True, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the step's new tokens over all stored tokens of their requests, themselves included.

        Args:
            q: [T, Hq, D], packed as the step is.
            causal: token i of a request sees what was stored before it and itself; False: everything.
            options: of `kvk.paged_prefill` (softmax_scale, window_left, logits_soft_cap, alibi_slopes, sinks, key_bias,
                mask_bits, mask_width).

        Returns (out [T, Hq, Dv] in q's dtype, lse fp32 [T, Hq]).
        """
        if step.is_decode and causal and options.get("mask_bits") is None:
            options.pop("mask_bits", None)
            options.pop("mask_width", None)
            return self.layers[layer].decode(q, step.page_indices, step.kv_lens, **options)
        return self.layers[layer].prefill(
            q, step.qo_indptr, step.page_indices, step.kv_lens, causal=causal, **options
        )
