"""The device emulator and the kernels that run over it: one pytest test for each ctest test of tests/emulator.

The programs are built in build/emulator on first use. KVK_EMU_ORDER, KVK_EMU_ASYNC and KVK_EMU_SEED choose the
schedule of the tests that do not fix one (docs/emulator.md).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"


def tool(name: str) -> str:
    """A build tool, of this Python's environment before that of the system."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is needed to build the emulator"
    return found


def command(*words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command and shows what it said when it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    return done


@contextmanager
def one_process_at_a_time() -> Iterator[None]:
    """Keeps the workers of pytest-xdist from building in one folder at once."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cmake() -> str:
    """The cmake that configured the build, since another one would build everything anew; else the nearest."""
    cache = BUILD / "CMakeCache.txt"
    known = (
        re.search(r"^CMAKE_COMMAND:INTERNAL=(.*)$", cache.read_text(), re.MULTILINE)
        if cache.exists()
        else None
    )
    return known.group(1) if known and Path(known.group(1)).exists() else tool("cmake")


def configure() -> list[str]:
    """Configures the build; returns the names of the tests it has."""
    with one_process_at_a_time():
        fresh = not (BUILD / "CMakeCache.txt").exists()
        generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}") if fresh else ()
        command(cmake(), "-S", SOURCE, "-B", BUILD, *generator)
        listing = command(tool("ctest"), "--test-dir", BUILD, "--show-only=json-v1").stdout
    return [test["name"] for test in json.loads(listing)["tests"]]


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder with all programs built."""
    with one_process_at_a_time():
        command(cmake(), "--build", BUILD, "-j", str(min(4, os.cpu_count() or 1)))
    return BUILD


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ctest_name" in metafunc.fixturenames:
        metafunc.parametrize("ctest_name", configure())


def test_emulated(programs: Path, ctest_name: str) -> None:
    pattern = "^" + ctest_name.replace(".", r"\.") + "$"
    done = command(
        tool("ctest"), "--test-dir", programs, "-R", pattern, "--output-on-failure", "--no-tests=error"
    )
    assert "1 tests failed" not in done.stdout


@pytest.mark.parametrize("which", ["--toys", "--edits"])
def test_seeded_defects_are_caught(programs: Path, which: str) -> None:
    command(sys.executable, SOURCE / "mutation.py", "--build", programs, which)
