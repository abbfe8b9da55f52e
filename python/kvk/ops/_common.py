"""What the op families share: optional arguments, ``out=`` pairs, and fakes (shapes without data)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

# Of the ops with a fake, the defaults of their schemas: what call_attention need not hand on.
_DEFAULTS: dict[str, dict[str, Any]] = {}


def both(op: str, out: Tensor | None, lse: Tensor | None, prefix: str = "") -> tuple[Tensor, Tensor]:
    """out and lse, which go together."""
    if out is None or lse is None:
        missing = f"{prefix}{'out' if out is None else 'lse'}"
        raise RuntimeError(f"kvk::{op}: {prefix}out and {prefix}lse go together, got no {missing}")
    return out, lse


def call_attention(
    name: str, args: tuple[Any, ...], out: Tensor | None, lse: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """kvk::<name> of args with the options that are not at their default, into new tensors or into out and lse.

    The dispatcher takes about half a microsecond to parse a keyword.
    """
    op, defaults = getattr(torch.ops.kvk, name), _DEFAULTS[name]
    given = {
        option: value
        for option, value in options.items()
        if value is not None and (defaults[option] is None or value != defaults[option])
    }
    if out is None and lse is None:
        return op(*args, **given)
    out, lse = both(name, out, lse)
    op.out(*args, **given, out=out, lse=lse)
    return out, lse


def fake(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of the ops' arguments by name as the fake of kvk::<name> for each name.

    One meta tensor among real ones routes a call to the fake, past the kernels' own checks: so it first sees that all
    tensors are on one device.
    """

    def register(shapes: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _register_fake(name, shapes)
        return shapes

    return register


def attention_results(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    """out [..., H, Dv] and lse [..., H] of rows q [..., H, D]."""
    return q.new_empty((*q.shape[:-1], head_dim_v)), q.new_empty(q.shape[:-1], dtype=torch.float32)


def no_results(**arguments: Any) -> None:
    """The fake of an op that only writes into its arguments."""


def _register_fake(name: str, shapes: Callable[..., Any]) -> None:
    op, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.kvk, op), overload or "default")._schema
    names = [argument.name for argument in schema.arguments]
    _DEFAULTS.setdefault(op, {a.name: a.default_value for a in schema.arguments if a.has_default_value()})

    @library.register_fake(f"kvk::{name}")
    def checked(*args: Any, **options: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | options
        device = arguments[names[0]].device
        for found, tensor in arguments.items():
            if isinstance(tensor, Tensor) and tensor.device != device:
                raise RuntimeError(
                    f"kvk::{op}: {found} must be on {device} like {names[0]}, got {tensor.device}"
                )
        return shapes(**arguments)
