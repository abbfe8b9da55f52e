"""`python -m kvk info`: versions, library, instruction-set level, threads and CUDA, as a bug report wants them."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from kvk import _load, cuda


def build_info() -> dict[str, str]:
    """What the loaded libkvk.so says of itself: version, cpu_level (in use), cpu_levels (built, lowest first),
    compiler, torch_headers."""
    library = ctypes.CDLL(_load.path_of_library())  # a second handle of the library that is loaded already
    library.kvk_build_info.restype = ctypes.c_char_p
    text: bytes = library.kvk_build_info()
    return dict(line.split("=", 1) for line in text.decode().splitlines())


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _level(info: dict[str, str]) -> str:
    asked = os.environ.get("KVK_CPU_LEVEL")
    why = "KVK_CPU_LEVEL" if asked else "the best of this build that this machine has"
    return f"{info['cpu_level']} ({why})"


def rows() -> list[tuple[str, str]]:
    """(name, value) of every line."""
    info = build_info()
    return [
        ("kvk", info["version"]),
        ("library", _load.path_of_library()),
        ("built with", f"{info['compiler']}, headers of torch {info['torch_headers']}"),
        ("CPU level", _level(info)),
        ("CPU levels", f"{info['cpu_levels']} (in this build)"),
        ("threads", f"{torch.get_num_threads()} (torch.get_num_threads)"),
        ("torch", torch.__version__),
        *cuda.info_rows(),
        ("transformers", _installed("transformers")),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
    ]


def main() -> int:
    """Prints the lines; the exit status."""
    for name, value in rows():
        print(f"{name + ':':<14}{value}")
    return 0
