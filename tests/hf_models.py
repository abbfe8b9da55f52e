"""Small random models of transformers, and runs of them with one attention or another."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from kvk.integrations.transformers import KvkCache

VOCAB = 61
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # far from uniform logits, so that greedy choices are clear
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def tiny(kind: str = "Llama", **options: Any) -> Any:
    """A small random model of a kind, in eval mode; 6 query heads on 2 kv heads unless the options say otherwise."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def example_ids() -> torch.Tensor:
    """int64 [3, 13]"""
    return torch.randint(2, VOCAB, (3, 13), generator=torch.Generator().manual_seed(1))


def example_padding() -> torch.Tensor:
    """int64 [3, 13], rows of 8, 13 and 11 tokens, padded on the left."""
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[0, :5] = 0
    mask[2, :2] = 0
    return mask


def generate(model: Any, attention: str, ids: torch.Tensor, **options: Any) -> Any:
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


def assert_same(got: Any, want: Any, atol: float = 2e-4) -> None:
    """Equal tokens, close logits."""
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=atol, rtol=1e-4)


@torch.no_grad()
def logits(model: Any, attention: str, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    model.set_attn_implementation(attention)
    return model(ids, **inputs).logits


def prefilled(model: Any, ids: torch.Tensor, **options: Any) -> KvkCache:
    cache = KvkCache(page_size=4, **options)
    logits(model, "kvk", ids, past_key_values=cache)
    return cache
