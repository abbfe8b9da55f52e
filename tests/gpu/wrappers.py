"""Whether the device half of the ptx:: wrappers is what a card has last run.

No machine without a card can check the text of the instructions, so results of a run on one carry a hash of it. The
tests' summary says when it has changed since (tests/conftest.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEVICE = ROOT / "include" / "kvk" / "device"
RESULTS = ROOT / "bench" / "results"
SCHEMA = "kvk-gpu-check-1"


def device_half(text: str) -> str:
    """A header without comments, blank lines and what only the emulator compiles."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    kept: list[str] = []
    # One entry for each open #if: whether the emulator's half ("then" or "else") is being left out; None: another #if.
    nesting: list[bool | None] = []
    for line in text.splitlines():
        words = line.split()
        directive = "".join(words[:1]) if line.lstrip().startswith("#") else ""
        if directive in ("#if", "#ifdef", "#ifndef"):
            condition = "".join(words[1:])
            known = {"KVK_EMULATOR": True, "!KVK_EMULATOR": False}
            nesting.append(known.get(condition))
            if condition in known:
                continue
        elif directive in ("#else", "#elif") and nesting and nesting[-1] is not None:
            if directive == "#elif":
                raise ValueError("#elif of a KVK_EMULATOR condition")
            nesting[-1] = not nesting[-1]
            continue
        elif directive == "#endif" and nesting.pop() is not None:
            continue
        if words and True not in nesting:
            kept.append(" ".join(words))
    return "\n".join(kept)


def wrappers_hash(folder: Path = DEVICE) -> str:
    """SHA-256 of the device half of ptx*.h."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("ptx*.h")):
        digest.update(f"{path.name}\n{device_half(path.read_text())}\n".encode())
    return digest.hexdigest()


def last_run(results: Path = RESULTS) -> dict[str, Any] | None:
    """The latest committed record of `make gpu-check` whose conformance tests passed; None: there is none."""
    runs = []
    for path in results.glob("gpu-*.json"):
        record = json.loads(path.read_text())
        if record.get("schema") != SCHEMA or record["dry_run"] or not record["card"]:
            continue
        if record["parts"].get("conformance", {}).get("status") == "passed":
            runs.append(record)
    return max(runs, key=lambda record: str(record["date"]), default=None)


def state_line(folder: Path = DEVICE, results: Path = RESULTS) -> str | None:
    """What to tell a reader of the tests' summary; None when the wrappers are those of the last run."""
    run = last_run(results)
    if run is None:
        return "ptx:: wrappers: never compared on a card (make gpu-check)"
    if run["wrappers_hash"] == wrappers_hash(folder):
        return None
    return (
        f"ptx:: wrappers: changed since they were last compared on a card ({run['card']}, {run['date'][:10]})"
    )
