"""Perplexity of the demo's model over compressed caches: python bench/perplexity.py [--windows N] [--chunk TOKENS]

Windows of 1024 tokens of Python's help texts, prefilled in chunks of 64 tokens, so that a token reads its own chunk
dense and everything before it as the cache holds it; the first 128 tokens of a window are not scored. The table of
docs/compress-your-cache.md comes from here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from kvk.demo.model import converted_model, load
from kvk.demo.text import read_text
from kvk.integrations.transformers import KvkCache
from kvk.recipes.kivi import kivi_cache
from kvk.recipes.mustafar import mustafar_cache
from kvk.recipes.rotated_int4 import rotated_int4_cache

WINDOW, UNSCORED = 1024, 128

CACHES: dict[str, Callable[[], KvkCache]] = {
    "exact": KvkCache,
    "KIVI 4 bit": lambda: kivi_cache(4, tail=0, sinks=1),
    "KIVI 3 bit": lambda: kivi_cache(3, tail=0, sinks=1),
    "KIVI 2 bit": lambda: kivi_cache(2, tail=0, sinks=1),
    "KIVI 2 bit, no sinks": lambda: kivi_cache(2, tail=0),
    "KIVI 2 bit, no sinks, tail 128": lambda: kivi_cache(2),
    "rotated int4, no sinks": rotated_int4_cache,
    "rotated 2 bit, groups of 32": lambda: rotated_int4_cache(2, group=32, sinks=1),
    "Mustafar 50%, no sinks": lambda: mustafar_cache(0.5, tail=0),
    "Mustafar 70% (24 of 64), no sinks": lambda: mustafar_cache(0.7, tail=0),
    "Mustafar 75%, no sinks": lambda: mustafar_cache(0.75, tail=0),
    "Mustafar 50% rotated, no sinks": lambda: mustafar_cache(0.5, tail=0, rotated=True),
}


@torch.inference_mode()
def perplexity(
    model: torch.nn.Module, ids: torch.Tensor, new_cache: Callable[[], KvkCache], chunk: int
) -> float:
    """Over the rows of ids, int64 [windows, WINDOW]."""
    total = 0.0
    for row in ids:
        cache = new_cache()
        parts = [model(part[None], past_key_values=cache).logits[0] for part in row.split(chunk)]
        logits = torch.cat(parts)[UNSCORED:-1]
        total += torch.nn.functional.cross_entropy(logits, row[UNSCORED + 1 :]).item()
    return math.exp(total / len(ids))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=64)
    args = parser.parse_args()
    model, tokenizer = load(converted_model())
    model.set_attn_implementation("kvk")
    needed = args.windows * WINDOW
    ids = tokenizer(read_text(None)[: 8 * needed], return_tensors="pt").input_ids[0, :needed].view(-1, WINDOW)
    exact = 0.0
    for name, new_cache in CACHES.items():
        got = perplexity(model, ids, new_cache, args.chunk)
        exact = exact or got
        print(f"{name:32s} {got:8.3f} {got / exact:7.3f}", flush=True)


if __name__ == "__main__":
    main()
