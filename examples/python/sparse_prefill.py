"""Sparse attention for a long prompt of a real model: perplexity and time beside dense attention.

    make demo                                           # once: installs and converts the model
    .venv/bin/python examples/python/sparse_prefill.py [--tokens 8192] [--calibrate 8192] [--model FOLDER]

Heads get their patterns on one part of a text (`kvk.recipes`), and are judged on another. A transformers model runs the
prompt in one forward pass; only its attention differs from row to row.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from kvk.demo.model import converted_model, load
from kvk.demo.text import read_text
from kvk.recipes.duo_attention import choose_streaming_heads, register_duo_attention
from kvk.recipes.minference import AShape, choose_patterns, register_minference
from rich.console import Console
from rich.table import Table


@torch.inference_mode()
def score(model, attention: str, ids: torch.Tensor) -> tuple[float, float]:
    """(perplexity of the text, seconds of its layers) with this attention."""
    model.set_attn_implementation(attention)
    start = time.perf_counter()
    hidden = model.model(ids, use_cache=False).last_hidden_state[0]
    seconds = time.perf_counter() - start
    parts = zip(hidden[:-1].split(512), ids[0, 1:].split(512), strict=True)  # 49 thousand logits a token
    loss = sum(
        torch.nn.functional.cross_entropy(model.lm_head(part), target, reduction="sum").item()
        for part, target in parts
    )
    return math.exp(loss / (ids.shape[1] - 1)), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt")
    parser.add_argument("--calibrate", type=int, default=8192, help="tokens that patterns are chosen on")
    parser.add_argument("--model", type=Path, help="a folder of a Llama-type model; default: the demo's")
    options = parser.parse_args()

    model, tokenizer = load(options.model or converted_model())
    text = tokenizer(read_text(None), return_tensors="pt", verbose=False).input_ids
    prompt, calibration = text[:, : options.tokens], text[:, options.tokens :][:, : options.calibrate]

    heads = model.config.num_attention_heads
    register_minference("A-shape", [[AShape(2, 14)] * heads] * model.config.num_hidden_layers)
    register_minference("MInference", choose_patterns(model, calibration))
    register_duo_attention("DuoAttention", choose_streaming_heads(model, calibration))

    table = Table("attention", "perplexity", "of dense", "layers, s", "times faster")
    score(model, "kvk", prompt[:, :256])  # what is done once
    dense, dense_seconds = score(model, "kvk", prompt)
    table.add_row("dense", f"{dense:.3f}", "", f"{dense_seconds:.1f}", "")
    for name in ("A-shape", "MInference", "DuoAttention"):
        value, seconds = score(model, name, prompt)
        row = f"{value:.3f}", f"{value / dense:.3f}", f"{seconds:.1f}", f"{dense_seconds / seconds:.2f}"
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
