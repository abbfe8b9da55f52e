"""Host-side book-keeping of a paged cache: which pages hold which tokens of which request.

Only integers live here; no tensor, no dtype, no device. `kvk.cache` puts page tensors under it, whatever their format.

A page holds `page_size` consecutive tokens of a request. Pages are reference-counted, so that requests that begin alike
share them. Only the partly filled last page of a request is ever written, and only while it belongs to that request
alone: a request that appends to a shared one gets a copy of it first (copy-on-write).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field


class OutOfPagesError(RuntimeError):
    """The pool has fewer free pages than a call needs. The call changed nothing.

    Attributes: `wanted` (pages the call needs), `free` (pages left), `max_pages` (pages of the pool).
    """

    def __init__(
        self, wanted: int, free: int, max_pages: int, page_size: int, limit: str = "max_pages"
    ) -> None:
        kind = "dense pages" if limit == "max_dense_pages" else "pages"
        super().__init__(
            f"kvk: out of cache pages: {wanted} more {kind} of {page_size} tokens are wanted, {free} are free "
            f"of {limit}={max_pages}; free or truncate requests, or give the cache more pages"
        )
        self.wanted, self.free, self.max_pages = wanted, free, max_pages


class PageAllocator:
    """Hands out page ids and counts their owners. Freed pages are used again before new ones are opened.

    `max_pages` None means no limit. Ids are always below `high_water`, the size a pool of tensors must have.
    `on_free` is told of every page that loses its last owner.
    """

    def __init__(self, max_pages: int | None) -> None:
        self.max_pages = max_pages
        self._owners: list[int] = []  # by page id; 0 means free
        self._free: list[int] = []
        self.on_free: Callable[[int], None] | None = None

    @property
    def high_water(self) -> int:
        """Number of page ids ever handed out."""
        return len(self._owners)

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return len(self._owners) - len(self._free)

    @property
    def num_free(self) -> int | None:
        """Pages that can still be had, None when there is no limit."""
        return None if self.max_pages is None else self.max_pages - self.num_used

    def high_water_after(self, num_pages: int) -> int:
        """`high_water` once `num_pages` more pages are taken."""
        return self.high_water + max(0, num_pages - len(self._free))

    def owners(self, page: int) -> int:
        """How many requests hold the page."""
        return self._owners[page]

    def allocate(self) -> int:
        """A page with one owner. The caller has checked `num_free`."""
        if self._free:
            page = self._free.pop()
            self._owners[page] = 1
        else:
            page = len(self._owners)
            self._owners.append(1)
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One owner more for each page."""
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner less for each page; a page without owners is free."""
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
                if self.on_free is not None:
                    self.on_free(page)

    def reset(self, num_used: int) -> None:
        """As if only pages 0 to `num_used` - 1 had ever been handed out, with one owner each."""
        self._owners, self._free = [1] * num_used, []


@dataclass
class _Request:
    pages: list[int] = field(default_factory=list)
    length: int = 0  # tokens stored
    clean: int = 0  # entries of `pages`, from the first on, that a reader has already taken


@dataclass(frozen=True)
class Extension:
    """What room for new tokens takes: copy pages (source, destination) first, then write token i to slots[i].

    A slot is page * page_size + offset in the page; the tokens of the requests come one request after another.
    """

    page_copies: list[tuple[int, int]]
    slots: list[int]


class BlockTable:
    """The page lists of all live requests.

    Args:
        page_size: tokens per page, >= 1.
        max_pages: most pages in use at a time; None means no limit.

    Requests are named by integers that are never used twice.
    """

    def __init__(self, page_size: int, max_pages: int | None = None) -> None:
        if page_size < 1:
            raise ValueError(f"kvk.BlockTable: page_size must be at least 1, got {page_size}")
        if max_pages is not None and max_pages < 0:
            raise ValueError(f"kvk.BlockTable: max_pages must not be negative, got {max_pages}")
        self.page_size = page_size
        self.allocator = PageAllocator(max_pages)
        self._requests: dict[int, _Request] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: int) -> bool:
        return request in self._requests

    @property
    def requests(self) -> list[int]:
        """The live requests, oldest first."""
        return list(self._requests)

    def _get(self, request: int) -> _Request:
        try:
            return self._requests[request]
        except KeyError:
            raise KeyError(f"kvk.BlockTable: no live request {request}") from None

    def _add(self, entry: _Request) -> int:
        request = self._next_id
        self._next_id += 1
        self._requests[request] = entry
        return request

    def _num_pages(self, length: int) -> int:
        return -(-length // self.page_size)

    def length(self, request: int) -> int:
        """Tokens stored for the request."""
        return self._get(request).length

    def pages(self, request: int) -> Sequence[int]:
        """Page ids of the request in token order. Not a copy: valid until the next change."""
        return self._get(request).pages

    def create(self) -> int:
        """A new, empty request."""
        return self._add(_Request())

    def fork(self, request: int, length: int | None = None) -> int:
        """A new request that shares the pages of the first `length` tokens of `request` (None: of all of them)."""
        source = self._get(request)
        length = source.length if length is None else length
        if not 0 <= length <= source.length:
            raise ValueError(
                f"kvk.BlockTable.fork: length must be 0 to {source.length} for request {request}, got {length}"
            )
        pages = source.pages[: self._num_pages(length)]
        self.allocator.share(pages)
        return self._add(_Request(pages, length))

    def _needs_copy(self, entry: _Request, num_tokens: int, dropped: dict[int, int]) -> bool:
        """Whether appending must first copy the last page. `dropped`: owners this call has taken off a page so far."""
        if num_tokens == 0 or entry.length % self.page_size == 0:
            return False
        last = entry.pages[-1]
        if self.allocator.owners(last) - dropped.get(last, 0) == 1:
            return False
        dropped[last] = dropped.get(last, 0) + 1
        return True

    def pages_wanted(self, requests: Sequence[int], num_tokens: Sequence[int]) -> int:
        """Pages that `extend` with these arguments would take. Checks the arguments and the limit, changes nothing.

        Raises OutOfPagesError when the pool has too few, ValueError for a negative count or a request given twice,
        KeyError for a request that is not live.
        """
        if len(requests) != len(num_tokens):
            raise ValueError(
                f"kvk.BlockTable.extend: {len(requests)} requests but {len(num_tokens)} token counts were given"
            )
        if len(set(requests)) != len(requests):
            raise ValueError("kvk.BlockTable.extend: a request is given twice")
        wanted = 0
        dropped: dict[int, int] = {}
        for request, count in zip(requests, num_tokens, strict=True):
            entry = self._get(request)
            if count < 0:
                raise ValueError(f"kvk.BlockTable.extend: request {request} cannot grow by {count} tokens")
            wanted += self._num_pages(entry.length + count) - len(entry.pages)
            wanted += self._needs_copy(entry, count, dropped)
        free = self.allocator.num_free
        if free is not None and wanted > free:
            assert self.allocator.max_pages is not None
            raise OutOfPagesError(wanted, free, self.allocator.max_pages, self.page_size)
        return wanted

    def extend(self, requests: Sequence[int], num_tokens: Sequence[int]) -> Extension:
        """Room for `num_tokens[i]` more tokens of `requests[i]`, all or nothing. Errors as `pages_wanted`."""
        self.pages_wanted(requests, num_tokens)
        copies: list[tuple[int, int]] = []
        slots: list[int] = []
        for request, count in zip(requests, num_tokens, strict=True):
            entry = self._requests[request]
            if self._needs_copy(entry, count, {}):
                source, target = entry.pages[-1], self.allocator.allocate()
                self.allocator.release([source])
                entry.pages[-1] = target
                entry.clean = min(entry.clean, len(entry.pages) - 1)
                copies.append((source, target))
            while len(entry.pages) * self.page_size < entry.length + count:
                entry.pages.append(self.allocator.allocate())
            position, entry.length = entry.length, entry.length + count
            while position < entry.length:
                index, offset = divmod(position, self.page_size)
                run = min(self.page_size - offset, entry.length - position)
                first = entry.pages[index] * self.page_size + offset
                slots.extend(range(first, first + run))
                position += run
        return Extension(copies, slots)

    def truncate(self, request: int, length: int) -> list[int]:
        """Forget the tokens from `length` on; returns the pages the request no longer holds."""
        entry = self._get(request)
        if not 0 <= length <= entry.length:
            raise ValueError(
                f"kvk.BlockTable.truncate: length must be 0 to {entry.length} for request {request}, got {length}"
            )
        keep = self._num_pages(length)
        dropped = entry.pages[keep:]
        self.allocator.release(dropped)
        del entry.pages[keep:]
        entry.length = length
        entry.clean = min(entry.clean, keep)
        return dropped

    def free(self, request: int) -> list[int]:
        """End a request; returns the pages it held."""
        entry = self._get(request)
        self.allocator.release(entry.pages)
        del self._requests[request]
        return entry.pages

    def take_changes(self, request: int) -> tuple[int, list[int]]:
        """(i, ids): the page list from entry i on is `ids`; what is before i was taken by an earlier call.

        For the one reader that mirrors the page lists into tensors.
        """
        entry = self._get(request)
        start, entry.clean = entry.clean, len(entry.pages)
        return start, entry.pages[start:]
