"""Options and the `measure` fixture of the benchmarks; the tables come when the run ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench import picture, report
from bench.cases import Case
from bench.harness import OURS, QUICK, Budget, Implementation, Measure, Measurement
from bench.record import Run, write_json
from bench.roofline import Ceilings

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvk", "kvk benchmarks (python -m kvk bench sets these)")
    group.addoption("--kvk-quick", action="store_true", help="the short list of cases, fewer rounds")
    group.addoption("--kvk-json", metavar="FILE", type=Path, help="write the run as JSON")
    group.addoption("--kvk-plot", metavar="FILE", type=Path, help="draw the roofline picture (PNG)")
    group.addoption("--kvk-threads", metavar="N", type=int, default=0, help="threads of every implementation")
    group.addoption("--kvk-buffer-mib", metavar="N", type=int, default=1024, help="memory the ceilings read")
    group.addoption("--kvk-peers", metavar="WORDS", help="only peers named with one of these")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("kvk_quick"):
        return
    slow = [item for item in items if not cast(Any, item).callspec.params["case"].quick]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Run:
    """The run's record; the ceilings are surveyed before the first row."""
    threads = pytestconfig.getoption("kvk_threads") or torch.get_num_threads()
    torch.set_num_threads(threads)
    ceilings = Ceilings(threads, pytestconfig.getoption("kvk_buffer_mib") << 20)
    ceilings.survey()
    record = Run(ceilings, quick=pytestconfig.getoption("kvk_quick"))
    pytestconfig.stash[RUN] = record
    return record


def _chosen(words: str | None, implementation: Implementation) -> bool:
    if implementation.name == OURS or words is None:
        return True
    return any(word and word in implementation.name for word in words.split(","))


@pytest.fixture
def measure(request: pytest.FixtureRequest, run: Run, benchmark: Any) -> Measure:
    """measure(case, implementations) times a case through pytest-benchmark's pedantic mode: its setup is the
    peers' half of a round, its target kvk's."""

    def measured(case: Case, implementations: Sequence[Implementation]) -> dict[str, Any]:
        words = request.config.getoption("kvk_peers")
        taken = [i for i in implementations if _chosen(words, i)]
        measurement = Measurement(case, taken, run.ceilings, QUICK if run.quick else Budget())
        benchmark.group = case.op
        benchmark.extra_info["calls_per_round"] = measurement.ours_seat.calls
        benchmark.pedantic(measurement.ours, setup=measurement.others, rounds=measurement.rounds)
        row = measurement.row()
        run.rows.append(row)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(report.progress_line(row), flush=True)
        return row

    return measured


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots between the lines of the rows."""
    return ("passed", "", "") if report.when == "call" and report.passed else None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    record = config.stash.get(RUN, None)
    if record is None or not record.rows:
        return
    made = record.as_json()
    terminalreporter.ensure_newline()
    report.print_tables(made)
    for option, write in (("kvk_json", write_json), ("kvk_plot", picture.draw)):
        path = config.getoption(option)
        if path is not None:
            write(path, made)
            terminalreporter.write_line(f"wrote {path}")
