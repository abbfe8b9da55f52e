"""Draws the README's performance table from a committed run.

In the checkout, `python -m bench.readme_table bench/results/FILE.json` rewrites README.md between the two
markers; --check only says (exit status 1) whether that would change it; --print writes to the terminal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import report
from bench.record import ROOT, read_json

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def describe(row: dict[str, Any]) -> str:
    """The case's label with its parts spaced out for prose."""
    case: str = row["case"]
    return case.replace("-on-", " on ").replace("-", " ")


def table(run: dict[str, Any]) -> str:
    """Markdown: the headline rows, the machine and the ceilings under them."""
    lines = [
        "| op | case | time | rate | of the measured ceiling | fastest peer | peer's time / kvk's |",
        "|---|---|--:|--:|--:|---|--:|",
    ]
    for row in (r for r in run["rows"] if r["headline"] and not report.is_call(r)):
        rate = f"{row['gflop_s']:.0f} GFLOP/s" if row["bound"] == "fma" else f"{row['gb_s']:.1f} GB/s"
        ceiling = f"{report.fraction_text(row['fraction'])} of {report.BOUND_NAMES[row['bound']]}"
        time = report.seconds_text(row["seconds"]["median"])
        cells = [f"`{row['op']}`", describe(row), time, rate, ceiling]
        if row["peers"]:
            name, peer = min(row["peers"].items(), key=lambda item: item[1]["ratio"])
            cells += [name, report.ratio_text(peer["ratio"])]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for row in (r for r in run["rows"] if report.is_call(r)):
        trivial = ", ".join(
            f"{name} {report.seconds_text(peer['seconds']['median'])}" for name, peer in row["peers"].items()
        )
        time = report.seconds_text(row["seconds"]["median"])
        lines.append(f"One call of `torch.ops.kvk.{row['op']}.out`: {time} ({trivial}).  ")
    lines.append(f"{report.ceilings_line(run)}.  ")
    lines.append(f"{report.head_line(run)}, {run['date'][:10]}.")
    return "\n".join(lines)


def replaced(text: str, made: str) -> str:
    """`text` with `made` between the markers; ValueError where they are not there once each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs one line {BEGIN} and, below it, one line {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draws the README's performance table from a committed run.")
    parser.add_argument("json", type=Path)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args(argv)
    made = table(read_json(options.json))
    if options.only_print:
        print(made)
        return 0
    before = options.readme.read_text()
    after = replaced(before, made)
    if options.check:
        if before != after:
            print(f"{options.readme} does not show {options.json}: draw it again", file=sys.stderr)
        return int(before != after)
    options.readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
