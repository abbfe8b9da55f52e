"""A command that measures cases on a card: what the CUDA benchmarks (bench_*_cuda.py) share."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases import WrongResultError
from bench.record import SCHEMA, git_commit, write_json
from bench.report import fraction_text, ratio_text, seconds_text


@dataclass(frozen=True)
class Suite:
    """What one command measures."""

    module: str
    about: str
    cases: Callable[[], Sequence[Any]]
    implementations: Callable[[Any], Sequence[Any]]  # of a case: kvk, then its peers
    aim: Callable[[dict[str, Any], Any], str | None]  # of a row and its case: "met", "missed" or None


def table(run: dict[str, Any]) -> str:
    """Markdown: a row for each case, a column for each peer, then why peers are missing."""
    rows = run["rows"]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [
        f"| op | case | time | GB/s | TFLOP/s | of ceiling | aim | {' | '.join(peers)} |",
        f"|---|---|---:|---:|---:|---:|---|{'---:|' * len(peers)}",
    ]
    for row in rows:
        ratios = [ratio_text(row["peers"][p]["ratio"]) if p in row["peers"] else "-" for p in peers]
        cells = [
            row["op"],
            row["case"] + ("" if row["seconds"]["graph"] else " (no graph)"),
            seconds_text(row["seconds"]["median"]),
            f"{row['gb_s']:.0f}",
            f"{row['gflop_s'] / 1e3:.1f}",
            f"{fraction_text(row['fraction'])} of {row['bound']}",
            row["aim"] or "",
            *ratios,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ceilings = ", ".join(f"{c['kind']} {c['best']:.0f} {c['unit']}" for c in run["ceilings"])
    lines += [
        "",
        f"Ceilings, best of this run: {ceilings}. Peers: their time over kvk's; above 1 kvk is faster.",
        "",
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for peer, reason in row["notes"].items():
            reasons.setdefault((peer, reason), []).append(row["case"])
    for (peer, reason), names in reasons.items():
        where = "everywhere" if len(names) == len(rows) else ", ".join(names)
        lines.append(f"- {peer} left out ({reason}): {where}")
    lines += [f"- {error}" for error in run["errors"]]
    if run["not_run"]:
        lines.append(f"- no time was left for {', '.join(run['not_run'])}")
    return "\n".join(lines) + "\n"


def measure(
    suite: Suite, chosen: Sequence[Any], words: str | None, seconds: float, rounds: int
) -> Iterator[dict[str, Any]]:
    """The run so far, after every case, until the time is over. A wrong result of kvk is an error of the run, and the
    next case goes on."""
    from bench import cuda_peers
    from bench.cuda_harness import CudaCeilings, CudaMeasurement

    start = time.monotonic()
    ceilings = CudaCeilings()
    properties = torch.cuda.get_device_properties(0)
    run: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": {
            "card": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_cache_bytes": properties.L2_cache_size,
        },
        "versions": {"python": platform.python_version(), **cuda_peers.versions()},
        "ceilings": [],
        "rows": [],
        "errors": [],
        "not_run": [],
    }
    for case in chosen:
        if run["rows"] and time.monotonic() - start > seconds:
            run["not_run"].append(case.name)
            continue
        try:
            ours, *others = suite.implementations(case)
            others = [p for p in others if words is None or any(w and w in p.name for w in words.split(","))]
            row = CudaMeasurement(case, [ours, *others], ceilings, rounds, turn=0.02).run()
            row["aim"] = suite.aim(row, case)
            run["rows"].append(row)
            print(
                f"{row['op']:<14} {row['case']:<26} {seconds_text(row['seconds']['median']):>9} "
                f"{fraction_text(row['fraction']):>4} of {row['bound']}",
                flush=True,
            )
        except (WrongResultError, RuntimeError) as error:
            run["errors"].append(f"{case.op} {case.name}: {(str(error).splitlines() or [''])[0]}")
            print(run["errors"][-1], flush=True)
        torch.cuda.empty_cache()
        run["ceilings"] = ceilings.as_json()
        yield run


def last_line(run: dict[str, Any]) -> str:
    """The run in one line."""
    slowest = [
        (peer["ratio"], name, row["case"]) for row in run["rows"] for name, peer in row["peers"].items()
    ]
    text = f"{len(run['rows'])} rows, {len(run['errors'])} errors"
    if run["not_run"]:
        text += f", no time for {len(run['not_run'])} cases"
    aims = [row["aim"] for row in run["rows"] if row["aim"]]
    text += f", {aims.count('met')} of {len(aims)} aims met"
    if slowest:
        ratio, name, case = min(slowest)
        text += f"; nearest or fastest peer {name} at {ratio_text(ratio)} ({case})"
    return text


def run_suite(suite: Suite, argv: Sequence[str] | None = None) -> int:
    """0: every row was right; 1: one was not; 2: no card."""
    parser = argparse.ArgumentParser(prog=f"python -m {suite.module}", description=suite.about)
    parser.add_argument("-k", metavar="WORD", default="", help="only cases with this in their name")
    parser.add_argument("--peers", metavar="WORDS", help="only peers named with one of these, or 'none'")
    parser.add_argument("--seconds", type=float, default=600, help="no new case after so long")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="the table as Markdown")
    parser.add_argument(
        "--list", action="store_true", help="list the cases and the peers that are here, and stop"
    )
    options = parser.parse_args(argv)
    chosen = [case for case in suite.cases() if options.k in f"{case.op}-{case.name}"]
    if options.list:
        for case in chosen:
            print(f"{case.op:<14} {case.name:<26} {case.bytes / 1e6:8.0f} MB {case.flops / 1e9:9.1f} GFLOP")
        from bench import cuda_peers

        print(f"{len(chosen)} cases; {json.dumps(cuda_peers.versions())}")
        return 0
    if not torch.cuda.is_available():
        print("no card: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    run: dict[str, Any] = {"rows": [], "errors": [], "not_run": [], "ceilings": []}
    for run in measure(suite, chosen, options.peers, options.seconds, options.rounds):
        if options.json:  # after every row: who stops the run keeps what it had
            write_json(options.json, run)
        if options.table:
            options.table.write_text(table(run))
    print("\n" + table(run))
    print(last_line(run))
    return 1 if run["errors"] or not run["rows"] else 0
