#!/usr/bin/env python3
"""Runs the kernel of every ptx:: wrapper on the card, and compares with what the emulator says.

    python tests/gpu/conformance.py --expect FILE [--output FILE]

FILE is what `build/emulator/emulator_conformance_plain --json FILE` wrote. It needs a card, torch for its memory, and
NVRTC.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nvrtc

UNTOUCHED = 0xFFFFFFFF  # what `out` holds before a kernel
MAP_BYTES, MAP_ALIGNMENT = 128, 64
# CUtensorMapDataType, CUtensorMapSwizzle, .. of cuda.h
BFLOAT16, INTERLEAVE_NONE, PROMOTION_NONE, OOB_ZERO = 9, 0, 0, 0
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@dataclass(frozen=True)
class Verdict:
    """One case: the words that differ from the emulator's, and the worst relative error where one is allowed."""

    kernel: str
    words: int
    wrong: int
    first: str
    worst_error: float | None
    allowed_error: float | None


def as_float(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


def compare(case: dict[str, Any], got: Sequence[int]) -> Verdict:
    """Bit for bit; or, for an approximate function, as floats within the case's relative error."""
    want: list[int] = case["out"]
    exact = case["log2_relative_error"] == 0
    allowed = 0.0 if exact else 2.0 ** case["log2_relative_error"]
    wrong, worst, first = 0, 0.0, ""
    if len(got) != len(want):
        return Verdict(case["kernel"], len(want), len(want), f"{len(got)} words", None, None)
    for index, (mine, other) in enumerate(zip(got, want, strict=True)):
        if mine == other:
            continue
        x, y = as_float(mine), as_float(other)
        if not exact and math.isfinite(x) and math.isfinite(y) and y != 0:
            error = abs(x - y) / abs(y)
            worst = max(worst, error)
            if error <= allowed:
                continue
        wrong += 1
        first = first or f"word {index}: {mine:#010x}, the emulator {other:#010x}"
    return Verdict(
        case["kernel"], len(want), wrong, first, None if exact else worst, None if exact else allowed
    )


def runs_on(kernel: str, arch: str) -> bool:
    """Whether an architecture has the kernel's instructions."""
    if "wgmma" in kernel:
        return arch == "sm_90a"
    if "tma" in kernel or "bulk" in kernel:
        return arch not in ("sm_80", "sm_86", "sm_89")
    return True


def compile_cases(kernels: Sequence[str], arch: str) -> nvrtc.Compiled:
    return nvrtc.compile_source('#include "emulator/conformance.cuh"\n', arch, expressions=kernels)


class Card:
    """The current card, through the driver; memory and context are torch's."""

    def __init__(self, cubin: bytes) -> None:
        import torch

        self.torch = torch
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes the primary context current
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module = ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(self.module), cubin)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {text.value.decode() if text.value else status}")

    def words(self, values: Sequence[int]) -> Any:
        signed = [value - (1 << 32) if value >= 1 << 31 else value for value in values]
        return self.torch.tensor(signed, dtype=self.torch.int32, device="cuda")

    def tensor_map(self, layout: dict[str, Any], address: int) -> bytes:
        """The 128 bytes that cuTensorMapEncodeTiled makes of a case's map."""
        dims = layout["dims"]
        rank = len(dims)
        memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        at = -(-ctypes.addressof(memory) // MAP_ALIGNMENT) * MAP_ALIGNMENT
        sizes = (ctypes.c_uint64 * rank)(*[dim["size"] for dim in dims])
        strides = (ctypes.c_uint64 * rank)(*[dim["stride_bytes"] for dim in dims[1:]], 0)
        box = (ctypes.c_uint32 * rank)(*[dim["box"] for dim in dims])
        steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        swizzle = SWIZZLES[layout["swizzle_bytes"]]
        tensor = (ctypes.c_void_p(at), BFLOAT16, rank, ctypes.c_void_p(address), sizes, strides)
        ways = (INTERLEAVE_NONE, swizzle, PROMOTION_NONE, OOB_ZERO)
        self.call("cuTensorMapEncodeTiled", *tensor, box, steps, *ways)
        return ctypes.string_at(at, MAP_BYTES)

    def run(self, case: dict[str, Any], symbol: str, words_in: Any) -> list[int]:
        """One launch of a case; the words of `out`."""
        out = self.words([UNTOUCHED] * len(case["out"]))
        counter = self.words([0])
        layout = case.get("map")
        tensor_map = self.tensor_map(layout, words_in.data_ptr()) if layout else bytes(MAP_BYTES)
        # struct ConformanceParams: three pointers, then the map on a multiple of 64.
        head = struct.pack("<3Q", words_in.data_ptr(), out.data_ptr(), counter.data_ptr())
        params = ctypes.create_string_buffer(head.ljust(MAP_ALIGNMENT, b"\0") + tensor_map)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), self.module, symbol.encode())
        if case["smem_bytes"] > 48 * 1024:
            self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, case["smem_bytes"])
        self.torch.cuda.synchronize()
        self.call(
            "cuLaunchKernel",
            function,
            1,
            1,
            1,
            case["threads"],
            1,
            1,
            case["smem_bytes"],
            None,
            arguments,
            None,
        )
        self.torch.cuda.synchronize()
        return [value & UNTOUCHED for value in out.tolist()]


def run_on_card(expected: dict[str, Any], progress: Callable[[str], None] = print) -> list[Verdict]:
    """Every case that the card's architecture has."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}{'a' if major >= 9 else ''}"
    cases = [case for case in expected["cases"] if runs_on(case["kernel"], arch)]
    compiled = compile_cases([case["kernel"] for case in cases], arch)
    card = Card(compiled.cubin)
    words_in = card.words(expected["in"])
    verdicts = []
    for case in cases:
        verdict = compare(case, card.run(case, compiled.lowered[case["kernel"]], words_in))
        error = "" if verdict.worst_error is None else f", error {verdict.worst_error:.1e}"
        state = "ok  " if not verdict.wrong else "FAIL"
        progress(f"{state} {verdict.kernel}{error} {verdict.first}")
        verdicts.append(verdict)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description="compare the ptx:: wrappers on the card with the emulator")
    parser.add_argument("--expect", type=Path, required=True, help="the emulator's answers")
    parser.add_argument("--output", type=Path, help="write the verdicts as JSON")
    options = parser.parse_args()
    verdicts = run_on_card(json.loads(options.expect.read_text()))
    if options.output:
        options.output.write_text(json.dumps([vars(verdict) for verdict in verdicts], indent=1) + "\n")
    wrong = [verdict.kernel for verdict in verdicts if verdict.wrong]
    print(f"{len(verdicts)} kernels, {len(wrong)} differ from the emulator")
    return 1 if wrong or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
