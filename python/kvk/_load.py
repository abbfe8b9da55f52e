"""Loads libkvk.so, once, and refuses a namespace that another library has already defined.

Two libraries that define one torch namespace end the process (a segmentation fault inside torch), so the loader asks
first.
"""

from __future__ import annotations

import os
from importlib.resources import files

import torch

NAMESPACE = "kvk"
_MINIMUM_TORCH = (2, 10)
_loaded: str | None = None


def path_of_library() -> str:
    """The file of libkvk.so: KVK_LIBRARY if set (a build of your own), else the one in the package."""
    return os.path.realpath(os.environ.get("KVK_LIBRARY") or str(files("kvk") / "libkvk.so"))


def load(path: str | None = None) -> None:
    """Loads the kernels from `path` (default: path_of_library()).

    Raises:
        ImportError: the file is missing, torch is older than 2.10, or another library has defined torch.ops.kvk.
    """
    global _loaded
    path = os.path.realpath(path or path_of_library())
    if _loaded == path:
        return
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MINIMUM_TORCH:
        raise ImportError(f"kvk needs torch 2.10 or later, found {torch.__version__}")
    if torch._C._dispatch_has_kernel(f"{NAMESPACE}::paged_decode"):
        raise ImportError(
            f"torch.ops.{NAMESPACE} is already defined by {_loaded or 'another library'}; not loading {path}"
        )
    if not os.path.exists(path):
        raise ImportError(
            f"kvk: {path} does not exist; build it with `pip install .` or, in a checkout, `make build`"
        )
    torch.ops.load_library(path)
    _loaded = path
