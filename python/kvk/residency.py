"""Where the pages of a compressing cache live: in a dense slot while they are young, in a record afterwards.

Only integers live here, as in `kvk.block_table`, whose page ids it places. A page begins in a slot of the dense pools
and moves to a record of the packed pools when it is full and has left the recent window of every request that holds
it; its first tokens' pages (sinks) may stay. It moves back only to be appended to after a deep rollback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvk.block_table import BlockTable, OutOfPagesError, PageAllocator

DENSE = 1 << 28  # tag of a dense page in a page reference (docs/formats.md)


@dataclass
class _Dense:
    """A page in a dense slot. Its holders have it at the same place of their page lists."""

    slot: int
    index: int  # in those lists
    holders: set[int]


@dataclass(frozen=True)
class Move:
    """Pages to move between the pools: number i goes from source[i] to target[i]."""

    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)

    def add(self, source: int, target: int) -> None:
        self.source.append(source)
        self.target.append(target)

    def __bool__(self) -> bool:
        return bool(self.source)


@dataclass(frozen=True)
class Before:
    """What `Residency.extended` must know of a request as it was before it grew."""

    num_pages: int
    last_page: int
    length: int


class Residency:
    """Dense slots and records of the pages of a BlockTable.

    Args:
        residual: a request's last so many tokens are in dense pages.
        sinks: pages at the beginning of each request that stay dense.
        max_dense_pages: most dense slots in use at a time; None: no limit.
        moved: told (request, index in its page list) for every page reference that changes.

    Where requests share a page, its place is the same for all of them: it is packed once, when the last of them lets
    it go.
    """

    def __init__(
        self,
        blocks: BlockTable,
        *,
        residual: int,
        sinks: int,
        max_dense_pages: int | None,
        moved: Callable[[int, int], None],
    ) -> None:
        if residual < 0 or sinks < 0:
            raise ValueError(
                f"kvk.PagedCache: residual and sinks must not be negative, got {residual} and {sinks}"
            )
        self.slots, self.records = PageAllocator(max_dense_pages), PageAllocator(None)
        self._blocks, self._residual, self._sinks, self._moved = blocks, residual, sinks, moved
        self._dense: dict[int, _Dense] = {}  # by page id
        self._record: dict[int, int] = {}  # by page id
        self._grown: set[int] = (
            set()
        )  # requests that may have pages outside their window that nobody looked at
        self._passed: dict[int, int] = {}  # request -> pages of its list, from the first on, looked at since
        self._candidates: set[int] = set()  # pages that lost a holder
        blocks.allocator.on_free = self._release

    # -- what is where ------------------------------------------------------------------------------------------------

    def reference(self, page: int) -> int:
        """How attention names the page: a record, or DENSE | a slot."""
        dense = self._dense.get(page)
        return self._record[page] if dense is None else DENSE | dense.slot

    def slot(self, page: int) -> int:
        """The dense slot of a page that is in one."""
        return self._dense[page].slot

    def is_dense(self, page: int) -> bool:
        """Whether the page is in a dense slot."""
        return page in self._dense

    def first_recent(self, length: int) -> int:
        """Index of the first page that holds one of the last `residual` tokens, or is not full."""
        return max(0, length - self._residual) // self._blocks.page_size

    # -- changes of the page lists ------------------------------------------------------------------------------------

    def before(self, request: int) -> Before:
        """To be taken of each request before it grows."""
        pages = self._blocks.pages(request)
        return Before(len(pages), pages[-1] if pages else -1, self._blocks.length(request))

    def forked(self, request: int) -> None:
        """`request` is new and shares pages."""
        for page in self._blocks.pages(request):
            if page in self._dense:
                self._dense[page].holders.add(request)
        self._passed[request] = self.first_recent(self._blocks.length(request))

    def dropped(self, request: int, pages: Iterable[int]) -> None:
        """`request` holds these pages no longer; those that nobody holds have been freed."""
        for page in pages:
            dense = self._dense.get(page)
            if dense is not None:
                dense.holders.discard(request)
                self._candidates.add(page)

    def shortened(self, request: int) -> None:
        """`request` has been truncated."""
        passed = self.first_recent(self._blocks.length(request))
        self._passed[request] = min(self._passed.get(request, 0), passed)

    def ended(self, request: int) -> None:
        """`request` is live no longer."""
        self._passed.pop(request, None)
        self._grown.discard(request)

    def _release(self, page: int) -> None:
        dense = self._dense.pop(page, None)
        if dense is not None:
            self.slots.release([dense.slot])
        else:
            self.records.release([self._record.pop(page)])

    def slots_wanted(self, requests: Sequence[int], num_tokens: Sequence[int], num_pages: int) -> int:
        """Dense slots that `extend` would take: for `num_pages` new pages, and for packed ones that are appended to.

        Raises OutOfPagesError when there are too few.
        """
        writers: dict[int, int] = {}  # packed page -> requests that would write to it
        for request, count in zip(requests, num_tokens, strict=True):
            if count > 0 and self._blocks.length(request) % self._blocks.page_size:
                last = self._blocks.pages(request)[-1]
                if last in self._record:
                    writers[last] = writers.get(last, 0) + 1
        # All but the last owner get a copy, which is a new page.
        wanted = num_pages + sum(
            count == self._blocks.allocator.owners(page) for page, count in writers.items()
        )
        free = self.slots.num_free
        if free is not None and wanted > free:
            assert self.slots.max_pages is not None
            raise OutOfPagesError(
                wanted, free, self.slots.max_pages, self._blocks.page_size, "max_dense_pages"
            )
        return wanted

    def extended(self, request: int, before: Before, copies: Move, unpacked: Move) -> None:
        """Places the pages a request has grown by. Adds slots to copy to slots, and records to unpack into slots."""
        pages = self._blocks.pages(request)
        if self._blocks.length(request) == before.length:
            return
        self._grown.add(request)
        last = before.num_pages - 1
        if last >= 0 and pages[last] != before.last_page:  # copy-on-write
            target = self._place(pages[last], last, request)
            source = self._dense.get(before.last_page)
            if source is not None:
                copies.add(source.slot, target)
            else:
                unpacked.add(self._record[before.last_page], target)
            self.dropped(request, [before.last_page])
        elif last >= 0 and before.length % self._blocks.page_size and pages[last] in self._record:
            record = self._record.pop(pages[last])
            unpacked.add(record, self._place(pages[last], last, request))
            self.records.release([record])
            self._moved(request, last)
        for index in range(last + 1, len(pages)):
            self._place(pages[index], index, request)

    def _place(self, page: int, index: int, request: int) -> int:
        slot = self.slots.allocate()
        self._dense[page] = _Dense(slot, index, {request})
        return slot

    # -- packing ------------------------------------------------------------------------------------------------------

    def packable(self) -> list[int]:
        """The dense pages that are full and in no request's window, for `pack`.

        Looks at the pages that have left a window since the last call, not at the cache.
        """
        for request in self._grown:
            start, end = self._passed.get(request, 0), self.first_recent(self._blocks.length(request))
            self._candidates.update(self._blocks.pages(request)[start:end])
            self._passed[request] = end
        self._grown.clear()
        # Whoever still wants a page will offer it again.
        self._candidates = {page for page in self._candidates if page in self._dense and self._is_done(page)}
        return sorted(self._candidates)

    def _is_done(self, page: int) -> bool:
        dense = self._dense[page]
        return dense.index >= self._sinks and all(
            self.first_recent(self._blocks.length(holder)) > dense.index for holder in dense.holders
        )

    def pack(self, pages: Iterable[int]) -> Move:
        """Moves pages from their slots to records: (slots, records)."""
        move = Move()
        for page in pages:
            dense = self._dense.pop(page)
            self._record[page] = self.records.allocate()
            move.add(dense.slot, self._record[page])
            self.slots.release([dense.slot])
            for holder in dense.holders:
                self._moved(holder, dense.index)
        self._candidates.difference_update(pages)
        return move

    def compact(self) -> list[int]:
        """Renumbers the dense slots in use to 0, 1, ...; their old numbers in the new order."""
        old: list[int] = []
        for dense in sorted(self._dense.values(), key=lambda dense: dense.slot):
            if dense.slot != len(old):
                for holder in dense.holders:
                    self._moved(holder, dense.index)
            old.append(dense.slot)
            dense.slot = len(old) - 1
        self.slots.reset(len(old))
        return old
