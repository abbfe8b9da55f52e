"""Logging and saving calls from Python: what KVK_LOG and KVK_DUMP do for a whole process (docs/record.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CALLS = 100
BYTES = 1 << 30


@contextmanager
def recording(
    *, log: int = 0, dump: str | Path | None = None, max_calls: int = CALLS, max_bytes: int = BYTES
) -> Iterator[None]:
    """Logs or saves the calls made inside, from any thread; then things are as they were.

    Args:
        log: 1 prints a line on stderr for each call, 2 adds strides and the range of values.
        dump: folder that each call's inputs are saved in before it runs, for `python -m kvk replay`.
        max_calls, max_bytes: files, and bytes on disk, that the folder may hold; what is over is not saved.
    """
    change = torch.ops.kvk._set_recording
    before = change(log, "" if dump is None else str(dump), max_calls, max_bytes).split("\n")
    try:
        yield
    finally:
        change(int(before[0]), before[1], int(before[2]), int(before[3]))
