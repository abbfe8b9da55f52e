"""The Hadamard transform."""

from __future__ import annotations

import torch
from torch import Tensor, library

from kvk.ops._common import fake, no_results

_ops = torch.ops.kvk


def hadamard(
    x: Tensor, *, scale: float | None = None, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """Hadamard transform of the last dimension, ``out = scale * H x``. Differentiable.

    ``H = H_m (x) H_{2**k}`` for n = m * 2**k, m in {1, 12, 20, 28, 40} (the largest that fits), n at most 32768; the
    chunks of 2**k elements are in Sylvester's order and the m-index is the slow one. The matrices are those of
    fast-hadamard-transform (docs/hadamard.md). With the default scale the transform is orthonormal, and
    ``transpose=True`` undoes it; for m of 1 and 12 H is symmetric and undoes itself. Computed in float32, scaled first.

    Args:
        x: [..., n], float32, bfloat16 or float16, any leading strides, last stride 1.
        scale: default n ** -0.5; 1.0 gives the plain signs.
        transpose: multiply by the transpose of H. It is also the gradient of the transform.
        out: tensor to write into, as x (no gradient then). It may be x itself; else it must not overlap x.

    Returns:
        out, [..., n] in x's dtype.

    Raises:
        RuntimeError: n has no supported Hadamard matrix (nothing is padded), or an argument has the wrong shape, dtype,
            device or stride.
    """
    if out is None:
        return _ops.hadamard(x, scale=scale, transpose=transpose)
    if out is x:
        _ops.hadamard_(x, scale=scale, transpose=transpose)
    else:
        _ops.hadamard.out(x, scale=scale, transpose=transpose, out=out)
    return out


@fake("hadamard")
def _(x, **_):
    return x.new_empty(x.shape)


fake("hadamard.out", "hadamard_")(no_results)


def _save_options(ctx, inputs, keyword_only_inputs, output):
    ctx.options = keyword_only_inputs


def _backward(ctx, grad):
    options = {**ctx.options, "transpose": not ctx.options["transpose"]}
    return _ops.hadamard(grad.contiguous(), **options)


library.register_autograd("kvk::hadamard", _backward, setup_context=_save_options)
