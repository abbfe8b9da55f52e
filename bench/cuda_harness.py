"""Times implementations of one case on a card, in alternating rounds like harness.py, with events.

A turn is a CUDA graph of several calls, or the calls themselves where one cannot be captured, over draws of data that
together are larger than the L2 cache. Every round measures the row's ceiling again: the copy bandwidth, or the rate of
a large bf16 matrix product.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cuda_data import draw
from bench.harness import OURS, admit, paired

COPY_BYTES = 1 << 30
MATRIX_SIZE = 8192
MOST_DRAW_BYTES = 8 << 30


def timed(run: Callable[[], Any]) -> float:
    """Seconds of the card's time between two events around run()."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """A graph of run(), replayed once; None for what cannot be captured: it is timed call by call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            run()
            with torch.cuda.graph(graph, stream=stream):
                run()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # a peer may fail in any way; kvk's rows say whether theirs is a graph
        torch.cuda.synchronize()
        graph = None
    torch.cuda.current_stream().wait_stream(stream)
    return graph


class CudaCeilings:
    """copy: GB/s, bytes read plus bytes written. matrix: GFLOP/s of a bf16 product of random matrices."""

    def __init__(self, device: str = "cuda") -> None:
        half = COPY_BYTES // 2
        self._source = torch.randint(0, 255, (half,), dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self._a, self._b = (
            torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        self._c = torch.empty_like(self._a)
        self.samples: dict[str, list[float]] = {"copy": [], "matrix": []}
        for kind in self.samples:
            for _ in range(5):
                self.measure(kind)

    def measure(self, kind: str) -> float:
        """One pass."""
        if kind == "copy":
            rate = COPY_BYTES / timed(lambda: self._target.copy_(self._source)) / 1e9
        else:
            rate = 2 * MATRIX_SIZE**3 / timed(lambda: torch.mm(self._a, self._b, out=self._c)) / 1e9
        self.samples[kind].append(rate)
        return rate

    def best(self, kind: str) -> float:
        return max(self.samples[kind])

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"kind": kind, "unit": "GB/s" if kind == "copy" else "GFLOP/s", "best": max(rates),
             "median": statistics.median(rates), "passes": len(rates)}
            for kind, rates in self.samples.items()
        ]  # fmt: skip


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def copies(case: Any, l2: int) -> int:
    """How many draws to rotate through: four times the L2 cache of data, at least two, within a limit."""
    return max(2, min(-(-4 * l2 // case.bytes), MOST_DRAW_BYTES // case.bytes))


@dataclass
class Seat:
    """One implementation: its functions, one for each draw, and its times."""

    name: str
    runs: Sequence[Callable[[], Any]]
    error: float
    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    samples: dict[int, float] = field(default_factory=dict)

    def _all(self) -> None:
        for i in range(self.calls):
            self.runs[i % len(self.runs)]()

    def prepare(self, turn: float) -> None:
        """Warms up, settles how many calls make a turn of `turn` seconds, and captures them."""
        for run in self.runs:
            run()
        self.calls = len(self.runs)
        once = max(timed(self._all) / self.calls, 1e-6)
        rounds = max(1, round(turn / once / len(self.runs)))
        self.calls = len(self.runs) * min(rounds, 64)
        self.graph = captured(self._all)

    def turn(self, number: int) -> None:
        run = self._all if self.graph is None else self.graph.replay
        self.samples[number] = timed(run) / self.calls

    @property
    def median(self) -> float:
        return statistics.median(self.samples.values())

    def summary(self) -> dict[str, Any]:
        values = self.samples.values()
        return {"median": self.median, "min": min(values), "rounds": len(values), "calls": self.calls,
                "graph": self.graph is not None}  # fmt: skip


class CudaMeasurement:
    """Builds, checks and times one case; raises WrongResultError when kvk is wrong. A peer that is wrong, broken or
    absent is left out with a note."""

    def __init__(
        self,
        case: Any,
        implementations: Sequence[Any],
        ceilings: CudaCeilings,
        rounds: int,
        turn: float,
    ) -> None:
        self.case, self.ceilings, self.rounds, self.turn = case, ceilings, rounds, turn
        draws = [draw(case, seed) for seed in range(copies(case, l2_bytes()))]
        self.notes: dict[str, str] = {}
        self.seats = [seat for i in implementations if (seat := self._seat(i, draws)) is not None]
        self.ours = next(seat for seat in self.seats if seat.name == OURS)
        memory, compute = case.bytes / ceilings.best("copy"), case.flops / ceilings.best("matrix")
        self.kind = "matrix" if compute > memory else "copy"
        self.ceiling_samples: dict[int, float] = {}

    def _seat(self, implementation: Any, draws: list[Any]) -> Seat | None:
        def make() -> Seat:
            prepared = [implementation.build(data) for data in draws]
            error = draws[0].check(prepared[0].result(prepared[0].run()))
            seat = Seat(implementation.name, [p.run for p in prepared], error)
            seat.prepare(self.turn)
            return seat

        return admit(implementation, self.case, self.notes, make)

    def run(self) -> dict[str, Any]:
        """All rounds, then the row."""
        gc.collect()
        for number in range(self.rounds):
            self.ceiling_samples[number] = self.ceilings.measure(self.kind)
            for seat in self.seats:
                seat.turn(number)
        return self.row()

    def _times(self, seat: Seat) -> dict[str, Any]:
        case, work = self.case, self.case.flops if self.kind == "matrix" else self.case.bytes
        rates = {number: work / seconds / 1e9 for number, seconds in seat.samples.items()}
        return {
            "seconds": seat.summary(),
            "gb_s": case.bytes / seat.median / 1e9,
            "gflop_s": case.flops / seat.median / 1e9,
            "error": seat.error,
            "fraction": paired(rates, self.ceiling_samples),
            "fraction_best": max(rates.values()) / max(self.ceiling_samples.values()),
        }

    def row(self) -> dict[str, Any]:
        """The fields of a row of docs/benchmarks.md."""
        case, ours, rates = self.case, self.ours, self.ceiling_samples.values()
        others = [seat for seat in self.seats if seat is not ours]
        return {
            "op": case.op,
            "case": case.name,
            "headline": case.headline,
            "dtype": case.dtype,
            "bytes": case.bytes,
            "flops": case.flops,
            "bound": self.kind,
            "ceiling": {"median": statistics.median(rates), "best": max(rates)},
            **self._times(ours),
            "peers": {
                seat.name: {
                    **self._times(seat),
                    "ratio": paired(seat.samples, ours.samples),
                    "ratio_best": min(seat.samples.values()) / min(ours.samples.values()),
                }
                for seat in others
            },
            "notes": self.notes,
        }
