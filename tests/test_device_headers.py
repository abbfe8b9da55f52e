"""Device headers under the compilers that read them: the host's with the emulator, and NVRTC for each architecture.

A kernel that spills, uses local memory or makes ptxas warn fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import nvrtc
import pytest

ROOT = Path(__file__).resolve().parents[1]
HEADERS = sorted((ROOT / "include" / "kvk" / "device").glob("*.*h"))
HEADER_IDS = [path.name for path in HEADERS]
CONFORMANCE = ROOT / "tests" / "emulator" / "conformance.cuh"


def instantiations(table: str) -> list[str]:
    """The kernels of one of conformance.cuh's tables, as name expressions."""
    text = re.search(rf"#define {table}\(X\)(.*?)\n(?!  X)", CONFORMANCE.read_text(), re.DOTALL)
    assert text, table
    rows = re.findall(r"X\(([^)]*)\)", text.group(1))
    names = []
    for row in rows:
        words = [word.strip() for word in row.split(",")]
        template = f"<kvk::device::{words[1]}, {words[2]}, {words[3]}>" if "WGMMA" in table else ""
        names.append(f"kvk::device::{words[0]}{template}")
    assert names, table
    return names


TOY_HEADERS = ("toy_decode.cuh", "toy_hadamard.cuh", "toy_wgmma.cuh")
TOYS = [
    "kvk::device::toy_decode_kernel<kvk::device::ToyDecodeConfig>",
    "kvk::device::toy_combine_kernel<128>",
    "kvk::device::toy_hadamard_kernel<kvk::device::bf16>",
    "kvk::device::toy_hadamard_kernel<kvk::device::f16>",
]
WGMMA_TOYS = [
    "kvk::device::toy_gemm_kernel<kvk::device::ToyGemmConfig>",
    "kvk::device::toy_store_gemm_kernel<kvk::device::bf16>",
    "kvk::device::toy_store_gemm_kernel<kvk::device::f16>",
    "kvk::device::toy_pv_kernel<kvk::device::bf16>",
]


def compile_clean(source: str, arch: str, expressions: list[str]) -> nvrtc.Compiled:
    compiled = nvrtc.compile_source(source, arch, expressions=expressions)
    assert not compiled.problems(), "\n".join(compiled.problems())
    assert set(compiled.lowered.values()) <= {kernel.kernel for kernel in compiled.kernels}
    return compiled


@pytest.mark.parametrize(
    ("header", "kvk_arch"), [(name, 900) for name in HEADER_IDS] + [("ptx.h", 800), ("ptx.h", 1000)]
)
def test_header_compiles_alone_on_the_host(header: str, kvk_arch: int, tmp_path: Path) -> None:
    source = tmp_path / "alone.cc"
    source.write_text(f'#include "kvk/device/{header}"\n' * 2)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "no host compiler"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-DKVK_ARCH={kvk_arch}"]
    done = subprocess.run(
        [compiler, *flags, f"-I{ROOT / 'include'}", f"-I{ROOT / 'tests'}", str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("header", HEADER_IDS)
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_header_compiles_alone_with_nvrtc(header: str, arch: str) -> None:
    compiled = nvrtc.compile_source(f'#include "kvk/device/{header}"\n' * 2, arch)
    assert not compiled.warnings


# Headers that say what a kernel's parameters are also serve the launch code, which has neither CUDA nor the emulator.
@pytest.mark.parametrize("header", ["int.h", "tensor_map.h", "split.h"])
def test_parameter_header_needs_no_emulator(header: str, tmp_path: Path) -> None:
    source = tmp_path / "alone.cc"
    source.write_text(f'#include "kvk/device/{header}"\n')
    done = subprocess.run(
        ["g++", "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'include'}", str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_every_wrapper_compiles_clean(arch: str) -> None:
    expressions = instantiations("KVK_CONFORMANCE_CASES")
    if arch != "sm_80":
        expressions += instantiations("KVK_CONFORMANCE_TMA_CASES")
    if arch == "sm_90a":
        expressions += instantiations("KVK_CONFORMANCE_WGMMA_CASES")
    compile_clean('#include "emulator/conformance.cuh"\n', arch, expressions)


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_toy_kernels_compile_clean(arch: str) -> None:
    source = "".join(f'#include "emulator/kernels/{header}"\n' for header in TOY_HEADERS)
    compile_clean(source, arch, TOYS + (WGMMA_TOYS if arch == "sm_90a" else []))


def test_every_wrapper_has_a_conformance_kernel() -> None:
    used = set(re.findall(r"\b(?:ptx::)?(\w+)\b", CONFORMANCE.read_text()))
    for header in HEADERS:
        if not header.name.startswith("ptx_"):
            continue
        wrappers = set(re.findall(r"^KVK_DEVICE [\w ]+?(\w+)\(", header.read_text(), re.MULTILINE))
        wrappers -= {"mbar_test", "smem_u32"}  # inside the other wrappers
        wrappers -= {"set_max_registers_up", "set_max_registers_down"}  # in toy_gemm_kernel
        assert wrappers <= used, f"{header.name}: {sorted(wrappers - used)}"


def test_spills_and_local_memory_are_problems() -> None:
    source = """
    template <int n> __global__ void __launch_bounds__(1024, 2) greedy(float* p) {
      float x[n];
      #pragma unroll
      for (int i = 0; i < n; ++i) x[i] = p[i * 1024 + threadIdx.x];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < n; ++i) p[i * 1024 + threadIdx.x] = x[n - 1 - i] * x[i];
    }
    __global__ void indexed(float* p, int k) {
      float x[64];
      for (int i = 0; i < 64; ++i) x[i] = p[i];
      p[0] = x[k % 64];
    }
    """
    problems = nvrtc.compile_source(source, "sm_80", expressions=["greedy<100>", "indexed"]).problems()
    assert any("spill" in line for line in problems) and any("local memory" in line for line in problems)


def test_errors_carry_the_log() -> None:
    with pytest.raises(nvrtc.CompileError, match="nonsense"):
        nvrtc.compile_source("nonsense;", "sm_80")
