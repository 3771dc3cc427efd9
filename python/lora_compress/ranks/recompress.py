"""The singular value decomposition of a product of two thin factors, without the product.

With the Gram matrices BᵀB = V·Λ·Vᵀ and A·Aᵀ, and M = Λ^½·Vᵀ·(A·Aᵀ)·V·Λ^½ = W·Σ²·Wᵀ, the product B·A has the singular
values Σ, the left vectors B·V·Λ^-½·W and the right ones Σ⁻¹·Wᵀ·Λ^½·Vᵀ·A. Everything of the rank's size is float64; the
Gram matrices square the condition of the factors, so directions of B below some 1e-7 of its largest are not found,
whose energy is below 1e-14 of what they could carry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

# Eigenvalues of a Gram matrix that are rounding, relative to the largest.
NOISE = 1e-14
# Rows of a factor that are summed in float64 at a time.
HEIGHT = 2048


@dataclass(frozen=True)
class Product:
    """B (rows, k) times A (k, cols), float32, and what turns them into singular vectors: `sigma` (r,) descending;
    B·left/σ^½ and σ^½·right·A… are the balanced factors (`truncated`).
    """

    b: Matrix
    a: Matrix
    sigma: NDArray[np.float64]
    left: NDArray[np.float64]
    right: NDArray[np.float64]

    def truncated(self, rank: int) -> tuple[Matrix, Matrix]:
        """The best pair of a rank, σ split evenly: B' (rows, r), A' (r, cols) with r ≤ `rank`."""
        rank = min(rank, len(self.sigma))
        root = np.sqrt(self.sigma[:rank])
        b = self.b @ (self.left[:, :rank] * root).astype(np.float32)
        a = (self.right[:rank] / root[:, None]).astype(np.float32) @ self.a
        return np.ascontiguousarray(b), np.ascontiguousarray(a)


def decompose(b: Matrix, a: Matrix) -> Product:
    """The singular value decomposition of b·a."""
    values, vectors = np.linalg.eigh(_gram(b))
    kept = values > NOISE * max(float(values[-1]), 0.0) if len(values) else np.zeros(0, bool)
    root, basis = np.sqrt(values[kept]), vectors[:, kept]
    # B = Q·(root·basisᵀ) with orthonormal Q = B·basis/root.
    inner = root[:, None] * basis.T
    squares, turned = np.linalg.eigh(inner @ _gram(a.T) @ inner.T)
    order = np.argsort(squares)[::-1]
    squares, turned = np.maximum(squares[order], 0.0), turned[:, order]
    # Where the sum of factors cancels, what is left of it is rounding.
    whole = float(np.sum(root**2)) * float(np.sum(a.astype(np.float64) ** 2)) if len(squares) else 0.0
    found = squares > NOISE * max(float(squares[0]) if len(squares) else 0.0, whole)
    sigma, turned = np.sqrt(squares[found]), turned[:, found]
    return Product(b, a, sigma, (basis / root) @ turned, turned.T @ inner)


def distance(product: tuple[Matrix, Matrix], other: tuple[Matrix, Matrix]) -> float:
    """‖B·A − B'·A'‖², of pairs of one shape: both as one pair side by side, whose product's energy is tr(BᵀB·AAᵀ)."""
    left = _gram(np.hstack([product[0], -other[0]]))
    right = _gram(np.vstack([product[1], other[1]]).T)
    return max(float(np.sum(left * right)), 0.0)


def _gram(tall: NDArray[Any]) -> NDArray[np.float64]:
    """tallᵀ·tall, summed in float64."""
    total = np.zeros((tall.shape[1], tall.shape[1]))
    for begin in range(0, tall.shape[0], HEIGHT):
        part = tall[begin : begin + HEIGHT].astype(np.float64)
        total += part.T @ part
    return total
