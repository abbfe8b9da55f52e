"""Saved calls: reading what KVK_DUMP has written (safetensors, docs/record.md)."""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SavedCallError(ValueError):
    """The file is no saved call, or not whole."""


@dataclass(frozen=True)
class SavedArgument:
    """One argument; value is a tensor's description (a dict) or the plain value."""

    name: str
    role: str  # "input", "in_out" or "output"
    value: Any

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, saved or (an output) only described."""
        return isinstance(self.value, dict) and "tensor" in self.value


@dataclass(frozen=True)
class SavedCall:
    """A call as it was recorded. tensors() reads the data anew each time, so that in-place ops can run twice."""

    path: Path
    version: str
    op: str
    overload: str
    cpu_level: str
    arguments: tuple[SavedArgument, ...]

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """The saved tensors by name, with the strides they had. Rows that the call does not name are zeros.

        Raises:
            SavedCallError: a tensor was of a dtype that is not saved, which an op refuses.
        """
        with self.path.open("rb") as file:
            memory = mmap.mmap(
                file.fileno(), 0, access=mmap.ACCESS_COPY
            )  # pages are read when they are touched
        header, start = _header(memory, self.path)
        found = {}
        for argument in self.arguments:
            if argument.name not in header:
                if argument.is_tensor and argument.role != "output":
                    raise SavedCallError(f"{self.path}: {argument.name} is of a dtype that is not saved")
                continue
            entry = header[argument.name]
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            if end == begin:
                x = torch.empty(shape, dtype=dtype)
            else:
                count = (end - begin) // dtype.itemsize
                x = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + begin).reshape(shape)
            found[argument.name] = _placed(x, argument.value["stride"], argument.value["alignment"]).to(
                device
            )
        return found

    def plain(self) -> dict[str, Any]:
        """The arguments that are no tensors and were given, and None where the op wants to be told so."""
        schema = getattr(torch.ops.kvk, self.op).default._schema
        wanted = {a.name for a in schema.arguments if not a.has_default_value()}
        given = [a for a in self.arguments if not a.is_tensor and (a.value is not None or a.name in wanted)]
        return {a.name: _plain(a.value) for a in given}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return (
            float.fromhex(value["float"])
            if "float" in value
            else getattr(torch, value["name"], value["name"])
        )
    return value


def _placed(x: Tensor, strides: list[int], alignment: int) -> Tensor:
    """x in memory as the call had it: the strides, and the start's distance from a multiple of 64 bytes."""
    if min(strides, default=0) < 0 or x.numel() == 0:
        strides = list(x.stride())  # torch has no negative strides: the values are what counts then
    alignment -= alignment % x.element_size()
    if x.data_ptr() % 64 == alignment and list(x.stride()) == strides:
        return x  # still the file's pages
    last = (
        sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) if x.numel() else -1
    )
    memory = torch.zeros((last + 1) * x.element_size() + 128, dtype=torch.uint8)
    start = (alignment - memory.data_ptr()) % 64
    moved = memory[start : start + (last + 1) * x.element_size()].view(x.dtype).as_strided(x.shape, strides)
    distinct = tuple(slice(0, size if stride else 1) for size, stride in zip(x.shape, strides, strict=True))
    moved[distinct] = x[distinct]  # an expanded dimension is written once
    return moved


def _header(data: mmap.mmap, path: Path) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        raise SavedCallError(f"{path} is not a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise SavedCallError(f"{path} is not a safetensors file, or is cut short")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise SavedCallError(f"{path} is not a safetensors file: {error}") from None
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        begin, end = entry["data_offsets"]
        if end - begin != size or 8 + length + end > len(data):
            raise SavedCallError(f"{path} is cut short or damaged at {name}")
    return header, 8 + length


def read_call(path: str | Path) -> SavedCall:
    """The call in a file.

    Raises:
        SavedCallError: the file is not one that KVK_DUMP has written, or not whole. OSError: it cannot be read.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise SavedCallError(f"{path} is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header, _ = _header(data, path)
    about = header.get("__metadata__", {})
    if about.get("format") != "kvk.call.1":
        raise SavedCallError(f"{path} is no saved call of kvk (its format is {about.get('format')!r})")
    arguments = tuple(SavedArgument(a["argument"], a["role"], a["value"]) for a in json.loads(about["call"]))
    return SavedCall(path, about["kvk"], about["op"], about["overload"], about["cpu_level"], arguments)
