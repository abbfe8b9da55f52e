"""Array libraries: how each hands over its memory, and makes the arrays that results go to."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

# Their arrays cannot be written, and DLPack does not always say so.
IMMUTABLE = ("jax", "jaxlib", "tensorflow")
ON_A_CARD = (2, 13)  # DLPack's device types of CUDA memory, plain and managed


@dataclass(frozen=True)
class BFloat16Bits:
    """A uint16 array whose elements are the bits of bfloat16 numbers, for libraries that have no such dtype."""

    array: Any


def bfloat16_bits(array: Any) -> BFloat16Bits:
    """Passes a uint16 array (NumPy's, CuPy's) for bfloat16. Results of a call are then uint16 arrays of bits, too."""
    if str(getattr(array, "dtype", None)) != "uint16":
        raise TypeError(f"bfloat16_bits wants an array of uint16, got {getattr(array, 'dtype', type(array))}")
    return BFloat16Bits(array)


def root_of(array: Any) -> str:
    """The library an array is from, "numpy"."""
    return type(array).__module__.partition(".")[0]


def handed(array: Any) -> tuple[Any, str, Any]:
    """What the module takes for an array: a producer of DLPack, the dtype that the producer cannot name, the array."""
    if isinstance(array, BFloat16Bits):
        return array.array, "bfloat16", array
    if str(getattr(array, "dtype", "")) == "bfloat16" and root_of(array) in ("numpy", "cupy"):
        return (
            array.view("uint16"),
            "bfloat16",
            array,
        )  # of ml_dtypes: DLPack knows it, these libraries do not export it
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"kvk.array takes arrays that have __dlpack__, got {type(array).__name__}")
    return array, "", array


def empty(like: Any, shape: list[int], dtype: str) -> tuple[Any, str, Any]:
    """A new array of the library and on the device of `like`, as handed()."""
    bits = isinstance(like, BFloat16Bits)
    source = like.array if bits else like
    root = root_of(source)
    if root == "torch":
        torch = sys.modules["torch"]
        return handed(torch.empty(shape, dtype=getattr(torch, dtype), device=source.device))
    if root == "cupy":
        cupy = sys.modules["cupy"]
        with source.device:
            return _sixteen(cupy, shape, dtype, bits)
    if source.__dlpack_device__()[0] in ON_A_CARD:
        raise RuntimeError(
            f"kvk.array: new arrays on a card come from CuPy or torch, and this one is of {root}: give out= and lse="
        )
    import numpy

    return _sixteen(numpy, shape, dtype, bits)


def _sixteen(xp: Any, shape: list[int], dtype: str, bits: bool) -> tuple[Any, str, Any]:
    """xp.empty, with bfloat16 as ml_dtypes has it if it is there, else as bits."""
    if dtype != "bfloat16":
        array = xp.empty(shape, dtype=dtype)
        return array, "", array
    raw = xp.empty(shape, dtype="uint16")
    if bits or xp.__name__ != "numpy":
        return raw, dtype, raw
    try:
        import ml_dtypes
    except ImportError:
        return raw, dtype, raw
    return raw, dtype, raw.view(ml_dtypes.bfloat16)


def finished(result: Any, like: Any) -> Any:
    """A result in the library of the call's first array: NumPy memory goes back to it by DLPack."""
    source = like.array if isinstance(like, BFloat16Bits) else like
    if root_of(result) != "numpy" or root_of(source) in ("numpy", "cupy", "torch"):
        return result
    namespace = getattr(source, "__array_namespace__", None)
    if namespace is None or not hasattr(namespace(), "from_dlpack") or str(result.dtype) == "bfloat16":
        return result
    return namespace().from_dlpack(result)


def stream_of(arrays: list[Any], given: int | None) -> tuple[int | None, int]:
    """(what __dlpack__ is told, the address to queue on): CuPy's current stream on the card of the first array."""
    for array in arrays:
        kind, index = array.__dlpack_device__()
        if kind not in ON_A_CARD:
            return None, 0
        if given is None:
            cupy = sys.modules.get("cupy")
            if cupy is not None:
                with cupy.cuda.Device(index):
                    given = int(cupy.cuda.get_current_stream().ptr)
            elif root_of(array) == "torch":
                given = int(sys.modules["torch"].cuda.current_stream(index).cuda_stream)
        address = given or 0
        return address or 1, address  # DLPack's 1 is the default stream, whose address is null
    return None, 0
