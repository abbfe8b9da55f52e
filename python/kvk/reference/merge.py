"""Reference of merge_states: join the results of attention over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(
    out: Tensor, lse: Tensor, *, compute_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Join n partial attention results into the result over all their keys.

    With lse = log(sum_i exp(lse_i)) the merged output is sum_i exp(lse_i - lse) out_i (the rescaling of
    Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").

    A part whose lse is -inf saw no key: it is not read, even if its out is NaN, and its gradient is 0. An lse
    of +inf counts as -inf. If every part is -inf, out is 0 and lse is -inf. A NaN lse makes that row NaN.
    Differentiable by ordinary autograd in both arguments.

    Args:
        out: [n, T, H, D], float32, bfloat16 or float16.
        lse: [n, T, H], natural log.
        compute_dtype: dtype of the result. Below float32 the weights and the result are rounded to it and the
            rest is float32.

    Returns:
        (out [T, H, D] in compute_dtype, lse [T, H] in compute_dtype but at least float32).
    """
    work_dtype = torch.promote_types(compute_dtype, torch.float32)
    lse = lse.to(work_dtype)
    lse = torch.where(lse == torch.inf, -torch.inf, lse)
    seen = lse != -torch.inf
    some_seen = seen.any(0)

    # Shifting by the largest lse keeps exp in range; the shift cancels, so it takes no part in the gradient.
    shift = (
        torch.where(some_seen, lse.detach().amax(0), 0.0) if lse.shape[0] else lse.new_zeros(lse.shape[1:])
    )
    weight = torch.exp(lse - shift)
    total = torch.where(some_seen, weight.sum(0), 1.0)

    share = (weight / total).to(compute_dtype).to(work_dtype)
    part = torch.where(seen[..., None], out.to(compute_dtype).to(work_dtype), 0.0)
    merged = (share[..., None] * part).sum(0)
    merged_lse = torch.where(some_seen, shift + torch.log(total), -torch.inf)
    return merged.to(compute_dtype), merged_lse
