"""RotateKV (Su et al., IJCAI 2025): keys of several heads rotated together before their rotary embedding, 2 to 4 bits.

    from kvk.recipes.rotatekv import calibrate, rotatekv_cache

    order = calibrate(model, calibration_ids)  # once for a model
    model.set_attn_implementation("kvk")
    model.generate(**inputs, past_key_values=rotatekv_cache(model, order, bits=2))

One Hadamard transform over the channels of `heads` kv heads spreads a key's outliers further than one over a head, and
before the rotary embedding they stand still, so that channels of like size can be put side by side, once for a model: a
per-token scale then fits them. Values are rotated head by head. The first page, the attention sinks, stays dense.

Where it departs from the paper's code: keys are rotated by the cache and not by way of the model's weights; sinks are
the first page in place of the 20 tokens with the largest activations; groups end at a head (there 128 of all channels);
2**bits - 1 levels at every width (there b*b - 1).
"""

# mypy: allow-subclassing-any
# (transformers' classes are Any to mypy where it is not installed)

from __future__ import annotations

from typing import Any

import torch

from kvk.formats.quant import QuantFormat
from kvk.integrations.transformers import KvkCache
from kvk.integrations.transformers_masks import KvkMask
from kvk.ops.hadamard import hadamard


def _shape(model: Any) -> tuple[int, int]:
    """(kv heads, head dim)"""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim


def rope_table(model: Any, max_len: int) -> torch.Tensor:
    """float32 [max_len, R]: cosines, then sines, of the model's rotary embedding at each position."""
    rotary = model.get_decoder().rotary_emb
    cosine, sine = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(max_len)[None])
    half = cosine.shape[-1] // 2
    return torch.cat([cosine[0, :, :half], sine[0, :, :half]], 1).contiguous()


@torch.no_grad()
def calibrate(
    model: Any, ids: torch.Tensor, *, heads: int | None = None, statistic: str = "sum"
) -> list[torch.Tensor]:
    """The order of each layer's rotated key channels, int32 [Hkv / heads, heads * D].

    Args:
        model: of the Llama type: `layer.self_attn.k_proj` makes the keys.
        ids: int64 [B, T], tokens of a typical text.
        heads: kv heads rotated together; None: all.
        statistic: what channels are sorted by: "sum", the signed sum over all tokens, as in the paper's code, or "max",
            the largest magnitude.

    Raises ValueError for another statistic.
    """
    if statistic not in ("sum", "max"):
        raise ValueError(f"statistic must be 'sum' or 'max', got {statistic!r}")
    num_heads, head_dim = _shape(model)
    width = (heads or num_heads) * head_dim
    seen: list[torch.Tensor] = []

    def look(module: Any, inputs: Any, keys: torch.Tensor) -> None:
        rotated = hadamard(keys.float().unflatten(-1, (-1, width))).flatten(0, 1)
        seen.append(rotated.sum(0) if statistic == "sum" else rotated.abs().amax(0))

    hooks = [layer.self_attn.k_proj.register_forward_hook(look) for layer in model.get_decoder().layers]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [channels.argsort(stable=True).int() for channels in seen]


class RotateKvCache(KvkCache):
    """See `rotatekv_cache`."""

    def __init__(self, rope: torch.Tensor, order: list[torch.Tensor], **options: Any) -> None:
        super().__init__(**options)
        self._rope, self._order = rope, order

    def _layer_options(self, layer: int) -> dict[str, torch.Tensor | None]:
        return {"k_permutation": self._order[layer], "k_rope": self._rope}

    def _twin(self) -> KvkCache:
        return RotateKvCache(self._rope, self._order, **self._options)

    def _store(self, layer: Any, key: torch.Tensor, value: torch.Tensor, mask: KvkMask) -> Any:
        """The model hands over keys with their rotary embedding: it is taken off again, by the opposite angles."""
        batch, _, columns, _ = key.shape
        first, last = layer.columns, layer.columns + columns
        if mask.padding is None:
            positions = torch.arange(first, last).expand(batch, -1)
        else:
            positions = (mask.padding.expand(batch, -1).long().cumsum(1) - 1).clamp_min(0)[:, first:last]
        if int(positions.max()) >= len(self._rope):
            raise ValueError(f"RotateKvCache was made for {len(self._rope)} tokens; give it a larger max_len")
        half = self._rope.shape[1] // 2
        cosine, sine = self._rope[positions][:, None].split(half, -1)
        a, b, rest = key.float().split([half, half, key.shape[-1] - 2 * half], -1)
        plain = torch.cat([a * cosine + b * sine, b * cosine - a * sine, rest], -1)
        return super()._store(layer, plain.to(key.dtype), value, mask)


def rotatekv_cache(
    model: Any,
    order: list[torch.Tensor],
    bits: int = 2,
    *,
    heads: int | None = None,
    group: int = 128,
    clip: float | None = None,
    page_size: int = 32,
    sinks: int = 1,
    tail: int = 0,
    max_len: int = 8192,
    **options: Any,
) -> RotateKvCache:
    """A transformers cache that stores K and V as RotateKV does.

    Args:
        model: of the Llama type; its rotary embedding is the half style over the whole head dim.
        order: of `calibrate`, with the same heads.
        bits: 2, 3, 4 or 8.
        heads: kv heads whose keys are rotated together; None: all.
        group: channels that share a scale; at most the head dim, which it divides.
        clip: the ends of a group are multiplied by it; None: 0.8 at 2 bits, 1 above.
        page_size, sinks, tail: tokens of a page; pages at the beginning and tokens at the end that stay dense.
        max_len: most tokens of a row.
        options: of `KvkCache`, for example max_pages, dtype.

    Raises ValueError with the first tokens if head dim and heads have no Hadamard matrix.
    """
    num_heads, _ = _shape(model)
    ratio = (0.8 if bits == 2 else 1.0) if clip is None else clip

    def new_format(layer: int, head_dim: int, head_dim_v: int) -> QuantFormat:
        return QuantFormat(
            page_size,
            head_dim,
            bits,
            bits,
            min(group, head_dim),
            min(group, head_dim_v),
            "token",
            "token",
            head_dim_v,
            k_clip=ratio,
            v_clip=ratio,
            k_rotate=heads or num_heads,
            v_rotate=1,
        )

    return RotateKvCache(
        rope_table(model, max_len),
        order,
        page_size=page_size,
        new_format=new_format,
        residual=tail,
        sinks=sinks,
        **options,
    )
