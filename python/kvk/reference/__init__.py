"""Readable references: what every op computes, in plain torch.

Each function takes the arguments of the op of the same name (without `out` and `lse`) and one more,
`compute_dtype`. With the default, float64, it is the truth that kernels are measured against; with the dtype
of the inputs it is the same computation as plain torch does it in that dtype, the yardstick of the error
rule. Written to be read, not to be fast, and meant for the CPU.

The op in place hadamard_ has no function of its own: `hadamard` says what it writes. All others have, but for
what computes nothing of tensors and so has neither a reference nor a benchmark, only tests: the library's own
ops, whose names begin with an underscore and which load kernels, record calls or lay out records
(docs/adding-an-op.md), and the functions of `kvk.array` beside the ops: version, cpu_level, get_num_threads and
set_num_threads, and `call`, through which its ops go.
"""

from kvk.reference.block_sparse import block_sparse_attention, vertical_slash_attention
from kvk.reference.gradients import (
    block_sparse_attention_backward,
    merge_states_backward,
    neighborhood_attention_backward,
)
from kvk.reference.hadamard import hadamard, hadamard_matrix
from kvk.reference.lightning import lightning_attention, lightning_attention_backward, lightning_decode
from kvk.reference.linear import (
    linear_attention,
    linear_attention_backward,
    linear_attention_mask,
    taylor_feature_map,
    taylor_feature_map_backward,
)
from kvk.reference.merge import merge_states
from kvk.reference.neighborhood import axis_mask, neighborhood_attention, neighborhood_mask
from kvk.reference.paged import append_kv, gather_request, paged_decode, paged_prefill, unpack_mask_bits
from kvk.reference.quant import dequantize, dequantize_pages, quantize, quantize_pages
from kvk.reference.quant_attention import quant_decode, quant_prefill
from kvk.reference.sparse import compress_pages, decompress_pages
from kvk.reference.sparse_attention import sparse_decode, sparse_prefill

__all__ = [
    "append_kv",
    "axis_mask",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "compress_pages",
    "decompress_pages",
    "dequantize",
    "dequantize_pages",
    "gather_request",
    "hadamard",
    "hadamard_matrix",
    "lightning_attention",
    "lightning_attention_backward",
    "lightning_decode",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_mask",
    "merge_states",
    "merge_states_backward",
    "neighborhood_attention",
    "neighborhood_attention_backward",
    "neighborhood_mask",
    "paged_decode",
    "paged_prefill",
    "quant_decode",
    "quant_prefill",
    "quantize",
    "quantize_pages",
    "sparse_decode",
    "sparse_prefill",
    "taylor_feature_map",
    "taylor_feature_map_backward",
    "unpack_mask_bits",
    "vertical_slash_attention",
]
