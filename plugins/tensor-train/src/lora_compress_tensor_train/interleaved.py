"""`tensor-train-interleaved`: o1 i1 a, a o2 i2 -> (o1 o2) (i1 i2), a sum of `rank` Kronecker products.

With the entries of Δ rearranged to R[(o1 i1), (o2 i2)], a Kronecker product is a matrix of rank 1 and the train one of
rank a: the best train of its rank is the truncated SVD of R (Van Loan & Pitsianis 1993; Eckart & Young 1936).

Rows and columns are split so that a rank costs the fewest parameters, o1·i1 + o2·i2: about 2·√(rows·cols), as many as
a rank of a pair (B, A) in a square matrix and fewer in others. Prime sizes leave nothing to split, then it is that
pair. There are min(o1·i1, o2·i2) ranks. The rank of ΔW itself is not bounded by that of the train.

There is no `init`: the host's zeroes the first core and gives the second the variance 1/(3·cols). An update of the
first then reaches the outputs as large as from LoRA's B, as the sum over i1 is over inputs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lora_compress
import numpy as np

from lora_compress_tensor_train.sizes import interleaved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Factor = NDArray[np.float32]

# Elements of Δ that are rearranged at a time.
PANEL = 1 << 22


def axes(rows: int, cols: int, rank: int) -> dict[str, int]:
    """Sizes of all indices."""
    o1, o2, i1, i2 = interleaved(rows, cols)
    return {"o1": o1, "o2": o2, "i1": i1, "i2": i2, "a": min(rank, o1 * i1, o2 * i2)}


def ladder(rows: int, cols: int) -> Sequence[int]:
    """Ranks up to that of a full rearranged matrix."""
    o1, o2, i1, i2 = interleaved(rows, cols)
    return range(1, min(o1 * i1, o2 * i2) + 1)


def rearranged(delta: lora_compress.Delta) -> NDArray[np.float32]:
    """R (o1·i1, o2·i2) of a delta (o1·o2, i1·i2), float32: four bytes an element are held."""
    rows, cols = delta.shape
    o1, o2, i1, i2 = interleaved(rows, cols)
    result = np.empty((o1, i1, o2, i2), np.float32)
    height = max(PANEL // (o2 * cols), 1)
    for begin in range(0, o1, height):
        end = min(begin + height, o1)
        result[begin:end] = delta.rows(begin * o2, end * o2).reshape(-1, o2, i1, i2).transpose(0, 2, 1, 3)
    return result.reshape(o1 * i1, o2 * i2)


def fit(delta: lora_compress.Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[Factor]:
    """Cores (o1, i1, a), (a, o2, i2), float32, σ split evenly."""
    o1, o2, i1, i2 = interleaved(*delta.shape)
    matrix = lora_compress.Delta.from_array(rearranged(delta), delta.name)
    u, sigma, vt = matrix.truncated_svd(rank, seed=seed, tolerance=tolerance)
    root = np.sqrt(sigma).astype(np.float32)
    return (u * root).reshape(o1, i1, root.size), (root[:, None] * vt).reshape(root.size, o2, i2)


INTERLEAVED = lora_compress.Decomposition(
    "tensor-train-interleaved",
    "o1 i1 a, a o2 i2 -> (o1 o2) (i1 i2)",
    axes=axes,
    fit=fit,
    ladder=ladder,
    description="a sum of Kronecker products; the best of its rank",
)
