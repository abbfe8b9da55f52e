"""NVRTC through ctypes: compiles kernels for any architecture without a GPU, and reads what ptxas says of them."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as ptxas reports it; bytes are per thread but for static shared memory (per block)."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A compiled program: its kernels, and warnings of the compiler and of ptxas."""

    kernels: tuple[Resources, ...]
    warnings: tuple[str, ...]
    cubin: bytes
    lowered: dict[str, str]  # name expression -> symbol in the cubin

    def problems(self) -> list[str]:
        """Spills, local memory and warnings: what the compile gate refuses."""
        found = list(self.warnings)
        for kernel in self.kernels:
            if kernel.spill_store_bytes or kernel.spill_load_bytes:
                found.append(f"{kernel.kernel} spills {kernel.spill_store_bytes} bytes")
            elif kernel.stack_bytes:
                found.append(f"{kernel.kernel} has {kernel.stack_bytes} bytes of local memory")
        return found


class CompileError(Exception):
    """NVRTC refused the program; the text is its log."""


@cache
def library() -> ctypes.CDLL:
    """The NVRTC that the wheel nvidia-cuda-nvrtc installs."""
    spec = importlib.util.find_spec("nvidia")
    assert spec and spec.submodule_search_locations, "the tests need the wheel nvidia-cuda-nvrtc"
    for place in spec.submodule_search_locations:
        for path in sorted(Path(place).glob("c*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    raise AssertionError("the tests need the wheel nvidia-cuda-nvrtc")


def _check(status: int, what: str) -> None:
    if status:
        library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"{what}: {library().nvrtcGetErrorString(status).decode()}")


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library(), f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _resources(log: str) -> tuple[Resources, ...]:
    kernels = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        assert stack and used, f"ptxas's report has changed:\n{part}"
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(
            Resources(
                kernel=part[: part.index("'")],
                registers=int(used.group(1)),
                stack_bytes=int(stack.group(1)),
                spill_store_bytes=int(stack.group(2)),
                spill_load_bytes=int(stack.group(3)),
                shared_bytes=int(shared.group(1)) if shared else 0,
            )
        )
    return tuple(kernels)


def compile_source(
    source: str,
    arch: str,
    *,
    expressions: Sequence[str] = (),
    options: Sequence[str] = (),
    name: str = "source.cu",
) -> Compiled:
    """Compiles CUDA C++ for one architecture; `expressions` name template instantiations to keep.

    Raises:
        CompileError: with NVRTC's log.
    """
    flags = [
        f"-arch={arch}",
        "-std=c++20",
        f"-I{ROOT / 'include'}",
        f"-I{ROOT / 'tests'}",
        *(f"--ptxas-options={option}" for option in ("-v", "-warn-spills", "-warn-lmem-usage")),
        *options,
    ]
    nvrtc, program = library(), ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    _check(made, "nvrtcCreateProgram")
    try:
        for expression in expressions:
            _check(nvrtc.nvrtcAddNameExpression(program, expression.encode()), expression)
        words = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])
        status = nvrtc.nvrtcCompileProgram(program, len(flags), words)
        log = _text(program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(f"{name} for {arch}\n{log}")
        lowered = {}
        for expression in expressions:
            symbol = ctypes.c_char_p()
            _check(nvrtc.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(symbol)), expression)
            assert symbol.value is not None
            lowered[expression] = symbol.value.decode()
        warnings = tuple(line for line in log.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE))
        return Compiled(_resources(log), warnings, _text(program, "CUBIN"), lowered)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
