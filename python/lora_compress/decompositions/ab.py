"""`ab`: ΔW ≈ B·A, the two factors of LoRA, by truncated SVD.

The best pair of its rank in the Frobenius norm is U·diag(σ)·Vᵀ (Eckart & Young 1936). The singular values are split
evenly,
B = U·√σ and A = √σ·Vᵀ: with all of σ in one factor, entries of small directions would reach the subnormal range of F16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lora_compress.decompositions.interface import Decomposition
from lora_compress.hookspecs import hookimpl

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_compress._native import Delta


def fit(delta: Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[NDArray[np.float32]]:
    """Truncated SVD of `delta`."""
    u, sigma, vt = delta.truncated_svd(rank, seed=seed, tolerance=tolerance)
    root = np.sqrt(sigma).astype(np.float32)
    return u * root, root[:, None] * vt


AB = Decomposition("ab", "out r, r in", fit=fit, description="two factors, the LoRA pair; the best of its rank")


@hookimpl
def register_decompositions(register: Callable[[Decomposition], None]) -> None:
    """Register `ab`."""
    register(AB)
