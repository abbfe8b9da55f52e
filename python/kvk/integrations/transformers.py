"""Hugging Face transformers: `attn_implementation="kvk"` and a paged `KvkCache`.

    import kvk.integrations.transformers as kvk_hf      # registers "kvk"

    model.set_attn_implementation("kvk")
    model.generate(**inputs, past_key_values=kvk_hf.KvkCache(page_size=16, max_pages=4096))

The cache stores K and V in pages and gives the model a handle in their place; the attention function reads the pages
through it, so no dense copy is made. Padding is mapped out: padded tokens are not stored. Inference only.
"""

from __future__ import annotations

from typing import Any

import torch

from kvk.ops.paged import paged_prefill

try:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        "kvk.integrations.transformers needs Hugging Face transformers 5 (5.17 or later is tested): "
        "pip install 'transformers>=5.17'"
    ) from error

from kvk.integrations.transformers_cache import KvkCache, PagedKV
from kvk.integrations.transformers_masks import KvkMask, kvk_mask, mask_from_tensor, pack_bits

__all__ = ["KvkCache", "kvk_attention", "kvk_mask", "register"]


def refuse_unsupported(query: torch.Tensor, dropout: float, kwargs: dict[str, Any]) -> None:
    """ValueError for what no attention of kvk can do for transformers."""
    if dropout:
        raise ValueError("kvk attention is for inference and has no dropout: call model.eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError(
            "kvk attention has no gradient: run the model under torch.no_grad() or inference_mode()"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            'kvk attention never forms the attention weights: use attn_implementation="eager" for them'
        )
    for name in ("position_bias", "cache", "cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            raise ValueError(f"kvk attention does not support the argument {name}")


@torch.compiler.disable
def kvk_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PagedKV,
    value: torch.Tensor | PagedKV,
    attention_mask: KvkMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls (`AttentionInterface`).

    Args:
        query: [B, Hq, S, D].
        key, value: handles of a `KvkCache`, or dense tensors [B, Hkv, L, D] (no cache, DynamicCache), read in place.
        attention_mask: what `kvk_mask` made, a caller's own 4-D mask, or None (causal unless the module says no).
        softcap, s_aux: soft cap of the scores and attention sinks [Hq], where the model has them.

    Returns (out [B, S, Hq, D], None); out is 0 for a token that is padding or sees no key.
    Raises ValueError for what kvk cannot do: dropout, gradients, attention weights, position biases, real-valued masks.
    """
    refuse_unsupported(query, dropout, kwargs)
    batch, heads, new, _ = query.shape
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if sliding_window is not None and not causal:
            raise ValueError("kvk attention has no two-sided window without a mask function")
        mask = KvkMask(causal=causal, window_left=-1 if sliding_window is None else sliding_window - 1)
    elif isinstance(attention_mask, torch.Tensor):
        num_keys = key.columns if isinstance(key, PagedKV) else key.shape[2]
        mask = mask_from_tensor(attention_mask, query, num_keys)
    else:
        mask = attention_mask
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "window_left": mask.window_left,
        "logits_soft_cap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.float(),
    }
    q = query.transpose(1, 2).reshape(batch * new, heads, -1)
    if isinstance(key, PagedKV):
        out = _paged_attention(q, key, mask, options)
    else:
        assert isinstance(value, torch.Tensor)
        out = _dense_attention(q, key, value, mask, options)
    return out.view(batch, new, heads, -1).to(query.dtype), None


def _paged_attention(
    q: torch.Tensor, handle: PagedKV, mask: KvkMask, options: dict[str, Any]
) -> torch.Tensor:
    """Store the new tokens, then attend; q [B * S, Hq, D], padding included, which gets 0."""
    under_way = handle.store(mask)
    pool, index = handle.cache.pool, handle.layer.index
    assert pool is not None and index is not None
    if mask.elements is not None:
        options["mask_bits"], options["mask_width"] = handle.cache.mask_bits(under_way, mask.elements)
    q = q.to(pool.layers[index].dtype)
    if under_way.kept is None:
        return pool.attend(index, q, under_way.step, causal=mask.causal, **options)[0]
    packed, _ = pool.attend(index, q[under_way.kept], under_way.step, causal=mask.causal, **options)
    out = packed.new_zeros(q.shape[0], *packed.shape[1:])
    out[under_way.kept] = packed
    return out


def _dense_attention(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: KvkMask, options: dict[str, Any]
) -> torch.Tensor:
    """Attention over dense K and V [B, Hkv, L, D]: each row is one page of L tokens, no copy is made."""
    batch, _, length, _ = key.shape
    if mask.padding is not None:
        hidden = ~mask.padding.expand(batch, length)
        options["key_bias"] = torch.zeros(batch, length, device=q.device).masked_fill_(hidden, float("-inf"))
    if mask.elements is not None:
        elements = mask.elements.expand(batch, -1, -1, length)
        options["mask_bits"], options["mask_width"] = pack_bits(elements.reshape(-1, length)), length
    rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    return paged_prefill(
        q,
        rows * (q.shape[0] // batch),
        key.transpose(1, 2),
        value.transpose(1, 2),
        rows[:batch, None],
        torch.full((batch,), length, dtype=torch.int32, device=q.device),
        causal=mask.causal,
        **options,
    )[0]


def register() -> None:
    """Make "kvk" an attention implementation of transformers. Importing this module does it."""
    AttentionInterface.register("kvk", kvk_attention)
    AttentionMaskInterface.register("kvk", kvk_mask)


register()
