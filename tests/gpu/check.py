#!/usr/bin/env python3
"""Everything that only a card can show, in one call (`make gpu-check`; docs/cuda.md, "Checks on a card").

The parts are independent: one that fails or runs out of time does not stop the others. Without a card nothing runs,
unless --dry-run asks for what needs none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import parts  # noqa: E402
import wrappers  # noqa: E402
from parts import Part, Setting  # noqa: E402

ROOT = wrappers.ROOT
NO_CARD = "no card: torch.cuda.is_available() is False"

PARTS: dict[str, tuple[Callable[[Setting], Part], float]] = {
    "compile": (parts.compile_kernels, 150),
    "conformance": (parts.conformance, 90),
    "tests": (parts.tests, 300),
    "bench": (parts.bench, 240),
    "sanitizer": (parts.sanitizer, 240),
}


def card_facts() -> dict[str, Any]:
    """The card and the versions around it."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
        }
    try:
        from kvk import cuda

        found = cuda.info()
        facts["driver"] = found["driver"].get("cuda", found["driver"].get("error"))
        facts["nvrtc"] = found["nvrtc"].get("version", found["nvrtc"].get("error"))
        facts["device_sources"] = found["device_sources"]
    except (ImportError, OSError, RuntimeError) as error:
        facts["kvk"] = f"does not load: {error}"
    return facts


def markdown(record: dict[str, Any]) -> str:
    """The short table, and what the benchmarks say."""
    facts = record["facts"]
    where = facts.get("card", "no card")
    lines = [
        f"# kvk on {where}",
        "",
        f"{record['date']}, commit {record['commit']}"
        + "".join(
            f", {name} {facts[name]}" for name in ("torch", "cuda", "driver", "nvrtc") if name in facts
        ),
        "",
        "| part | result | seconds | |",
        "|---|---|---:|---|",
    ]
    for name, part in record["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {part['detail']} |")
    tables = [part["table"] for part in record["parts"].values() if part["table"]]
    return "\n".join([*lines, "", *tables]) + "\n"


def install_wheels(folder: Path, target: Path) -> None:
    """Peers that were carried along, for this run alone."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"gpu-check: no wheels in {folder}")
    flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), *wheels], check=True
    )


@dataclass
class Clock:
    """The time that is left of --total."""

    total: float
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.total - (time.monotonic() - self.start)


def run_parts(names: Sequence[str], setting: Setting, clock: Clock) -> dict[str, Part]:
    done: dict[str, Part] = {}
    for name in names:
        run, limit = PARTS[name]
        # A dry run may have to build the emulator, and wait for somebody who does.
        setting.limit = min(max(limit, 1200) if setting.dry_run else limit, clock.left() - 5)
        start = time.monotonic()
        if setting.limit < 10:
            part = Part("not run", "no time was left")
        else:
            print(f"== {name} (at most {setting.limit:.0f} s)", flush=True)
            try:
                part = run(setting)
            except Exception as error:  # a part's failure of any kind is its own
                part = Part(
                    "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
        part.seconds = time.monotonic() - start
        print(f"   {part.status}: {part.detail}", flush=True)
        done[name] = part
    return done


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="without a card: collect, compile, expect")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--total", type=float, default=3600, metavar="SECONDS", help="time for all parts")
    parser.add_argument("--output", type=Path, help="results (default: $OUT, else build/gpu-check)")
    parser.add_argument("--expect", type=Path, help="the emulator's answers, from an earlier --dry-run")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="peers to install for this run alone")
    parser.add_argument("--arch", default="sm_90a", help="what a dry run compiles for")
    options = parser.parse_args(argv)
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: no {', '.join(sorted(unknown))}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """0: every part passed; 1: one did not; 2: no card, or wrong options."""
    options = parse(argv)
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print(
            f"gpu-check: {NO_CARD}. Nothing was checked; --dry-run does what needs no card.", file=sys.stderr
        )
        return 2
    output = options.output or Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check")
    output.mkdir(parents=True, exist_ok=True)
    site = Path(tempfile.mkdtemp(prefix="kvk-wheels-"))
    try:
        if options.wheels:
            install_wheels(options.wheels, site)
        paths = [str(site), str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        if options.dry_run:  # what the caller prepends goes first: a build of his own
            paths = [os.environ.get("PYTHONPATH", ""), *paths[:-1]]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
        }
        sys.path[:0] = [path for path in paths if path]
        setting = Setting(output, options.dry_run, options.arch, options.expect, environment)
        done = run_parts(options.parts.split(","), setting, Clock(options.total))
    finally:
        shutil.rmtree(site, ignore_errors=True)
    facts = card_facts()
    record = {
        "schema": wrappers.SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": parts.git_commit(),
        "dry_run": options.dry_run,
        "card": facts.get("card"),
        "facts": facts,
        "wrappers_hash": wrappers.wrappers_hash(),
        "parts": {name: asdict(part) for name, part in done.items()},
    }
    (output / "gpu-check.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / "gpu-check.md").write_text(markdown(record))
    print("\n" + markdown(record))
    bad = [name for name, part in done.items() if part.status not in ("passed", "absent")]
    print(f"{output}/gpu-check.json, gpu-check.md" + (f"; not passed: {', '.join(bad)}" if bad else ""))
    if facts.get("card") and not bad:
        name = f"gpu-{facts['card'].lower().replace(' ', '-')}-{record['date'][:10]}.json"
        print(f"to keep it: cp {output}/gpu-check.json bench/results/{name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
