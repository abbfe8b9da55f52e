"""Page lists as int32 tensors, kept in step with a BlockTable by writing only what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvk.block_table import BlockTable


class PageTable:
    """The page lists of a batch, in one or several views: page ids, or what stands for them.

    Every live request has a row of a host tensor. The rows of the latest batch are kept gathered as well, so that a
    decode step of an unchanged batch writes at most one entry per request, and copies nothing.

    Args:
        views: functions from page ids to the entries of each view.
    """

    def __init__(
        self, blocks: BlockTable, device: torch.device, views: Sequence[Callable[[int], int]]
    ) -> None:
        self._blocks, self._device, self._views = blocks, device, views
        self._rows = torch.zeros(len(views), 0, 0, dtype=torch.int32)
        self._row_of: dict[int, int] = {}
        self._free_rows: list[int] = []
        self._moved: dict[int, set[int]] = {}  # request -> entries that no longer stand for their page
        self._batch: tuple[int, ...] = ()
        self._batch_rows = self._rows
        self._batch_on_device = self._rows.to(device)

    def drop(self, request: int) -> None:
        """Give back the row of a request that ends."""
        self._moved.pop(request, None)
        row = self._row_of.pop(request, None)
        if row is not None:
            self._free_rows.append(row)

    def moved(self, request: int, index: int) -> None:
        """Entry `index` of the request's list must be worked out again: its page is the same, its views are not."""
        self._moved.setdefault(request, set()).add(index)

    def _ensure_shape(self, num_rows: int, width: int) -> None:
        _, rows, columns = self._rows.shape
        if num_rows <= rows and width <= columns:
            return
        grown = torch.zeros(
            len(self._views),
            rows if num_rows <= rows else max(num_rows, 2 * rows),
            columns if width <= columns else max(width, 2 * columns),
            dtype=torch.int32,
        )
        grown[:, :rows, :columns] = self._rows
        self._free_rows.extend(range(grown.shape[1] - 1, rows - 1, -1))
        self._rows = grown
        self._batch = ()

    def _changes(self, request: int) -> list[tuple[int, list[int]]]:
        """(i, page ids from entry i on) for what must be written to the request's row."""
        start, pages = self._blocks.take_changes(request)
        changes = [(start, pages)] if pages else []
        listed = self._blocks.pages(request)
        for index in sorted(self._moved.pop(request, ())):
            if index < start:
                changes.append((index, [listed[index]]))
        return changes

    def gather(self, requests: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """int32 [B, max_pages] on the device for each view. Rewritten in place by the next call."""
        width = max((len(self._blocks.pages(request)) for request in requests), default=0)
        absent = sum(request not in self._row_of for request in requests)
        self._ensure_shape(len(self._row_of) + absent, width)
        known = requests == self._batch
        changed = not known
        for i, request in enumerate(requests):
            if request not in self._row_of:
                self._row_of[request] = self._free_rows.pop()
            for start, pages in self._changes(request):
                entries = torch.tensor(
                    [[view(page) for page in pages] for view in self._views], dtype=torch.int32
                )
                self._rows[:, self._row_of[request], start : start + len(pages)] = entries
                if known:
                    self._batch_rows[:, i, start : start + len(pages)] = entries
                    changed = True
        if not known:
            index = torch.tensor([self._row_of[request] for request in requests], dtype=torch.int64)
            self._batch, self._batch_rows = requests, self._rows.index_select(1, index)
        if changed:
            self._batch_on_device = self._batch_rows.to(self._device)
        return self._batch_on_device.unbind(0)
