"""What a run leaves behind: the machine, the versions, the commit, the ceilings and the rows, as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kvk.info import build_info

from bench.harness import cache_bytes
from bench.peers import versions
from bench.roofline import Ceilings

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """Short commit of the checkout, "+changes" where the tree differs from it, "unknown" outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def machine(threads: int, vector_bytes: int, build: dict[str, str]) -> dict[str, Any]:
    """The machine as it is used in this run."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "last_level_cache_bytes": cache_bytes(),
        "isa": {
            "kvk": build["cpu_level"],
            "torch": torch.backends.cpu.get_cpu_capability(),
            "ceilings": f"{8 * vector_bytes}-bit vectors",
        },
        "system": f"{platform.system()} {platform.machine()}",
    }


@dataclass
class Run:
    """Collects the rows of one run. What it says of the machine and the library is asked at its start."""

    ceilings: Ceilings
    quick: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    build: dict[str, str] = field(default_factory=build_info)
    commit: str = field(default_factory=git_commit)

    def as_json(self) -> dict[str, Any]:
        """The whole run; docs/benchmarks.md describes the fields."""
        import kvk

        return {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": self.commit,
            "quick": self.quick,
            "machine": machine(self.ceilings.threads, self.ceilings.vector_bytes, self.build),
            "kvk_build": self.build,
            "versions": {"kvk": kvk.__version__, "python": platform.python_version(), **versions()},
            "ceilings": self.ceilings.as_json(),
            "rows": self.rows,
        }


def write_json(path: Path, run: dict[str, Any]) -> None:
    """Writes a run, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a run; ValueError when it is of another schema."""
    run: dict[str, Any] = json.loads(path.read_text())
    if run.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {run.get('schema')!r}, this version reads {SCHEMA}")
    return run
