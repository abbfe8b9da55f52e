"""Prompts through an attention of one's own, everything else through kvk's: `register_prefill`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvk.integrations.transformers import kvk_attention, refuse_unsupported
from kvk.integrations.transformers_cache import PagedKV
from kvk.integrations.transformers_masks import KvkMask, kvk_mask

# (layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], softmax scale or None) -> out [T, Hq, Dv], causal
Prefill = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    said = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def _sees_all_before(mask: KvkMask | torch.Tensor) -> bool:
    return isinstance(mask, KvkMask) and mask.causal and mask.elements is None and mask.window_left == -1


def register_prefill(name: str, prefill: Prefill) -> None:
    """Make `name` an attention implementation of transformers that puts whole prompts through `prefill`.

        register_prefill("mine", prefill)
        model.set_attn_implementation("mine")

    A whole prompt is a forward pass over all keys there are, causal and of more than one token. Its tokens are stored
    in a `KvkCache` as ever. What comes later (decoding, more chunks of a prompt), and prompts of layers with a window,
    a soft cap, sinks or a mask of one's own, go through `kvk_attention`.

    Args:
        prefill: called for each layer and row of the batch, padding left out, as
            `prefill(layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], scale)`; returns out [T, Hq, Dv].
    """

    @torch.compiler.disable
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | PagedKV,
        value: torch.Tensor | PagedKV,
        attention_mask: KvkMask | torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        refuse_unsupported(query, dropout, kwargs)
        columns = key.columns if isinstance(key, PagedKV) else key.shape[2]
        mask = KvkMask(causal=_is_causal(module, kwargs)) if attention_mask is None else attention_mask
        scores = any(kwargs.get(option) is not None for option in ("sliding_window", "softcap", "s_aux"))
        if not 1 < query.shape[2] == columns or scores or not _sees_all_before(mask):
            return kvk_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        assert isinstance(mask, KvkMask)
        if isinstance(key, PagedKV):
            dense = key.fresh()
            key.store(mask)
        else:
            assert isinstance(value, torch.Tensor)
            dense = key, value
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        out = query.new_zeros(query.shape[0], columns, query.shape[1], dense[1].shape[-1])
        for row, (q, k, v) in enumerate(zip(query, *dense, strict=True)):
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
            if mask.padding is None:
                out[row] = prefill(layer, q, k, v, scaling)
            else:
                real = mask.padding.expand(len(query), -1)[row]
                out[row, real] = prefill(layer, q[real], k[real], v[real], scaling)
        return out, None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, kvk_mask)
