"""Layers that multiply the same input: one A for all, by the truncated SVD of their stacked deltas.

    [Δ_q; Δ_k; Δ_v] ≈ [B_q; B_k; B_v]·A,      parameters r·(Σ rows + cols) instead of r·(Σ rows + layers·cols)

The best factors of their rank (Eckart & Young on the stack); error² = ‖Δ‖² − Σ σ². They beat separate pairs of equal
size where the layers' row spaces overlap: queries, keys and values of one width get 1.5 times the rank, and need not
lose more by sharing than that gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from lora_compress import Delta

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Factor = NDArray[np.float32]


def fit(deltas: Sequence[Delta], rank: int, *, seed: int, tolerance: float) -> tuple[list[Factor], Factor]:
    """B (rows, r) of every layer and the common A (r, cols), float32, σ split evenly between them as LoRA's is."""
    stack = Delta.stack(deltas) if len(deltas) > 1 else deltas[0]
    u, sigma, vt = stack.truncated_svd(rank, seed=seed, tolerance=tolerance)
    root = np.sqrt(sigma).astype(np.float32)
    ends = np.cumsum([delta.shape[0] for delta in deltas])
    return np.split(u * root, ends[:-1]), root[:, None] * vt
