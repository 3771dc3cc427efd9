"""`tensor-train`: o1 a, a o2 b, b i1 c, c i2 -> (o1 o2) (i1 i2), the train with the rows of ΔW before its columns.

The middle bond b is the rank of ΔW, and the train lowers to a pair (B, A) of that rank. Rows and columns are split as
close to square as they divide, and the outer bonds are as large as the middle one until they leave nothing out:

    a = min(rank, o1),   c = min(rank, i2),   parameters o1·a + a·o2·b + b·i1·c + c·i2.

The fit starts in the middle, where a truncated SVD of Δ does the large work, Δ ≈ U·diag(σ)·Vᵀ with b = rank. All else
is small. The unfolding of U·diag(σ)·Vᵀ at c has the singular values of diag(σ)·Vᵀ seen as (b·i1, i2), for U is
orthonormal; truncated to c it spans b rows of length i1·i2, with the orthonormal basis W. Then M = Δ·Wᵀ is the best
matrix to stand left of W, and M seen as (o1, o2·b) is truncated to a. (With U·diag(σ) instead of M the two truncations
would not be orthogonal to each other, and the bound below not proven.)

Error: with ε_k the error of the best matrix of rank k of an unfolding of Δ,

    error² = ‖Δ − M·W‖² + ‖M − its truncation‖² ≤ ε_b² + ε_c² + ε_a² ≤ 3·best²

where best is the error of the best train of these bonds (up to rounding, and to `tolerance` in ε_b). The equality holds
because the truncation stays within the rows of W. Further ‖Δ − M·W‖² ≤ ‖Δ − UUᵀΔ‖² + ‖UUᵀΔ − its truncation to c‖², two
terms orthogonal from the left, and M·W is the best matrix with the rows of W. The singular values of the unfoldings of
UUᵀΔ and of Δ·WᵀW are no larger than those of Δ, as both are products of Δ with a projection. (Oseledets 2011, Theorem
2.2, has this for the order from left to right; Grasedyck 2010, Theorem 3.11, for trees.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lora_compress
import numpy as np

from lora_compress_tensor_train.sizes import near_square

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Factor = NDArray[np.float32]


def axes(rows: int, cols: int, rank: int) -> dict[str, int]:
    """Sizes of all indices; the bonds are smaller than `rank` where a smaller one leaves nothing out."""
    (o1, o2), (i2, i1) = near_square(rows), near_square(cols)
    b = min(rank, rows, cols)
    return {"o1": o1, "o2": o2, "i1": i1, "i2": i2, "a": min(b, o1), "b": b, "c": min(b, i2)}


def fit(delta: lora_compress.Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[Factor]:
    """Cores (o1, a), (a, o2, b), (b, i1, c), (c, i2), float32; the outer ones orthonormal, σ split evenly over the
    inner ones.
    """
    rows, cols = delta.shape
    size = axes(rows, cols, rank)
    o1, o2, i1, i2 = (size[index] for index in ("o1", "o2", "i1", "i2"))
    _, sigma, vt = delta.truncated_svd(rank, seed=seed, tolerance=tolerance)
    if not sigma.size:
        return [np.zeros(shape, np.float32) for shape in TENSOR_TRAIN.shapes(rows, cols, 1)]
    weighted = sigma[:, None] * vt
    last = leading(weighted.reshape(-1, i2).T, size["c"])
    # The rows of length i1·i2 that are left, as (i1·c, b) over the orthonormal `last`, and a basis of them.
    inner = (weighted.reshape(-1, i2) @ last).reshape(sigma.size, -1).T
    basis, _ = np.linalg.qr(inner)
    right = basis.T.reshape(-1, i1, last.shape[1])
    spanned = (right @ last.T).reshape(-1, cols)
    product = delta.matmul(np.ascontiguousarray(spanned.T, np.float32)).astype(np.float64)
    first = leading(product.reshape(o1, -1), size["a"])
    left = (first.T @ product.reshape(o1, -1)).reshape(-1, spanned.shape[0])
    energies, turned = np.linalg.eigh(left.T @ left)
    turned, root = turned[:, energies > floor(energies)], energies[energies > floor(energies)] ** 0.25
    second = (left @ turned / root).reshape(-1, o2, root.size)
    third = np.tensordot((turned * root).T, right, 1)
    return [np.ascontiguousarray(core, np.float32) for core in (first, second, third, last.T)]


def leading(matrix: Array, rank: int) -> Array:
    """The leading left singular vectors (rows, r), r at most `rank`.

    From the Gram matrix, which leaves half the digits of float64, one more than float32 has. An SVD would have all, and
    take forty times as long where other threads compete with those of BLAS, as they do in an extraction.
    """
    if matrix.shape[0] > matrix.shape[1]:
        basis, rest = np.linalg.qr(matrix)
        return np.asarray(basis @ leading(rest, rank))
    energies, vectors = np.linalg.eigh(matrix @ matrix.T)
    kept = min(rank, int(np.count_nonzero(energies > floor(energies))))
    return vectors[:, ::-1][:, :kept]


def floor(energies: Array) -> float:
    """Eigenvalues of a Gram matrix up to here may be all rounding (Golub & Van Loan 2013, §8.1)."""
    return energies.size * float(np.finfo(np.float64).eps * energies[-1])


def init(rows: int, cols: int, rank: int, *, rng: np.random.Generator) -> Sequence[Factor]:
    """Cores to train from: the last one of the rows is zero, the others are normal.

    The product of the column cores has entries of variance 1/(3·cols), as LoRA's A has (Hu et al. 2022): each has the
    variance (1/(3·cols·c))^½ for a sum of c products. The first core has 1/a, so that what an update puts into the
    second one reaches the outputs as large as from LoRA's B.
    """
    first, second, third, last = TENSOR_TRAIN.shapes(rows, cols, rank)
    inner = (3 * cols * last[0]) ** -0.25
    return [
        (rng.standard_normal(first) / np.sqrt(first[1])).astype(np.float32),
        np.zeros(second, np.float32),
        (rng.standard_normal(third) * inner).astype(np.float32),
        (rng.standard_normal(last) * inner).astype(np.float32),
    ]


TENSOR_TRAIN = lora_compress.Decomposition(
    "tensor-train",
    "o1 a, a o2 b, b i1 c, c i2 -> (o1 o2) (i1 i2)",
    axes=axes,
    fit=fit,
    init=init,
    description="four cores, rows before columns; lowers to a LoRA pair",
)
