"""The paged cache against a dense one: append, fork, roll back, free, in bounded memory."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from kvk.block_table import BlockTable, OutOfPagesError
from kvk.cache import PagedCache, Step
from test_block_table import assert_consistent, snapshot

HEADS, DIM, DIM_V, LAYERS = 2, 32, 40, 2


class DenseModel(RuleBasedStateMachine):
    """Random histories of a small cache, with the tokens of every request kept densely beside it."""

    requests = Bundle("requests")

    @initialize(page_size=st.integers(1, 5), max_pages=st.integers(0, 14), initial=st.booleans())
    def start(self, page_size: int, max_pages: int, initial: bool) -> None:
        self.cache = PagedCache(
            LAYERS,
            HEADS,
            DIM,
            head_dim_v=DIM_V,
            page_size=page_size,
            max_pages=max_pages,
            initial_pages=max_pages if initial else 0,
        )
        self.stored: dict[int, list[float]] = {}  # request -> the number its every token was filled with
        self.counter = 0.0

    @rule(target=requests)
    def create(self) -> int:
        request = self.cache.create()
        assert request not in self.stored
        self.stored[request] = []
        return request

    @rule(target=requests, request=requests, data=st.data())
    def fork(self, request: int, data: st.DataObject) -> int:
        length = data.draw(st.none() | st.integers(0, len(self.stored[request])))
        used = self.cache.blocks.allocator.num_used
        twin = self.cache.fork(request, length)
        assert self.cache.blocks.allocator.num_used == used  # nothing is copied
        self.stored[twin] = self.stored[request][:length]
        return twin

    @rule(request=requests, data=st.data())
    def truncate(self, request: int, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.stored[request])))
        self.cache.truncate(request, length)
        del self.stored[request][length:]

    @rule(request=consumes(requests))
    def free(self, request: int) -> None:
        self.cache.free(request)
        del self.stored[request]
        with pytest.raises(KeyError, match=f"no live request {request}"):
            self.cache.length(request)

    @rule(target=requests, data=st.data(), counts=st.lists(st.integers(0, 7), max_size=4))
    def extend(self, data: st.DataObject, counts: list[int]) -> object:
        batch = data.draw(st.permutations(sorted(self.stored)))[: len(counts)]
        counts = counts[: len(batch)]
        before, nbytes = snapshot(self.cache.blocks), self.cache.nbytes
        used = self.cache.blocks.allocator.num_used
        try:
            wanted = self.cache.blocks.pages_wanted(batch, counts)
            step = self.cache.extend(batch, counts)
        except OutOfPagesError as error:
            assert snapshot(self.cache.blocks) == before and self.cache.nbytes == nbytes
            assert error.wanted > error.free == self.cache.blocks.allocator.num_free
            return multiple()
        assert self.cache.blocks.allocator.num_used == used + wanted
        tokens = [self.counter + i for i in range(sum(counts))]
        self.counter += len(tokens)
        for layer in range(LAYERS):
            filled = torch.tensor(tokens).view(-1, 1, 1) + 1000 * layer
            self.cache.append(layer, filled.repeat(1, HEADS, DIM), -filled.repeat(1, HEADS, DIM_V), step)
        for request, count in zip(batch, counts, strict=True):
            self.stored[request] += tokens[:count]
            tokens = tokens[count:]
        assert step.is_decode == all(count == 1 for count in counts)
        self.check(step)
        return multiple()

    def check(self, step: Step) -> None:
        """What the step's page table shows is what was stored, in every layer."""
        page_size = self.cache.page_size
        assert step.page_indices.dtype == step.kv_lens.dtype == step.qo_indptr.dtype == torch.int32
        for i, request in enumerate(step.requests):
            want = self.stored[request]
            assert int(step.kv_lens[i]) == len(want)
            pages = step.page_indices[i, : -(-len(want) // page_size)].long()
            for layer, pool in enumerate(self.cache.layers):
                k = pool.k_pages[pages].flatten(0, 1)[: len(want)]
                v = pool.v_pages[pages].flatten(0, 1)[: len(want)]
                expected = (torch.tensor(want) + 1000 * layer).view(-1, 1, 1)
                assert torch.equal(k, expected.expand_as(k)) and torch.equal(v, -expected.expand_as(v))

    @rule()
    def read_all(self) -> None:
        requests = sorted(self.stored)
        self.check(self.cache.extend(requests, [0] * len(requests)))

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert_consistent(self.cache.blocks)
        cache = self.cache
        assert cache.nbytes_used == cache.blocks.allocator.num_used * cache.page_bytes
        assert cache.nbytes == sum(p.k_pages.nbytes + p.v_pages.nbytes for p in cache.layers)
        assert cache.nbytes_used <= cache.nbytes <= (cache.blocks.allocator.max_pages or 0) * cache.page_bytes

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for request in self.cache.blocks.requests:
                self.cache.free(request)
            assert self.cache.blocks.allocator.num_used == 0 and len(self.cache.blocks) == 0


TestDenseModel = DenseModel.TestCase


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal, bottom right aligned; q [n, Hq, D], k [L, Hkv, D], v [L, Hkv, Dv] -> [n, Hq, Dv]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,lhd->hnl", q, k) * q.shape[-1] ** -0.5
    n, length = scores.shape[1:]
    hidden = torch.ones(n, length, dtype=torch.bool).triu(length - n + 1)
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def test_attend_prefill_decode_fork_and_rollback() -> None:
    """The whole life of a request, its attention compared with a dense one at each step."""
    torch.manual_seed(0)
    cache = PagedCache(LAYERS, HEADS, DIM, head_dim_v=DIM_V, page_size=4, max_pages=64)
    dense: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(requests: list[int], counts: list[int], **options: float) -> None:
        step = cache.extend(requests, counts)
        for layer in range(LAYERS):
            total = sum(counts)
            q, k, v = (torch.randn(total, h, d) for h, d in ((3 * HEADS, DIM), (HEADS, DIM), (HEADS, DIM_V)))
            cache.append(layer, k, v, step)
            out, lse = cache.attend(layer, q, step, **options)
            assert lse.shape == (total, 3 * HEADS)
            start = 0
            for request, count in zip(requests, counts, strict=True):
                new = slice(start, start + count)
                start += count
                old_k, old_v = dense.get((request, layer), (k[:0], v[:0]))
                keys = torch.cat([old_k, k[new]])
                values = torch.cat([old_v, v[new]])
                dense[request, layer] = (keys, values)
                torch.testing.assert_close(
                    out[new], dense_attention(q[new], keys, values), atol=2e-6, rtol=1e-5
                )

    def fork(request: int) -> int:
        twin = cache.fork(request)
        for layer in range(LAYERS):
            dense[twin, layer] = dense[request, layer]
        return twin

    a, b = cache.create(), cache.create()
    forward([a, b], [9, 3])
    forward([a, b], [1, 1])
    c = fork(a)
    forward([b, c, a], [1, 1, 1])  # c and a part: one of them gets a copy of the shared last page
    forward([c, a], [5, 0])
    cache.truncate(c, 7)
    for layer in range(LAYERS):
        k, v = dense[c, layer]
        dense[c, layer] = (k[:7], v[:7])
    forward([c, a, b], [1, 1, 1])
    forward([a, b, c], [2, 2, 2])
    cache.free(a)
    forward([c, b], [1, 1])


def test_fork_costs_no_pages_until_it_writes() -> None:
    cache = PagedCache(1, HEADS, DIM, page_size=16, max_pages=100)
    parent = cache.create()
    cache.extend([parent], [16 * 10 + 3])
    used = cache.blocks.allocator.num_used
    children = [cache.fork(parent) for _ in range(8)]
    assert cache.blocks.allocator.num_used == used == 11
    cache.extend(children, [1] * 8)  # eight copies of the partly filled last page; the parent keeps its own
    assert cache.blocks.allocator.num_used == used + 8
    cache.extend([parent], [1])
    assert cache.blocks.allocator.num_used == used + 8


def test_the_last_sharer_needs_no_copy() -> None:
    """Two requests part in one call: the first takes a copy, the second keeps the page. One free page is enough."""
    cache = PagedCache(1, HEADS, DIM, page_size=16, max_pages=2)
    parent = cache.create()
    cache.extend([parent], [3])
    child = cache.fork(parent)
    cache.extend([parent, child], [1, 1])
    assert cache.blocks.allocator.num_free == 0
    assert cache.blocks.pages(parent) != cache.blocks.pages(child)


def test_ended_requests_leave_nothing_behind() -> None:
    cache = PagedCache(1, HEADS, DIM, page_size=4, max_pages=8)
    for _ in range(200):
        batch = [cache.create(), cache.create()]
        cache.extend(batch, [9, 5])
        for request in batch:
            cache.free(request)
    assert cache.nbytes_used == 0 and len(cache.blocks) == 0
    assert cache._table._rows.shape[1] == 2


def test_out_of_pages_says_how_many() -> None:
    cache = PagedCache(1, HEADS, DIM, page_size=16, max_pages=8)
    a = cache.create()
    cache.extend([a], [16 * 6])
    with pytest.raises(
        OutOfPagesError, match=r"4 more pages of 16 tokens are wanted, 2 are free of max_pages=8"
    ) as info:
        cache.extend([a, cache.create()], [1, 33])
    assert (info.value.wanted, info.value.free, info.value.max_pages) == (4, 2, 8)
    assert cache.length(a) == 96
    cache.extend([a], [32])  # what fits still goes in


def test_pool_memory_is_bounded_and_reported() -> None:
    cache = PagedCache(LAYERS, HEADS, DIM, head_dim_v=DIM_V, page_size=8, max_pages=61, dtype=torch.bfloat16)
    assert cache.page_bytes == LAYERS * 8 * HEADS * (DIM + DIM_V) * 2
    assert cache.nbytes == cache.nbytes_used == 0
    a = cache.create()
    for _ in range(61):
        cache.extend([a], [8])
        assert cache.nbytes_used <= cache.nbytes <= cache.nbytes_used * 9 // 8 + cache.page_bytes
        assert cache.nbytes <= 61 * cache.page_bytes
    assert cache.nbytes_used == 61 * cache.page_bytes
    cache.free(a)
    assert cache.nbytes_used == 0 and cache.nbytes == 61 * cache.page_bytes


def test_preallocated_pools_never_move() -> None:
    cache = PagedCache(1, HEADS, DIM, page_size=4, max_pages=16, initial_pages=16)
    address = cache.layers[0].k_pages.data_ptr()
    cache.extend([cache.create()], [64])
    assert cache.layers[0].k_pages.data_ptr() == address


def test_a_decode_step_touches_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work proportional to the stored tokens: the page table of an unchanged batch is edited, not built."""
    cache = PagedCache(1, HEADS, DIM, page_size=4, max_pages=4000)
    batch = [cache.create() for _ in range(3)]
    cache.extend(batch, [4000, 4001, 4002])
    cache.extend(batch, [9, 9, 9])  # the table grows to twice its width here
    taken: list[int] = []
    take_changes = BlockTable.take_changes

    def counting(self: BlockTable, request: int) -> tuple[int, list[int]]:
        start, pages = take_changes(self, request)
        taken.append(len(pages))
        return start, pages

    monkeypatch.setattr(BlockTable, "take_changes", counting)
    table = cache.extend(batch, [1, 1, 1]).page_indices
    for _ in range(40):
        step = cache.extend(batch, [1, 1, 1])
        assert step.page_indices.data_ptr() == table.data_ptr()
        cache.truncate(batch[0], cache.length(batch[0]) - 1)  # a rejected draft token
        cache.extend(batch[:1], [0])  # another batch in between
        table = cache.extend(batch, [0, 0, 0]).page_indices
    assert max(taken) == 1 and sum(taken) <= 3 * 12


def test_batches_of_any_composition() -> None:
    """Requests come, go and change places between steps; their tables stay right."""
    rng = random.Random(5)
    cache = PagedCache(1, HEADS, DIM, page_size=2, max_pages=500)
    live: list[int] = []
    for _ in range(300):
        if len(live) < 6 and rng.random() < 0.3:
            live.append(cache.fork(rng.choice(live)) if live and rng.random() < 0.5 else cache.create())
        if live and rng.random() < 0.15:
            cache.free(live.pop(rng.randrange(len(live))))
        batch = rng.sample(live, rng.randint(0, len(live)))
        step = cache.extend(batch, [rng.randint(0, 3) for _ in batch])
        assert step.page_indices.shape[0] == len(batch)
        for i, request in enumerate(batch):
            pages = list(cache.blocks.pages(request))
            assert step.page_indices[i, : len(pages)].tolist() == pages


def test_layers_may_differ_and_come_late() -> None:
    cache = PagedCache(page_size=4, max_pages=8)
    a = cache.create()
    step = cache.extend([a], [5])
    small, large = cache.add_layer(1, 32), cache.add_layer(4, 64, head_dim_v=32, dtype=torch.float16)
    assert [pool.num_pages for pool in cache.layers] == [2, 2]
    cache.append(small, torch.ones(5, 1, 32), torch.ones(5, 1, 32), step)
    cache.append(large, torch.ones(5, 4, 64).half(), torch.ones(5, 4, 32).half(), step)
    out, _ = cache.attend(large, torch.ones(5, 8, 64).half(), step)
    assert torch.equal(out, torch.ones(5, 8, 32).half())
    assert cache.page_bytes == 4 * (64 * 4 + 4 * 96 * 2)


def test_bad_arguments() -> None:
    cache = PagedCache(1, HEADS, DIM, page_size=4, max_pages=8)
    a = cache.create()
    cache.extend([a], [6])
    before = snapshot(cache.blocks)
    with pytest.raises(ValueError, match="a request is given twice"):
        cache.extend([a, a], [1, 1])
    with pytest.raises(ValueError, match=f"request {a} cannot grow by -1 tokens"):
        cache.extend([a], [-1])
    with pytest.raises(ValueError, match="1 requests but 2 token counts"):
        cache.extend([a], [1, 2])
    with pytest.raises(KeyError, match="no live request 99"):
        cache.extend([a, 99], [1, 1])
    with pytest.raises(ValueError, match="fork: length must be 0 to 6 for request 0, got 7"):
        cache.fork(a, 7)
    with pytest.raises(ValueError, match="truncate: length must be 0 to 6 for request 0, got -1"):
        cache.truncate(a, -1)
    with pytest.raises(KeyError, match="no live request 7"):
        cache.free(7)
    with pytest.raises(ValueError, match=r"initial_pages must be 0 to max_pages \(8\), got 9"):
        PagedCache(max_pages=8, initial_pages=9)
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        PagedCache(page_size=0)
    with pytest.raises(ValueError, match="max_pages must not be negative, got -1"):
        PagedCache(max_pages=-1)
    assert snapshot(cache.blocks) == before
