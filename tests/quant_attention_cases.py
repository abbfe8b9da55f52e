"""Cases of attention over records (quantized or bitmap-sparse) and dense pages, made from cases of paged attention."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import kvk
import torch
from kvk import reference
from kvk_testing import assert_error_rule, threads
from paged_cases import PagedCase, make_case
from torch import Tensor

DENSE = 1 << 28  # the tag of a dense page


@dataclass
class QuantCase:
    """The arguments of one call of quant_decode or sparse_decode, of ..._prefill when qo_indptr is there."""

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    page_indices: Tensor
    kv_lens: Tensor
    fmt: kvk.QuantFormat | kvk.BitmapFormat
    options: dict[str, Any]
    qo_indptr: Tensor | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        head = (self.q,) if self.qo_indptr is None else (self.q, self.qo_indptr)
        return (*head, self.k_pool, self.v_pool, self.page_indices, self.kv_lens)

    @property
    def name(self) -> str:
        family = "sparse" if isinstance(self.fmt, kvk.BitmapFormat) else "quant"
        return f"{family}_decode" if self.qo_indptr is None else f"{family}_prefill"

    def run(self) -> tuple[Tensor, Tensor]:
        return getattr(kvk, self.name)(*self.args, self.fmt, **self.options)

    def reference(self, compute_dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        with threads(1):
            return getattr(reference, self.name)(
                *self.args, self.fmt, **self.options, compute_dtype=compute_dtype
            )

    def with_(self, **changes: Any) -> QuantCase:
        options = {**self.options, **changes.pop("options", {})}
        return replace(self, options=options, **changes)

    def check(self) -> tuple[Tensor, Tensor]:
        """Run the op and hold it against the reference."""
        out, lse = self.run()
        assert out.dtype == self.q.dtype and lse.dtype == torch.float32
        exact_out, exact_lse = self.reference()
        plain_out, plain_lse = self.reference(self.q.dtype)
        assert_error_rule(lse, exact_lse, plain_lse, per_row=False, what="lse")
        assert_error_rule(out, exact_out, plain_out, per_row=True, what="out")
        return out, lse


def quantized(
    case: PagedCase,
    fmt: kvk.QuantFormat | kvk.BitmapFormat,
    dense_share: float,
    seed: int = 0,
    k_permutation: Tensor | None = None,
    k_rope: Tensor | None = None,
) -> QuantCase:
    """The same call with each page either a record or dense. What may not be read is poisoned.

    Slots that no key fills hold NaN in dense pages and in bitmap-sparse records, other numbers in quantized ones, whose
    groups they share; records that no request uses are bytes of 0xff, NaN wherever a number is read.
    """
    rng = random.Random(seed)
    gen = torch.Generator().manual_seed(seed)
    num_pages, _, heads, _ = case.k_pages.shape
    dense = [page for page in range(num_pages) if rng.random() < dense_share]
    packed = [page for page in range(num_pages) if page not in dense]
    rng.shuffle(dense)
    rng.shuffle(packed)
    gaps = 2  # pages of each pool that nobody uses
    places = rng.sample(range(len(packed) + gaps), len(packed))
    dense_places = rng.sample(range(len(dense) + gaps), len(dense))

    numbers = dict(zip(packed, places, strict=True))
    numbers |= {page: DENSE | place for page, place in zip(dense, dense_places, strict=True)}
    indices = case.page_indices.clone()
    for i, entry in enumerate(indices.view(-1).tolist()):
        indices.view(-1)[i] = numbers.get(entry, entry)

    k_pool, v_pool = (x.fill_(0xFF) for x in fmt.new_pool(len(packed) + gaps, heads))
    ids, records = torch.tensor(packed, dtype=torch.int32), torch.tensor(places, dtype=torch.int32)
    if isinstance(fmt, kvk.BitmapFormat):
        kvk.compress_pages(case.k_pages, case.v_pages, ids, k_pool, v_pool, records, fmt)
    else:
        sources = []
        for pages, axis in ((case.k_pages, fmt.k_axis), (case.v_pages, fmt.v_axis)):
            filler = torch.randn(pages.shape, generator=gen).to(pages.dtype)
            # A token's own groups may be NaN; a group of several tokens may not, when one of them is read.
            whole = pages.isnan().all(-1, keepdim=True) if axis == "token" and pages is case.v_pages else None
            finite = torch.where(pages.isnan(), filler, pages)
            sources.append(finite if whole is None else torch.where(whole, torch.nan, finite))
        kvk.quantize_pages(*sources, ids, k_pool, v_pool, records, fmt, k_permutation=k_permutation)

    options = dict(case.options)
    if k_permutation is not None:
        options["k_permutation"] = k_permutation
    if k_rope is not None:
        options["k_rope"] = k_rope
    if dense_share > 0:
        pools = []
        for pages in (case.k_pages, case.v_pages):
            pool = torch.full((len(dense) + gaps, *pages.shape[1:]), torch.nan, dtype=pages.dtype)
            pool[dense_places] = pages[dense]
            pools.append(pool)
        options["k_pages"], options["v_pages"] = pools
    if "key_bias" in options:
        rows = len(packed) + gaps + (len(dense) + gaps if dense_share > 0 else 0)
        bias = torch.full((rows, *options["key_bias"].shape[1:]), torch.nan)
        bias[places] = options["key_bias"][packed]
        if dense:
            bias[[len(packed) + gaps + place for place in dense_places]] = options["key_bias"][dense]
        options["key_bias"] = bias
    return QuantCase(case.q, k_pool, v_pool, indices, case.kv_lens, fmt, options, qo_indptr=case.qo_indptr)


def make_quant_case(
    kv_lens,
    q_lens=None,
    *,
    fmt: kvk.QuantFormat | kvk.BitmapFormat,
    dense_share: float = 0.3,
    seed: int = 0,
    **params: Any,
) -> QuantCase:
    """As make_case, with the format's page size and head dims."""
    case = make_case(
        kv_lens,
        q_lens,
        seed=seed,
        page_size=fmt.page_size,
        head_dim=fmt.head_dim,
        head_dim_v=fmt.head_dim_v,
        **params,
    )
    return quantized(case, fmt, dense_share, seed)
