"""LoKr (Yeh et al. 2024) as a decomposition of ΔW: o1 i1, o2 r, r i2 -> (o1 o2) (i1 i2), the Kronecker product
S ⊗ (B·A) of a small matrix and one of low rank.

o1 and i1 are the largest divisors of rows and columns that are at most 8 and no larger than what they leave, as with
LyCORIS' `factor=8`: ΔW is cut into o1×i1 blocks, and all are one block times a number each. The rank of the block is at
most min(o2, i2), that of ΔW up to min(o1, i1) times as large. Parameters: o1·i1 + r·(o2 + i2).

Fit: with the entries of Δ rearranged to R[(o1 i1), (o2 i2)], S ⊗ C is a matrix of rank 1, so that the nearest Kronecker
product is the first singular triplet of R (Van Loan & Pitsianis 1993). C is truncated to rank r, and alternating least
squares, which never raise the error, go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import lora_compress
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Factor = NDArray[np.float32]

# The first factor has at most this many rows and columns.
FACTOR = 8
# Elements of Δ that are rearranged at a time.
PANEL = 1 << 22


def split(size: int) -> tuple[int, int]:
    """A number as a product of two: the first is at most `FACTOR`, and not larger than the second."""
    first = max(divisor for divisor in range(1, FACTOR + 1) if size % divisor == 0 and divisor**2 <= size)
    return first, size // first


def axes(rows: int, cols: int, rank: int) -> dict[str, int]:
    """Sizes of all indices."""
    (o1, o2), (i1, i2) = split(rows), split(cols)
    return {"o1": o1, "o2": o2, "i1": i1, "i2": i2, "r": min(rank, o2, i2)}


def ladder(rows: int, cols: int) -> Sequence[int]:
    """Ranks up to that of a full block."""
    return range(1, min(split(rows)[1], split(cols)[1]) + 1)


def rearranged(delta: lora_compress.Delta) -> NDArray[np.float32]:
    """R (o1·i1, o2·i2) of a delta (o1·o2, i1·i2), float32: four bytes an element are held."""
    rows, cols = delta.shape
    (o1, o2), (i1, i2) = split(rows), split(cols)
    result = np.empty((o1, i1, o2, i2), np.float32)
    height = max(PANEL // cols, 1)
    for block in range(o1):
        for begin in range(0, o2, height):
            end = min(begin + height, o2)
            panel = delta.rows(block * o2 + begin, block * o2 + end)
            result[block, :, begin:end] = panel.reshape(end - begin, i1, i2).transpose(1, 0, 2)
    return result.reshape(o1 * i1, o2 * i2)


def start(delta: lora_compress.Delta, rank: int, *, seed: int, tolerance: float) -> list[Factor]:
    """S (o1, i1), B (o2, r) and A (r, i2), float32, of the nearest Kronecker product, its second factor truncated."""
    (o1, o2), (i1, i2) = split(delta.shape[0]), split(delta.shape[1])
    matrix = lora_compress.Delta.from_array(rearranged(delta), delta.name)
    u, sigma, vt = matrix.truncated_svd(1, seed=seed, tolerance=tolerance)
    # σ is 1 or 0 numbers long: with none, zeros are the nearest.
    small, block = (u @ np.sqrt(sigma)).reshape(o1, i1), (np.sqrt(sigma) @ vt).reshape(o2, i2)
    second = lora_compress.Delta.from_array(block.astype(np.float32), delta.name)
    u, sigma, vt = second.truncated_svd(rank, seed=seed, tolerance=tolerance)
    root = np.sqrt(sigma).astype(np.float32)
    return [small.astype(np.float32), u * root, root[:, None] * vt]


def fit(delta: lora_compress.Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[Factor]:
    """The factors of `start`, improved."""
    factors = start(delta, rank, seed=seed, tolerance=tolerance)
    return LOKR.improve([delta], [factors], tolerance=tolerance)[0] if delta.energy else factors


LOKR = lora_compress.Decomposition(
    "lokr",
    "o1 i1, o2 r, r i2 -> (o1 o2) (i1 i2)",
    axes=axes,
    fit=fit,
    ladder=ladder,
    description="the Kronecker product of a small and a low-rank matrix",
)


@lora_compress.hookimpl
def register_decompositions(register: Callable[[lora_compress.Decomposition], None]) -> None:
    """Register `lokr`."""
    register(LOKR)
