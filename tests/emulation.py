"""Building the device emulator and the programs that run over it (docs/emulator.md), in build/emulator."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
from building import ROOT, lock, run, tool

SOURCE = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"


def _cmake() -> str:
    """The cmake that configured the build, since another one would build everything anew; else the nearest."""
    cache = BUILD / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    known = re.search(r"^CMAKE_COMMAND:INTERNAL=(.*)$", text, re.MULTILINE)
    return known.group(1) if known and Path(known.group(1)).exists() else tool("cmake")


def _configure() -> None:
    fresh = not (BUILD / "CMakeCache.txt").exists()
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}") if fresh else ()
    include = Path(torch.__file__).parent / "include"
    run([_cmake(), "-S", SOURCE, "-B", BUILD, f"-DKVK_TORCH_INCLUDE={include}", *generator])


def ctest_names() -> list[str]:
    """The tests that ctest knows of."""
    with lock("emulator"):
        _configure()
        listing = run([tool("ctest"), "--test-dir", BUILD, "--show-only=json-v1"]).stdout
    return [test["name"] for test in json.loads(listing)["tests"]]


def build(*targets: str) -> Path:
    """Builds everything, or these targets; the build folder."""
    with lock("emulator"):
        _configure()
        named = ("--target", *targets) if targets else ()
        jobs = str(min(4, os.cpu_count() or 1))
        run([_cmake(), "--build", BUILD, "-j", jobs, *named], timeout=1800)
    return BUILD
