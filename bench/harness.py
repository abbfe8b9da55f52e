"""Times implementations of one case against each other and against the machine, in alternating rounds.

A shared machine drifts by tens of percent within seconds, so figures taken one after the other say little.
Here every round times one pass of the row's ceiling, every peer and kvk in turn, and ratios are medians over
the rounds of the ratio inside a round. Results are checked against the fp64 reference before any timing.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bench.cases import Case, Data, WrongResultError
from bench.roofline import Ceilings

OURS = "kvk"
AnySeat = TypeVar("AnySeat")


@dataclass
class Prepared:
    """One implementation on one draw of data. run() does the work; result(what run gave) is the tuple that
    data.check wants, or None where there is nothing to compare (the trivial op of the call cost)."""

    run: Callable[[], Any]
    result: Callable[[Any], Any] | None


class Implementation(Protocol):
    """kvk or a peer."""

    name: str

    def unavailable(self, case: Case) -> str | None:
        """Why this case cannot be run here, or None."""

    def build(self, data: Any) -> Prepared:
        """Everything that may be done ahead: conversions, layouts, compilation. Not timed.

        data: what `make` of a case gives that is not unavailable."""


# The fixture of the benchmark files: times a case, records its row and returns it.
Measure = Callable[[Case, Sequence[Implementation]], dict[str, Any]]


@dataclass(frozen=True)
class Budget:
    """How long a row may take.

    rounds: of every implementation that is fast enough. turn: seconds of one timing, within which fast calls
    are repeated. slow: seconds an implementation may spend in all its turns; it gets two in any case."""

    rounds: int = 9
    turn: float = 0.02
    slow: float = 4.0


QUICK = Budget(rounds=5, turn=0.01, slow=1.0)
SHORT_CALL = 5e-3  # below this a first, untimed call wakes the threads
SETTLE = 3e-3  # between turns, for the spinning threads of the one before


def cache_bytes() -> int:
    """Size of the last-level cache of the first core, 32 MiB where the system does not say."""
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=32 << 20)


def busy_seconds() -> float | None:
    """CPU seconds that all processes of this machine, and its host in its place, have used since it started."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, interrupt, soft, steal = (int(field) for field in fields[:8])
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


class Disturbance:
    """How much of the machine others used since the start of this object."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = busy_seconds(), time.process_time(), time.perf_counter()

    def share(self) -> float | None:
        """Part of all cores' time, 0 to 1; None where the system does not say."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return None
        others = busy - self._busy - (time.process_time() - self._own)
        return max(0.0, others / ((time.perf_counter() - self._start) * (os.cpu_count() or 1)))


def rotated_copies(case: Case, cache: int) -> int:
    """How many draws to rotate through so that every call finds its data in memory and not in a cache."""
    if case.bandwidth is None:
        return 1
    wanted = min(4 * cache, 512 << 20)
    return max(1, math.ceil(wanted / case.bytes))


@dataclass
class Seat:
    """One implementation at the table: its functions, one for each draw, and its times."""

    name: str
    runs: Sequence[Callable[[], Any]]
    error: float
    estimate: float = 0.0
    calls: int = 1
    rounds: int = 1
    samples: dict[int, float] = field(default_factory=dict)  # round -> seconds per call
    _next: int = 0

    def plan(self, budget: Budget) -> None:
        """Estimates one call and settles how many make a turn and in how many rounds to take part."""
        self._once()
        start = time.perf_counter()
        self._once()
        self.estimate = max(time.perf_counter() - start, 1e-7)
        if self.estimate < 1e-3:  # too short for one look
            start = time.perf_counter()
            for _ in range(20):
                self._once()
            self.estimate = (time.perf_counter() - start) / 20
        self.calls = max(1, round(budget.turn / self.estimate))
        self.rounds = min(budget.rounds, max(2, int(budget.slow / (self.estimate * self.calls))))

    def _once(self) -> None:
        self.runs[self._next]()
        self._next = (self._next + 1) % len(self.runs)

    def settle(self) -> None:
        """Lets other implementations' threads go to sleep and wakes the own ones."""
        time.sleep(SETTLE)
        if self.estimate < SHORT_CALL:
            self._once()

    def turn(self, round_number: int) -> None:
        """One timed turn."""
        runs, n = self.runs, len(self.runs)
        order = [runs[(self._next + i) % n] for i in range(self.calls)]
        start = time.perf_counter()
        for run in order:
            run()
        self.samples[round_number] = (time.perf_counter() - start) / self.calls
        self._next = (self._next + self.calls) % n

    @property
    def median(self) -> float:
        """Median seconds per call over the rounds."""
        return statistics.median(self.samples.values())

    @property
    def least(self) -> float:
        """Seconds per call of the best round."""
        return min(self.samples.values())

    def summary(self) -> dict[str, float]:
        """Seconds per call, and how often it was looked at."""
        return {
            "median": self.median,
            "min": self.least,
            "rounds": len(self.samples),
            "calls": self.calls,
        }


def paired(above: dict[int, float], below: dict[int, float]) -> float:
    """Median over the rounds both took part in of above / below."""
    return statistics.median(above[r] / below[r] for r in above.keys() & below.keys())


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def admit(
    implementation: Any, case: Any, notes: dict[str, str], make: Callable[[], AnySeat]
) -> AnySeat | None:
    """The seat that make() gives, checked and ready to be timed. A peer that is absent, wrong or broken gets a note and
    None; kvk's failure of any kind is raised."""
    name, required = implementation.name, implementation.name == OURS
    reason = implementation.unavailable(case)
    if reason is not None:
        if required:
            raise RuntimeError(f"{case.op}: {reason}")
        notes[name] = reason
        return None
    try:
        return make()
    except WrongResultError as wrong:
        if required:
            raise WrongResultError(f"{case.op} {case.name}: {wrong}") from wrong
        notes[name] = f"wrong result: {wrong}"
    except Exception as failure:  # a peer's failure of any kind is a note in the table, never ours
        if required:
            raise
        notes[name] = f"failed: {first_line(failure)}"
    return None


class Measurement:
    """Builds, checks and times one case.

    `others()` then `ours()` make a round (pytest-benchmark: setup and target of a pedantic run), `row()` is
    the result. Raises WrongResultError when kvk is wrong; a peer that is wrong, broken or absent is left out
    with a note."""

    def __init__(
        self,
        case: Case,
        implementations: Iterable[Implementation],
        ceilings: Ceilings,
        budget: Budget,
        cache: int | None = None,
    ) -> None:
        self.case, self.ceilings, self.budget = case, ceilings, budget
        copies = rotated_copies(case, cache_bytes() if cache is None else cache)
        draws = [case.make(seed) for seed in range(copies)]
        self.notes: dict[str, str] = {}
        self.seats: list[Seat] = []
        for implementation in implementations:
            seat = self._seat(implementation, draws)
            if seat is not None:
                self.seats.append(seat)
        self.ours_seat = next(seat for seat in self.seats if seat.name == OURS)
        self.peers = [seat for seat in self.seats if seat is not self.ours_seat]
        self.kind = self._ceiling_kind()
        self.ceiling_samples: dict[int, float] = {}
        self.round = -1
        self.disturbance = Disturbance()

    def _seat(self, implementation: Implementation, draws: list[Data]) -> Seat | None:
        def make() -> Seat:
            prepared = [implementation.build(data) for data in draws]
            draws[0].reset()
            value = prepared[0].run()
            error = 0.0
            if prepared[0].result is not None:
                error = draws[0].check(prepared[0].result(value))
            seat = Seat(implementation.name, [p.run for p in prepared], error)
            seat.plan(self.budget)
            return seat

        return admit(implementation, self.case, self.notes, make)

    def _ceiling_kind(self) -> str | None:
        """What bounds this case on this machine: read or copy bandwidth, or the FMA rate, by the best passes of
        the run (a disturbed pass must not change the kind of a row)."""
        bandwidth = self.case.bandwidth
        if bandwidth is None:
            return None
        memory = self.case.bytes / self.ceilings.best(bandwidth)
        compute = self.case.flops / self.ceilings.best("fma")
        return "fma" if compute > memory else bandwidth

    def others(self) -> None:
        """Starts a round: the ceiling, then every peer still taking part. Leaves kvk ready to be timed."""
        self.round += 1
        if self.round == 0:
            gc.collect()
            self.disturbance = Disturbance()
        if self.kind is not None:
            time.sleep(SETTLE)
            self.ceiling_samples[self.round] = self.ceilings.measure(self.kind)
        for seat in self.peers:
            if self.round < seat.rounds:
                seat.settle()
                seat.turn(self.round)
        self.ours_seat.settle()

    def ours(self) -> None:
        """Ends a round: kvk."""
        self.ours_seat.turn(self.round)

    @property
    def rounds(self) -> int:
        """Rounds of this case."""
        return self.ours_seat.rounds

    def run(self) -> dict[str, Any]:
        """All rounds without pytest-benchmark, then the row."""
        for _ in range(self.rounds):
            self.others()
            self.ours()
        return self.row()

    def _times(self, seat: Seat) -> dict[str, Any]:
        case, seconds = self.case, seat.median
        times: dict[str, Any] = {
            "seconds": seat.summary(),
            "gb_s": case.bytes / seconds / 1e9,
            "gflop_s": case.flops / seconds / 1e9,
            "error": seat.error,
        }
        if self.kind is not None:
            work = case.flops if self.kind == "fma" else case.bytes
            rates = {r: work / s / 1e9 for r, s in seat.samples.items()}
            times["fraction"] = paired(rates, self.ceiling_samples)
            times["fraction_best"] = max(rates.values()) / max(self.ceiling_samples.values())
        return times

    def row(self) -> dict[str, Any]:
        """The finished row, ready for JSON: see docs/benchmarks.md for every field."""
        case, ours = self.case, self.ours_seat
        row: dict[str, Any] = {
            "op": case.op,
            "case": case.name,
            "headline": case.headline,
            "dtype": case.dtype,
            "bytes": case.bytes,
            "flops": case.flops,
            "bound": self.kind,
            "ceiling": None,
            **self._times(ours),
            "peers": {
                seat.name: {
                    **self._times(seat),
                    "ratio": paired(seat.samples, ours.samples),
                    "ratio_best": seat.least / ours.least,
                }
                for seat in self.peers
            },
            "notes": self.notes,
            "others_cpu": self.disturbance.share(),
        }
        if self.ceiling_samples:
            rates = list(self.ceiling_samples.values())
            row["ceiling"] = {"median": statistics.median(rates), "best": max(rates)}
        aim = getattr(case, "aim_us", None)
        if aim is not None:
            row["aim_us"] = aim
        return row
