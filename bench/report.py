"""A run in words: tables, ceilings and notes. A run is the dict that record.Run.as_json makes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
CALL_COLUMNS = ["time", "aim"]
WORK_COLUMNS = ["time", "MB", "GFLOP", "GB/s", "GFLOP/s", "bound", "of bound"]
DISTURBED = 0.05  # share of the machine
BOUND_NAMES = {"read": "read", "copy": "copy", "fma": "FMA"}


def seconds_text(seconds: float) -> str:
    """Three figures with the unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def fraction_text(fraction: float | None) -> str:
    """Per cent of the ceiling."""
    return "" if fraction is None else f"{100 * fraction:.0f}%"


def ratio_text(ratio: float) -> str:
    """How many times the time of kvk a peer takes."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def ceilings_line(run: dict[str, Any]) -> str:
    """Best figures of the run with all threads, in words."""
    threads = run["machine"]["threads"]
    best = {c["kind"]: c for c in run["ceilings"] if c["threads"] == threads}
    kinds = [best[kind] for kind in ("read", "copy", "triad", "fma")]
    parts = [f"{c['kind']} {c['best']:.1f} {c['unit']}" for c in kinds]
    return f"Ceilings, best of this run with {threads} threads: {', '.join(parts)}"


def head_line(run: dict[str, Any]) -> str:
    """Machine, versions and commit in one line."""
    machine, version = run["machine"], run["versions"]
    listed = ", ".join(f"{name} {value}" for name, value in version.items())
    where = f"{machine['cpu']}, {machine['cores']} cores, kvk at {machine['isa']['kvk']}"
    return f"{where}; {listed}; {run['commit']}"


def peer_names(rows: Iterable[Row]) -> list[str]:
    """Peers that were timed in at least one row, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["peers"]))


def is_disturbed(row: Row) -> bool:
    """Whether other processes took so much of the machine that the row's figures are not to be quoted."""
    return (row["others_cpu"] or 0.0) > DISTURBED


def case_text(row: Row) -> str:
    """The case's name, marked where the row was disturbed."""
    return f"{row['case']} *" if is_disturbed(row) else str(row["case"])


def is_call(row: Row) -> bool:
    """Whether a row is about the cost of a call and not about bytes and FLOPs."""
    return "aim_us" in row


def tables(run: dict[str, Any]) -> list[Any]:
    """One rich table per op, and one for the cost of calls."""
    from rich.table import Table

    groups: dict[str, list[Row]] = {}
    for row in run["rows"]:
        groups.setdefault("cost of one call" if is_call(row) else row["op"], []).append(row)
    made = []
    for title, rows in groups.items():
        calls, peers = is_call(rows[0]), peer_names(rows)
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("op" if calls else "case", no_wrap=True)
        for column in (CALL_COLUMNS if calls else WORK_COLUMNS) + peers:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*(_call_cells if calls else _work_cells)(row, peers))
        made.append(table)
    return made


def _call_cells(row: Row, peers: list[str]) -> list[str]:
    # Times, not ratios: the columns are parts of the cost, not competitors.
    others = [seconds_text(row["peers"][p]["seconds"]["median"]) if p in row["peers"] else "-" for p in peers]
    name = f"{row['op']}.out{' *' if is_disturbed(row) else ''}"
    return [name, seconds_text(row["seconds"]["median"]), f"{row['aim_us']:g} us", *others]


def _work_cells(row: Row, peers: list[str]) -> list[str]:
    computes = row["flops"] > 0
    return [
        case_text(row),
        seconds_text(row["seconds"]["median"]),
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['flops'] / 1e9:.3g}" if computes else "-",
        f"{row['gb_s']:.1f}",
        f"{row['gflop_s']:.3g}" if computes else "-",
        f"{BOUND_NAMES[row['bound']]} {row['ceiling']['median']:.0f}",
        fraction_text(row["fraction"]),
        *(ratio_text(row["peers"][p]["ratio"]) if p in row["peers"] else "-" for p in peers),
    ]


def progress_line(row: Row) -> str:
    """One finished row in a line, for the terminal while the run goes on."""
    line = f"{row['op']:<14}{case_text(row):<28}{seconds_text(row['seconds']['median']):>9}"
    if row["bound"] is not None:
        work = f"{row['gflop_s']:.0f} GFLOP/s" if row["bound"] == "fma" else f"{row['gb_s']:.1f} GB/s"
        line += f"{work:>14}  {fraction_text(row['fraction']):>4} of {BOUND_NAMES[row['bound']]}"
    if row["peers"] and not is_call(row):
        name, peer = min(row["peers"].items(), key=lambda item: item[1]["ratio"])
        line += f"  best peer {ratio_text(peer['ratio'])} ({name})"
    return line


def notes(run: dict[str, Any]) -> list[str]:
    """Why peers are missing, each reason once per op."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for row in run["rows"]:
        for peer, reason in row["notes"].items():
            seen.setdefault((row["op"], peer, reason), []).append(row["case"])
    count = {op: sum(r["op"] == op for r in run["rows"]) for op in {r["op"] for r in run["rows"]}}
    lines = []
    for (op, peer, reason), names in seen.items():
        where = "every case" if len(names) == count[op] else ", ".join(names)
        lines.append(f"{op}: {peer} left out ({reason}): {where}")
    return lines


def print_tables(run: dict[str, Any]) -> None:
    """Tables, ceilings and notes on the terminal. Not wrapped when the output is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    for table in tables(run):
        console.print(table)
    console.print("Peer columns: time of the peer over time of kvk; above 1 kvk is faster.", highlight=False)
    if any(map(is_disturbed, run["rows"])):
        used = max(row["others_cpu"] or 0.0 for row in run["rows"])
        print(f"* other processes used more than {DISTURBED:.0%} of the machine meanwhile (up to {used:.0%})")
    for line in [ceilings_line(run), head_line(run), *notes(run)]:
        console.print(line, highlight=False, soft_wrap=True)
