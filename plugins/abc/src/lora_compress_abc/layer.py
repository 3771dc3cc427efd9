"""One layer: ΔW ≈ U·diag(σ)·Vᵀ by truncated SVD.

C·G·A of rank r spans what B·A of rank r does, so its error is the same, with r² parameters more: a core is worth having
where it is all that is trained (LoRA-XS, Bałazy et al. 2024), or where the outer factors are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lora_compress import Delta
    from numpy.typing import NDArray


def fit(delta: Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[NDArray[np.float32]]:
    """U (rows, r), diag(σ) (r, r), Vᵀ (r, cols), float32; the best of their rank (Eckart & Young 1936)."""
    u, sigma, vt = delta.truncated_svd(rank, seed=seed, tolerance=tolerance)
    return u, np.diag(sigma).astype(np.float32), vt
