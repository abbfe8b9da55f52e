"""Page lists against plain lists of tokens."""

from __future__ import annotations

import random

import pytest
from kvk.block_table import BlockTable, OutOfPagesError


def snapshot(blocks: BlockTable) -> object:
    """Everything that an unsuccessful call must leave alone."""
    lists = {r: (list(blocks.pages(r)), blocks.length(r)) for r in blocks.requests}
    allocator = blocks.allocator
    return (
        lists,
        allocator.num_used,
        allocator.high_water,
        [allocator.owners(p) for p in range(allocator.high_water)],
    )


def assert_consistent(blocks: BlockTable) -> None:
    """Owners, free pages and page lists say the same."""
    allocator = blocks.allocator
    held = [page for request in blocks.requests for page in blocks.pages(request)]
    for page in range(allocator.high_water):
        assert allocator.owners(page) == held.count(page)
    assert allocator.num_used == len(set(held)) <= allocator.high_water
    for request in blocks.requests:
        pages = blocks.pages(request)
        assert len(set(pages)) == len(pages) == -(-blocks.length(request) // blocks.page_size)
    if allocator.max_pages is not None:
        assert allocator.num_free == allocator.max_pages - allocator.num_used
        assert allocator.high_water <= allocator.max_pages


@pytest.mark.parametrize("seed", range(3))
def test_block_table_long_random_history(seed: int) -> None:
    """Thousands of operations on page lists alone, with far larger requests than the model above."""
    rng = random.Random(seed)
    blocks = BlockTable(page_size=rng.choice([1, 4, 16]), max_pages=300)
    content: dict[int, int] = {}  # slot -> token
    stored: dict[int, list[int]] = {}
    refused = 0
    for token in range(0, 4000 * 100, 100):
        action = rng.choice(["create", "fork", "truncate", "free", "extend", "extend", "extend"])
        request = rng.choice(list(stored)) if stored else None
        if action == "create" or request is None:
            stored[blocks.create()] = []
        elif action == "fork":
            length = rng.randint(0, len(stored[request]))
            stored[blocks.fork(request, length)] = stored[request][:length]
        elif action == "truncate":
            length = rng.randint(0, len(stored[request]))
            blocks.truncate(request, length)
            del stored[request][length:]
        elif action == "free":
            blocks.free(request)
            del stored[request]
        else:
            batch = rng.sample(list(stored), rng.randint(1, min(4, len(stored))))
            counts = [rng.choice([0, 1, 1, 2, 25]) for _ in batch]
            try:
                extension = blocks.extend(batch, counts)
            except OutOfPagesError:
                refused += 1
                continue
            for source, target in extension.page_copies:
                for offset in range(blocks.page_size):
                    content[target * blocks.page_size + offset] = content.get(
                        source * blocks.page_size + offset, -1
                    )
            assert len(set(extension.slots)) == len(extension.slots) == sum(counts)
            slots = iter(extension.slots)
            for r, count in zip(batch, counts, strict=True):
                for i in range(count):
                    content[next(slots)] = token + i
                    stored[r].append(token + i)
                token += count
        if token % 5000 == 0:
            assert_consistent(blocks)
    assert refused > 10
    for request, want in stored.items():
        slots_of = [
            page * blocks.page_size + o for page in blocks.pages(request) for o in range(blocks.page_size)
        ]
        assert [content[slot] for slot in slots_of[: len(want)]] == want
