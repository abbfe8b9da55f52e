"""`python -m kvk demo`: does the paged cache give the same model, and what does it cost?"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvk.demo.measure import Agreement, CacheConfig, Result, compare, run
from kvk.demo.model import DemoUnavailable, converted_model, load, require
from kvk.demo.text import Workload, make_workload, read_text

PAGE_SIZE = 16


def cache_configs(model: Any, calibration: torch.Tensor) -> list[CacheConfig]:
    """The rows of the table. The first is the reference that the others are compared with.

    Args:
        model: what they run.
        calibration: int64 [1, C], tokens that no row is judged by; RotateKV orders its channels with them.
    """
    from transformers import DynamicCache

    from kvk.integrations.transformers import KvkCache
    from kvk.recipes.kivi import kivi_cache
    from kvk.recipes.mustafar import mustafar_cache
    from kvk.recipes.rotated_int4 import rotated_int4_cache
    from kvk.recipes.rotatekv import calibrate, rotatekv_cache

    def spread_dense(cache: Any, batch: int) -> Any:
        cache.batch_repeat_interleave(batch)  # a dense cache copies the prefix for each request
        return cache

    def dense_bytes(cache: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def spread_paged(cache: Any, batch: int) -> Any:
        return cache.fork(batch)

    def paged_bytes(cache: Any) -> int:
        cache.pack()  # the last step's pages, so that what is shown is what the requests need
        return int(cache.nbytes)

    def paged(name: str, dtype: torch.dtype, max_error: float) -> CacheConfig:
        def new_cache() -> KvkCache:
            return KvkCache(page_size=PAGE_SIZE, dtype=dtype)

        return CacheConfig(name, "kvk", new_cache, spread_paged, paged_bytes, max_error=max_error)

    def packed(name: str, new_cache: Callable[[], KvkCache], max_loss: float) -> CacheConfig:
        return CacheConfig(name, "kvk", new_cache, spread_paged, paged_bytes, max_loss=max_loss)

    @functools.cache
    def order() -> list[torch.Tensor]:
        return calibrate(model, calibration)

    return [
        CacheConfig("torch sdpa f32", "sdpa", DynamicCache, spread_dense, dense_bytes),
        # f32 sums in another order: 2e-6 of the largest logit after 30 layers.
        paged("kvk f32", torch.float32, 2e-5),
        # q, K and V rounded to 8 significant bits in every layer: 8e-3 of the largest logit.
        paged("kvk bf16", torch.bfloat16, 2e-2),
        # On the default text: KIVI 0.998 and 1.146 times torch's perplexity, rotated int4 1.007, RotateKV 1.054,
        # Mustafar 1.006 and 1.024. bench/perplexity.py, which prefills 64 tokens at a time, gives 1.002 and 1.20 for
        # KIVI, 1.012 for rotated int4.
        packed("KIVI 4 bit", lambda: kivi_cache(4, dtype=torch.bfloat16), 1.02),
        packed("KIVI 2 bit", lambda: kivi_cache(2, dtype=torch.bfloat16), 1.2),
        packed("rotated int4", lambda: rotated_int4_cache(dtype=torch.bfloat16), 1.04),
        packed("RotateKV 2 bit", lambda: rotatekv_cache(model, order(), 2, dtype=torch.bfloat16), 1.08),
        packed("Mustafar 50%", lambda: mustafar_cache(0.5), 1.03),
        packed("Mustafar 70%", lambda: mustafar_cache(0.7), 1.05),
    ]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kvk demo",
        description="Runs SmolLM2-135M over a real text through kvk's paged cache (append, prefill in chunks, a batch "
        "of requests of different lengths that share a prefix, decode), checks it against plain torch attention and "
        "shows what each costs. Exit code 1: the results do not agree; 2: something is missing, the text says what.",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="a long text in UTF-8 (default: Python's own help texts)"
    )
    parser.add_argument(
        "--model", metavar="DIR", type=Path, help="a transformers folder with a Llama-type model"
    )
    parser.add_argument("--tokens", metavar="N", type=int, default=32, help="tokens to generate per request")
    parser.add_argument("--quick", action="store_true", help="a short prefix and few tokens")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error("--tokens must be at least 1")
    return args


def _table(results: list[Result], agreements: list[Agreement | None]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)  # fits 80 columns
    table.add_column("cache", no_wrap=True)
    for heading in (
        "memory\nMiB",
        "KiB/\ntoken",
        "prefill\ntokens/s",
        "decode\ntokens/s",
        "perpl-\nexity",
        "largest\nerror",
        "same\ntoken",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result, agreement in zip(results, agreements, strict=True):
        compared = ["", ""]
        if agreement is not None:
            compared = [f"{agreement.max_error:.2g}", f"{agreement.same_choice}/{agreement.positions}"]
        table.add_row(
            result.config.name,
            f"{result.nbytes / 2**20:.1f}",
            f"{result.nbytes / 1024 / result.cached_tokens:.1f}",
            f"{result.rate('prefix', 'suffix'):.0f}",
            f"{result.rate('decode'):.1f}",
            f"{result.perplexity:.3f}",
            *compared,
        )
    return table


def _verdict(result: Result, agreement: Agreement) -> str:
    if agreement.max_loss is not None:
        words = "is as good as it should be" if agreement.ok else "LOSES MORE THAN IT SHOULD"
        return (
            f"{result.config.name} {words}: {agreement.loss:.3f} times torch's perplexity, allowed "
            f"{agreement.max_loss:g} times."
        )
    if agreement.ok:
        return (
            f"{result.config.name} agrees with torch: largest logit error {agreement.max_error:.2g}, allowed "
            f"{agreement.allowed:.2g}; greedy tokens are the same wherever torch's two best logits differ by "
            f"more than twice that ({agreement.decided} of {agreement.positions} positions)."
        )
    return (
        f"{result.config.name}: DOES NOT AGREE with torch: largest logit error {agreement.max_error:.3g}, allowed "
        f"{agreement.allowed:.3g}; {agreement.wrong} of {agreement.decided} clear greedy tokens differ."
    )


def _run_all(
    model: Any, workload: Workload, chunk: int, num_decode: int
) -> tuple[list[Result], list[Agreement | None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    results: list[Result] = []
    agreements: list[Agreement | None] = []
    total = workload.num_tokens + num_decode * workload.num_requests
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tokens"),
    )
    with torch.inference_mode():
        model(
            workload.prefix[:, :16], use_cache=False
        )  # so that the first row does not pay for the first use
    with Progress(*columns, TimeElapsedColumn()) as progress:
        configs = cache_configs(model, workload.calibration)
        tasks = [progress.add_task(config.name, total=total, start=False) for config in configs]
        for config, task in zip(configs, tasks, strict=True):
            progress.start_task(task)
            result = run(
                model,
                config,
                workload,
                chunk=chunk,
                num_decode=num_decode,
                forced=results[0].generated if results else None,
                advance=lambda n, task=task: progress.advance(task, n),  # type: ignore[misc]
            )
            agreements.append(compare(result, results[0]) if results else None)
            if results:
                result.logits.clear()
            results.append(result)
    return results, agreements


def _demo(args: argparse.Namespace) -> int:
    require("transformers", "rich")
    import transformers
    from rich.console import Console

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(soft_wrap=True, highlight=False)
    start = time.perf_counter()
    text = read_text(args.text)
    folder = args.model or converted_model(console.print)
    model, tokenizer = load(folder)
    prefix, suffixes, chunk, shown = (
        (256, [8, 19, 40], 96, 2) if args.quick else (1536, [24, 57, 96, 160], 256, 1)
    )
    num_decode = min(args.tokens, 8) if args.quick else args.tokens
    workload = make_workload(tokenizer, text, prefix, suffixes)
    config = model.config
    console.print(
        f"{folder.name}: {config.num_hidden_layers} layers, {config.num_attention_heads} query heads on "
        f"{config.num_key_value_heads} kv heads, f32 weights; {torch.get_num_threads()} threads\n"
        f"{workload.num_requests} requests share a prefix of {prefix} tokens (prefilled {chunk} at a time) and go on "
        f"with {', '.join(map(str, suffixes))} tokens; then {num_decode} are decoded for each"
    )
    load_average, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load_average > 0.75 * cores:
        console.print(
            f"note: the machine is busy (load {load_average:.1f} on {cores} cores): slow, and the rates are low"
        )
    results, agreements = _run_all(model, workload, chunk, num_decode)
    console.print(_table(results, agreements))
    console.print(
        "First row: transformers' DynamicCache. memory: all bytes the cache holds at the end; per token: of every "
        "request's own tokens, so sharing the prefix counts; KIVI keeps each request's last 128 tokens in bf16. "
        "perplexity: of the prefix. error: over all logits, "
        "against the first row, whose tokens every row is fed."
    )
    failed = False
    for result, agreement in zip(results, agreements, strict=True):
        if agreement is not None:
            console.print(_verdict(result, agreement), style=None if agreement.ok else "bold red")
            failed = failed or not agreement.ok
    asked, answer = workload.suffixes[shown][-40:], results[1].generated[shown]
    console.print(
        f"\n{results[1].config.name} goes on after {tokenizer.decode(asked)!r}\n    with {tokenizer.decode(answer)!r}",
        markup=False,
    )
    console.print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0, 1 (results do not agree), 2 (something is missing)."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return _demo(args)
    except DemoUnavailable as error:
        print(f"kvk demo: {error}", file=sys.stderr)
        return 2
