"""The compressing cache against pages that are quantized and dequantized by the reference."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import hypothesis.strategies as st
import kvk
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from kvk import reference
from kvk.block_table import OutOfPagesError
from kvk.cache import PagedCache, Step
from kvk.pages import PackedPages
from kvk_testing import assert_bit_equal
from test_block_table import assert_consistent

HEADS, DIM, DIM_V = 2, 32, 40
DENSE = 1 << 28


def small_format(page_size: int, bits: int) -> kvk.QuantFormat:
    """Per-channel keys where the page has room for a group, per-token keys elsewhere."""
    axis = "channel" if page_size % 16 == 0 else "token"
    group = 16 if axis == "channel" else 32
    return kvk.QuantFormat(page_size, DIM, bits, bits, group, 40, axis, head_dim_v=DIM_V)


def through_reference(
    fmt: kvk.QuantFormat, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A page's [P, Hkv, D] and [P, Hkv, Dv] quantized and read back."""
    pools, page = fmt.new_pool(1, k.shape[1]), torch.zeros(1, dtype=torch.int32)
    reference.quantize_pages(k[None], v[None], page, *pools, page, fmt)
    k, v = reference.dequantize_pages(*pools, page, fmt, k.dtype)
    return k[0], v[0]


class Page:
    """A page of the model: what each layer reads from it, and whether it is packed."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], packed: bool = False) -> None:
        self.layers, self.packed = layers, packed

    def copy(self) -> Page:
        return Page([(k.clone(), v.clone()) for k, v in self.layers])


class Model:
    """A small cache with a layer of 4 bits, one of 2 bits and a dense one, and what it must hold beside it."""

    def __init__(
        self, page_size: int, max_pages: int, residual: int, sinks: int, max_dense_pages: int | None
    ) -> None:
        self.size, self.residual, self.sinks = page_size, residual, sinks
        self.cache = PagedCache(
            page_size=page_size,
            max_pages=max_pages,
            residual=residual,
            sinks=sinks,
            max_dense_pages=max_dense_pages,
        )
        self.formats = [small_format(page_size, 4), small_format(page_size, 2), None]
        for fmt in self.formats:
            self.cache.add_layer(HEADS, DIM, head_dim_v=DIM_V, fmt=fmt)
        self.pages: dict[int, list[Page]] = {}
        self.length: dict[int, int] = {}
        self.gen = torch.Generator().manual_seed(0)
        self.refused = 0

    def create(self) -> int:
        request = self.cache.create()
        self.pages[request], self.length[request] = [], 0
        return request

    def fork(self, request: int, length: int) -> int:
        twin = self.cache.fork(request, length)
        self.pages[twin], self.length[twin] = self.pages[request][: -(-length // self.size)], length
        return twin

    def truncate(self, request: int, length: int) -> None:
        self.cache.truncate(request, length)
        self.pages[request] = self.pages[request][: -(-length // self.size)]
        self.length[request] = length

    def free(self, request: int) -> None:
        self.cache.free(request)
        del self.pages[request], self.length[request]

    def pack(self) -> None:
        self.cache.pack()
        self.pack_model()

    def pack_model(self) -> None:
        """From the definition: a full page that no request's window holds, sinks apart."""
        held: dict[int, tuple[Page, int, int]] = {}  # the page, its index, the earliest window of its holders
        for request, pages in self.pages.items():
            first = max(0, self.length[request] - self.residual) // self.size
            for index, page in enumerate(pages):
                earliest = min(first, held[id(page)][2]) if id(page) in held else first
                held[id(page)] = (page, index, earliest)
        for page, index, earliest in held.values():
            if not page.packed and self.sinks <= index < earliest:
                page.packed = True
                page.layers = [
                    (k, v) if fmt is None else through_reference(fmt, k, v)
                    for fmt, (k, v) in zip(self.formats, page.layers, strict=True)
                ]

    def extend(self, batch: list[int], counts: list[int]) -> None:
        try:
            step = self.cache.extend(batch, counts)
        except OutOfPagesError as error:
            assert error.wanted > error.free
            self.refused += 1
            self.read()
            return
        self.pack_model()
        shapes = ((sum(counts), HEADS, DIM), (sum(counts), HEADS, DIM_V))
        new = [tuple(torch.randn(shape, generator=self.gen) for shape in shapes) for _ in self.formats]
        for layer, (k, v) in enumerate(new):
            self.cache.append(layer, k, v, step)
        self.grow_model(batch, counts, new)
        self.check_step(step)
        self.check_attention(step)

    def grow_model(self, batch: list[int], counts: list[int], new: list[tuple[torch.Tensor, ...]]) -> None:
        token = 0
        for request, count in zip(batch, counts, strict=True):
            pages = self.pages[request]
            if count and self.length[request] % self.size:
                shared = sum(pages[-1] in other for other in self.pages.values()) > 1
                pages[-1] = pages[-1].copy() if shared else pages[-1]
                pages[-1].packed = False
            for position in range(self.length[request], self.length[request] + count):
                if position % self.size == 0:
                    empty = [
                        (torch.zeros(self.size, HEADS, DIM), torch.zeros(self.size, HEADS, DIM_V))
                        for _ in new
                    ]
                    pages.append(Page(empty))
                for stored, (k, v) in zip(pages[-1].layers, new, strict=True):
                    stored[0][position % self.size], stored[1][position % self.size] = k[token], v[token]
                token += 1
            self.length[request] += count

    def contents(self, request: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K [L, Hkv, D] and V of a request in the model."""
        parts = [page.layers[layer] for page in self.pages[request]]
        k = torch.cat([torch.empty(0, HEADS, DIM), *(k for k, _ in parts)])
        v = torch.cat([torch.empty(0, HEADS, DIM_V), *(v for _, v in parts)])
        return k[: self.length[request]], v[: self.length[request]]

    def check_step(self, step: Step) -> None:
        """What the step's page tables show is what the model holds, in every layer, bit for bit."""
        for i, request in enumerate(step.requests):
            assert int(step.kv_lens[i]) == self.length[request]
            for layer, store in enumerate(self.cache.layers):
                k, v = self.stored(store, step, i, len(self.pages[request]))
                want_k, want_v = self.contents(request, layer)
                assert_bit_equal(k[: len(want_k)], want_k)
                assert_bit_equal(v[: len(want_v)], want_v)

    def stored(self, store: Any, step: Step, i: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(store, PackedPages):
            pages = step.page_indices[i, :count].long()
            return store.k_pages[pages].flatten(0, 1), store.v_pages[pages].flatten(0, 1)
        k, v = torch.empty(count, self.size, HEADS, DIM), torch.empty(count, self.size, HEADS, DIM_V)
        entries = step.packed.page_indices[i, :count].tolist()
        assert [not entry & DENSE for entry in entries] == [p.packed for p in self.pages[step.requests[i]]]
        for index, entry in enumerate(entries):
            if entry & DENSE:
                k[index], v[index] = store.dense.k_pages[entry - DENSE], store.dense.v_pages[entry - DENSE]
            else:
                ids = torch.tensor([entry], dtype=torch.int32)
                k[index : index + 1], v[index : index + 1] = kvk.dequantize_pages(
                    store.k_pool, store.v_pool, ids, store.fmt, torch.float32
                )
        return k.flatten(0, 1), v.flatten(0, 1)

    def check_attention(self, step: Step) -> None:
        q = torch.randn(sum(step.num_tokens), 2 * HEADS, DIM, generator=self.gen)
        for layer in range(len(self.formats)):
            out, _ = self.cache.attend(layer, q, step)
            start = 0
            for request, count in zip(step.requests, step.num_tokens, strict=True):
                want = dense_attention(q[start : start + count], *self.contents(request, layer))
                torch.testing.assert_close(out[start : start + count], want, atol=5e-6, rtol=1e-5)
                start += count

    def read(self) -> None:
        """Everything, as the next step would."""
        step = self.cache.extend(sorted(self.pages), [0] * len(self.pages))
        self.pack_model()
        self.check_step(step)

    def check_bytes(self) -> None:
        """Every byte that is held is accounted for."""
        cache, residency = self.cache, self.cache._residency
        assert_consistent(cache.blocks)
        pages = {id(page): page.packed for held in self.pages.values() for page in held}
        packed = sum(pages.values())
        assert residency.records.num_used == packed and residency.slots.num_used == len(pages) - packed
        dense_page = self.size * HEADS * (DIM + DIM_V) * 4
        record = [HEADS * (fmt.k_record_bytes + fmt.v_record_bytes) for fmt in self.formats[:2]]
        used = len(pages) * dense_page + 2 * (len(pages) - packed) * dense_page + packed * sum(record)
        assert cache.nbytes_used == used <= cache.nbytes
        held = sum(
            x.k_pages.nbytes + x.v_pages.nbytes
            for x in (*(p.dense for p in cache.layers[:2]), cache.layers[2])
        )
        assert cache.nbytes == held + sum(p.k_pool.nbytes + p.v_pool.nbytes for p in cache.layers[:2])
        limit = residency.slots.max_pages
        assert limit is None or cache.layers[0].dense.num_pages <= limit

    def end(self) -> None:
        for request in sorted(self.pages):
            self.free(request)
        assert self.cache.nbytes_used == 0


class Machine(RuleBasedStateMachine):
    """Random histories, short ones first."""

    requests = Bundle("requests")

    @initialize(
        page_size=st.sampled_from([1, 3, 4, 16]),
        max_pages=st.integers(6, 16),
        residual=st.integers(0, 9),
        sinks=st.integers(0, 2),
        limited=st.booleans(),
    )
    def start(self, page_size: int, max_pages: int, residual: int, sinks: int, limited: bool) -> None:
        self.model = Model(page_size, max_pages, residual, sinks, max_pages * 2 // 3 if limited else None)

    @rule(target=requests)
    def create(self) -> int:
        return self.model.create()

    @rule(target=requests, request=requests, data=st.data())
    def fork(self, request: int, data: st.DataObject) -> int:
        return self.model.fork(request, data.draw(st.integers(0, self.model.length[request])))

    @rule(request=requests, data=st.data())
    def truncate(self, request: int, data: st.DataObject) -> None:
        self.model.truncate(request, data.draw(st.integers(0, self.model.length[request])))

    @rule(request=consumes(requests))
    def free(self, request: int) -> None:
        self.model.free(request)

    @rule(target=requests, data=st.data(), counts=st.lists(st.integers(0, 9), min_size=1, max_size=4))
    def extend(self, data: st.DataObject, counts: list[int]) -> object:
        batch = data.draw(st.permutations(sorted(self.model.pages)))[: len(counts)]
        self.model.extend(batch, counts[: len(batch)])
        return multiple()

    @rule()
    def pack(self) -> None:
        self.model.pack()

    @invariant()
    def bytes_are_exact(self) -> None:
        if hasattr(self, "model"):
            self.model.check_bytes()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.end()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=15, stateful_step_count=20)


@pytest.mark.parametrize("seed", range(6))
def test_long_histories(seed: int) -> None:
    """Hundreds of operations in a row: forks of forks, deep and shallow rollbacks, requests that end out of order."""
    rng = random.Random(seed)
    model = Model([1, 3, 4, 16][seed % 4], 28, rng.choice([0, 5, 12]), seed % 3, [22, None][seed % 2])
    for _ in range(110):
        live = sorted(model.pages)
        action = rng.choices(["create", "fork", "truncate", "free", "extend", "pack"], [1, 2, 2, 1, 6, 1])[0]
        if action == "create" or not live:
            model.create()
        elif action == "fork":
            request = rng.choice(live)
            model.fork(request, rng.choice([model.length[request], rng.randint(0, model.length[request])]))
        elif action == "truncate":
            request = rng.choice(live)
            model.truncate(request, max(0, model.length[request] - rng.choice([1, 2, 3, 20])))
        elif action == "free" or len(live) > 6:
            model.free(rng.choice(live))
        elif action == "extend":
            batch = rng.sample(live, rng.randint(1, min(4, len(live))))
            model.extend(batch, [rng.choice([0, 1, 1, 2, 2 * model.size + 3]) for _ in batch])
        else:
            model.pack()
        model.check_bytes()
    assert model.refused > 0
    model.end()


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal, bottom right aligned; q [n, Hq, D], k [L, Hkv, D], v [L, Hkv, Dv] -> [n, Hq, Dv]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,lhd->hnl", q, k) * q.shape[-1] ** -0.5
    n, length = scores.shape[1:]
    hidden = torch.ones(n, length, dtype=torch.bool).triu(length - n + 1)
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


# -- one property each ------------------------------------------------------------------------------------------------

FMT = kvk.QuantFormat(16, 64, 2, 2, 16, 32)


def new_cache(**options: Any) -> PagedCache:
    return PagedCache(2, HEADS, 64, fmt=FMT, **{"residual": 32, **options})


def grow(cache: PagedCache, requests: list[int], counts: list[int], seed: int = 0) -> list[torch.Tensor]:
    """One step with random tokens; each layer's output."""
    gen = torch.Generator().manual_seed(seed)
    step, out = cache.extend(requests, counts), []
    for layer in range(len(cache.layers)):
        k, v = torch.randn(2, sum(counts), HEADS, 64, generator=gen)
        q = torch.randn(sum(counts), 2 * HEADS, 64, generator=gen)
        cache.append(layer, k, v, step)
        out.append(cache.attend(layer, q, step)[0])
    return out


def counting_packs(cache: PagedCache) -> list[int]:
    """Dense slots that layer 0 has packed, as it goes on."""
    packed: list[int] = []
    layer = cache.layers[0]
    pack = layer._ops.pack

    def count(k: Any, v: Any, src: torch.Tensor, *rest: Any) -> None:
        packed.extend(src.tolist())
        pack(k, v, src, *rest)

    layer._ops = dataclasses.replace(layer._ops, pack=count)
    return packed


def test_shared_pages_are_packed_once_when_the_last_request_lets_go() -> None:
    cache = new_cache()
    packed = counting_packs(cache)
    prefix = cache.create()
    grow(cache, [prefix], [80])
    batch = [cache.fork(prefix) for _ in range(3)]
    grow(cache, batch, [40, 40, 16])
    grow(cache, batch, [1, 1, 1])
    # 80 tokens: 48 are outside the prefix's window of 32, and so outside every fork's.
    assert len(packed) == 3
    cache.free(prefix)
    grow(cache, batch, [1, 1, 1])
    assert len(packed) == 4  # the third request, of 97 tokens, still has the prefix's last page in its window
    grow(cache, batch, [1, 1, 16])
    grow(cache, batch, [1, 1, 1])
    assert len(packed) == 5 == cache._residency.records.num_used


def test_a_request_with_its_own_copy_holds_the_shared_page_no_longer() -> None:
    cache = new_cache(residual=0)
    a = cache.create()
    grow(cache, [a], [20])
    b = cache.fork(a)
    grow(cache, [b], [1])  # b gets a copy of page 1, which both had half full
    grow(cache, [a], [40])
    cache.pack()
    assert cache._residency.records.num_used == 3  # pages 0 to 2 of a; b is still in its page 1


def test_rollback_in_the_window_is_exact() -> None:
    """Speculative decoding: rejected tokens leave no trace, and nothing of the cache is packed too early."""
    plain, drafted = new_cache(residual=32), new_cache(residual=32)
    packed = counting_packs(drafted)
    requests = [cache.create() for cache in (plain, drafted)]
    for cache, request in zip((plain, drafted), requests, strict=True):
        grow(cache, [request], [100])
    for i in range(60):
        drafted.truncate(requests[1], drafted.length(requests[1]))
        grow(drafted, [requests[1]], [7], seed=1000 + i)  # a draft, rejected
        drafted.truncate(requests[1], drafted.length(requests[1]) - 7)
        a, b = grow(plain, [requests[0]], [1], seed=i), grow(drafted, [requests[1]], [1], seed=i)
        for x, y in zip(a, b, strict=True):
            assert_bit_equal(x, y)
    assert len(packed) == (159 - 32) // 16


def test_deep_rollback_unpacks_the_page_that_is_written() -> None:
    cache = new_cache(residual=16)
    request = cache.create()
    grow(cache, [request], [100])
    grow(cache, [request], [1])
    assert cache._residency.records.num_used == 5
    cache.truncate(request, 40)  # in the middle of page 2, which is a record
    assert cache._residency.records.num_used == 3 and cache._residency.slots.num_used == 0
    twin = cache.fork(request)
    grow(cache, [request, twin], [1, 1])  # one of them gets a copy, the other the page itself, dense
    assert cache._residency.records.num_used == 2 and cache._residency.slots.num_used == 2
    grow(cache, [request, twin], [30, 2])
    grow(cache, [request], [1])
    assert (
        cache._residency.records.num_used == 3
    )  # of `request`, page 2 again; `twin` holds its own in its window


def test_dense_memory_is_bounded_by_windows_and_returned() -> None:
    """A long prompt in one step, and in chunks: afterwards the dense pools hold windows only."""
    for chunk in (2000, 100):
        cache = new_cache()
        request = cache.create()
        for start in range(0, 2000, chunk):
            grow(cache, [request], [min(chunk, 2000 - start)])
        cache.pack()
        assert cache._residency.slots.num_used == 2  # 2000 = 125 pages; the last 32 tokens
        assert cache.layers[0].dense.num_pages == 2
        grow(cache, [request], [1])
        assert cache.layers[0].dense.num_pages <= 12
        records = cache.layers[0].num_records * cache.layers[0].record_bytes
        assert 123 <= cache.layers[0].num_records <= 123 * 9 // 8 + 1
        assert (
            cache.layers[0].nbytes == records + cache.layers[0].dense.num_pages * cache.layers[0].page_bytes
        )


def test_bytes_per_token() -> None:
    """2 bits with groups of 16 and 32 are 3.5 bits an element; the window adds its dense tokens, and nothing else."""
    cache = PagedCache(3, HEADS, 64, fmt=FMT, residual=32, dtype=torch.bfloat16)
    request = cache.create()
    cache.extend([request], [16 * 1000])
    cache.pack()
    packed, dense = 16 * 998, 32
    assert FMT.bits_per_element == 3.5
    assert cache.nbytes_used == 3 * HEADS * 2 * 64 * (packed * 3.5 / 8 + dense * 2)


def test_sinks_and_layers_that_stay_dense() -> None:
    cache = new_cache(sinks=2, residual=0)
    dense = cache.add_layer(HEADS, 64)
    request = cache.create()
    grow(cache, [request], [80])
    step = cache.extend([request], [0])
    assert [bool(x & DENSE) for x in step.packed.page_indices[0, :5].tolist()] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert cache.layers[dense].num_pages == 5 and not isinstance(cache.layers[dense], PackedPages)
    assert cache._residency.slots.num_used == 2


def test_a_decode_step_touches_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work proportional to the stored tokens: tables are edited in place, and pages looked at once."""
    cache = new_cache()
    batch = [cache.create() for _ in range(3)]
    grow(cache, batch, [1600, 1610, 1615])
    grow(cache, batch, [9, 9, 9])  # the table grows to twice its width here
    grow(cache, batch, [1, 1, 1])
    looked: list[int] = []
    is_done = type(cache._residency)._is_done

    def counting(self: Any, page: int) -> bool:
        looked.append(page)
        return is_done(self, page)

    monkeypatch.setattr(type(cache._residency), "_is_done", counting)
    written: list[int] = []
    reference_of = cache._table._views[1]
    cache._table._views[1] = lambda page: written.append(page) or reference_of(page)
    table = cache.extend(batch, [0, 0, 0]).packed.page_indices
    written.clear()
    for i in range(48):
        grow(cache, batch, [1, 1, 1], seed=i)
        step = cache.extend(batch, [0, 0, 0])
        assert step.packed.page_indices.data_ptr() == table.data_ptr()
    assert len(looked) == 9 and len(written) == 2 * 9  # each request opened three pages, and packed three


def test_preallocated_pools_never_move() -> None:
    cache = new_cache(max_pages=64, initial_pages=64, max_dense_pages=16, initial_dense_pages=16)
    layer = cache.layers[0]
    pools = [x.data_ptr() for x in (layer.k_pool, layer.v_pool, layer.dense.k_pages, layer.dense.v_pages)]
    request = cache.create()
    for i in range(45):
        grow(cache, [request], [16], seed=i)
    assert pools == [
        x.data_ptr() for x in (layer.k_pool, layer.v_pool, layer.dense.k_pages, layer.dense.v_pages)
    ]
    with pytest.raises(OutOfPagesError, match=r"dense pages .* free of max_dense_pages=16"):
        cache.extend([request, *(cache.create() for _ in range(8))], [16] + [32] * 8)
    assert cache.length(request) == 720


def test_empty_short_and_partly_filled() -> None:
    """No token, fewer than a page, a page and a bit: nothing is packed, everything is attended to."""
    cache = new_cache(residual=0)
    a, b, c = (cache.create() for _ in range(3))
    out = grow(cache, [a, b, c], [0, 5, 17])
    assert out[0].shape == (22, 4, 64) and bool(out[0].isfinite().all())
    cache.pack()
    assert cache._residency.records.num_used == 1 and cache._residency.slots.num_used == 2
    out = grow(cache, [a, b, c], [1, 1, 1])
    assert bool(out[0].isfinite().all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_batch_gives_what_each_request_gives_alone(bits: int) -> None:
    """Requests with a shared prefix and others, every bit width, and one channel of the keys times 20."""
    fmt = kvk.QuantFormat(32, 64, bits, bits)
    gen = torch.Generator().manual_seed(bits)
    tokens = torch.randn(3, 300, 2, HEADS, 64, generator=gen)
    tokens[:, :, 0, :, 7] *= 20
    tokens[1, :100] = tokens[0, :100]  # requests 0 and 1 begin alike
    queries = torch.randn(3, 300, 2 * HEADS, 64, generator=gen)

    def run(
        cache: PagedCache, requests: dict[int, int], lengths: dict[int, int]
    ) -> dict[int, list[torch.Tensor]]:
        """Chunks of 40 until each has its length, then the rest token by token."""
        out: dict[int, list[torch.Tensor]] = {which: [] for which in requests}
        while any(cache.length(requests[w]) < lengths[w] for w in requests):
            at = {w: cache.length(requests[w]) for w in requests if cache.length(requests[w]) < lengths[w]}
            counts = {w: min(40 if lengths[w] - at[w] > 4 else 1, lengths[w] - at[w]) for w in at}
            step = cache.extend([requests[w] for w in at], list(counts.values()))
            rows = [(w, slice(at[w], at[w] + counts[w])) for w in at]
            k, v = torch.cat([tokens[w, s] for w, s in rows]).unbind(1)
            cache.append(0, k, v, step)
            got = cache.attend(0, torch.cat([queries[w, s] for w, s in rows]), step)[0]
            for (which, _), part in zip(rows, got.split(list(counts.values())), strict=True):
                out[which].append(part)
        return out

    lengths = {0: 204, 1: 164, 2: 84}
    alone = {}
    for which, length in lengths.items():
        cache = PagedCache(1, HEADS, 64, fmt=fmt, residual=64)
        alone |= run(cache, {which: cache.create()}, {which: length})
    cache = PagedCache(1, HEADS, 64, fmt=fmt, residual=64)
    prefix = cache.create()
    run(cache, {0: prefix}, {0: 80})
    batch = run(cache, {0: prefix, 1: cache.fork(prefix), 2: cache.create()}, lengths)
    for which in lengths:
        for x, y in zip(reversed(batch[which]), reversed(alone[which]), strict=False):
            assert_bit_equal(x, y)


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"page_size, head_dim and head_dim_v are \(16, 32, 32\), its format's"
    ):
        PagedCache(1, HEADS, 32, fmt=FMT)
    with pytest.raises(ValueError, match="a cache whose layers come with a format needs residual"):
        PagedCache(page_size=16).add_layer(HEADS, 64, fmt=FMT)
    with pytest.raises(ValueError, match="residual and sinks must not be negative, got -1 and 0"):
        new_cache(residual=-1)
    with pytest.raises(ValueError, match=r"initial_dense_pages must be 0 to max_dense_pages \(4\), got 5"):
        new_cache(max_dense_pages=4, initial_dense_pages=5)
