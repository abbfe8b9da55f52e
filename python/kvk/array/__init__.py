"""kvk on arrays: the ops of ``torch.ops.kvk`` for NumPy, CuPy and whatever else speaks DLPack, without torch.

Every op is a function of this module, with the names, order and defaults of its torch twin; the same checks, errors and
bits. Arrays are never copied or converted: what an op writes is written in the caller's memory (docs/array.md).
"""

from __future__ import annotations

from typing import Any

from kvk.array._arrays import BFloat16Bits, bfloat16_bits
from kvk.array._format_classes import BitmapFormat, QuantFormat
from kvk.array._functions import make_functions
from kvk.array._library import library

_functions = make_functions()
globals().update(_functions)

__version__: str = library.version()
__all__ = ["BFloat16Bits", "BitmapFormat", "QuantFormat", "bfloat16_bits"]
__all__ += ["cpu_level", "get_num_threads", "set_num_threads", *sorted(_functions)]


def cpu_level() -> str:
    """The instruction-set level that the CPU's kernels run at; KVK_CPU_LEVEL asks for a lower one."""
    return library.cpu_level()


def get_num_threads() -> int:
    """How many threads a call on the CPU uses."""
    return library.get_num_threads()


def set_num_threads(count: int) -> None:
    """How many threads a call on the CPU uses; 0: one for each of the machine's."""
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    library.set_num_threads(count)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"kvk.array has no {name!r}; its ops are {', '.join(sorted(_functions))}")
