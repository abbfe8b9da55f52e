"""Attention over bitmap-sparse pages through torch.ops alone: an installed wheel's library, none of its Python.

An engine that loads libkvk.so by itself (or from C++, with torch::Library) sees this much. Formats travel as integers:
docs/formats.md.
"""

import importlib.util
from pathlib import Path

import torch

spec = importlib.util.find_spec("kvk")  # where it is installed; nothing of it is imported
assert spec is not None and spec.submodule_search_locations is not None, "pip install kvk first"
torch.ops.load_library(Path(spec.submodule_search_locations[0]) / "libkvk.so")
ops = torch.ops.kvk

PAGE, HEADS, DIM, KEEP = 64, 8, 128, 40  # 40 of 128 elements stay: 69% zeros
BF16 = 0
fmt = [
    PAGE,
    DIM,
    DIM,
    BF16,
    KEEP,
    0,
    KEEP,
    0,
]  # page, head dims of K and V, dtype, then keep and rotate of K and of V
*_, k_record_bytes, _, _, _, v_record_bytes = ops._bitmap_layout(fmt)
k_pool = torch.empty(10, HEADS, k_record_bytes, dtype=torch.uint8)
v_pool = torch.empty(10, HEADS, v_record_bytes, dtype=torch.uint8)

k_pages, v_pages = torch.randn(
    2, 4, PAGE, HEADS, DIM
).bfloat16()  # four dense pages; the first three are full
full = torch.arange(3, dtype=torch.int32)
records = torch.tensor([7, 2, 5], dtype=torch.int32)
ops.compress_pages(k_pages, v_pages, full, k_pool, v_pool, records, fmt)

dense = 1 << 28  # the tag of a dense page: the newest tokens
page_indices = torch.tensor([[7, 2, 5, 3 | dense]], dtype=torch.int32)
kv_lens = torch.tensor([3 * PAGE + 20], dtype=torch.int32)
q = torch.randn(1, 32, DIM).bfloat16()
out, lse = ops.sparse_decode(q, k_pool, v_pool, page_indices, kv_lens, fmt, k_pages=k_pages, v_pages=v_pages)

k, v = ops.decompress_pages(k_pool, v_pool, records, fmt)  # the same, the long way round
want, want_lse = ops.paged_decode(
    q,
    torch.cat([k, k_pages[3:]]),
    torch.cat([v, v_pages[3:]]),
    torch.arange(4, dtype=torch.int32)[None],
    kv_lens,
)
assert torch.allclose(out.float(), want.float(), atol=0.01) and torch.allclose(lse, want_lse, atol=1e-3)
stored, was = k_pool[0].nbytes + v_pool[0].nbytes, k_pages[0].nbytes + v_pages[0].nbytes
print(f"out {list(out.shape)}, {stored} bytes a page instead of {was}: {stored / was:.3f}")
