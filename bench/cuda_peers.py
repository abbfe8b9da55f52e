"""What kvk is compared with on a card. Each peer is optional: why one sits a case out is printed under the table.

Peers without pages get dense, contiguous K and V, prepared before the clock starts, which is in their favour.
"""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench import peers as cpu_peers
from bench.cases import AttentionCase, heads_last
from bench.cuda_data import CudaData
from bench.harness import OURS, Prepared


class Kvk:
    """The library itself, through its typed Python functions."""

    name = OURS

    def unavailable(self, case: AttentionCase) -> str | None:
        """Never: a missing op is an error of the run."""
        return None

    def build(self, data: CudaData) -> Prepared:
        """The op on the paged data, without any preparation."""
        import kvk

        pages = (data.k_pages, data.v_pages, data.page_indices, data.kv_lens)
        if data.case.q_len == 1:
            return Prepared(lambda: kvk.paged_decode(data.q, *pages), lambda result: result)
        return Prepared(lambda: kvk.paged_prefill(data.q, data.qo_indptr, *pages), lambda result: result)


class Sdpa:
    """torch's scaled_dot_product_attention with one of its backends, and no other.

    packed: the query heads of a group are rows of one query, so that K and V are read once per kv head."""

    def __init__(self, backend: SDPBackend, word: str, packed: bool = False) -> None:
        self.backend, self.packed = backend, packed
        self.name = f"sdpa {word}{' packed' if packed else ''}"

    def unavailable(self, case: AttentionCase) -> str | None:
        """Packed rows only for one token: more would need a mask of their own."""
        if self.packed and case.q_len > 1:
            return "decode only"
        return None

    def build(self, data: CudaData) -> Prepared:
        """is_causal for a square, the lower-right bias for a chunk of a longer context."""
        case, k, v = data.case, data.k, data.v
        square = case.q_len == case.kv_len and case.q_len > 1
        q, grouped, bias = data.dense_q, case.q_heads != case.kv_heads, None
        shape = q.shape
        if self.packed:
            q, grouped = q.reshape(case.batch, case.kv_heads, -1, case.head_dim), False
        elif case.q_len > 1 and not square:
            from torch.nn.attention.bias import causal_lower_right

            bias = causal_lower_right(case.q_len, case.kv_len)
            group = case.q_heads // case.kv_heads  # the bias takes no enable_gqa
            k, v, grouped = (*(x.repeat_interleave(group, 1) for x in (k, v)), False)
        backend = self.backend

        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q, k, v, attn_mask=bias, is_causal=square, enable_gqa=grouped
                )

        return Prepared(run, lambda out: (heads_last(out.reshape(shape)), None))


class Flex(cpu_peers.Flex):
    """torch's flex_attention, compiled for the case's shapes."""

    name = "flex compiled"

    def unavailable(self, case: AttentionCase) -> str | None:
        """Needs Triton."""
        return None if find_spec("triton") else "triton is not installed"


class FlashAttention3:
    """FlashAttention-3 forward, dense (the wheel fa3-fwd is built without pages and without float16)."""

    name = "fa3"

    def unavailable(self, case: AttentionCase) -> str | None:
        """A Hopper card and the wheel."""
        if find_spec("fa3_fwd_interface") is None:
            return "fa3-fwd is not installed"
        if torch.cuda.get_device_capability()[0] != 9:
            return "Hopper only"
        return None if case.dtype == "bf16" else "built for bfloat16 alone"

    def build(self, data: CudaData) -> Prepared:
        """The call for caches; it chooses splits and packing."""
        from fa3_fwd_interface import flash_attn_with_kvcache

        case = data.case
        q = data.q.view(case.batch, case.q_len, case.q_heads, case.head_dim)
        k, v = (x.transpose(1, 2).contiguous() for x in (data.k, data.v))

        def run() -> torch.Tensor:
            result = flash_attn_with_kvcache(q, k, v, cache_seqlens=data.kv_lens, causal=True)
            return result[0] if isinstance(result, tuple) else result

        return Prepared(run, lambda out: (out.reshape(case.tokens, case.q_heads, case.head_dim), None))


class FlashInfer:
    """FlashInfer over the same pages; its plan is made before the clock starts."""

    name = "flashinfer"

    def unavailable(self, case: AttentionCase) -> str | None:
        """The package; its kernels are compiled at first use."""
        return None if find_spec("flashinfer") else "flashinfer is not installed"

    def build(self, data: CudaData) -> Prepared:
        """Decode with tensor cores, as it advises for groups of query heads; prefill causal."""
        import flashinfer

        case, device = data.case, data.q.device
        per_request = data.page_indices.shape[1]
        indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * per_request
        last = torch.full(
            (case.batch,), case.kv_len - (per_request - 1) * case.page_size, dtype=torch.int32, device=device
        )
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        indices = data.page_indices.flatten()
        heads = (case.q_heads, case.kv_heads, case.head_dim)
        pages = (data.k_pages, data.v_pages)
        if case.layout == "HND":  # it wants the memory's own order
            pages = (data.k_pages.transpose(1, 2), data.v_pages.transpose(1, 2))
        dtype = data.q.dtype
        if case.q_len == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, case.layout, use_tensor_cores=True
            )
            wrapper.plan(indptr, indices, last, *heads, case.page_size, q_data_type=dtype, kv_data_type=dtype)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, case.layout)
            wrapper.plan(
                data.qo_indptr, indptr, indices, last, *heads, case.page_size,
                causal=True, q_data_type=dtype, kv_data_type=dtype,
            )  # fmt: skip
        return Prepared(lambda: wrapper.run(data.q, pages), lambda out: (out, None))


def peers() -> list[Any]:
    """All, those of torch first."""
    return [
        Sdpa(SDPBackend.FLASH_ATTENTION, "flash"),
        Sdpa(SDPBackend.FLASH_ATTENTION, "flash", packed=True),
        Sdpa(SDPBackend.CUDNN_ATTENTION, "cudnn"),
        Sdpa(SDPBackend.EFFICIENT_ATTENTION, "efficient", packed=True),
        Flex(),
        FlashAttention3(),
        FlashInfer(),
    ]


def versions() -> dict[str, str]:
    """Versions of what is installed of the peers."""
    found = {}
    for package in (
        "torch",
        "triton",
        "fa3-fwd",
        "flashinfer-python",
        "nvidia-cudnn-cu13",
        "flash-linear-attention",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
