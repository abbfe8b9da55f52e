"""What a call must move and compute at the least: every input that it needs read once, every output written once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvk.formats.quant import QuantFormat
from kvk.formats.sparse import BitmapFormat
from kvk.reference.neighborhood import axis_mask

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


def _records(a: Arguments) -> Cost:
    """Keys of dense pages count as what they take, by the share of dense pages in the table."""
    fmt: QuantFormat | BitmapFormat = a["fmt"]
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


def _visited(a: Arguments) -> int:
    """(query, key) pairs of all heads in the blocks that a pattern names, causality counted."""
    q, k, pointers = a["q"], a["k"], a["row_ptr"].cpu()
    columns = a["col_idx"].cpu().long()
    block_q, block_k = a["block_q"], a["block_k"]
    starts = [a.get(f"cu_seqlens_{x}") for x in "qk"]
    lens_q, lens_k = (
        [x.shape[0]] if s is None else s.cpu().long().diff().tolist()
        for s, x in zip(starts, (q, k), strict=True)
    )
    pairs = 0
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        for h in range(pointers.shape[1]):
            of = b if pointers.shape[0] > 1 else 0, h
            counts = pointers[of].diff()
            row = torch.arange(len(counts)).repeat_interleave(counts)
            first, last = int(pointers[of][0]), int(pointers[of][-1])
            key = columns[of][first:last] * block_k
            for i in range(block_q):
                query = row * block_q + i
                end = query + 1 + len_k - len_q if a.get("causal") else torch.full_like(query, len_k)
                end = torch.minimum(end, (key + block_k).clamp(max=len_k))
                pairs += int(torch.where(query < len_q, (end - key).clamp(min=0), 0).sum())
    return pairs * (q.shape[1] if pointers.shape[1] == 1 else 1)


def _block_sparse(a: Arguments) -> Cost:
    q, k, v = a["q"], a["k"], a["v"]
    out = q.shape[0] * q.shape[1] * (v.shape[-1] * q.element_size() + 4)
    moved = sum(map(_size, (q, k, v, a["row_ptr"], a["col_idx"]))) + out
    return Cost(moved, 2 * (q.shape[-1] + v.shape[-1]) * _visited(a), "read")


def _backward(a: Arguments, forward: Cost) -> Cost:
    """Of attention: scores and their gradient, a product for each of dq, dk and dv; out, lse and their gradients are
    read, the gradients of q, k and v written."""
    q, v = a["q"], a["v"]
    dims = q.shape[-1] + v.shape[-1]
    more = sum(map(_size, (q, a["k"], v, a["out"], a["lse"])))
    return Cost(forward.bytes + more, forward.flops // dims * (dims + q.shape[-1] + dims), "read")


def _block_sparse_backward(a: Arguments) -> Cost:
    return _backward(a, _block_sparse(a))


def _neighborhood_backward(a: Arguments) -> Cost:
    return _backward(a, _neighborhood(a))


def _merge_backward(a: Arguments) -> Cost:
    """Parts are read and their gradients written; beside them the merged ones of `grad`."""
    parts = _size(a["out"]) + _size(a["lse"])
    return Cost(2 * parts + _size(a["grad_out"]) + _size(a["grad_lse"]), 4 * a["out"].numel(), "copy")


def _vertical_slash(a: Arguments) -> Cost:
    """Without FLOPs: what is seen depends on how bands and keys overlap."""
    q, v = a["q"], a["v"]
    out = q.shape[0] * q.shape[1] * (v.shape[-1] * q.element_size() + 4)
    return Cost(sum(map(_size, (q, a["k"], v, a["vertical"], a["slash"]))) + out, 0, "read")


def _neighborhood(a: Arguments) -> Cost:
    q, k, v = a["q"], a["k"], a["v"]
    extents = q.shape[1:-2]
    pairs = q.shape[0] * q.shape[-2]
    for d, extent in enumerate(extents):
        axis = [a["kernel_size"], a.get("stride", 1), a.get("dilation", 1), a.get("is_causal", False)]
        kernel, stride, dilation, causal = (
            x if isinstance(x, int) else x[d if len(x) > 1 else 0] for x in axis
        )
        pairs *= int(axis_mask(extent, kernel, stride, dilation, bool(causal)).sum())
    out = q.numel() // q.shape[-1] * (v.shape[-1] * q.element_size() + 4)
    return Cost(sum(map(_size, (q, k, v))) + out, 2 * (q.shape[-1] + v.shape[-1]) * pairs, "read")


def _hadamard(a: Arguments) -> Cost:
    x = a["x"]
    n = x.shape[-1]
    m = next((m for m in (40, 28, 20, 12, 1) if n % m == 0 and (n // m).bit_count() == 1), 1)
    return Cost(2 * _size(x), x.numel() * (int(math.log2(n // m)) + (m if m > 1 else 0) + 1), "copy")


def _lightning(a: Arguments) -> Cost:
    """The recurrence's own FLOPs: chunks compute a fifth more at Dk = Dv = 128, and never T x T."""
    q, v, starts = a["q"], a["v"], a.get("cu_seqlens")
    sequences = q.shape[0] if starts is None else starts.numel() - 1
    state = 4 * sequences * q.shape[2] * q.shape[3] * v.shape[3]
    initial = state if a.get("initial_state") is not None else 0
    decay = a.get("log_decay")
    moved = 2 * _size(q) + 2 * _size(v) + state + initial + (0 if decay is None else _size(decay))
    return Cost(moved, 4 * q.numel() * v.shape[3], "read")


def _lightning_backward(a: Arguments) -> Cost:
    """Of the recurrence: the states again, their gradient, and a product for each of q, k, v and a decay per state."""
    q, v, decay = a["q"], a["v"], a.get("log_decay")
    forward = _lightning(a)
    gradients = 2 * _size(q) + _size(v) + (_size(decay) if decay is not None else 0)
    products = 5 + (decay is not None and bool(a.get("decay_grad", True)))
    return Cost(forward.bytes + gradients, 2 * products * q.numel() * v.shape[3], "read")


def _lightning_decode(a: Arguments) -> Cost:
    q, v = a["q"], a["v"]
    rows = int((a["slots"] >= 0).sum())
    state = 4 * rows * q.shape[1] * q.shape[2] * v.shape[2]
    return Cost(
        2 * state + 2 * _size(q) + 2 * _size(v), 5 * rows * q.shape[1] * q.shape[2] * v.shape[2], "copy"
    )


def _linear(a: Arguments) -> Cost:
    """Of the recurrence: k v^T and S^T q; z and q . z."""
    q, v = a["q"], a["v"]
    count = q.shape[0] if a.get("cu_seqlens") is None else a["cu_seqlens"].numel() - 1
    final = 4 * count * q.shape[2] * q.shape[3] * (v.shape[3] + 1)
    given = ("q_den", "k_den", "initial_state", "initial_z")
    moved = 2 * _size(q) + 2 * _size(v) + final + sum(_size(a[x]) for x in given if a.get(x) is not None)
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    return Cost(moved + 4 * rows, 4 * q.numel() * (v.shape[3] + 1), "read")


def _linear_backward(a: Arguments) -> Cost:
    """The states again and their gradient; a product for each of q, k and v."""
    q, v = a["q"], a["v"]
    gradients = 2 * _size(q) + _size(v) + sum(_size(a[x]) for x in ("q_den", "k_den") if a.get(x) is not None)
    return Cost(_linear(a).bytes + gradients, 10 * q.numel() * (v.shape[3] + 1), "read")


def _taylor(a: Arguments) -> Cost:
    x = a["x"]
    d = x.shape[-1]
    rows = x.numel() // d
    features = 1 + d + d * (d + 1) // 2
    backward = "grad" in a
    moved = rows * (features + d * (2 if backward else 1)) * x.element_size()
    return Cost(moved, rows * (3 * d * d if backward else d + d * (d + 1)), "copy")


def _pack(a: Arguments) -> Cost:
    fmt: QuantFormat | BitmapFormat = a["fmt"]
    count, heads = a["src"].numel(), a["k_pages"].shape[2]
    dense = fmt.page_size * (fmt.head_dim + fmt.head_dim_v) * a["k_pages"].element_size()
    return Cost(count * heads * (dense + fmt.k_record_bytes + fmt.v_record_bytes), 0, "copy")


def _unpack(a: Arguments) -> Cost:
    fmt: QuantFormat | BitmapFormat = a["fmt"]
    count, heads = a["ids"].numel(), a["k_pool"].shape[1]
    dtype = fmt.dtype if isinstance(fmt, BitmapFormat) else a["dtype"]
    dense = fmt.page_size * (fmt.head_dim + fmt.head_dim_v) * dtype.itemsize
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
    "merge_states_backward": _merge_backward,
    "block_sparse_attention": _block_sparse,
    "block_sparse_attention_backward": _block_sparse_backward,
    "neighborhood_attention": _neighborhood,
    "neighborhood_attention_backward": _neighborhood_backward,
    "vertical_slash_attention": _vertical_slash,
    "quant_decode": _records,
    "quant_prefill": _records,
    "sparse_decode": _records,
    "sparse_prefill": _records,
    "compress_pages": _pack,
    "decompress_pages": _unpack,
    "quantize_pages": _pack,
    "dequantize_pages": _unpack,
    "quantize": _quantize,
    "dequantize": _dequantize,
    "hadamard": _hadamard,
    "hadamard_": _hadamard,
    "lightning_attention": _lightning,
    "lightning_attention_backward": _lightning_backward,
    "lightning_decode": _lightning_decode,
    "linear_attention": _linear,
    "linear_attention_backward": _linear_backward,
    "taylor_feature_map": _taylor,
    "taylor_feature_map_backward": _taylor,
}
