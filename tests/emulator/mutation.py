#!/usr/bin/env python3
"""Mutation test of the emulator: kernels with a seeded defect must fail, under every schedule, in the race build.

Two kinds of defect. The toy kernels (kernels/toy_*.cuh) hold theirs, chosen by KVK_TOY_DEFECT, so one program
serves all. A defect of one of the library's kernels is a change of its text: `edits.py` lists them, and each is
compiled from a copy of the headers.

    mutation.py --build build/emulator [--toys] [--edits] [--all-builds] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import edits

ROOT = Path(__file__).resolve().parents[2]
TOY_DEFECTS = {
    1: "nothing keeps the next load off the stage that is read",
    2: "no barrier after the wait for cp.async",
    3: "cp_async_wait waits for too little",
    4: "one element past a shared array",
    5: "two words of a fragment swapped",
    6: "the tail of the last page is not masked",
    7: "a full-mask shuffle under a divergent condition",
    8: "stale rows of the last page are read",
    9: "a 16-byte store at an 8-byte boundary",
    10: "a barrier in a divergent branch",
    11: "the page table is read past its end",
    12: "no barrier between the store of Q and its loads",
    13: "no empty group after the last load",
    14: "padding rows are never written",
    15: "no barrier before the merge",
    30: "a lane exits before a shuffle",
    31: "a shuffle in both arms of a branch",
    40: "the last wgmma group is never waited for",
    41: "no wgmma.fence",
    42: "wrong parity of an mbarrier",
    43: "wrong byte count of an mbarrier",
    44: "a tensor map without the swizzle",
    45: "a stage released before wgmma has read it",
    46: "wrong stride in a matrix descriptor",
    47: "no barrier after the mbarriers' initialisation",
    48: "no wait for a full stage",
    49: "no fence.proxy.async between stores and wgmma",
}
SCHEDULES = {
    "in order, late": {},
    "reverse, early": {"KVK_EMU_ORDER": "reverse", "KVK_EMU_ASYNC": "early"},
    "random, mixed": {"KVK_EMU_ORDER": "random", "KVK_EMU_ASYNC": "mixed", "KVK_EMU_SEED": "3"},
}
BUILDS = ("plain", "asan", "race")


@dataclass
class Outcome:
    """What one run of a program with a seeded defect came to; `found` is None when the program passed."""

    found: str | None
    message: str


def classify(output: str, status: int) -> Outcome:
    """Names what made a program fail: the emulator's kind of error, a sanitizer, or the reference."""
    for pattern, prefix in (
        (r"\[emulator:([a-z-]+)\][^\n]*", ""),
        (r"AddressSanitizer: ([\w-]+)[^\n]*", "ASan "),
        (r"runtime error: ((?:[a-z]+ ){0,3})[^\n]*", "UBSan "),
    ):
        match = re.search(pattern, output)
        if match:
            return Outcome(prefix + match.group(1).strip(), match.group(0))
    if status == 0:
        return Outcome(None, "")
    if status < 0:
        return Outcome(f"signal {-status}", "")
    return Outcome("reference", "".join(re.findall(r"FAIL[^\n]*", output)[:1]))


def run(program: Path, environment: dict[str, str]) -> Outcome:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("KVK_")}
    try:
        done = subprocess.run(
            [str(program)], capture_output=True, text=True, timeout=120, env={**clean, **environment}
        )
    except subprocess.TimeoutExpired:
        return Outcome("timeout", "")
    return classify(done.stdout + done.stderr, done.returncode)


def report(name: str, outcomes: dict[str, Outcome], verbose: bool) -> bool:
    """Prints one line for a defect; true when every schedule found it."""
    caught = all(outcome.found for outcome in outcomes.values())
    kinds = sorted({outcome.found or "NOT FOUND" for outcome in outcomes.values()})
    print(f"{'caught' if caught else 'MISSED'}  {name}: {', '.join(kinds)}", flush=True)
    if verbose:
        for message in sorted({outcome.message for outcome in outcomes.values() if outcome.message}):
            print(f"        {message}")
    return caught


def check_toys(build: Path, builds: tuple[str, ...], jobs: int, verbose: bool) -> int:
    """Runs every toy defect; returns how many the race build missed."""
    missed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for mode in builds:
            program = build / f"emulator_toys_{mode}"
            clean = run(program, {})
            if clean.found:
                print(f"the toy kernels fail without a defect: {clean}")
                return 1
            jobs_of = {
                defect: {
                    name: pool.submit(run, program, {**schedule, "KVK_TOY_DEFECT": str(defect)})
                    for name, schedule in SCHEDULES.items()
                }
                for defect in TOY_DEFECTS
            }
            for defect, futures in jobs_of.items():
                outcomes = {name: future.result() for name, future in futures.items()}
                caught = report(f"{mode} toy {defect}, {TOY_DEFECTS[defect]}", outcomes, verbose)
                missed += not caught and mode == "race"
    return missed


def includes(command: list[str], build: Path, header: str) -> bool:
    """Whether what the command compiles includes the header."""
    words = [*command, "-M", "-MF", "-"]
    del words[words.index("-o") : words.index("-o") + 2]
    done = subprocess.run(words, cwd=build, capture_output=True, text=True, check=True)
    return any(path.endswith(f"/include/{header}") for path in done.stdout.split())


def compile_commands(build: Path, edit: edits.Edit, copy: Path, out: Path) -> list[list[str]]:
    """The race build's own commands for the edit's program, with the copied headers first; its objects that the edit
    leaves as they are stay."""
    entries = json.loads((build / "compile_commands.json").read_text())
    commands: list[list[str]] = []
    objects: list[str] = []
    for entry in entries:
        if f"emulator_{edit.test}_race.dir/" not in entry["command"]:
            continue
        words = shlex.split(entry["command"])
        at = words.index("-o") + 1
        if not includes(words, build, edit.header):
            objects.append(words[at])
            continue
        words[at] = str(out / (Path(entry["file"]).name + ".o"))
        objects.append(words[at])
        commands.append([words[0], f"-I{copy}", *words[1:]])
    if not commands:
        raise SystemExit(
            f"{edit.name}: no emulator test {edit.test} of {edit.header} with a race build in {build}"
        )
    objects += (build / f"emulator_{edit.test}_race.objects").read_text().split()
    objects.append(str(build / "kvk_emulator_race.o"))
    link = [commands[0][0], "-fsanitize=undefined", *objects, "-ldl", "-o", str(out / "program")]
    return [*commands, link]


def check_edit(build: Path, edit: edits.Edit) -> dict[str, Outcome]:
    """Compiles a program with one edited header and runs it."""
    with tempfile.TemporaryDirectory() as folder:
        copy, out = Path(folder) / "include", Path(folder) / "out"
        out.mkdir()
        shutil.copytree(ROOT / "include", copy)
        path = copy / edit.header
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise SystemExit(
                f"{edit.name}: its text occurs {text.count(edit.old)} times in {edit.header}, wanted once"
            )
        path.write_text(text.replace(edit.old, edit.new))
        for command in compile_commands(build, edit, copy, out):
            done = subprocess.run(command, cwd=build, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{edit.name} does not compile:\n{done.stderr[-2000:]}")
        schedules = edit.schedules or SCHEDULES
        return {
            name: run(out / "program", {"KVK_EMU_STOP": "1", **schedule, **edit.environment})
            for name, schedule in schedules.items()
        }


def check_edits(build: Path, jobs: int, verbose: bool) -> int:
    """Runs every edit of the library's kernels; returns how many were missed."""
    missed = 0
    with ThreadPoolExecutor(jobs) as pool:
        futures = [(edit, pool.submit(check_edit, build, edit)) for edit in edits.EDITS]
        for edit, future in futures:
            missed += not report(f"race {edit.header}: {edit.name}", future.result(), verbose)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "emulator", help="folder of the built emulator"
    )
    parser.add_argument("--toys", action="store_true", help="only the toy kernels' defects")
    parser.add_argument("--edits", action="store_true", help="only the edits of the library's kernels")
    parser.add_argument("--all-builds", action="store_true", help="the toys in the plain and ASan builds too")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="print the messages")
    args = parser.parse_args()
    both = not args.toys and not args.edits
    start, missed = time.monotonic(), 0
    if args.toys or both:
        missed += check_toys(args.build, BUILDS if args.all_builds else ("race",), args.jobs, args.verbose)
    if args.edits or both:
        missed += check_edits(args.build, args.jobs, args.verbose)
    print(f"{missed} missed, {time.monotonic() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
