"""`python -m kvk replay`: runs a saved call again and holds it against the reference."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvk import reference
from kvk.formats import format_of
from kvk.saved import SavedCall, SavedCallError, read_call

# Beside twice the error of plain torch in the same dtype, in units of the dtype's epsilon at the scale of the row: the
# rule of docs/conventions.md.
FLOOR_ULPS = {torch.float32: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5}


@dataclass(frozen=True)
class Expected:
    """A result of the reference. plain: the same in plain torch of the kernel's dtype; None asks for equal bits.

    errors_of: what the scale of errors is the largest element of: the "row", the "tensor" (gradients, whose rows are
    sums of terms that cancel), or the "element" itself where it is over 1 (lse).
    """

    exact: Tensor
    plain: Tensor | None = None
    errors_of: str = "row"


Results = dict[str, Tensor]
Reference = Callable[[dict[str, Any]], dict[str, Expected]]


def _named(names: tuple[str, ...], results: Any) -> Results:
    return dict(zip(names, results if isinstance(results, tuple) else (results,), strict=True))


def _both_ways(
    function: Callable[..., Any], names: tuple[str, ...], first: str, errors_of: str = "row"
) -> Reference:
    """A reference that takes compute_dtype; `first` is the argument that gives the op its dtype."""

    def run(arguments: dict[str, Any]) -> dict[str, Expected]:
        exact = _named(names, function(**arguments))
        plain = _named(names, function(**arguments, compute_dtype=arguments[first].dtype))
        scales = {name: "element" if name == "lse" else errors_of for name in names}
        return {name: Expected(exact[name], plain[name], scales[name]) for name in names}

    return run


def _exact(function: Callable[..., Any], names: tuple[str, ...]) -> Reference:
    """A reference whose bits are the op's."""
    return lambda arguments: {name: Expected(x) for name, x in _named(names, function(**arguments)).items()}


def _in_place(function: Callable[..., Any], names: tuple[str, ...]) -> Reference:
    """The same, for an op that changes its arguments."""

    def run(arguments: dict[str, Any]) -> dict[str, Expected]:
        function(**arguments)
        return {name: Expected(arguments[name]) for name in names}

    return run


def _with_format(function: Callable[..., Any]) -> Callable[..., Any]:
    """A format as an object, with the clips that travel beside it."""

    def run(*, fmt: list[int], **arguments: Any) -> Any:
        clips = {name: arguments.pop(name) for name in ("k_clip", "v_clip") if name in arguments}
        return function(fmt=replace(format_of(fmt), **clips), **arguments)

    return run


def _named_records(function: Callable[..., Any]) -> Callable[..., Any]:
    """Only the records that the table names: the reference reads whole pools, and most of a saved pool is zeros."""

    def run(*, k_pool: Tensor, v_pool: Tensor, page_indices: Tensor, **arguments: Any) -> Any:
        page, tag = page_indices & 0x0FFFFFFF, page_indices >> 28
        is_record = (tag == 0) & (page < k_pool.shape[0])
        used, place = torch.unique(torch.where(is_record, page, 0), return_inverse=True)
        bias = arguments.pop("key_bias", None)
        if bias is not None:
            arguments["key_bias"] = torch.cat([bias[: k_pool.shape[0]][used.long()], bias[k_pool.shape[0] :]])
        indices = torch.where(is_record, place.to(page_indices.dtype), page_indices)
        used = used.long()
        return function(k_pool=k_pool[used], v_pool=v_pool[used], page_indices=indices, **arguments)

    return run


def _hadamard(x: Tensor, *, scale: float | None = None, transpose: bool = False, **other: Any) -> Tensor:
    return reference.hadamard(x, scale=scale, transpose=transpose, **other)


def _transform_in_place(arguments: dict[str, Any]) -> dict[str, Expected]:
    (result,) = _both_ways(_hadamard, ("x",), "x")(arguments).values()
    return {"x": result}


def _lightning_backward(
    *, decay_grad: bool = True, log_decay: Tensor | None, initial_state: Tensor | None = None, **other: Any
) -> tuple[Tensor, ...]:
    """What the op was not asked for is empty."""
    *grads, decay, state = reference.lightning_attention_backward(
        log_decay=log_decay, initial_state=initial_state, **other
    )
    decay = decay if decay_grad and log_decay is not None else decay.new_empty(0)
    return *grads, decay, state if initial_state is not None else state.new_empty(0)


_ATTENTION = ("out", "lse")
_GRADIENTS = ("dq", "dk", "dv")
_LIGHTNING_GRADIENTS = ("grad_q", "grad_k", "grad_v", "grad_log_decay", "grad_initial_state")
_LINEAR = ("out", "den", "final_state", "final_z")
_LINEAR_GRADIENTS = (
    "grad_q",
    "grad_k",
    "grad_v",
    "grad_q_den",
    "grad_k_den",
    "grad_initial_state",
    "grad_initial_z",
)
# Every op that can be replayed against a reference: its results and how to get them. Others run all the same.
REFERENCES: dict[str, Reference] = {
    "paged_decode": _both_ways(reference.paged_decode, _ATTENTION, "q"),
    "paged_prefill": _both_ways(reference.paged_prefill, _ATTENTION, "q"),
    "quant_decode": _both_ways(_named_records(_with_format(reference.quant_decode)), _ATTENTION, "q"),
    "quant_prefill": _both_ways(_named_records(_with_format(reference.quant_prefill)), _ATTENTION, "q"),
    "sparse_decode": _both_ways(_named_records(_with_format(reference.sparse_decode)), _ATTENTION, "q"),
    "sparse_prefill": _both_ways(_named_records(_with_format(reference.sparse_prefill)), _ATTENTION, "q"),
    "merge_states": _both_ways(reference.merge_states, _ATTENTION, "out"),
    "block_sparse_attention": _both_ways(reference.block_sparse_attention, _ATTENTION, "q"),
    "vertical_slash_attention": _both_ways(reference.vertical_slash_attention, _ATTENTION, "q"),
    "neighborhood_attention": _both_ways(reference.neighborhood_attention, _ATTENTION, "q"),
    "hadamard": _both_ways(_hadamard, ("out",), "x"),
    "hadamard_": _transform_in_place,
    "lightning_attention": _both_ways(reference.lightning_attention, ("out", "final_state"), "q"),
    "lightning_decode": _both_ways(reference.lightning_decode, ("out", "state"), "q"),
    "merge_states_backward": _both_ways(
        reference.merge_states_backward, ("grad", "grad_of_lse"), "out", "tensor"
    ),
    "block_sparse_attention_backward": _both_ways(
        reference.block_sparse_attention_backward, _GRADIENTS, "q", "tensor"
    ),
    "neighborhood_attention_backward": _both_ways(
        reference.neighborhood_attention_backward, _GRADIENTS, "q", "tensor"
    ),
    "lightning_attention_backward": _both_ways(_lightning_backward, _LIGHTNING_GRADIENTS, "q", "tensor"),
    "linear_attention": _both_ways(reference.linear_attention, _LINEAR, "q"),
    "linear_attention_backward": _both_ways(
        reference.linear_attention_backward, _LINEAR_GRADIENTS, "q", "tensor"
    ),
    "taylor_feature_map": _both_ways(reference.taylor_feature_map, ("out",), "x"),
    "taylor_feature_map_backward": _both_ways(reference.taylor_feature_map_backward, ("out",), "x", "tensor"),
    "append_kv": _in_place(reference.append_kv, ("k_pages", "v_pages")),
    "quantize_pages": _in_place(_with_format(reference.quantize_pages), ("k_pool", "v_pool")),
    "dequantize_pages": _exact(_with_format(reference.dequantize_pages), ("k", "v")),
    "compress_pages": _in_place(_with_format(reference.compress_pages), ("k_pool", "v_pool")),
    "decompress_pages": _exact(_with_format(reference.decompress_pages), ("k", "v")),
    "quantize": _exact(reference.quantize, ("codes", "scale", "min")),
    "dequantize": _exact(reference.dequantize, ("x",)),
}


def run_call(call: SavedCall, device: str = "cpu") -> Results:
    """Runs the op on copies of the saved inputs; its results and what it changed, by name, on the CPU.

    Raises:
        RuntimeError: the op refuses the call, as it may have done when it was recorded.
    """
    tensors = call.tensors(device)
    op = getattr(torch.ops.kvk, call.op).default
    results = op(**tensors, **call.plain())
    names = [a.name for a in call.arguments if a.role == "in_out"]
    found = {name: tensors[name].cpu() for name in names}
    if results is not None:
        results = results if isinstance(results, tuple) else (results,)
        given = [value.name or f"result {i}" for i, value in enumerate(op._schema.returns)]
        if call.op in REFERENCES and len(given) == 1:
            given = ["x" if call.op == "dequantize" else "out"]
        given = [name.removeprefix("merged_") for name in given]
        found |= dict(zip(given, (x.cpu() for x in results), strict=True))
    return found


@dataclass(frozen=True)
class Comparison:
    """One result against the reference. differs: elements beyond what is allowed; first: the index of the first."""

    name: str
    worst: float
    allowed: float
    differs: int
    first: tuple[int, ...] | None
    got: float
    wanted: float


def compare(name: str, got: Tensor, want: Expected) -> Comparison:
    """Places of NaN and infinities must be the same; what is finite may be off by the error rule, or not at all."""
    exact = want.exact.double()
    finite = torch.isfinite(exact)
    same = torch.where(finite, torch.isfinite(got), torch.isnan(exact) & torch.isnan(got) | (exact == got))
    safe = torch.where(finite, exact, 0.0)
    if want.errors_of == "element" or exact.dim() == 0:
        scale = safe.abs().clamp(min=1.0)
    elif exact.numel() == 0:
        scale = safe
    else:
        scale = safe.abs().amax(-1, keepdim=True) if want.errors_of == "row" else safe.abs().max()
    scale = torch.where(scale == 0, 1.0, scale)

    def error(x: Tensor) -> Tensor:
        return torch.where(finite & torch.isfinite(x), (x.double() - safe).abs() / scale, 0.0)

    errors, allowed = error(got), 0.0
    if want.plain is not None:
        most = error(want.plain).max().item() if want.plain.numel() else 0.0
        allowed = 2 * most + FLOOR_ULPS[got.dtype] * torch.finfo(got.dtype).eps
    wrong = ~same | (errors > allowed)
    worst = errors.max().item() if errors.numel() else 0.0
    count = int(wrong.sum())
    if count == 0:
        return Comparison(name, worst, allowed, 0, None, 0.0, 0.0)
    first = tuple(torch.nonzero(wrong)[0].tolist())
    return Comparison(name, worst, allowed, count, first, got[first].item(), want.exact[first].item())


def check_call(call: SavedCall, results: Results) -> list[Comparison] | None:
    """Every result against the reference, which runs on the CPU; None where the op has no reference here."""
    if call.op not in REFERENCES:
        return None
    wanted = REFERENCES[call.op]({**call.tensors(), **call.plain()})
    return [compare(name, results[name], want) for name, want in wanted.items()]


def digest(x: Tensor) -> str:
    """Names the bytes of a result, to compare two machines by."""
    return hashlib.sha256(x.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _describe(comparison: Comparison, got: Tensor) -> str:
    c = comparison
    head = f"{c.name:<8} {str(got.dtype).removeprefix('torch.')} {list(got.shape)}, sha256 {digest(got)}"
    rule = f"allowed {c.allowed:.2e}" if c.allowed else "every bit must be equal"
    if c.first is None:
        return f"{head}: agrees, largest error {c.worst:.2e} ({rule})"
    return (
        f"{head}: DIFFERS at {list(c.first)}: got {c.got}, wanted {c.wanted}, error {abs(c.got - c.wanted):.3e}\n"
        f"{'':<8} {c.differs} of {got.numel()} elements differ; largest relative error {c.worst:.2e}, {rule}"
    )


def replay(path: str | Path, device: str = "cpu") -> bool:
    """Replays one file and prints what came of it; whether the results agree with the reference."""
    call = read_call(path)
    level = f" at {_level()}" if device == "cpu" else ""
    print(f"{call.path}: {call.op} on {device}{level}; recorded with kvk {call.version} ({call.cpu_level})")
    try:
        results = run_call(call, device)
    except RuntimeError as error:
        print(f"refused: {str(error).splitlines()[0]}")
        return False
    comparisons = check_call(call, results)
    if comparisons is None:
        for name, x in results.items():
            print(
                f"{name:<8} {list(x.shape)}, sha256 {digest(x)}: ran; {call.op} has no reference to compare with"
            )
        return True
    for comparison in comparisons:
        print(_describe(comparison, results[comparison.name]))
    return all(comparison.differs == 0 for comparison in comparisons)


def _level() -> str:
    from kvk.info import build_info

    return build_info()["cpu_level"]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: all agree; 1: some result differs, or a call is refused; 2: a file is no saved call."""
    parser = argparse.ArgumentParser(
        prog="python -m kvk replay", description="Run calls that KVK_DUMP has saved, against the reference."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path)
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where the op runs (cpu)")
    options = parser.parse_args(argv)
    agrees = True
    for path in options.files:
        try:
            agrees &= replay(path, options.device)
        except (OSError, SavedCallError) as error:
            print(f"kvk replay: {error}", file=sys.stderr)
            return 2
    return 0 if agrees else 1
