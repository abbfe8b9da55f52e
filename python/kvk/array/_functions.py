"""The functions of kvk.array, made from the schemas that the module registers: no op is written down here."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvk.array._arrays import IMMUTABLE, BFloat16Bits, empty, finished, handed, root_of, stream_of
from kvk.array._format_classes import dtype_name
from kvk.array._library import library

_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """An argument of a schema. default: _REQUIRED where there is none."""

    name: str
    type: str
    default: Any
    written: bool
    keyword_only: bool


def _default(text: str | None, type_name: str) -> Any:
    if text is None:
        return _REQUIRED
    return "float32" if type_name == "ScalarType" else ast.literal_eval(text)


def _schemas() -> dict[str, tuple[list[Argument], str]]:
    found = {}
    for op, arguments, text, _ in library.ops():
        found[op] = (
            [
                Argument(name, kind, _default(default, kind), *flags)
                for name, kind, default, *flags in arguments
            ],
            text,
        )
    return found


class Function:
    """One op: its plain form, and the .out form if it has one."""

    def __init__(self, name: str, plain: list[Argument], out: list[Argument] | None, text: str) -> None:
        self.name, self.arguments = name, plain
        self.outputs = [] if out is None else [a for a in out if a.name not in {p.name for p in plain}]
        parameters = [
            inspect.Parameter(
                a.name,
                inspect.Parameter.KEYWORD_ONLY if a.keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=a.default,
            )
            for a in plain
        ]
        parameters += [
            inspect.Parameter(a.name, inspect.Parameter.KEYWORD_ONLY, default=None) for a in self.outputs
        ]
        parameters.append(inspect.Parameter("stream", inspect.Parameter.KEYWORD_ONLY, default=None))
        self.signature = inspect.Signature(parameters)
        self.doc = (
            f"kvk.{name} on arrays: ``{text}``\n\nstream: a CUstream's address, default CuPy's current one."
        )

    def __call__(self, *args: Any, **options: Any) -> Any:
        given = self.signature.bind(*args, **options)
        values = given.arguments
        self._add_format(values)
        outputs = [values.get(a.name) for a in self.outputs]
        with_out = any(x is not None for x in outputs)
        if with_out and any(x is None for x in outputs):
            names = [a.name for a in self.outputs]
            missing = next(a.name for a, x in zip(self.outputs, outputs, strict=True) if x is None)
            raise RuntimeError(f"kvk::{self.name}: {' and '.join(names)} go together, got no {missing}")
        arguments = self.arguments + (self.outputs if with_out else [])
        arrays = [values[a.name] for a in arguments if "Tensor" in a.type and values.get(a.name) is not None]
        sources = [x.array if isinstance(x, BFloat16Bits) else x for x in arrays]
        told, address = stream_of([x for x in sources if hasattr(x, "__dlpack__")], values.get("stream"))
        stack = [self._convert(a, values.get(a.name, a.default)) for a in arguments]
        op = f"{self.name}.out" if with_out else self.name
        results = library.call(op, stack, told, address, empty)
        if with_out:
            results = outputs
        elif not results:
            return None
        else:
            results = [finished(x, arrays[0]) for x in results]
        return results[0] if len(results) == 1 else tuple(results)

    def _add_format(self, values: dict[str, Any]) -> None:
        """What a format says beside its numbers (the clips of a QuantFormat) goes to the arguments of that name."""
        fmt = values.get("fmt")
        if fmt is None or not hasattr(fmt, "numbers"):
            return
        for a in self.arguments:
            if a.keyword_only and a.name not in values and hasattr(fmt, a.name):
                values[a.name] = getattr(fmt, a.name)
        values["fmt"] = fmt.numbers

    def _convert(self, argument: Argument, value: Any) -> Any:
        if "Tensor" in argument.type and value is not None:
            source = value.array if isinstance(value, BFloat16Bits) else value
            if argument.written and root_of(source) in IMMUTABLE:
                raise RuntimeError(
                    f"kvk::{self.name}: {argument.name} is written, and arrays of {root_of(source)} cannot be"
                )
            return handed(value)
        return dtype_name(value) if argument.type == "ScalarType" else value


def make_functions() -> dict[str, Callable[..., Any]]:
    """The public ops by name."""
    schemas = _schemas()
    functions: dict[str, Callable[..., Any]] = {}
    for op, (arguments, text) in schemas.items():
        if op.startswith("_") or "." in op:
            continue
        out = schemas.get(f"{op}.out")
        functions[op] = _as_function(Function(op, arguments, out and out[0], text))
    return functions


def _as_function(call: Function) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        return call(*args, **options)

    function.__name__ = function.__qualname__ = call.name
    function.__module__ = "kvk.array"
    function.__doc__ = call.doc
    function.__signature__ = call.signature  # type: ignore[attr-defined]
    return function
