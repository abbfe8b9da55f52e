"""A paged KV cache for a stack of layers: requests that grow, share prefixes, fork, roll back and end.

One forward pass is one `Step`:

    cache = kvk.PagedCache(num_layers=30, num_kv_heads=3, head_dim=64, page_size=16, max_pages=4096)
    a = cache.create()
    step = cache.extend([a], [len(prompt)])          # room for the new tokens, page tables
    for layer in range(30):
        cache.append(layer, k, v, step)              # k, v [T, Hkv, D]
        out, lse = cache.attend(layer, q, step)      # q [T, Hq, D]
    b = cache.fork(a)                                # shares a's pages, copies none

With a format (`fmt=kvk.QuantFormat(page_size=32, head_dim=64)`) full pages become records of it as they age; the newest
tokens of each request stay dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvk.block_table import BlockTable, OutOfPagesError
from kvk.formats import BitmapFormat, QuantFormat
from kvk.page_table import PageTable
from kvk.pages import DensePages, PackedPages
from kvk.residency import Before, Move, Residency

__all__ = ["OutOfPagesError", "PagedCache", "Step"]


@dataclass(frozen=True)
class Places:
    """Where a step's tokens are, for layers that keep their pages alike."""

    slot_mapping: torch.Tensor  # int64 [T], page * page_size + offset; negative: padding
    page_indices: torch.Tensor  # int32 [B, max_pages], entries past a request's pages are undefined


@dataclass(frozen=True)
class Step:
    """One forward pass of a batch: where its new tokens go and what they see. Valid until the cache changes.

    The new tokens of the B requests are packed one request after another, T in all.
    """

    requests: tuple[int, ...]
    num_tokens: tuple[int, ...]  # new tokens of each request
    qo_indptr: torch.Tensor  # int32 [B + 1], where each request's new tokens begin
    kv_lens: torch.Tensor  # int32 [B], stored tokens including the new ones
    plain: Places  # of layers that keep every page dense
    packed: Places | None  # of layers with a format: slots of their dense pages, and tagged page references

    @property
    def is_decode(self) -> bool:
        """Whether every request has exactly one new token."""
        return all(n == 1 for n in self.num_tokens)

    @property
    def slot_mapping(self) -> torch.Tensor:
        """Of layers that keep every page dense."""
        return self.plain.slot_mapping

    @property
    def page_indices(self) -> torch.Tensor:
        """Of layers that keep every page dense."""
        return self.plain.page_indices

    def with_padding(self, rows: torch.Tensor, num_rows: int) -> Step:
        """The step for `append` of k and v with padding: new token i is in row rows[i] (int64 [T]) of num_rows."""

        def spread(places: Places) -> Places:
            slots = places.slot_mapping.new_full((num_rows,), -1)
            slots[rows] = places.slot_mapping
            return replace(places, slot_mapping=slots)

        return replace(self, plain=spread(self.plain), packed=self.packed and spread(self.packed))


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
        fmt: what full pages become in the layers made at once, a `kvk.QuantFormat` or `kvk.BitmapFormat`; None: they
            stay dense.
        residual: tokens at the end of each request that stay dense in layers with a format; the default is 128 where
            fmt is given. None: the cache takes no layers with a format.
        sinks: pages at the beginning of each request that stay dense in those layers.
        max_dense_pages: most dense pages in use at a time in those layers: residual and sinks of every request, a page
            that is being filled, and the new tokens of a step. None: no limit.
        initial_dense_pages: dense pages there is memory for from the start in those layers, and never less.

    Packing is lazy: `extend` first packs the pages that the step before has pushed out of every window, so a rollback
    of up to `residual` tokens is exact. A deeper one is exact too until the request appends again: the page it then
    writes to is unpacked into a dense one, with the numbers that its record holds.

    Raises `OutOfPagesError` from `extend` when a limit is reached; the cache then holds what it held.
    """

    def __init__(
        self,
        num_layers: int = 0,
        num_kv_heads: int = 1,
        head_dim: int = 64,
        *,
        head_dim_v: int | None = None,
        page_size: int | None = None,
        max_pages: int | None = None,
        initial_pages: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fmt: QuantFormat | BitmapFormat | None = None,
        residual: int | None = None,
        sinks: int = 0,
        max_dense_pages: int | None = None,
        initial_dense_pages: int = 0,
    ) -> None:
        if page_size is None:
            page_size = 16 if fmt is None else fmt.page_size
        if fmt is not None and residual is None:
            residual = 128
        self.blocks = BlockTable(page_size, max_pages)
        if initial_pages < 0 or (max_pages is not None and initial_pages > max_pages):
            raise ValueError(
                f"kvk.PagedCache: initial_pages must be 0 to max_pages ({max_pages}), got {initial_pages}"
            )
        if (
            not 0
            <= initial_dense_pages
            <= (initial_dense_pages if max_dense_pages is None else max_dense_pages)
        ):
            raise ValueError(
                f"kvk.PagedCache: initial_dense_pages must be 0 to max_dense_pages ({max_dense_pages}), "
                f"got {initial_dense_pages}"
            )
        self.device = torch.device(device)
        self.layers: list[DensePages | PackedPages] = []
        self._num_pages, self._num_records = initial_pages, initial_pages
        self._num_slots = self._fewest_slots = initial_dense_pages
        self._residency: Residency | None = None
        views: list[Callable[[int], int]] = [lambda page: page]
        if residual is not None:
            self._residency = Residency(
                self.blocks,
                residual=residual,
                sinks=sinks,
                max_dense_pages=max_dense_pages,
                moved=lambda request, index: self._table.moved(request, index),
            )
            views.append(self._residency.reference)
        self._table = PageTable(self.blocks, self.device, views)
        for _ in range(num_layers):
            self.add_layer(num_kv_heads, head_dim, head_dim_v=head_dim_v, dtype=dtype, fmt=fmt)

    def add_layer(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        fmt: QuantFormat | BitmapFormat | None = None,
        **options: torch.Tensor | None,
    ) -> int:
        """One more layer, of dense pages or of a format; returns its index. Layers may differ in all of these.

        options: k_permutation and k_rope of the quantized ops, where the format's layer wants them. With k_rope, keys
        are appended before their rotary embedding; a request's first token is at position 0.
        """
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        pages: DensePages | PackedPages
        if fmt is None:
            pages = DensePages(
                num_kv_heads,
                head_dim,
                page_size=self.page_size,
                head_dim_v=head_dim_v,
                dtype=dtype,
                device=self.device,
            )
            pages.resize(self._num_pages)
        else:
            wanted, got = (
                (self.page_size, head_dim, head_dim_v),
                (fmt.page_size, fmt.head_dim, fmt.head_dim_v),
            )
            if wanted != got:
                raise ValueError(
                    f"kvk.PagedCache: the layer's page_size, head_dim and head_dim_v are {wanted}, its format's {got}"
                )
            if self._residency is None:
                raise ValueError("kvk.PagedCache: a cache whose layers come with a format needs residual")
            pages = PackedPages(num_kv_heads, fmt, dtype=dtype, device=self.device, **options)
            pages.dense.resize(self._num_slots)
            pages.resize(self._num_records)
        self.layers.append(pages)
        return len(self.layers) - 1

    # -- size ---------------------------------------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.blocks.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one dense page in all layers."""
        return sum(layer.page_bytes for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes the page pools hold now, pages that are free included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages and records that requests hold now; a shared one counts once."""
        used, pages = 0, self.blocks.allocator.num_used
        for layer in self.layers:
            if isinstance(layer, DensePages):
                used += pages * layer.page_bytes
            else:
                assert self._residency is not None
                used += self._residency.slots.num_used * layer.page_bytes
                used += self._residency.records.num_used * layer.record_bytes
        return used

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
        twin = self.blocks.fork(request, length)
        if self._residency is not None:
            self._residency.forked(twin)
        return twin

    def truncate(self, request: int, length: int) -> None:
        """Forget the tokens of a request from `length` on (rejected draft tokens, say)."""
        dropped = self.blocks.truncate(request, length)
        if self._residency is not None:
            self._residency.dropped(request, dropped)
            self._residency.shortened(request)

    def free(self, request: int) -> None:
        """End a request; pages that no other request shares are free again."""
        pages = self.blocks.free(request)
        self._table.drop(request)
        if self._residency is not None:
            self._residency.dropped(request, pages)
            self._residency.ended(request)

    # -- a forward pass -----------------------------------------------------------------------------------------------

    def _reserve(self, num_pages: int) -> None:
        if num_pages <= self._num_pages:
            return
        target = _grown_size(num_pages, self._num_pages, self.blocks.allocator.max_pages)
        for layer in self.layers:
            if isinstance(layer, DensePages) and layer.num_pages < target:
                layer.resize(target)
        self._num_pages = target

    def _reserve_records(self, num_records: int) -> None:
        if num_records <= self._num_records:
            return
        target = _grown_size(num_records, self._num_records, self.blocks.allocator.max_pages)
        for layer in self.packed_layers:
            if layer.num_records < target:
                layer.resize(target)
        self._num_records = target

    def _fit_slots(self, residency: Residency, num_new: int, *, spare: bool = True) -> None:
        """Memory for `num_new` more dense slots. Much more than is in use goes back, or any without `spare`."""
        wanted = max(self._fewest_slots, residency.slots.num_used + num_new)
        if self._num_slots > wanted + (wanted // 2 + 4 if spare else 0):
            kept = residency.compact()
            for layer in self.packed_layers:
                layer.dense.keep(kept, wanted)
            self._num_slots = wanted
        num_slots = residency.slots.high_water_after(num_new)
        if num_slots > self._num_slots:
            self._num_slots = _grown_size(num_slots, self._num_slots, residency.slots.max_pages)
            for layer in self.packed_layers:
                layer.dense.resize(self._num_slots)

    @property
    def packed_layers(self) -> list[PackedPages]:
        """The layers with a format."""
        return [layer for layer in self.layers if isinstance(layer, PackedPages)]

    def pack(self) -> None:
        """Pack now what `extend` would pack first: full pages outside every request's window.

        After a long prefill it frees the memory of the prompt's dense pages. All layers must have the tokens by then.
        """
        if self._residency is not None:
            self._pack(self._residency)
            self._fit_slots(self._residency, 0, spare=False)

    def _pack(self, residency: Residency) -> None:
        pages = residency.packable()
        if not pages:
            return
        self._reserve_records(residency.records.high_water_after(len(pages)))
        slots, records = self._int32(residency.pack(pages))
        for layer in self.packed_layers:
            layer.pack(slots, records)

    def _int32(self, move: Move) -> tuple[torch.Tensor, torch.Tensor]:
        source, target = torch.tensor(
            [move.source, move.target], dtype=torch.int32, device=self.device
        ).unbind(0)
        return source, target

    def extend(self, requests: Sequence[int], num_tokens: Sequence[int]) -> Step:
        """Make room for `num_tokens[i]` more tokens of `requests[i]` (0 is allowed) and say where they go.

        The slots are undefined memory until `append` has written them in every layer. All or nothing: on an error
        (OutOfPagesError, no memory, a request given twice or not live, a negative count) every request holds what it
        held before.
        """
        residency = self._residency
        wanted = self.blocks.pages_wanted(requests, num_tokens)
        if residency is not None:
            self._pack(residency)
            self._fit_slots(residency, residency.slots_wanted(requests, num_tokens, wanted))
        self._reserve(self.blocks.allocator.high_water_after(wanted))
        before = [] if residency is None else [residency.before(request) for request in requests]
        extension = self.blocks.extend(requests, num_tokens)
        for layer in self.layers:
            if extension.page_copies and isinstance(layer, DensePages):
                layer.copy_pages(extension.page_copies)
        packed_slots = (
            None if residency is None else self._place(residency, requests, before, extension.slots)
        )
        batch = tuple(requests)
        qo_indptr = [0]
        for count in num_tokens:
            qo_indptr.append(qo_indptr[-1] + count)
        plain, *packed = self._table.gather(batch)
        return Step(
            requests=batch,
            num_tokens=tuple(num_tokens),
            qo_indptr=torch.tensor(qo_indptr, dtype=torch.int32, device=self.device),
            kv_lens=torch.tensor([self.length(r) for r in batch], dtype=torch.int32, device=self.device),
            plain=Places(torch.tensor(extension.slots, dtype=torch.int64, device=self.device), plain),
            packed=None if packed_slots is None else Places(packed_slots, packed[0]),
        )

    def _place(
        self, residency: Residency, requests: Sequence[int], before: Sequence[Before], slots: Sequence[int]
    ) -> torch.Tensor:
        """Dense slots for what the requests have grown by; int64 [T] where the new tokens go."""
        copies, unpacked = Move(), Move()
        for request, old in zip(requests, before, strict=True):
            residency.extended(request, old, copies, unpacked)
        for layer in self.packed_layers:
            if copies:
                layer.copy_pages(list(zip(copies.source, copies.target, strict=True)))
            if unpacked:
                layer.unpack(*self._int32(unpacked))
        size = self.page_size
        return torch.tensor(
            [residency.slot(slot // size) * size + slot % size for slot in slots],
            dtype=torch.int64,
            device=self.device,
        )

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Store the step's new tokens of a layer: k [T, Hkv, D], v [T, Hkv, Dv] in the layer's dtype.

        With `step.with_padding(...)` k and v may have rows that are padding.
        """
        self.layers[layer].append(k, v, self._places(layer, step).slot_mapping)

    def _places(self, layer: int, step: Step) -> Places:
        if isinstance(self.layers[layer], DensePages):
            return step.plain
        assert step.packed is not None
        return step.packed

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
        page_indices = self._places(layer, step).page_indices
        if step.is_decode and causal and options.get("mask_bits") is None:
            options.pop("mask_bits", None)
            options.pop("mask_width", None)
            return self.layers[layer].decode(q, page_indices, step.kv_lens, **options)
        return self.layers[layer].prefill(
            q, step.qo_indptr, page_indices, step.kv_lens, causal=causal, **options
        )


def _grown_size(wanted: int, present: int, limit: int | None) -> int:
    """Pages to have memory for: an eighth more than there was, so that growing costs little for each page."""
    size = max(wanted, present + present // 8)
    return size if limit is None else min(size, limit)
