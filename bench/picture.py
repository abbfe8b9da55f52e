"""The roofline picture of a run (the dict that record.Run.as_json makes)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.report import Row, peer_names

Styles = dict[str, str]


def _series(run: dict[str, Any]) -> list[Row]:
    return [row for row in run["rows"] if row["bound"] is not None]


def draw(path: Path, run: dict[str, Any]) -> None:
    """The picture: left the roofline of this run with every row that computes, right every row's fraction of
    its own ceiling. Filled marks are kvk, hollow ones the peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

    rows = _series(run)
    peers = peer_names(rows)
    height = max(6.5, 2.2 + 0.24 * len(rows))
    figure = Figure(figsize=(15, height), layout="constrained")
    grid = GridSpec(1, 2, figure=figure, width_ratios=(1, 1.05))
    ops = list(dict.fromkeys(row["op"] for row in rows))
    colours = {op: f"C{i}" for i, op in enumerate(ops)}
    marks = dict(zip(peers, "sD^vPX<>*hpd" * 2, strict=False))
    _draw_roofline(figure.add_subplot(grid[0]), run, rows, colours, marks)
    _draw_fractions(figure.add_subplot(grid[1]), rows, colours, marks)
    if rows:
        figure.legend(handles=_legend(colours, marks), loc="outside lower center", ncols=6, fontsize=9)
    machine = run["machine"]
    figure.suptitle(
        f"kvk {run['versions']['kvk']} ({run['commit']}) on {machine['cpu']}, {machine['threads']} threads, "
        f"{machine['isa']['kvk']}, {run['date'][:10]}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _spread(intensity: list[float]) -> list[float]:
    """Rows of equal intensity side by side, 5% apart, so that they can be told apart."""
    placed: list[float] = []
    for i, x in enumerate(intensity):
        near = [j for j, other in enumerate(intensity) if abs(other / x - 1) < 0.1]
        placed.append(x * 1.05 ** (near.index(i) - (len(near) - 1) / 2))
    return placed


def _draw_roofline(axes: Any, run: dict[str, Any], rows: list[Row], colours: Styles, marks: Styles) -> None:
    threads = run["machine"]["threads"]
    best = {(c["kind"], c["threads"]): c["best"] for c in run["ceilings"]}
    points = [row for row in rows if row["flops"]]
    intensity = [row["flops"] / row["bytes"] for row in points]
    low, high = min([0.1, *intensity]) / 2, max([100.0, *intensity]) * 2
    for count, style in ((threads, "-"), (1, "--")):
        if ("fma", count) not in best or (count == 1 and threads == 1 and style == "--"):
            continue
        bandwidth, peak = best["read", count], best["fma", count]
        knee = peak / bandwidth
        axes.plot([low, knee, high], [low * bandwidth, peak, peak], style, color="0.25", lw=1.2)
        label = f"{count} thread{'s' if count > 1 else ''}"
        axes.annotate(
            f"FMA {peak:.0f} GFLOP/s, {label}",
            (high, peak),
            (-4, 4 if count == threads else -11),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        # Along the slope: above the line of all threads, below that of one.
        x, y = low * 1.4, low * 1.4 * bandwidth * (1.25 if count == threads else 0.6)
        axes.text(
            x,
            y,
            f"read {bandwidth:.0f} GB/s, {label}",
            rotation=math.degrees(math.atan2(y, x)),  # slope 1 in logarithms, said in data units
            rotation_mode="anchor",
            transform_rotates_text=True,
            fontsize=8,
        )
    for row, x in zip(points, _spread(intensity), strict=True):
        speeds = [row["gflop_s"], *(peer["gflop_s"] for peer in row["peers"].values())]
        axes.plot([x, x], [min(speeds), max(speeds)], color="0.88", lw=1, zorder=1)
        for name, peer in row["peers"].items():
            hollow: dict[str, Any] = {
                "mfc": "none",
                "mec": colours[row["op"]],
                "alpha": 0.6,
                "ms": 5,
                "zorder": 2,
            }
            axes.plot(x, peer["gflop_s"], marks[name], **hollow)
        axes.plot(x, row["gflop_s"], "o", color=colours[row["op"]], mec="white", mew=0.6, ms=7, zorder=3)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="arithmetic intensity, FLOP per byte of minimum traffic",
        ylabel="GFLOP/s",
        title="Roofline measured in the same run",
    )
    axes.grid(True, which="major", color="0.92")


def _draw_fractions(axes: Any, rows: list[Row], colours: Styles, marks: Styles) -> None:
    for y, row in enumerate(rows):
        for name, peer in row["peers"].items():
            axes.plot(peer["fraction"], y, marks[name], mfc="none", mec=colours[row["op"]], alpha=0.6, ms=5)
        axes.plot(row["fraction"], y, "o", color=colours[row["op"]], mec="white", mew=0.6, ms=7, zorder=3)
    peers = [peer["fraction"] for row in rows for peer in row["peers"].values()]
    largest = max([1.0, *(row["fraction"] for row in rows), *peers])
    axes.axvline(1.0, color="0.25", lw=1.2)
    axes.set(
        xlim=(0, 1.05 * largest),
        ylim=(len(rows) - 0.4, -0.6),
        xlabel="fraction of the row's own ceiling (read or copy bandwidth, or FMA rate)",
        title="How near to the ceiling",
    )
    axes.set_yticks(range(len(rows)), [f"{row['op']}  {row['case']}" for row in rows], fontsize=8)
    axes.grid(True, axis="both", color="0.92")
    axes.set_axisbelow(True)


def _legend(colours: Styles, marks: Styles) -> list[Any]:
    from matplotlib.lines import Line2D

    ours = [Line2D([], [], marker="o", ls="", color=c, ms=7, label=f"kvk {op}") for op, c in colours.items()]
    hollow: dict[str, Any] = {"ls": "", "mfc": "none", "mec": "0.3", "ms": 6}
    return ours + [Line2D([], [], marker=mark, label=name, **hollow) for name, mark in marks.items()]
