"""Tensor trains of any length, in float64: core k has shape (r_{k−1}, n_k, r_k) with r_0 = r_d = 1, and

    T[i_1, …, i_d] = G_1[:, i_1, :]·G_2[:, i_2, :] ⋯ G_d[:, i_d, :].

Bond k of the best train of given ranks leaves at least ε_k, the error of the best matrix of rank r_k for the unfolding
T[(i_1 … i_k), (i_{k+1} … i_d)]. What one truncation after the other leaves is orthogonal to all that is kept, so errors
add up as squares: error² ≤ Σ ε_k² ≤ (d − 1)·best² (Oseledets 2011, Theorem 2.2). A relative accuracy ε is therefore met
when each of the d − 1 bonds is given ε·‖T‖/√(d − 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def tt_svd(tensor: NDArray[Any], error: float) -> list[Array]:
    """Cores of a train with ‖T − train‖ ≤ `error`·‖T‖ up to rounding, by TT-SVD (Oseledets 2011, Algorithm 1).

    tensor: any real dtype, one or more axes, none of them empty.
    error: relative; 0 drops only what float64 rounding accounts for.

    Returns float64 cores, all but the last with orthonormal columns as (r_{k−1}·n_k, r_k) matrices. Each bond is the
    smallest that its share of the error allows, given the bonds before it, and never larger than the same share asks of
    the unfolding of T itself. Raises `ValueError` for a tensor without elements and a negative error.
    """
    rest = np.asarray(tensor, np.float64)
    if not rest.size or not rest.ndim or not error >= 0:
        raise ValueError(f"a train needs elements and an error of at least 0, not {rest.shape} and {error}")
    sizes = rest.shape
    allowed = error * float(np.linalg.norm(rest)) / math.sqrt(max(len(sizes) - 1, 1))
    cores: list[Array] = []
    bond = 1
    for size in sizes[:-1]:
        basis, rest = split(rest.reshape(bond * size, -1), allowed)
        cores.append(basis.reshape(bond, size, -1))
        bond = basis.shape[1]
    return [*cores, rest.reshape(bond, sizes[-1], 1)]


def tt_round(cores: Sequence[NDArray[Any]], error: float) -> list[Array]:
    """A train with smaller bonds that differs by at most `error`·‖T‖ up to rounding, by TT-rounding (Oseledets 2011,
    Algorithm 2): QR from left to right, so that each truncated SVD from right to left sees all of T in one core.

    cores: any real dtype, shapes (r_{k−1}, n_k, r_k) as above.
    error: relative; 0 drops only what float64 rounding accounts for.

    Returns float64 cores, all but the first with orthonormal rows as (r_{k−1}, n_k·r_k) matrices. The tensor itself is
    never formed: O(d·n·r³). Raises `ValueError` for cores that are no train and a negative error.
    """
    found = [np.asarray(core, np.float64) for core in cores]
    _check(found)
    if not error >= 0:
        raise ValueError(f"an error of at least 0, not {error}")
    for number in range(len(found) - 1):
        core = found[number]
        basis, rest = np.linalg.qr(core.reshape(-1, core.shape[2]))
        found[number] = basis.reshape(*core.shape[:2], -1)
        found[number + 1] = np.tensordot(rest, found[number + 1], 1)
    allowed = error * float(np.linalg.norm(found[-1])) / math.sqrt(max(len(found) - 1, 1))
    for number in range(len(found) - 1, 0, -1):
        core = found[number]
        basis, rest = split(core.reshape(core.shape[0], -1).T, allowed)
        found[number] = basis.T.reshape(-1, *core.shape[1:])
        found[number - 1] = np.tensordot(found[number - 1], rest.T, 1)
    return found


def split(matrix: Array, error: float) -> tuple[Array, Array]:
    """U (rows, r) with orthonormal columns and UᵀM (r, cols), the best of their rank: the smallest that leaves
    ‖M − U·UᵀM‖ ≤ `error`, at least 1.
    """
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    # Singular values are computed to within this of σ_1: smaller ones may be all rounding (Golub & Van Loan 2013,
    # §5.4).
    floor = max(matrix.shape) * np.finfo(np.float64).eps * float(sigma[0])
    # Tail r is what is left when r directions are kept.
    tails = np.sqrt(np.cumsum(np.square(sigma)[::-1])[::-1])
    kept = max(int(np.count_nonzero(tails > max(error, floor))), 1)
    return u[:, :kept], sigma[:kept, None] * vt[:kept]


def _check(cores: Sequence[Array]) -> None:
    shapes = [core.shape for core in cores]
    if not shapes or any(len(shape) != 3 or 0 in shape for shape in shapes):
        raise ValueError(f"cores are arrays (bond, size, bond) with elements, not {shapes}")
    ends = [1, *(shape[2] for shape in shapes)], [*(shape[0] for shape in shapes), 1]
    if ends[0] != ends[1]:
        raise ValueError(f"the bonds of {shapes} do not meet, or the first and the last are not 1")
