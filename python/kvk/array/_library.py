"""Finds and loads the module: KVK_ARRAY_LIBRARY if set (a build of your own), else the one in the package."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any


def _load() -> Any:
    path = os.environ.get("KVK_ARRAY_LIBRARY")
    if not path:
        try:
            return importlib.import_module("kvk.array._array")
        except ModuleNotFoundError as error:
            raise ImportError(
                "kvk.array: its module is not built for this Python; `pip install ./packages/kvk-array` in a checkout "
                "builds it (docs/array.md)"
            ) from error
    spec = importlib.util.spec_from_file_location("kvk.array._array", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"kvk.array: KVK_ARRAY_LIBRARY={path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


library = _load()
