"""The ceilings of this machine, measured in the run they are used in.

Native passes (native/ceilings.cc) over buffers that torch allocated, so that pages and alignment are those of
the ops' own tensors. A row's ceiling is measured again in every round of that row, between the
implementations; what is kept for the picture is the best of the whole run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "native" / "ceilings.cc"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"]
READ_BYTES = 1 << 30
FMA_ITERATIONS = 1_000_000


def _cpu_flags() -> str:
    """What -march=native depends on: the cached library of one machine is not loaded on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kvk" / "bench"


def load_native() -> ctypes.CDLL:
    """Compiles native/ceilings.cc with the system compiler (CXX, g++, c++ or clang++), unless this very
    content was compiled on this machine before, and loads it.

    Raises RuntimeError when there is no compiler or it fails."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    compiler = next((found for found in map(shutil.which, wanted) if found), None)
    if compiler is None:
        raise RuntimeError(f"the ceilings are measured by native code: no C++ compiler among {wanted}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    text = "\0".join([SOURCE.read_text(), *FLAGS, version, _cpu_flags()])
    library = _cache_folder() / f"ceilings-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "ceilings.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            os.replace(made, library)
    native = ctypes.CDLL(str(library))
    pointer, size, count = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, arguments in {
        "read": [pointer, size, count, count],
        "copy": [pointer, pointer, size, count, count],
        "triad": [pointer, pointer, pointer, size, count, count],
        "fma": [ctypes.c_int64, count],
        "fma_flops": [ctypes.c_int64, count],
    }.items():
        function = getattr(native, f"kvk_bench_{name}")
        function.argtypes, function.restype = arguments, ctypes.c_double
    return native


class Ceilings:
    """Measures one pass of a ceiling at a time. Kinds: read, copy, triad (GB/s), fma (GFLOP/s, fp32).

    threads: the number the ops run with. buffer_bytes: 1 GiB unless a test wants less; it must be far larger
    than the caches for the figures to mean memory."""

    def __init__(self, threads: int, buffer_bytes: int = READ_BYTES) -> None:
        self.native = load_native()
        self.threads = threads
        self.vector_bytes: int = self.native.kvk_bench_vector_bytes()
        self._bytes = buffer_bytes // 4096 * 4096
        # Random: a page that was never written is one shared page of zeros, which reads from the cache.
        self._source = torch.randn(self._bytes // 4)
        self._target = torch.randn(self._bytes // 8)
        for tensor in (self._source, self._target):
            if tensor.data_ptr() % 64:
                raise RuntimeError("the ceiling buffers must be 64-byte aligned")
        self.samples: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._variants = {
            kind: range(getattr(self.native, f"kvk_bench_{kind}_variants")())
            for kind in ("read", "copy", "triad")
        }
        self._best_variant: dict[tuple[str, int], int] = {}

    def _pass(self, kind: str, variant: int, threads: int) -> float:
        native, source, target = self.native, self._source.data_ptr(), self._target.data_ptr()
        whole, half = self._bytes, self._bytes // 2
        work: float
        seconds: float
        if kind == "read":
            work, seconds = whole, native.kvk_bench_read(source, whole, threads, variant)
        elif kind == "copy":
            work, seconds = 2 * half, native.kvk_bench_copy(target, source, half, threads, variant)
        elif kind == "triad":
            second = source + half
            work, seconds = 3 * half, native.kvk_bench_triad(target, source, second, half, threads, variant)
        elif kind == "fma":
            work = native.kvk_bench_fma_flops(FMA_ITERATIONS, threads)
            seconds = native.kvk_bench_fma(FMA_ITERATIONS, threads)
        else:
            raise ValueError(f"no ceiling {kind!r}")
        return work / seconds / 1e9

    def measure(self, kind: str, threads: int | None = None) -> float:
        """One pass with the variant that was best at first sight: GB/s, or GFLOP/s for fma."""
        threads = threads or self.threads
        key = (kind, threads)
        if kind in self._variants and key not in self._best_variant:
            rates = {v: max(self._pass(kind, v, threads) for _ in range(2)) for v in self._variants[kind]}
            self._best_variant[key] = max(rates, key=lambda v: rates[v])
        rate = self._pass(kind, self._best_variant.get(key, 0), threads)
        self.samples[key].append(rate)
        return rate

    def survey(self, passes: int = 3) -> None:
        """Every ceiling, with one thread and with all: the lines of the picture."""
        for kind in ("read", "copy", "triad", "fma"):
            for threads in sorted({1, self.threads}):
                for _ in range(passes):
                    self.measure(kind, threads)

    def best(self, kind: str, threads: int | None = None) -> float:
        """The best pass of the run so far."""
        return max(self.samples[kind, threads or self.threads])

    def as_json(self) -> list[dict[str, object]]:
        """One entry per kind and thread count: best, median, number of passes, unit."""
        return [
            {
                "kind": kind,
                "threads": threads,
                "unit": "GFLOP/s" if kind == "fma" else "GB/s",
                "best": max(rates),
                "median": statistics.median(rates),
                "passes": len(rates),
            }
            for (kind, threads), rates in sorted(self.samples.items())
        ]
