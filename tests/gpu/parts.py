"""The parts of `make gpu-check`, each a function from the setting to a Part."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
EMULATOR_PROGRAM = ROOT / "build" / "emulator" / "emulator_conformance_plain"
KEPT_EXPECTATION = ROOT / "build" / "gpu-check" / "conformance.json"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_STATUS = 86


@dataclass
class Part:
    """status: passed, failed, "timed out", "not run", or absent (its tool is not on this machine)."""

    status: str
    detail: str
    numbers: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    seconds: float = 0.0


@dataclass
class Setting:
    """What every part is told. limit: the seconds it may take."""

    output: Path
    dry_run: bool
    arch: str
    expect: Path | None
    environment: Mapping[str, str]
    limit: float = 0.0


@dataclass(frozen=True)
class Done:
    """A finished command; status None: it ran out of time."""

    status: int | None
    text: str

    @property
    def last_line(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1]

    def verdict(self) -> str:
        return "timed out" if self.status is None else "passed" if self.status == 0 else "failed"


def run(
    setting: Setting, command: Sequence[str | Path], log: str, *, limit: float | None = None, **variables: str
) -> Done:
    """Runs a command of this Python's environment; its output goes to the log, of which the end is kept."""
    path = setting.output / log
    with open(path, "a+") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={**setting.environment, **variables},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None
        try:
            status = process.wait(timeout=setting.limit if limit is None else limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        file.seek(start)
        text = file.read()
    return Done(status, text)


def compile_kernels(setting: Setting) -> Part:
    """The default kernels, into the cache and onto the card; a dry run also compiles the wrappers' kernels."""
    archs = ["--arch", setting.arch] if setting.dry_run else []
    done = run(setting, [sys.executable, "-m", "kvk", "precompile", *archs], "compile.log")
    found = re.findall(r"^(\d+) kernels in ([\d.]+) s", done.text, re.MULTILINE)
    numbers = {"kernels": int(found[-1][0]), "compile_seconds": float(found[-1][1])} if found else {}
    detail = done.last_line
    spilling = len(re.findall(r" [1-9]\d* B spills", done.text))
    if spilling:  # the gate's NVRTC may be another
        numbers["spilling_kernels"] = spilling
        detail += f"; {spilling} spill with this NVRTC"
    if done.status == 0 and setting.dry_run:
        import conformance

        cases = expectation(setting)["cases"]
        names = [case["kernel"] for case in cases if conformance.runs_on(case["kernel"], setting.arch)]
        problems = conformance.compile_cases(names, setting.arch).problems()
        if problems:
            return Part("failed", "; ".join(problems), numbers)
        numbers["wrapper_kernels"] = len(names)
        detail += f"; {len(names)} kernels of the wrappers"
    return Part(done.verdict(), detail, numbers)


# ------------------------------------------------------------------------------------------------- conformance


def git_commit() -> str:
    """Of the checkout; else of the one that the carried answers were made in."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    kept = json.loads(KEPT_EXPECTATION.read_text()) if KEPT_EXPECTATION.exists() else {}
    return str(kept.get("commit", "unknown"))


def emulator_sources() -> str:
    """SHA-256 of what the emulator's answers are made from."""
    digest = hashlib.sha256()
    folders = (TESTS / "emulator", ROOT / "include" / "kvk" / "device")
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def expectation(setting: Setting) -> dict[str, Any]:
    """The emulator's answers: from a file that an earlier dry run left, or from the emulator itself.

    Raises:
        RuntimeError: there is neither, or the file is of other sources.
    """
    for path in filter(None, (setting.expect, KEPT_EXPECTATION if not setting.dry_run else None)):
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            if kept.get("sources") != emulator_sources():
                raise RuntimeError(f"{path} is of other sources: make gpu-check ARGS=--dry-run makes it anew")
            return kept
        if path == setting.expect:
            raise RuntimeError(f"{path} does not exist")
    program = EMULATOR_PROGRAM
    if setting.dry_run:
        import emulation

        program = emulation.build("emulator_conformance_plain") / EMULATOR_PROGRAM.name
    if not program.exists():
        raise RuntimeError(
            f"no answers of the emulator: neither {KEPT_EXPECTATION.relative_to(ROOT)} nor "
            f"{EMULATOR_PROGRAM.relative_to(ROOT)} is here (make gpu-check ARGS=--dry-run makes them)"
        )
    raw = setting.output / "emulator.json"
    done = run(setting, [program, "--json", raw], "conformance.log")
    if done.status != 0:
        raise RuntimeError(f"{program} failed: {done.last_line}")
    answers: dict[str, Any] = json.loads(raw.read_text())
    raw.unlink()
    return {"sources": emulator_sources(), "commit": git_commit(), **answers}


def conformance(setting: Setting) -> Part:
    """Every ptx:: wrapper on the card against the emulator."""
    answers = expectation(setting)
    cases = len(answers["cases"])
    if setting.dry_run:
        kept = setting.output / "conformance.json"
        kept.write_text(json.dumps(answers))
        return Part("passed", f"the emulator's answers of {cases} kernels are in {kept}", {"kernels": cases})
    expect, verdicts = setting.output / "expect.json", setting.output / "verdicts.json"
    expect.write_text(json.dumps(answers))
    script = Path(__file__).with_name("conformance.py")
    done = run(setting, [sys.executable, script, "--expect", expect, "--output", verdicts], "conformance.log")
    numbers = {"verdicts": json.loads(verdicts.read_text())} if verdicts.exists() else {}
    for path in (expect, verdicts):
        path.unlink(missing_ok=True)
    return Part(done.verdict(), done.last_line, numbers)


# ------------------------------------------------------------------------------------------------------- tests


def gpu_test_files() -> list[str]:
    names = ("test_cuda_ops*.py", "test_cuda_check.py", "test_gpu_*.py")
    return sorted(str(path.relative_to(ROOT)) for name in names for path in TESTS.glob(name))


def counts(junit: Path) -> dict[str, int]:
    """passed, failed, errors, skipped of a JUnit file."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in xml.etree.ElementTree.parse(junit).getroot().iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, "0"))
    bad = totals["failures"] + totals["errors"] + totals["skipped"]
    return {**totals, "passed": totals["tests"] - bad}


def tests(setting: Setting) -> Part:
    """pytest -m gpu; a dry run collects."""
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    if setting.dry_run:
        done = run(setting, [*pytest, "--collect-only", *gpu_test_files()], "tests.log")
        found = re.search(r"(\d+)(?:/\d+)? tests collected", done.text)
        number = int(found[1]) if found else 0
        return Part(done.verdict() if number else "failed", f"{number} tests collected", {"tests": number})
    junit = setting.output / "tests.xml"
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"] if find_spec("xdist") else []
    command = [*pytest, "-ra", "--tb=short", f"--junitxml={junit}", *workers, *gpu_test_files()]
    done = run(setting, command, "tests.log")
    if not junit.exists():
        return Part(done.verdict(), done.last_line)
    numbers = counts(junit)
    junit.unlink()
    status = done.verdict() if numbers["passed"] else "failed"
    return Part(
        status, ", ".join(f"{numbers[n]} {n}" for n in ("passed", "failures", "errors", "skipped")), numbers
    )


# --------------------------------------------------------------------------------------------------- sanitizer


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    folders = [str(Path(place) / "bin") for place in places if place]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def sanitize(setting: Setting, program: str, tool: str) -> tuple[str, str]:
    """(status, detail) of one tool over op_walk.py. Only kvk's kernels are watched: their inputs come by memcpy, which
    initcheck follows, and every tensor has an allocation of its own, so that memcheck sees its end."""
    walk = Path(__file__).with_name("op_walk.py")
    flags = [
        "--tool",
        tool,
        "--kernel-regex",
        "kns=_ZN3kvk6device",
        "--error-exitcode",
        str(SANITIZER_STATUS),
    ]
    command = [program, *flags, "--print-limit", "20", sys.executable, walk]
    done = run(setting, command, f"{tool}.part.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in done.text:
        return "absent", "the tool does not support this device"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: ([^\n]*)", done.text)
    right = "all right (cuda)" in done.text
    detail = summary[-1] if summary else done.last_line
    return done.verdict() if right or done.status is None else "failed", detail


def sanitizer(setting: Setting) -> Part:
    """compute-sanitizer's four tools, beside each other; a dry run walks through the ops over the emulator."""
    if setting.dry_run:
        walk = Path(__file__).with_name("op_walk.py")
        done = run(setting, [sys.executable, walk, "--emulated"], "sanitizer.log")
        return Part(done.verdict(), done.last_line)
    program = find_sanitizer()
    if program is None:
        return Part("absent", "compute-sanitizer is not here")
    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        results = dict(
            zip(SANITIZERS, pool.map(lambda tool: sanitize(setting, program, tool), SANITIZERS), strict=True)
        )
    with open(setting.output / "sanitizer.log", "a") as log:
        for tool in SANITIZERS:
            piece = setting.output / f"{tool}.part.log"
            log.write(piece.read_text())
            piece.unlink()
    found = {status for status, _ in results.values()}
    status = next((s for s in ("failed", "timed out", "absent") if s in found), "passed")
    detail = "; ".join(f"{tool} {status}: {detail}" for tool, (status, detail) in results.items())
    return Part(status, detail, {tool: status for tool, (status, _) in results.items()})


# ------------------------------------------------------------------------------------------------------- bench


BENCHES = ("paged", "quant", "sparse", "lightning", "linear", "grid")  # bench/bench_*_cuda.py


def bench(setting: Setting) -> Part:
    """The CUDA benchmarks with the peers that are here; a dry run lists them."""
    parts: dict[str, Part] = {}
    start = time.monotonic()
    for i, family in enumerate(BENCHES):
        command = [sys.executable, "-m", f"bench.bench_{family}_cuda"]
        if setting.dry_run:
            done = run(setting, [*command, "--list"], f"bench-{family}.log")
            parts[family] = Part(done.verdict(), done.last_line)
            continue
        written, table = setting.output / f"bench-{family}.json", setting.output / f"bench-{family}.md"
        left = setting.limit - 15 - (time.monotonic() - start)
        limit = max(5.0, left / (len(BENCHES) - i))
        arguments = ["--json", written, "--table", table, "--seconds", f"{limit:.0f}"]
        done = run(setting, [*command, *arguments], f"bench-{family}.log")
        numbers = json.loads(written.read_text()) if written.exists() else {}
        text = table.read_text() if table.exists() else ""
        for path in (written, table):
            path.unlink(missing_ok=True)
        parts[family] = Part(done.verdict(), done.last_line, numbers, text)
    verdicts = [part.status for part in parts.values()]
    status = next((verdict for verdict in verdicts if verdict != "passed"), "passed")
    detail = "; ".join(f"{family}: {part.detail}" for family, part in parts.items())
    numbers = {family: part.numbers for family, part in parts.items() if part.numbers}
    return Part(status, detail, numbers, "\n".join(part.table for part in parts.values() if part.table))
