"""What transformers' attention masks mean to kvk: padding, causality, a window, or bits per (query, key).

transformers describes a mask by a function of (batch, head, query, key) positions. The usual ones are read off it, so
that no [query, key] mask is ever made; any other is evaluated and handed to the kernel as bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask


@dataclass(frozen=True)
class KvkMask:
    """Which stored keys the new tokens of a batch see. All conditions hold together.

    "Columns" are transformers' positions in the padded batch; column 0 is the first key it knows of.
    """

    causal: bool = True
    window_left: int = -1  # a query sees this many keys before its own; -1: all
    padding: torch.Tensor | None = None  # bool [B, columns], False = padding; None: no padding anywhere
    elements: torch.Tensor | None = None  # bool [B or 1, 1, query columns, key columns], True = seen
    tells_padding: bool = True  # False: all new tokens are real, and nothing is said of earlier ones


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _read_pattern(mask_function: Callable[..., Any]) -> tuple[bool, int] | None:
    """(causal, window_left) of transformers' own causal, bidirectional and sliding masks, None of any other."""
    if mask_function is causal_mask_function:
        return True, -1
    if mask_function is bidirectional_mask_function:
        return False, -1
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return None
    parts = list(_closure(mask_function).get("mask_functions", ()))
    if len(parts) == 2 and causal_mask_function in parts:
        parts.remove(causal_mask_function)
        if parts[0].__qualname__ == "sliding_window_overlay.<locals>.inner_mask":
            return True, _closure(parts[0])["sliding_window"] - 1
    return None


def kvk_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> KvkMask:
    """The mask function transformers calls once a forward pass (`AttentionMaskInterface`), arguments as `sdpa_mask`.

    Raises ValueError for a static cache and for a 2-D attention_mask that does not cover every stored and new token.
    """
    pattern = _read_pattern(mask_function)
    causal = pattern is None or pattern[0]
    if isinstance(q_offset, torch.Tensor) or (causal and q_offset + q_length != kv_offset + kv_length):
        raise ValueError("kvk attention does not read static caches: use KvkCache or DynamicCache")
    padding = attention_mask
    if padding is not None:
        columns = kv_offset + kv_length
        if padding.shape[1] < columns:
            raise ValueError(
                f"kvk: attention_mask must cover all {columns} tokens, stored and new, got {padding.shape[1]} columns"
            )
        padding = padding[:, kv_offset:columns]
        if bool(padding.all()):
            padding = None
    if pattern is not None:
        return KvkMask(*pattern, padding=padding)
    elements = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    return KvkMask(causal=False, padding=padding, elements=elements)


def mask_from_tensor(mask: torch.Tensor, query: torch.Tensor, num_keys: int) -> KvkMask:
    """A caller's own mask [B or 1, 1, S, num_keys], bool (True = seen) or additive (0 or the dtype's lowest or -inf).

    Raises ValueError for any other shape, a mask per head, or real-valued biases, which bits cannot express.
    """
    batch, _, new, _ = query.shape
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or tuple(mask.shape[2:]) != (new, num_keys):
        raise ValueError(
            f"kvk: an attention mask of one's own must be [{batch} or 1, 1, {new}, {num_keys}], got {list(mask.shape)}"
        )
    if mask.shape[1] != 1:
        raise ValueError(f"kvk: an attention mask must be the same for all heads, got {mask.shape[1]} heads")
    if mask.dtype != torch.bool:
        seen = mask == 0
        hidden = mask == float("-inf")
        if mask.is_floating_point():
            hidden |= mask == torch.finfo(mask.dtype).min
        if not mask.is_floating_point() or not bool((seen | hidden).all()):
            raise ValueError(
                "kvk: an attention mask must be bool, or floating with only 0 and -inf (or the dtype's lowest value); "
                "other biases are not supported"
            )
        mask = seen
    return KvkMask(causal=False, elements=mask, tells_padding=False)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool [T, W] to int32 [T, ceil(W / 32)], bit j of a row = bit j % 32 of word j // 32."""
    tokens, width = mask.shape
    padded = torch.zeros(tokens, -(-width // 32) * 32, dtype=torch.uint8, device=mask.device)
    padded[:, :width] = mask
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    octets = (padded.view(tokens, -1, 8) * weights).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)
