"""Reference of hadamard: the transform by its explicit matrix."""

from __future__ import annotations

import torch
from torch import Tensor

ORDERS = (40, 28, 20, 12, 1)
MAX_HADAMARD = 32768

# First rows of the four symmetric circulants of Williamson's construction (docs/hadamard.md).
_WILLIAMSON = {20: ("+----", "+----", "++--+", "+-++-"), 28: ("+------", "++----+", "+-+--+-", "+--++--")}


def hadamard_order(n: int) -> int:
    """The m of n = m * 2**k, the largest of 40, 28, 20, 12 and 1 that fits.

    Raises:
        ValueError: none fits, or n is over 32768.
    """
    for m in ORDERS:
        if 1 <= n <= MAX_HADAMARD and n % m == 0 and (n // m).bit_count() == 1:
            return m
    raise ValueError(f"n must be m * 2**k with m in {{1, 12, 20, 28, 40}}, at most {MAX_HADAMARD}, got {n}")


def _circulant(row: str) -> Tensor:
    first = torch.tensor([1.0 if sign == "+" else -1.0 for sign in row], dtype=torch.float64)
    return torch.stack([first.roll(i) for i in range(len(row))])


def _legendre(prime: int) -> Tensor:
    """[prime, prime]: entry (i, j) is 1 where j - i is a square modulo prime, -1 where it is not, 0 for i = j."""
    squares = {i * i % prime for i in range(1, prime)}
    row = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)], dtype=torch.float64)
    return torch.stack([row.roll(i) for i in range(prime)])


def hadamard_matrix(m: int) -> Tensor:
    """H_m [m, m] of +1 and -1, float64, for m in {1, 2, 12, 20, 28, 40}: those of fast-hadamard-transform.

    12: Paley's second construction over 5. 20 and 28: Williamson's. 40: the two-fold of Paley's first over 19.
    """
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m == 2:
        return two
    if m == 12:
        conference = torch.ones(6, 6, dtype=torch.float64)
        conference[0, 0] = 0.0
        conference[1:, 1:] = _legendre(5)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, two) + torch.kron(torch.eye(6, dtype=torch.float64), diagonal)
    if m == 40:
        paley = torch.ones(20, 20, dtype=torch.float64)
        paley[0, 1:] = -1.0
        paley[1:, 1:] = torch.eye(19, dtype=torch.float64) - _legendre(19)
        return torch.kron(two, paley)
    a, b, c, d = (_circulant(row) for row in _WILLIAMSON[m])
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def hadamard(
    x: Tensor,
    *,
    scale: float | None = None,
    transpose: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """out = scale * H x along the last dimension; see kvk.hadamard. Differentiable by ordinary autograd. The op
    hadamard_ writes the same over x.

    H = H_m (x) H_2 (x) ... (x) H_2, multiplied factor by factor as explicit matrices.

    Args:
        x: [..., n].
        compute_dtype: dtype of the result. Below float32 only the result is rounded to it.

    Returns:
        [..., n] in compute_dtype.

    Raises:
        ValueError: no Hadamard matrix of this size is provided.
    """
    n = x.shape[-1]
    m = hadamard_order(n)
    work_dtype = torch.promote_types(compute_dtype, torch.float32)
    factors = [m] + [2] * (n // m).bit_length()
    factors.pop()  # bit_length counts one more than the power of two has factors
    out = x.to(work_dtype).reshape(*x.shape[:-1], *factors)
    for axis, size in enumerate(factors):
        matrix = hadamard_matrix(size).to(work_dtype)
        out = torch.movedim(
            torch.movedim(out, x.dim() - 1 + axis, -1) @ (matrix if transpose else matrix.T),
            -1,
            x.dim() - 1 + axis,
        )
    scale = n**-0.5 if scale is None else scale
    return (scale * out.reshape(x.shape)).to(compute_dtype)
