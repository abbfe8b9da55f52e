"""kvk: kernels for the KV cache of transformers, as torch ops.

The functions here are typed wrappers of ``torch.ops.kvk.*`` with the documentation; the ops are there as soon as this
package is imported. Conventions shared by all of them: docs/conventions.md.
"""

from __future__ import annotations

from kvk import _load

_load.load()

from kvk import cuda  # noqa: E402
from kvk.cache import OutOfPagesError, PagedCache  # noqa: E402
from kvk.cuda import precompile  # noqa: E402
from kvk.explanation import explain  # noqa: E402
from kvk.formats import BitmapFormat, QuantFormat  # noqa: E402
from kvk.ops.block_sparse import (  # noqa: E402
    block_sparse_attention,
    block_sparse_attention_backward,
    vertical_slash_attention,
)
from kvk.ops.hadamard import hadamard  # noqa: E402
from kvk.ops.lightning import lightning_attention, lightning_decode, lightning_slopes  # noqa: E402
from kvk.ops.linear import linear_attention, taylor_feature_map  # noqa: E402
from kvk.ops.neighborhood import neighborhood_attention, neighborhood_attention_backward  # noqa: E402
from kvk.ops.paged import append_kv, merge_states, paged_decode, paged_prefill  # noqa: E402
from kvk.ops.quant import dequantize, dequantize_pages, quantize, quantize_pages  # noqa: E402
from kvk.ops.quant_attention import quant_decode, quant_prefill  # noqa: E402
from kvk.ops.sparse import compress_pages, decompress_pages  # noqa: E402
from kvk.ops.sparse_attention import sparse_decode, sparse_prefill  # noqa: E402
from kvk.patterns import block_mask_to_csr  # noqa: E402
from kvk.record import recording  # noqa: E402

cuda.provide_nvrtc()
cuda.provide_cubins()

__version__ = "0.1.0"
__all__ = [
    "BitmapFormat",
    "OutOfPagesError",
    "PagedCache",
    "QuantFormat",
    "append_kv",
    "block_mask_to_csr",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "compress_pages",
    "decompress_pages",
    "dequantize",
    "dequantize_pages",
    "explain",
    "hadamard",
    "lightning_attention",
    "lightning_decode",
    "lightning_slopes",
    "linear_attention",
    "merge_states",
    "neighborhood_attention",
    "neighborhood_attention_backward",
    "paged_decode",
    "paged_prefill",
    "precompile",
    "quant_decode",
    "quant_prefill",
    "quantize",
    "quantize_pages",
    "recording",
    "sparse_decode",
    "sparse_prefill",
    "taylor_feature_map",
    "vertical_slash_attention",
]
