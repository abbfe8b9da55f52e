"""The device emulator and the kernels that run over it: one pytest test for each ctest test of tests/emulator.

The programs are built in build/emulator on first use. KVK_EMU_ORDER, KVK_EMU_ASYNC and KVK_EMU_SEED choose the
schedule of the tests that do not fix one (docs/emulator.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

import emulation
import pytest
from building import run, tool


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder with all programs built."""
    return emulation.build()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ctest_name" in metafunc.fixturenames:
        metafunc.parametrize("ctest_name", emulation.ctest_names())


def test_emulated(programs: Path, ctest_name: str) -> None:
    pattern = "^" + ctest_name.replace(".", r"\.") + "$"
    done = run(
        [tool("ctest"), "--test-dir", programs, "-R", pattern, "--output-on-failure", "--no-tests=error"]
    )
    assert "1 tests failed" not in done.stdout


@pytest.mark.parametrize("which", ["--toys", "--edits"])
def test_seeded_defects_are_caught(programs: Path, which: str) -> None:
    run([sys.executable, emulation.SOURCE / "mutation.py", "--build", programs, which], timeout=1800)
