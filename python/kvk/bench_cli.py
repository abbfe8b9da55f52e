"""`python -m kvk bench`: finds the checkout's bench/ folder and runs it.

The benchmarks are a tool of the source tree, not of the wheel: they need peers, a compiler and pytest. So
this module only locates them, says what is missing, and hands the options to pytest.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDED = {
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "rich": "rich",
    "matplotlib": "matplotlib",
}
NOT_FOUND = """\
kvk bench: the benchmarks are part of kvk's source tree, and neither {package}
nor the current folder lies in one. Run the command inside a checkout (the folder with bench/ and
python/kvk/); what is measured is the kvk that Python imports."""


def find_checkout() -> Path | None:
    """The source tree around this package, or else around the current folder; None when there is none."""
    for start in (Path(__file__).resolve().parent, Path.cwd()):
        for folder in (start, *start.parents):
            if (folder / "bench" / "harness.py").is_file() and (folder / "python" / "kvk").is_dir():
                return folder
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvk bench",
        description="Time kvk against its peers and against the ceilings of this machine, in one run.",
    )
    parser.add_argument(
        "-k", metavar="EXPR", help="only matching cases, e.g. 'decode and bf16' (as in pytest)"
    )
    parser.add_argument("--quick", action="store_true", help="the short list of cases, about a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the run's record (build/bench/bench.json)")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="the picture (build/bench/roofline.png)")
    parser.add_argument("--threads", metavar="N", type=int, default=0, help="threads (torch's default)")
    parser.add_argument("--peers", metavar="WORDS", help="only peers named with one of these, or 'none'")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; the exit status is pytest's (0: all ran and every kvk result was right)."""
    options = _parser().parse_args(argv)
    if options.threads < 0:
        print("kvk bench: --threads must be 1 or more", file=sys.stderr)
        return 2
    checkout = find_checkout()
    if checkout is None:
        print(NOT_FOUND.format(package=Path(__file__).resolve().parent), file=sys.stderr)
        return 2
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"kvk bench: not installed: {', '.join(missing)}", file=sys.stderr)
        print(f"  {sys.executable} -m pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    return _run(checkout, options)


def _run(checkout: Path, options: argparse.Namespace) -> int:
    import pytest

    bench = checkout / "bench"
    arguments = ["-c", str(bench / "pytest.ini"), f"--rootdir={bench}", "-q", "--tb=short", str(bench)]
    if options.k:
        arguments += ["-k", options.k]
    if options.quick:
        arguments.append("--kvk-quick")
    if options.peers is not None:
        arguments.append(f"--kvk-peers={options.peers}")
    if options.threads:
        arguments.append(f"--kvk-threads={options.threads}")
    if options.list:
        arguments.append("--collect-only")
    else:
        results = checkout / "build" / "bench"
        json = (options.json or results / "bench.json").resolve()
        plot = (options.plot or results / "roofline.png").resolve()
        arguments += [f"--kvk-json={json}", f"--kvk-plot={plot}"]
    return int(pytest.main(arguments))
