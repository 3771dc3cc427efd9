"""Layers of one kind in all blocks: Δ_l ≈ C·G_l·A with C and A in common (Tucker-2; LoTR, Bershatsky et al. 2024).

The layers are streamed; what is held is as large as the factors of the layers, never a Δ. With orthonormal C and A the
best core is G_l = Cᵀ·Δ_l·Aᵀ and the error is ‖Δ‖² − Σ‖G_l‖². Higher-order orthogonal iteration (De Lathauwer, De Moor &
Vandewalle 2000) takes in turn

    C ← leading left singular vectors of [Δ_1·Aᵀ … Δ_L·Aᵀ],      A ← leading right ones of [Cᵀ·Δ_1; …; Cᵀ·Δ_L],

each the best with the other held, so the error never rises. The start is the same with the layers' own truncated SVDs
in place of the Δ_l, which is the higher-order SVD but for what those leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from lora_compress import Delta

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Factor = NDArray[np.float32]

SWEEPS = 20
# The singular vectors of a half-sweep are found this much more exactly than what a sweep has to gain.
FINER = 0.1
# An error that is rounding alone.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Tucker2:
    """C (rows, p), a core (p, q) for each layer, A (q, cols), float32; and what is known of their error.

    errors: Σ‖Δ_l − C·G_l·A‖² after every half-sweep, never rising.
    lower_bound: no factors of these sizes have an error below it.
    """

    c: Factor
    cores: list[Factor]
    a: Factor
    errors: tuple[float, ...]
    lower_bound: float

    @property
    def excess(self) -> float:
        """At most how far above the best possible error this one is, relatively (of ‖·‖, not of its square)."""
        return math.sqrt(self.errors[-1] / self.lower_bound) - 1 if self.lower_bound else math.inf


def axes(rows: int, cols: int, rank: int) -> dict[str, int]:
    """Both bonds have the rank, as far as the sides reach."""
    return {"p": min(rank, rows), "q": min(rank, cols)}


def fit(deltas: Sequence[Delta], rank: int, *, seed: int, tolerance: float) -> tuple[Factor, list[Factor], Factor]:
    """C, the cores and A of `tucker2`."""
    found = tucker2(deltas, rank, seed=seed, tolerance=tolerance)
    return found.c, found.cores, found.a


def tucker2(deltas: Sequence[Delta], rank: int, *, seed: int = 0, tolerance: float = 1e-4) -> Tucker2:
    """Common outer factors and a core for each of the deltas, which are of one shape (rows, cols).

    Stops when a sweep lowers the error by less than `tolerance`, relatively. Layers are taken from `deltas` one after
    the other, once for each half-sweep.
    """
    rows, cols = deltas[0].shape
    p, q = min(rank, rows), min(rank, cols)
    finer = max(FINER * tolerance, 1e-7)
    whole, kept = 0.0, 0.0
    left, right = [], []
    for delta in deltas:
        u, sigma, vt = delta.truncated_svd(min(p, q), seed=seed, tolerance=finer)
        whole += delta.energy
        kept += float(np.sum(sigma**2))
        left.append(u * sigma.astype(np.float32))
        right.append(sigma.astype(np.float32)[:, None] * vt)
    _, captured_left = _leading(np.hstack(left), p, seed, finer)
    a, captured_right = _leading(np.vstack(right).T, q, seed, finer)
    # A layer's error is that of its own best pair at least. And by Ky Fan the energy in any q directions is at most
    # that of the truncated layers in their best q, and all that truncation left out.
    bounds = (0.0, whole - kept, kept - captured_left, kept - captured_right)
    errors: list[float] = []
    best: tuple[Factor, list[Factor], Factor] | None = None
    for _ in range(SWEEPS):
        c, captured = _leading(np.hstack([delta.matmul(a) for delta in deltas]), p, seed, finer)
        halfway = max(whole - captured, 0.0)
        images = [delta.rmatmul(c) for delta in deltas]
        following, captured = _leading(np.hstack(images), q, seed, finer)
        error = max(whole - captured, 0.0)
        if best is not None and not error <= halfway <= errors[-1]:
            # Rounding alone moves it now.
            break
        errors += [halfway, error]
        a = following
        best = c, [image.T @ a for image in images], np.ascontiguousarray(a.T)
        if error <= NEGLIGIBLE * whole or (len(errors) > 2 and error > errors[-3] * (1 - tolerance) ** 2):
            break
    c, cores, a = best  # type: ignore[misc]
    return Tucker2(c, cores, a, tuple(errors), max(bounds))


def _leading(stack: NDArray[np.float32], rank: int, seed: int, tolerance: float) -> tuple[Factor, float]:
    """Leading left singular vectors of a matrix in memory, at the core's speed, and the energy they capture."""
    delta = Delta.from_array(np.ascontiguousarray(stack), "stack")
    u, sigma, _ = delta.truncated_svd(rank, seed=seed, tolerance=tolerance)
    # Directions whose σ is little more than rounding are not orthogonal to the others as they come.
    basis, _ = np.linalg.qr(u.astype(np.float64))
    return basis.astype(np.float32), float(np.sum(sigma**2))
