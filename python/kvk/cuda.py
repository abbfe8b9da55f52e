"""The CUDA side: what was found, and compiling kernels ahead of their first use.

Nothing here is needed to run an op on a CUDA tensor: the library opens the driver and NVRTC by itself and compiles
what it needs. See docs/cuda.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import site
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvk import _load

_ARCH = re.compile(r"sm_\d{2,3}a?")


@dataclass(frozen=True)
class Kernel:
    """One instantiation of a kernel template.

    Attributes:
        header: The file that defines it, as ``#include`` writes it: ``kvk/device/paged_decode.cuh``.
        expression: The C++ expression that names it: ``kvk::device::paged_decode_kernel<...>``.
    """

    header: str
    expression: str


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for one architecture, and what ptxas said of it.

    Registers, stack and spills are per thread, shared memory (the static part) per block; -1: ptxas did not say.

    Attributes:
        origin: Where the code came from: "memory" (of this process), "shipped", "cache" or "compiled".
        key: Its name in the cache, the SHA-256 of everything that decides the code.
        seconds: What the call took.
        stack_bytes: Local memory: spilled registers, and arrays that did not fit registers.
        log: The compiler's whole output.
    """

    kernel: Kernel
    arch: str
    origin: str
    key: str
    seconds: float
    cubin_bytes: int
    lowered_name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    log: str

    @property
    def warnings(self) -> list[str]:
        """The warnings of NVRTC and ptxas, a line each."""
        return [line for line in self.log.splitlines() if "warning" in line.lower()]


def _library_folders() -> Iterator[tuple[Path, str]]:
    """(folder, pattern) of the places where pip, conda and the CUDA toolkit put NVRTC."""
    packages = [*sys.path, *site.getsitepackages(), site.getusersitepackages()]
    for name in dict.fromkeys(packages):
        nvidia = Path(name) / "nvidia"
        if name and nvidia.is_dir():
            yield nvidia, "*/lib/libnvrtc.so.*"  # nvidia/cu13/lib, nvidia/cuda_nvrtc/lib
    yield Path(torch.__file__).parent / "lib", "libnvrtc*.so*"
    yield Path(sys.prefix) / "lib", "libnvrtc.so.*"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "lib64", "libnvrtc.so.*"


def nvrtc_files() -> list[str]:
    """The NVRTC libraries of this environment, found as files (no package is imported), best first.

    Those of the CUDA major version that torch was built for come first, then later versions before earlier ones.
    """
    wanted = (torch.version.cuda or "").split(".")[0]
    found: dict[str, tuple[bool, tuple[int, ...]]] = {}
    for folder, pattern in _library_folders():
        for path in sorted(folder.glob(pattern)):
            match = re.fullmatch(r"libnvrtc(-[0-9a-f]+)?\.so\.([0-9.]+)", path.name)
            if match:
                version = tuple(int(part) for part in match[2].split(".") if part)
                found.setdefault(os.path.realpath(path), (str(version[0]) == wanted, version))
    return sorted(found, key=lambda path: found[path], reverse=True)


def provide_nvrtc() -> None:
    """Tells the library where NVRTC may lie. Part of `import kvk`; $KVK_NVRTC, if set, goes before."""
    _ops()._set_nvrtc_candidates(nvrtc_files())


def provide_cubins() -> None:
    """Tells the library of the cubins shipped with the package, in its folder ``cubins``, if it has one. Part of
    `import kvk`."""
    folder = Path(__file__).parent / "cubins"
    if folder.is_dir():
        _ops()._set_shipped_cubins(str(folder))


def _ops() -> Any:
    return getattr(torch.ops, _load.NAMESPACE)


def info() -> dict[str, Any]:
    """What the library finds of CUDA on this machine, now.

    Returns:
        driver: ``{"cuda": "12.8", "devices": [...]}``, each device with name, capability, arch (None for a card that
            kvk does not run on), num_sms and max_shared_per_block (bytes); or ``{"error": why}``.
        nvrtc: ``{"version": "12.8", "path": file}`` or ``{"error": why}``.
        torch_cuda: Whether this torch has CUDA (its current stream can be asked for).
        cache: The folder of compiled kernels, "" when there is none.
        cache_files, cache_bytes: What lies in it.
        device_sources: SHA-256 of the kernels' sources.
    """
    found: dict[str, Any] = json.loads(_ops()._runtime_info())
    files = cache_files()
    found["cache_files"] = len(files)
    found["cache_bytes"] = sum(path.stat().st_size for path in files if path.is_file())
    return found


def info_rows() -> list[tuple[str, str]]:
    """(name, value) of the lines that `python -m kvk info` prints of CUDA."""
    found = info()
    driver, nvrtc = found["driver"], found["nvrtc"]
    rows = [("CUDA driver", driver.get("error") or f"CUDA {driver['cuda']}")]
    for index, card in enumerate(driver.get("devices", [])):
        target = card["arch"] or f"compute capability {card['capability']}, too old for kvk"
        shared = card["max_shared_per_block"] // 1024
        rows.append(
            (f"cuda:{index}", f"{card['name']}, {target}, {card['num_sms']} SMs, {shared} KiB shared memory")
        )
    rows.append(("NVRTC", nvrtc.get("error") or f"{nvrtc['version']}, {nvrtc['path']}"))
    size = found["cache_bytes"] / 2**20
    rows.append(("cubin cache", f"{found['cache'] or 'off'}, {found['cache_files']} files, {size:.1f} MiB"))
    return rows


def cache_files() -> list[Path]:
    """The compiled kernels in the cache on disk."""
    folder = json.loads(_ops()._runtime_info())["cache"]
    return sorted(Path(folder).glob("*.cubin")) if folder else []


def clear_cache() -> int:
    """Deletes the compiled kernels on disk; how many. Kernels that are loaded stay loaded."""
    files = cache_files()
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)


def default_kernels() -> list[Kernel]:
    """The instantiations that common models use; what `precompile` compiles when it is told nothing else.

    Raises:
        RuntimeError: This build of libkvk.so has no CUDA kernels.
    """
    operation = getattr(_ops(), "_default_kernels", None)
    if operation is None:
        raise RuntimeError(
            "kvk: this build of libkvk.so has no list of CUDA kernels (torch.ops.kvk._default_kernels)"
        )
    return [Kernel(entry["header"], entry["expression"]) for entry in json.loads(operation())]


def compile_kernel(kernel: Kernel, arch: str, folder: str | os.PathLike[str] | None = None) -> CompiledKernel:
    """Compiles one kernel for one architecture, or finds it compiled. Needs NVRTC, and no card.

    Args:
        kernel: What to compile.
        arch: "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a", ...
        folder: Compile, whatever the cache has, and store here: cubins to ship. Default: the cache.

    Raises:
        RuntimeError: No NVRTC, or one too old for `arch`; the kernel does not compile (with the compiler's log).
    """
    text = _ops()._compile_kernel(kernel.header, kernel.expression, arch, os.fspath(folder) if folder else "")
    return CompiledKernel(kernel=kernel, arch=arch, **json.loads(text))


def _cards() -> list[str | None]:
    """The architecture of every card; None for one that kvk does not run on."""
    driver = json.loads(_ops()._runtime_info())["driver"]
    return [card["arch"] for card in driver.get("devices", [])]


def _checked_archs(archs: Iterable[str] | str | None) -> list[str]:
    if archs is None:
        present = list(dict.fromkeys(arch for arch in _cards() if arch))
        if not present:
            raise RuntimeError(
                "kvk: there is no card that kvk runs on; say which architectures to compile for"
            )
        return present
    chosen = [archs] if isinstance(archs, str) else list(archs)
    for arch in chosen:
        if not _ARCH.fullmatch(arch):
            raise ValueError(f"kvk: archs must be names like 'sm_80' or 'sm_90a', got {arch!r}")
    return chosen


def precompile(
    archs: Iterable[str] | str | None = None,
    kernels: Sequence[Kernel] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
) -> list[CompiledKernel]:
    """Compiles kernels ahead, into the cache on disk, and loads them onto the cards of this machine that they fit.

    A loaded kernel's first launch costs nothing more, and can be captured into a CUDA graph.

    Args:
        archs: Architectures, e.g. ["sm_90a"]. Default: those of the cards present.
        kernels: Default: `default_kernels()`.
        output: Compile into this folder instead, as cubins to ship; nothing is loaded.
        jobs: Kernels compiled at once. Default: one a core, 8 at most.

    Returns:
        One entry per kernel and architecture.

    Raises:
        RuntimeError: As `compile_kernel` and `default_kernels`; no card and no `archs`.
        ValueError: `archs` has a name of the wrong form, or `jobs` is below 1.
    """
    if jobs is None:
        jobs = min(8, len(os.sched_getaffinity(0)))
    if jobs < 1:
        raise ValueError(f"kvk: jobs must be 1 or more, got {jobs}")
    targets = _checked_archs(archs)
    wanted = list(default_kernels() if kernels is None else kernels)
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(
            pool.map(
                lambda pair: compile_kernel(pair[1], pair[0], output),
                [(arch, kernel) for arch in targets for kernel in wanted],
            )
        )
    if output is None and torch.cuda.is_available():
        for device, arch in enumerate(_cards()):
            for kernel in wanted if arch in targets else []:
                _ops()._load_kernel(kernel.header, kernel.expression, device)
    return compiled


def _line(done: CompiledKernel) -> str:
    spilled = done.spill_store_bytes + done.spill_load_bytes
    return (
        f"{done.arch:<8} {done.origin:<8} {done.seconds:6.2f} s {done.registers:4d} registers "
        f"{done.shared_bytes:6d} B shared {max(spilled, 0):4d} B spills  {done.kernel.expression}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvk precompile",
        description="Compile the CUDA kernels ahead of their first use. Needs NVRTC, and no card.",
    )
    parser.add_argument(
        "--arch", nargs="+", metavar="SM", help="sm_80, sm_90a, ... (default: the cards present)"
    )
    parser.add_argument(
        "--match", metavar="TEXT", default="", help="only kernels whose expression has this text"
    )
    parser.add_argument("--output", metavar="FOLDER", help="cubins to ship, instead of into the cache")
    parser.add_argument("--jobs", metavar="N", type=int, help="kernels compiled at once")
    parser.add_argument("--list", action="store_true", help="list the kernels and stop")
    parser.add_argument("--clear", action="store_true", help="empty the cache first")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m kvk precompile`; the exit status: 0 all compiled, 1 an error, 2 wrong options."""
    options = _parser().parse_args(argv)
    provide_nvrtc()
    start = time.perf_counter()
    try:
        if options.clear:
            print(f"deleted {clear_cache()} kernels")
        kernels = [kernel for kernel in default_kernels() if options.match in kernel.expression]
        if options.list:
            print("\n".join(f"{kernel.header}  {kernel.expression}" for kernel in kernels))
            return 0
        if not kernels:
            print(f"kvk precompile: no kernel has {options.match!r} in its expression", file=sys.stderr)
            return 2
        done = precompile(options.arch, kernels, output=options.output, jobs=options.jobs)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(map(_line, done)))
    place = options.output or json.loads(_ops()._runtime_info())["cache"] or "memory alone, the cache is off"
    print(f"{len(done)} kernels in {time.perf_counter() - start:.1f} s, in {place}")
    return 0
