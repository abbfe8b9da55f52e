"""`kvk.explain` and `python -m kvk explain`: how a call would be done, and what bounds it on this machine."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvk.costs import COSTS, Cost

# Compute capability, multiprocessors, shared memory a block may have: one card for each architecture.
CARDS = {
    "sm_80": (80, 108, 166912),  # A100
    "sm_86": (86, 84, 101376),  # A40
    "sm_89": (89, 142, 101376),  # L40S
    "sm_90a": (90, 132, 232448),  # H100, H200
    "sm_100a": (100, 148, 232448),  # B200
    "sm_120a": (120, 170, 101376),  # RTX 5090
}
_PASSES = 4
_BYTES = 1 << 28


@cache
def ceilings(device: str = "cpu") -> dict[str, float]:
    """What this machine reaches, the best of a few passes with torch's threads or on the card; measured once a process.

    Returns:
        "read" and "copy" in bytes/s (a copy's reads and writes both count), and "arithmetic" in FLOP/s: a matrix
        product of float32 on the CPU, of bfloat16 on a card. `python -m kvk bench` measures longer.
    """
    x = torch.ones(_BYTES // 4, device=device)
    y = torch.empty_like(x)
    on_card = device != "cpu"
    n = 8192 if on_card else 1024
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if on_card else torch.float32)
    product = torch.empty_like(a)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(_PASSES):
            if on_card:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if on_card:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    with torch.no_grad():
        return {
            "read": _BYTES / best(x.sum),
            "copy": 2 * _BYTES / best(lambda: y.copy_(x)),
            "arithmetic": 2 * n**3 / best(lambda: torch.mm(a, a, out=product)),
        }


@dataclass(frozen=True)
class Explanation:
    """What kvk.explain found; str() of it is the text that `python -m kvk explain` prints.

    Attributes:
        op: its name. device: "cpu", "cuda:0", or the card that was asked for.
        steps: a dict for each thing that the call would do: "attention" (the CPU's plan over pages), "grid" (a pass
            over ordinary tensors), "chunks" (lightning attention), "loop" (other work cut for the CPU's threads) or
            "launch" (a kernel on a card).
        cost: the least bytes and FLOPs; None for an op that kvk.costs does not know.
        ceilings: as ceilings(); empty if none were asked for, or the card is not here.
    """

    op: str
    device: str
    steps: tuple[dict[str, Any], ...]
    cost: Cost | None
    ceilings: dict[str, float]

    @property
    def seconds(self) -> float | None:
        """No call can take less here: the longer of moving the bytes and computing the FLOPs."""
        if self.cost is None or not self.ceilings:
            return None
        return max(
            self.cost.bytes / self.ceilings[self.cost.ceiling], self.cost.flops / self.ceilings["arithmetic"]
        )

    @property
    def bound(self) -> str | None:
        """Which of the two: "read", "copy" or "arithmetic"."""
        if self.cost is None or self.seconds is None:
            return None
        memory = self.cost.bytes / self.ceilings[self.cost.ceiling]
        return self.cost.ceiling if memory >= self.seconds else "arithmetic"

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}", *("  " + _step_text(step) for step in self.steps)]
        if not self.steps:
            lines.append("  nothing to do")
        if self.cost is not None:
            flops = f", {_scaled(self.cost.flops)}FLOP" if self.cost.flops else ""
            intensity = f" ({self.cost.flops / self.cost.bytes:.1f} FLOP/byte)" if self.cost.flops else ""
            lines.append(f"  at least {_scaled(self.cost.bytes)}B{flops}{intensity}")
        if self.seconds is not None:
            rate = self.ceilings[self.bound or ""]
            unit = "FLOP/s" if self.bound == "arithmetic" else "B/s"
            lines.append(
                f"  bound by {self.bound} ({_scaled(rate)}{unit} here): {_scaled(self.seconds)}s at the least"
            )
        return "\n".join(lines)


def _scaled(x: float) -> str:
    for factor, prefix in (
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1.0, ""),
        (1e-3, "m"),
        (1e-6, "u"),
    ):
        if x >= factor:
            return f"{x / factor:.3g} {prefix}"
    return f"{x * 1e9:.3g} n" if x else "0 "


def _attention_text(s: dict[str, Any]) -> str:
    kinds = []
    if s["stream_tiles"]:
        keys = f"blocks of {s['block_keys']} keys, split every {s['stream_split_keys']}"
        kinds.append(f"{s['stream_tiles']} tiles straight over the pages ({keys})")
    if s["panel_tiles"]:
        kinds.append(
            f"{s['panel_tiles']} tiles over unpacked panels (split every {s['panel_split_keys']} keys)"
        )
    return (
        f"{s['level']}, {s['workers']} threads: {' and '.join(kinds) or 'no tiles'}; "
        f"up to {s['rows_per_head']} rows and {s['heads_per_tile']} kv heads a tile, "
        f"{s['most_splits']} splits; {s['items']} items of work, "
        f"{_scaled(s['scratch_bytes'])}B a thread"
    )


def _step_text(s: dict[str, Any]) -> str:
    if s["step"] == "attention":
        return _attention_text(s)
    if s["step"] == "grid":
        return (
            f"{s['level']}, {s['workers']} threads: {s['pass']}, {s['tiles']} tiles of up to {s['rows_per_tile']} rows "
            f"against blocks of {s['block_columns']} columns, {_scaled(s['visited_pairs'])}pairs of row and column, "
            f"{_scaled(s['scratch_bytes'])}B a thread"
        )
    if s["step"] == "chunks":
        cut = f" in {s['slices']} slices of the columns of v" if s["slices"] > 1 else ""
        return (
            f"{s['level']}, {s['workers']} threads: {s['items']} items, each a head of a sequence{cut}, in chunks of "
            f"{s['chunk_tokens']} tokens, {_scaled(s['scratch_bytes'])}B a thread"
        )
    if s["step"] == "loop":
        return f"{s['level']}, {s['workers']} threads: {s['pieces']} pieces of work"
    return (
        f"{s['kernel'].replace('kvk::device::', '')}: {' x '.join(map(str, s['grid']))} blocks "
        f"of {s['threads']} threads, {_scaled(s['shared_bytes'])}B of shared memory"
    )


def _function(op: str) -> Callable[..., Any]:
    import kvk

    found = getattr(kvk, op, None) if op in kvk.__all__ else None
    if found is None and hasattr(torch.ops.kvk, op):
        found = getattr(torch.ops.kvk, op)
    if found is None:
        raise ValueError(f"kvk.explain: there is no op {op!r}")
    return found


def _bound_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    from kvk.formats import format_of

    if isinstance(function, torch._ops.OpOverloadPacket):
        names = [argument.name for argument in function.default._schema.arguments]
        found = {**dict(zip(names, args, strict=False)), **options}
    else:
        found = dict(inspect.signature(function).bind(*args, **options).arguments)
    if isinstance(found.get("fmt"), (list, tuple)):
        found["fmt"] = format_of(list(found["fmt"]))
    return found


def _device_of(arguments: dict[str, Any]) -> torch.device:
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            return value.device
    raise ValueError("kvk.explain: none of the arguments is a tensor")


def explain(
    op: str | Callable[..., Any], *args: Any, card: str | None = None, measure: bool = True, **options: Any
) -> Explanation:
    """Checks and plans a call as the op does, and runs nothing: no tensor is written.

    Args:
        op: "paged_decode" or kvk.paged_decode; args and options are the op's own.
        card: plan for a card of this architecture ("sm_80", "sm_90a", ...), as if the tensors lay there; needs none.
        measure: take the ceilings of this machine, a second the first time. Never for `card`.

    Raises:
        RuntimeError: the op refuses the arguments. ValueError: there is no such op, or no such card.
    """
    name, function = (op, _function(op)) if isinstance(op, str) else (op.__name__, op)
    if card is not None and card not in CARDS:
        raise ValueError(f"kvk.explain: card must be one of {', '.join(CARDS)}, got {card!r}")
    arguments = _bound_arguments(function, args, options)
    device = _device_of(arguments)
    torch.ops.kvk._explain_begin(*CARDS.get(card or "", (0, 0, 0)))
    try:
        with torch.no_grad():
            function(*args, **options)
    finally:
        steps = torch.ops.kvk._explain_end()
    cost = COSTS[name](arguments) if name in COSTS else None
    found = ceilings(str(device)) if measure and card is None else {}
    return Explanation(name, card or str(device), tuple(json.loads(steps)), cost, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Explains saved calls. Exit status 0; 1: the op refuses a call; 2: a file is no saved call."""
    from kvk.saved import SavedCallError, read_call

    parser = argparse.ArgumentParser(
        prog="python -m kvk explain", description="Say how calls that KVK_DUMP has saved would be done."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path)
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where the tensors lie (cpu)")
    parser.add_argument("--card", choices=CARDS, help="plan for a card that need not be here")
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure this machine")
    options = parser.parse_args(argv)
    for path in options.files:
        try:
            call = read_call(path)
            arguments = {**call.tensors(options.device), **call.plain()}
            op = getattr(torch.ops.kvk, call.op)
            print(explain(op, card=options.card, measure=not options.no_ceilings, **arguments))
        except (OSError, SavedCallError) as error:
            print(f"kvk explain: {error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            print(f"kvk explain: {str(error).splitlines()[0]}", file=sys.stderr)
            return 1
    return 0
