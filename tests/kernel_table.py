#!/usr/bin/env python3
"""Writes docs/kernels.md: registers and shared memory of every default CUDA kernel, as ptxas reports them.

    python tests/kernel_table.py            compile what is not in the cache, and write the file

It needs NVRTC and no card. tests/test_cuda_kernels.py compares the file with the kernels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import nvrtc
from kvk import cuda

FILE = nvrtc.ROOT / "docs" / "kernels.md"
HEADER = """\
# Registers and shared memory of the CUDA kernels

Made by `python tests/kernel_table.py`, with NVRTC {version}; do not edit. These are the kernels that
`kvk.precompile()` compiles (docs/cuda.md). Registers are per thread, shared memory in bytes per block; no kernel
spills or uses local memory, which the compile gate (`tests/test_cuda_kernels.py`) checks. Dynamic shared memory
is what the launch asks for: `kShape.shared_bytes()` of the kernel's config. A star: a block of that architecture
may not have so much ({limits}); there the op takes the small shape (`true`).
"""
# What a block may have, static and dynamic together (CUDA C++ Programming Guide, compute capabilities). sm_86 and
# sm_89 have sm_120's.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024, "sm_120a": 99 * 1024}


@cache
def compiled(arch: str) -> tuple[cuda.CompiledKernel, ...]:
    """Every default kernel for one architecture, in the order of default_kernels()."""
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(lambda kernel: cuda.compile_kernel(kernel, arch), cuda.default_kernels()))


def _config(expression: str) -> str | None:
    """The config that a kernel takes: kvk::device::NAME_kernel<CONFIG<..>> -> CONFIG<..>."""
    match = re.fullmatch(r"kvk::device::\w+<(kvk::device::\w+Config<.*>)>", expression)
    return match[1] if match else None


@cache
def dynamic_shared_bytes() -> dict[str, int]:
    """Expression -> bytes. The compiler works them out: they come back as part of a name."""
    kernels = cuda.default_kernels()
    configs = {kernel.expression: _config(kernel.expression) for kernel in kernels}
    asked = {
        f"shared_bytes<{config}::kShape.shared_bytes()>": expression
        for expression, config in configs.items()
        if config
    }
    includes = "".join(f'#include "{header}"\n' for header in dict.fromkeys(k.header for k in kernels))
    source = includes + "template <unsigned long long> __global__ void shared_bytes() {}\n"
    names = nvrtc.compile_source(source, "sm_80", expressions=list(asked)).lowered
    found = dict.fromkeys(configs, 0)
    for question, expression in asked.items():
        number = re.search(r"IL[a-z](\d+)E", names[question])
        assert number, names[question]
        found[expression] = int(number[1])
    return found


def _spread(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "/".join(map(str, values))


def table(kernels: Mapping[str, Sequence[cuda.CompiledKernel]]) -> str:
    """The Markdown table; kernels: arch -> its compiled kernels, all in one order."""
    archs = list(kernels)
    lines = [
        f"| kernel | {' | '.join(archs)} | static shared | dynamic shared |",
        f"|---|{'---:|' * (len(archs) + 2)}",
    ]
    for row in zip(*kernels.values(), strict=True):
        expression = row[0].kernel.expression
        static = _spread([kernel.shared_bytes for kernel in row])
        dynamic = dynamic_shared_bytes()[expression]
        registers = " | ".join(
            f"{kernel.registers}{'*' if kernel.shared_bytes + dynamic > SHARED_LIMIT[kernel.arch] else ''}"
            for kernel in row
        )
        name = expression.replace("kvk::device::", "")
        lines.append(f"| `{name}` | {registers} | {static} | {dynamic} |")
    return "\n".join(lines) + "\n"


def text() -> str:
    """What the file should hold."""
    kernels = {arch: compiled(arch) for arch in nvrtc.ARCHITECTURES}
    limits = ", ".join(f"{arch}: {limit // 1024} KiB" for arch, limit in SHARED_LIMIT.items())
    return HEADER.format(version=nvrtc_version(), limits=limits) + "\n" + table(kernels)


def nvrtc_version() -> str:
    return str(cuda.info()["nvrtc"]["version"])


def written_version(file: Path = FILE) -> str:
    match = re.search(r"with NVRTC ([\d.]+);", file.read_text())
    assert match, f"{file} does not say which NVRTC made it"
    return match[1]


def written_rows(file: Path = FILE) -> dict[str, list[str]]:
    """Kernel -> the cells beside it."""
    rows = [line.strip("| ").split(" | ") for line in file.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"{FILE}: {len(written_rows())} kernels, NVRTC {nvrtc_version()}")
    sys.exit(0)
