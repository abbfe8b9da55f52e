"""What a call must move and compute at the least: every input that it needs read once, every output written once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvk.formats.quant import QuantFormat

Arguments = dict[str, Any]


class Cost(NamedTuple):
    """bytes of memory; flops: multiply-adds times two (additions once), or 0 where a count would say nothing; ceiling:
    "read" or "copy", the kind of traffic."""

    bytes: int
    flops: int
    ceiling: str


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


class _Requests(NamedTuple):
    """Of each request and kv head: keys that some token of it sees, and (token, key) pairs that are not masked."""

    keys: Tensor
    pairs: Tensor


def _requests(a: Arguments, num_kv_heads: int) -> _Requests:
    lens = a["kv_lens"].cpu().long()
    lens = lens[:, None].expand(-1, num_kv_heads) if lens.dim() == 1 else lens
    starts = a.get("qo_indptr")
    tokens = torch.ones(lens.shape[0], dtype=torch.int64) if starts is None else starts.cpu().long().diff()
    causal, window = a.get("causal", True), a.get("window_left", -1)
    keys, pairs = torch.zeros_like(lens), torch.zeros_like(lens)
    for request in range(lens.shape[0]):
        for head in range(num_kv_heads):
            length, n = int(lens[request, head]), int(tokens[request])
            position = torch.arange(length - n, length)
            last = (position + 1).clamp(0, length) if causal else torch.full((n,), length)
            first = (position - window).clamp(min=0) if window >= 0 else torch.zeros_like(last)
            pairs[request, head] = (last - first).clamp(min=0).sum()
            keys[request, head] = max(0, int(last.max()) - int(first.min())) if n else 0
    return _Requests(keys, pairs)


def _attention(a: Arguments, num_kv_heads: int, bytes_per_key: float, dims: int) -> Cost:
    """dims: D + Dv; bytes_per_key: of K and V of one key and kv head."""
    q = a["q"]
    seen = _requests(a, num_kv_heads)
    dim_v = dims - q.shape[-1]
    out = q.shape[0] * q.shape[1] * (dim_v * q.element_size() + 4)
    group = q.shape[1] // num_kv_heads
    table = sum(_size(a[name]) for name in ("page_indices", "kv_lens"))
    moved = int(seen.keys.sum() * bytes_per_key) + _size(q) + out + table
    return Cost(moved, 2 * dims * group * int(seen.pairs.sum()), "read")


def _paged(a: Arguments) -> Cost:
    k, v = a["k_pages"], a["v_pages"]
    dims = k.shape[-1] + v.shape[-1]
    return _attention(a, k.shape[2], dims * k.element_size(), dims)


def _quant(a: Arguments) -> Cost:
    """Keys of dense pages count as what they take, by the share of dense pages in the table."""
    fmt: QuantFormat = a["fmt"]
    dims = fmt.head_dim + fmt.head_dim_v
    record = (fmt.k_record_bytes + fmt.v_record_bytes) / fmt.page_size
    tags = a["page_indices"].cpu() >> 28
    dense = float((tags == 1).float().mean()) if tags.numel() else 0.0
    per_key = (1 - dense) * record + dense * dims * a["q"].element_size()
    return _attention(a, a["k_pool"].shape[1], per_key, dims)


def _append(a: Arguments) -> Cost:
    k, v = a["k"], a["v"]
    stored = int((a["slot_mapping"] >= 0).sum())
    row = (k.shape[2] + v.shape[2]) * k.shape[1] * k.element_size()
    return Cost(2 * stored * row + _size(a["slot_mapping"]), 0, "copy")


def _merge(a: Arguments) -> Cost:
    out, lse = a["out"], a["lse"]
    return Cost(
        (_size(out) + _size(lse)) * (out.shape[0] + 1) // max(1, out.shape[0]), 2 * out.numel(), "read"
    )


def _hadamard(a: Arguments) -> Cost:
    x = a["x"]
    n = x.shape[-1]
    m = next((m for m in (40, 28, 20, 12, 1) if n % m == 0 and (n // m).bit_count() == 1), 1)
    return Cost(2 * _size(x), x.numel() * (int(math.log2(n // m)) + (m if m > 1 else 0) + 1), "copy")


def _quantize_pages(a: Arguments) -> Cost:
    fmt: QuantFormat = a["fmt"]
    count, heads = a["src"].numel(), a["k_pages"].shape[2]
    dense = fmt.page_size * (fmt.head_dim + fmt.head_dim_v) * a["k_pages"].element_size()
    return Cost(count * heads * (dense + fmt.k_record_bytes + fmt.v_record_bytes), 0, "copy")


def _dequantize_pages(a: Arguments) -> Cost:
    fmt: QuantFormat = a["fmt"]
    count, heads = a["ids"].numel(), a["k_pool"].shape[1]
    dense = fmt.page_size * (fmt.head_dim + fmt.head_dim_v) * a["dtype"].itemsize
    return Cost(count * heads * (dense + fmt.k_record_bytes + fmt.v_record_bytes), 0, "copy")


def _quantize(a: Arguments) -> Cost:
    x = a["x"]
    return Cost(_size(x) + x.numel() * a["bits"] // 8 + 4 * x.numel() // a["group"], 0, "copy")


def _dequantize(a: Arguments) -> Cost:
    numbers = a["codes"].numel() * 8 // a["bits"]
    moved = sum(_size(a[name]) for name in ("codes", "scale", "min"))
    return Cost(moved + numbers * a.get("dtype", torch.float32).itemsize, 0, "copy")


COSTS: dict[str, Callable[[Arguments], Cost]] = {
    "paged_decode": _paged,
    "paged_prefill": _paged,
    "append_kv": _append,
    "merge_states": _merge,
    "quant_decode": _quant,
    "quant_prefill": _quant,
    "quantize_pages": _quantize_pages,
    "dequantize_pages": _dequantize_pages,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "hadamard": _hadamard,
    "hadamard_": _hadamard,
}
