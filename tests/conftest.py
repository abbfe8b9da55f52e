"""Hypothesis profiles, and what tests marked `gpu` need.

The default profile repeats the same examples on every run; KVK_HYPOTHESIS_PROFILE=soak draws new ones, and many.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.register_profile("soak", settings.get_profile("default"), derandomize=False, max_examples=3000)
settings.load_profile(os.environ.get("KVK_HYPOTHESIS_PROFILE", "default"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """All from this one place, so that the summary says it once, with their number."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no card: torch.cuda.is_available() is False (docs/cuda.md, Checks on a card)")


def pytest_terminal_summary(terminalreporter) -> None:
    """One line where tests were passed over for want of a card: do the wrappers still await a run on one?"""
    if any("no card:" in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])):
        sys.path.append(str(Path(__file__).parent / "gpu"))
        import wrappers

        line = wrappers.state_line()
        if line is not None:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest):
    """Where the CUDA ops run: the emulator everywhere, and the card where there is one."""
    from card import CudaCard, EmulatedCard

    return EmulatedCard() if request.param == "emulated" else CudaCard()


@pytest.fixture
def checked():
    """The emulator under KVK_CHECK=1."""
    from card import EmulatedCard

    card = EmulatedCard()
    card.ops._check_values(True)
    yield card
    card.ops._check_values(False)
