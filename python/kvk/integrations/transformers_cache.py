"""The transformers cache over kvk pages: what `kvk.integrations.transformers` exports as `KvkCache`."""

# mypy: allow-subclassing-any
# (transformers' classes are Any to mypy where it is not installed)

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvk.cache import PagedCache, Step
from kvk.formats import BitmapFormat, QuantFormat
from kvk.integrations.transformers_masks import KvkMask, pack_bits


@dataclass(frozen=True)
class _Row:
    """One row of the batch: a request, and the columns of the row that were padding and are not stored."""

    request: int
    pads: tuple[int, ...] = ()

    def stored(self, columns: int) -> int:
        """Tokens stored of the first `columns` columns."""
        return columns - bisect_left(self.pads, columns)


@dataclass(frozen=True)
class _Pass:
    """A forward pass under way: shared by all layers."""

    columns: int  # new columns
    step: Step
    kept: torch.Tensor | None  # int64, which of the B * columns new tokens are stored; None: all
    padded: Step  # the step for all B * columns rows


class _Layer(CacheLayerMixin):
    """What transformers sees as a layer of the cache: it counts columns and hands out handles."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: KvkCache) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)  # the cache owns its layers, and must end when its last user lets go
        self.columns = 0
        self.index: int | None = None  # layer of the PagedCache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        assert cache is not None
        handle = PagedKV(cache, self, key_states, value_states)
        return handle, handle

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: pages are made when the first tokens are stored."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1


class PagedKV:
    """Handle of a layer's keys and values, in place of the dense tensors. `store` may run any number of times."""

    def __init__(self, cache: KvkCache, layer: _Layer, key: torch.Tensor, value: torch.Tensor) -> None:
        self.cache, self.layer = cache, layer
        self.columns = layer.columns + key.shape[2]  # once the new tokens are stored, padding included
        self._new: tuple[torch.Tensor, torch.Tensor] | None = (key, value)
        self._pass: _Pass | None = None

    def fresh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens' keys and values, [B, Hkv, S, D], until `store` has run."""
        assert self._new is not None
        return self._new

    def store(self, mask: KvkMask) -> _Pass:
        """Append the new tokens to the pages, once, and say where they are."""
        if self._pass is None:
            assert self._new is not None
            self._pass = self.cache._store(self.layer, *self._new, mask)
            self._new = None
        return self._pass

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"KvkCache gives a handle in place of K and V, which only kvk's attention can read ({name!r} was asked "
            'for): call model.set_attn_implementation("kvk")'
        )


def _free_rows(pool: PagedCache, rows: list[_Row]) -> None:
    for row in rows:
        pool.free(row.request)
    rows.clear()


class KvkCache(Cache):
    """A transformers cache whose K and V live in kvk pages.

    Args:
        page_size: tokens per page.
        max_pages: most pages in use at a time, None for no limit; a page counts once for all layers.
        initial_pages: pages there is memory for from the first token on.
        dtype: of the pages; None: the model's. Another dtype means that q, K and V are cast to it for attention.
        new_format: what full pages of a layer become, as a function of (layer, head_dim, head_dim_v), say
            `lambda layer, d, dv: kvk.QuantFormat(32, d, head_dim_v=dv)`; None, or a layer it gives None for: they stay
            dense. `kvk.recipes` has ready ones.
        residual, sinks, max_dense_pages: tokens at the end and pages at the beginning of each row that stay dense in
            layers with a format, and the most dense pages in those; see `kvk.PagedCache`.

    The batch may have padding anywhere; a window counts stored tokens. Forks of a cache share its pages and its limit.
    Raises `kvk.cache.OutOfPagesError` during a forward pass when the limit is reached: free or crop, or `reset`.
    """

    def __init__(
        self,
        *,
        page_size: int = 16,
        max_pages: int | None = None,
        initial_pages: int = 0,
        dtype: torch.dtype | None = None,
        new_format: Callable[[int, int, int], QuantFormat | BitmapFormat | None] | None = None,
        residual: int = 128,
        sinks: int = 0,
        max_dense_pages: int | None = None,
    ) -> None:
        super().__init__(layers=[])
        self._pool_options: dict[str, Any] = {
            "page_size": page_size,
            "max_pages": max_pages,
            "initial_pages": initial_pages,
            "sinks": sinks,
            "max_dense_pages": max_dense_pages,
            "residual": residual,
        }
        self.dtype, self._new_format = dtype, new_format
        self.pool: PagedCache | None = None  # made with the first tokens, which tell the device
        self._rows: list[_Row] = []
        self._columns = 0
        self._pass: _Pass | None = None

    def __repr__(self) -> str:
        return f"KvkCache(batch_size={self.batch_size}, columns={self._columns}, nbytes={self.nbytes})"

    def _new_pool(self, device: torch.device) -> PagedCache:
        options = self._pool_options if self._new_format else {**self._pool_options, "residual": None}
        return PagedCache(device=device, **options)

    def _adopt(self, pool: PagedCache) -> None:
        self.pool = pool
        weakref.finalize(self, _free_rows, pool, self._rows)

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first forward pass."""
        return len(self._rows) or -1

    @property
    def nbytes(self) -> int:
        """Bytes the page pools hold, shared with the forks of this cache."""
        return 0 if self.pool is None else self.pool.nbytes

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages in use, by this cache and its forks; a shared page counts once."""
        return 0 if self.pool is None else self.pool.nbytes_used

    @property
    def lengths(self) -> list[int]:
        """Tokens stored for each row."""
        return [row.stored(self._columns) for row in self._rows]

    # -- the forward pass ---------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Called by the model for each layer; returns a handle twice. The attention function stores the tokens."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def _store(self, layer: _Layer, key: torch.Tensor, value: torch.Tensor, mask: KvkMask) -> _Pass:
        batch, heads, columns, head_dim = key.shape
        if self.pool is None:
            self._adopt(self._new_pool(key.device))
        assert self.pool is not None
        if layer.columns == self._columns:
            self._pass = self._begin(batch, columns, mask)
            self._columns += columns
        under_way = self._pass
        if under_way is None or layer.columns + columns != self._columns or under_way.columns != columns:
            raise RuntimeError(
                f"KvkCache: a layer has seen {layer.columns} tokens and gets {columns} more, the cache is at "
                f"{self._columns}: a forward pass was cut short (call reset()), or the model skips this layer"
            )
        dtype = self.dtype or key.dtype
        if layer.index is None:
            dim_v = value.shape[-1]
            fmt = self._new_format and self._new_format(self.layers.index(layer), head_dim, dim_v)
            options = self._layer_options(self.layers.index(layer)) if fmt else {}
            layer.index = self.pool.add_layer(
                heads, head_dim, head_dim_v=dim_v, dtype=dtype, fmt=fmt or None, **options
            )
            layer.is_initialized = True
        k, v = (x.transpose(1, 2).reshape(batch * columns, heads, -1).to(dtype) for x in (key, value))
        self.pool.append(layer.index, k, v, under_way.padded)
        layer.columns = self._columns
        return under_way

    @property
    def _options(self) -> dict[str, Any]:
        """What this cache was made with."""
        return {"dtype": self.dtype, "new_format": self._new_format, **self._pool_options}

    def _twin(self) -> KvkCache:
        """An empty cache made as this one was."""
        return KvkCache(**self._options)

    def _layer_options(self, layer: int) -> dict[str, torch.Tensor | None]:
        """Options of `PagedCache.add_layer` for a layer with a format."""
        return {}

    def _begin(self, batch: int, columns: int, mask: KvkMask) -> _Pass:
        assert self.pool is not None
        if self._rows and len(self._rows) != batch:
            raise ValueError(
                f"KvkCache holds {len(self._rows)} rows but the batch has {batch}: call reset(), or spread a shared "
                "prefix over the batch with fork(n) or batch_repeat_interleave(n)"
            )
        kept = new = None
        past, counts = [self._columns] * batch, [columns] * batch
        if mask.padding is not None:
            padding = mask.padding.expand(batch, -1)
            past = padding[:, : self._columns].sum(1).tolist()
            new = padding[:, self._columns :]
            if bool(new.all()):
                new = None
        if self._rows and mask.tells_padding and past != self.lengths:
            raise ValueError(
                f"KvkCache: attention_mask says {past} earlier tokens are real, {self.lengths} are stored: pass the "
                "mask of all tokens, stored and new, with the same padding in every forward pass"
            )
        if new is not None:
            kept, counts = new.flatten().nonzero().squeeze(1), new.sum(1).tolist()
        rows = self._rows or [_Row(self.pool.create()) for _ in range(batch)]
        try:
            step = self.pool.extend([row.request for row in rows], counts)
        except BaseException:
            if rows is not self._rows:
                _free_rows(self.pool, rows)
            raise
        self._rows[:] = rows
        if new is None:
            return _Pass(columns, step, None, step)
        for i, flags in enumerate(new.tolist()):
            pads = tuple(self._columns + c for c, real in enumerate(flags) if not real)
            self._rows[i] = _Row(rows[i].request, rows[i].pads + pads)
        assert kept is not None
        return _Pass(columns, step, kept, step.with_padding(kept, batch * columns))

    def mask_bits(self, under_way: _Pass, elements: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(mask_bits, mask_width) of the stored tokens, from bool [B or 1, 1, new columns, all columns]."""
        batch = len(self._rows)
        mask = elements.expand(batch, -1, -1, -1)[:, 0]
        if any(row.pads for row in self._rows):
            order = torch.arange(self._columns, device=mask.device).repeat(batch, 1)
            for i, row in enumerate(
                self._rows
            ):  # padding first, so that bit W - 1 is the row's newest stored token
                hidden = torch.zeros(self._columns, dtype=torch.bool, device=mask.device)
                hidden[list(row.pads)] = True
                order[i] = torch.argsort(~hidden, stable=True)
            mask = mask.gather(2, order[:, None].expand_as(mask))
        mask = mask.reshape(-1, self._columns)
        return pack_bits(mask if under_way.kept is None else mask[under_way.kept]), self._columns

    # -- the batch ----------------------------------------------------------------------------------------------------

    def _select(self, indices: list[int]) -> None:
        """Row i becomes old row indices[i]. Rows taken twice are forked, rows not taken are freed."""
        if not self._rows:
            return
        assert self.pool is not None
        rows: list[_Row] = []
        moved: set[int] = set()
        for i in (index % len(self._rows) for index in indices):
            row = self._rows[i]
            rows.append(_Row(self.pool.fork(row.request), row.pads) if i in moved else row)
            moved.add(i)
        for i, row in enumerate(self._rows):
            if i not in moved:
                self.pool.free(row.request)
        self._rows[:] = rows

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i continues row beam_idx[i]. Shares pages, copies none."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order. `indices` are integers or a bool mask."""
        indices = torch.as_tensor(indices)
        self._select((indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times. Shares pages, copies none."""
        self._select([i for i in range(len(self._rows)) for _ in range(repeats)])

    def fork(self, repeats: int = 1) -> KvkCache:
        """A cache that begins as this one, each row `repeats` times, sharing its pages and its page limit.

        Both may grow, and either may end first. Starting many batches from one prefilled prefix is
        `prefix_cache.fork(batch_size)` each time.
        """
        other = self._twin()
        if self.pool is not None:
            other._adopt(self.pool)
            for row in self._rows:
                other._rows.extend(_Row(self.pool.fork(row.request), row.pads) for _ in range(repeats))
        other._columns = self._columns
        for layer in self.layers:
            twin = _Layer(other)
            twin.columns, twin.index, twin.is_initialized = layer.columns, layer.index, layer.is_initialized
            other.layers.append(twin)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> KvkCache:
        """A fork: pages are copied when one of the two writes to them."""
        return self.fork()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns of every row (a negative number, as in transformers 5)."""
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding passes a tensor in some versions
        if tokens_to_remove > 0:
            raise ValueError(
                f"KvkCache.crop takes the negative number of tokens to remove, got {tokens_to_remove}"
            )
        columns = max(0, self._columns + tokens_to_remove)
        if columns == self._columns:
            return
        for i, row in enumerate(self._rows):
            assert self.pool is not None
            stored = row.stored(columns)
            self.pool.truncate(row.request, stored)
            self._rows[i] = _Row(row.request, row.pads[: columns - stored])
        self._set_columns(columns)

    def pack(self) -> None:
        """Pack now what the next forward pass would pack first, and give back the memory of its dense pages."""
        if self.pool is not None:
            self.pool.pack()

    def reset(self) -> None:
        """Forget all rows. The pools keep their memory."""
        if self.pool is not None:
            _free_rows(self.pool, self._rows)
        self._set_columns(0)

    def _set_columns(self, columns: int) -> None:
        self._columns, self._pass = columns, None
        for layer in self.layers:
            layer.columns = columns
