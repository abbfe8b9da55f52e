"""`python -m kvk info | demo | bench | precompile | replay | explain`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """\
usage: python -m kvk COMMAND [options]

  info        versions, the library, the instruction-set level and the threads in use
  demo        runs a real model through the paged cache and compares it with plain torch
  bench       times the kernels against their peers and the ceilings of this machine
  precompile  compiles the CUDA kernels ahead, for --arch sm_90a and others; needs no card
  replay      runs calls saved with KVK_DUMP again and compares them with the reference
  explain     says how saved calls would be done: kernel, tiles, splits, bytes, FLOPs and the bound

python -m kvk COMMAND --help tells a command's options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "info" and not rest:
        from kvk import info

        return info.main()
    if command == "demo":
        from kvk.demo import run

        return run.main(rest)
    if command == "bench":
        from kvk import bench_cli

        return bench_cli.main(rest)
    if command == "precompile":
        from kvk import cuda

        return cuda.main(rest)
    if command == "replay":
        from kvk import replay

        return replay.main(rest)
    if command == "explain":
        from kvk import explanation

        return explanation.main(rest)
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
