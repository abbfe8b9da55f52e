"""Random cases of paged attention: pools with poisoned padding, page tables of every form, options."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import kvk
import torch
from kvk import reference
from kvk_testing import ErrorTooLarge, assert_error_rule, threads
from torch import Tensor

# What stands in page table entries that are never read.
GARBAGE = (2**31 - 1, -1, -(2**31), 1 << 28, 99_999_999)

TABLES = ("dense", "per_head", "csr", "csr_per_head")
LAYOUTS = ("nhd", "hnd", "halves", "padded")
Q_LAYOUTS = ("packed", "sliced", "head_major")


@dataclass
class PagedCase:
    """The arguments of one call of paged_decode, or of paged_prefill when qo_indptr is there."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_indices: Tensor
    kv_lens: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    qo_indptr: Tensor | None = None

    @property
    def args(self) -> tuple[Tensor, ...]:
        head = (self.q,) if self.qo_indptr is None else (self.q, self.qo_indptr)
        return (*head, self.k_pages, self.v_pages, self.page_indices, self.kv_lens)

    @property
    def name(self) -> str:
        return "paged_decode" if self.qo_indptr is None else "paged_prefill"

    def run(self) -> tuple[Tensor, Tensor]:
        return getattr(kvk, self.name)(*self.args, **self.options)

    def reference(self, compute_dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        # Hundreds of small matrix products: threads would spend the time waiting for each other.
        with threads(1):
            return getattr(reference, self.name)(*self.args, **self.options, compute_dtype=compute_dtype)

    def with_(self, **changes: Any) -> PagedCase:
        """A copy with other tensors, or other options: options={...} is merged in."""
        options = {**self.options, **changes.pop("options", {})}
        return replace(self, options=options, **changes)

    def rows(self, request: int) -> slice:
        """The rows of q and of the results that belong to a request."""
        if self.qo_indptr is None:
            return slice(request, request + 1)
        return slice(int(self.qo_indptr[request]), int(self.qo_indptr[request + 1]))

    def select(self, requests: Sequence[int]) -> PagedCase:
        """The case of these requests, in this order; a request may come several times."""
        order = torch.tensor(requests, dtype=torch.int64)
        rows = torch.tensor(
            [r for b in requests for r in range(self.q.shape[0])[self.rows(b)]], dtype=torch.int64
        )
        options, qo_indptr, page_indices = dict(self.options), self.qo_indptr, self.page_indices
        if "page_indptr" in options:
            indptr = options["page_indptr"]
            per_request = (indptr.numel() - 1) // self.kv_lens.shape[0]
            lists = [page_indices[indptr[i] : indptr[i + 1]] for i in range(indptr.numel() - 1)]
            lists = [lists[b * per_request + i] for b in requests for i in range(per_request)]
            page_indices = torch.cat(lists)
            options["page_indptr"] = torch.tensor([0, *map(len, lists)]).cumsum(0, dtype=torch.int32)
        else:
            page_indices = page_indices[order]
        if qo_indptr is not None:
            counts = qo_indptr.diff()[order]
            qo_indptr = torch.cat([counts.new_zeros(1), counts]).cumsum(0, dtype=torch.int32)
        if "mask_bits" in options:
            options["mask_bits"] = options["mask_bits"][rows]
        return replace(
            self,
            q=self.q[rows],
            page_indices=page_indices,
            kv_lens=self.kv_lens[order],
            options=options,
            qo_indptr=qo_indptr,
        )

    def check(self) -> tuple[Tensor, Tensor]:
        """Run the op and hold it against the reference."""
        out, lse = self.run()
        assert out.dtype == self.q.dtype and lse.dtype == torch.float32
        check_attention(out, lse, self)
        return out, lse


# The largest error of plain torch over a handful of rows is luck: it is taken over at least this many.
ERROR_SAMPLES = 128


def check_attention(out: Tensor, lse: Tensor, case: PagedCase) -> None:
    exact_out, exact_lse = case.reference()
    plain = [case.reference(case.q.dtype)]

    def check() -> None:
        assert_error_rule(lse, exact_lse, [x[1] for x in plain], per_row=False, what="lse")
        assert_error_rule(out, exact_out, [x[0] for x in plain], per_row=True, what="out")

    try:
        check()
    except ErrorTooLarge:
        if lse.numel() >= ERROR_SAMPLES:
            raise
        # The same sums with the channels in other orders are the same computation.
        for seed in range(ERROR_SAMPLES // lse.numel()):
            order = torch.randperm(case.q.shape[-1], generator=torch.Generator().manual_seed(seed))
            other = case.with_(q=case.q[..., order], k_pages=case.k_pages[..., order])
            plain.append(other.reference(case.q.dtype))
        check()


def pool(layout: str, num_pages: int, page_size: int, heads: int, dim: int, dim_v: int, dtype: torch.dtype):
    """Empty (k_pages, v_pages) of a layout, all NaN."""

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    if layout == "nhd":
        return nan(num_pages, page_size, heads, dim), nan(num_pages, page_size, heads, dim_v)
    if layout == "hnd":
        return tuple(nan(num_pages, heads, page_size, d).transpose(1, 2) for d in (dim, dim_v))
    if layout == "halves":
        both = nan(num_pages, 2, page_size, heads, max(dim, dim_v))
        return both[:, 0, :, :, :dim], both[:, 1, :, :, :dim_v]
    assert layout == "padded"  # no stride is round and no row is aligned
    return tuple(
        nan(num_pages + 1, page_size + 1, heads + 1, d + 3)[1:, :page_size, 1:, 1 : d + 1]
        for d in (dim, dim_v)
    )


def lay_out_q(q: Tensor, layout: str) -> Tensor:
    if layout == "packed":
        return q
    tokens, heads, dim = q.shape
    if layout == "sliced":  # as q comes out of a fused qkv projection
        return torch.cat(
            [q.new_full((tokens, 1, dim), torch.nan), q, q.new_full((tokens, 2, dim), torch.nan)], 1
        )[:, 1 : heads + 1]
    assert layout == "head_major"
    return q.transpose(0, 1).contiguous().transpose(0, 1)


def pack_mask_bits(mask: Tensor, extra_words: int = 0) -> Tensor:
    """bool [T, W] -> int32 [T, ceil(W / 32) + extra_words], bit j in word j // 32; bits past W are set."""
    tokens, width = mask.shape
    words = (width + 31) // 32 + extra_words
    wide = torch.ones(tokens, words * 32, dtype=torch.int64)
    wide[:, :width] = mask
    packed = (wide.view(tokens, words, 32) << torch.arange(32)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def tree_mask(num_tokens: int, rng: random.Random) -> Tensor:
    """bool [n, n]: every token sees itself and its ancestors in a random tree."""
    mask = torch.eye(num_tokens, dtype=torch.bool)
    for token in range(1, num_tokens):
        if rng.random() < 0.9:  # else one more root
            mask[token] |= mask[rng.randrange(token)]
    return mask


def _page_lists(
    lens: Sequence[Sequence[int]], page_size: int, share: bool, rng: random.Random
) -> tuple[list[list[list[int]]], int]:
    """Page ids for every (request, head), each in its own order, and the number of pages."""
    needs = [-(-max(row, default=0) // page_size) for row in lens]
    num_pages = sum(needs) + 2
    ids = rng.sample(range(num_pages), num_pages)
    lists = []
    for need in needs:
        own, ids = ids[:need], ids[need:]
        lists.append([rng.sample(own, need) for _ in lens[0]])
    if share:  # a common prefix of full pages with request 0
        for request in range(1, len(lens)):
            for head, pages in enumerate(lists[request]):
                full = min(lens[0][head], lens[request][head]) // page_size
                pages[:full] = lists[0][head][:full]
    return lists, num_pages


def _table(lists, needs, heads: int, table: str, rng: random.Random) -> tuple[Tensor, Tensor | None]:
    """The page table of one of TABLES, every entry past a list's need being garbage."""
    batch = len(lists)
    if table in ("dense", "csr"):
        rows = [(lists[b][0], max(needs[b])) for b in range(batch)]
    else:
        rows = [(lists[b][h], needs[b][h]) for b in range(batch) for h in range(heads)]
    if table in ("dense", "per_head"):
        width = max((need for _, need in rows), default=0) + 2
        full = [pages[:need] + rng.choices(GARBAGE, k=width - need) for pages, need in rows]
        shape = (batch, width) if table == "dense" else (batch, heads, width)
        return torch.tensor(full, dtype=torch.int32).reshape(shape), None
    flat: list[int] = []
    indptr = [0]
    for pages, need in rows:
        flat += pages[:need] + rng.choices(GARBAGE, k=rng.randrange(3))
        indptr.append(len(flat))
    return torch.tensor(flat, dtype=torch.int32), torch.tensor(indptr, dtype=torch.int32)


def make_case(
    kv_lens: Sequence[int] | Sequence[Sequence[int]],
    q_lens: Sequence[int] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    page_size: int = 16,
    table: str = "dense",
    layout: str = "nhd",
    q_layout: str = "packed",
    share_pages: bool = False,
    q_scale: float = 1.0,
    padding_rows: int = 0,
    alibi: bool = False,
    sinks: bool = False,
    key_bias: str | None = None,
    hidden_keys: float = 0.0,
    mask: str | None = None,
    mask_width: int = -1,
    **options: Any,
) -> PagedCase:
    """A random case.

    kv_lens holds one length a request, or one a (request, kv head). Everything that no result may depend on
    is poisoned: NaN in unused pages and past the end of the last page, garbage in unused table entries, NaN
    in the rows of q past the last request, NaN in the values of keys whose key_bias is -inf.

    q_scale: 1 for mild softmax weights, more for peaked ones. key_bias: "page" [N, P] or "head" [N, P, Hkv],
    with hidden_keys the share of -inf in it. mask: "tree" (over the query tokens) or "random" (over
    mask_width keys). options go to the op as they are.
    """
    rng = random.Random(seed)
    gen = torch.Generator().manual_seed(seed)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    batch = len(kv_lens)
    per_head_lens = batch > 0 and not isinstance(kv_lens[0], int)
    lens = [list(row) if per_head_lens else [row] * num_kv_heads for row in kv_lens]

    lists, num_pages = _page_lists(lens, page_size, share_pages, rng)
    if table in ("dense", "csr"):
        lists = [[heads[0]] * num_kv_heads for heads in lists]
    needs = [[-(-length // page_size) for length in row] for row in lens]
    page_indices, page_indptr = _table(lists, needs, num_kv_heads, table, rng)

    used = torch.zeros(num_pages, page_size, num_kv_heads, dtype=torch.bool)
    for pages, row in zip(lists, lens, strict=True):
        for head, length in enumerate(row):
            position = torch.arange(length)
            page = torch.tensor(pages[head], dtype=torch.int64)[position // page_size]
            used[page, position % page_size, head] = True

    k_pages, v_pages = pool(layout, num_pages, page_size, num_kv_heads, head_dim, head_dim_v, dtype)
    for pages in (k_pages, v_pages):
        values = torch.randn(pages.shape, generator=gen).to(dtype)
        pages.copy_(torch.where(used[..., None], values, torch.nan))

    tokens = batch if q_lens is None else sum(q_lens) + padding_rows
    num_q_heads = num_kv_heads * group
    q = (q_scale * torch.randn(tokens, num_q_heads, head_dim, generator=gen)).to(dtype)
    qo_indptr = None
    if q_lens is not None:
        qo_indptr = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        q[sum(q_lens) :] = torch.nan

    if page_indptr is not None:
        options["page_indptr"] = page_indptr
    if alibi:
        options["alibi_slopes"] = 2.0 ** (-8.0 * torch.arange(1, num_q_heads + 1) / num_q_heads)
    if sinks:
        options["sinks"] = 2 * torch.randn(num_q_heads, generator=gen)
    if key_bias is not None:
        shape = used.shape if key_bias == "head" else used.shape[:2]
        bias = torch.randn(shape, generator=gen)
        bias[torch.rand(shape, generator=gen) < hidden_keys] = -torch.inf
        hidden = (
            (bias == -torch.inf) if key_bias == "head" else (bias == -torch.inf)[..., None].expand_as(used)
        )
        v_pages.masked_fill_(hidden[..., None], torch.nan)
        options["key_bias"] = torch.where(used if key_bias == "head" else used.any(-1), bias, torch.nan)
    if mask is not None:
        assert q_lens is not None
        width = max(q_lens, default=0) if mask_width < 0 else mask_width
        rows = torch.rand(tokens, width, generator=gen) < 0.6
        if mask == "tree":
            assert mask_width < 0
            start = 0
            for n in q_lens:
                rows[start : start + n, :n] = tree_mask(n, rng)
                start += n
        options["mask_bits"] = pack_mask_bits(rows, extra_words=rng.randrange(2))
        options["mask_width"] = mask_width

    return PagedCase(
        q=lay_out_q(q, q_layout),
        k_pages=k_pages,
        v_pages=v_pages,
        page_indices=page_indices,
        kv_lens=torch.tensor(lens if per_head_lens else kv_lens, dtype=torch.int32),
        options=options,
        qo_indptr=qo_indptr,
    )
