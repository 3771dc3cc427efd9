"""What a unit of one tensor's error is worth beside another's: Σ w·‖Δ − BA‖² is what a budget makes small.

No weight is right for all models, so each has a name. `docs/ranks.md` measures them on real fine-tunes; "balanced" is
the default because it was best or close to it on all of them: the plain norm gives most to the tensors that moved most
(a tied embedding holds two thirds of ‖ΔW‖² and needs a few directions), the relative one nearly forgets them. Per byte,
the balanced worth of a direction is the geometric mean of two simple ones: σ²/‖ΔW‖² for each rank, whatever it costs,
and σ²/‖ΔW‖ for each byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_compress._native import Spectrum

Weight = Callable[[Spectrum], float]


def _delta(_: Spectrum) -> float:
    return 1.0


def _balanced(spectrum: Spectrum) -> float:
    return math.sqrt(sum(spectrum.shape)) / math.pow(spectrum.energy, 0.75)


def _relative(spectrum: Spectrum) -> float:
    return 1.0 / spectrum.energy


def _base(spectrum: Spectrum) -> float:
    return 1.0 / spectrum.base_energy if spectrum.base_energy > 0 else 1.0 / spectrum.energy


def _element(spectrum: Spectrum) -> float:
    rows, cols = spectrum.shape
    return 1.0 / (rows * cols)


WEIGHTS: dict[str, tuple[Weight, str]] = {
    "balanced": (_balanced, "√(rows + cols) / ‖ΔW‖^1.5"),
    "delta": (_delta, "1: the plain norm over all tensors"),
    "relative": (_relative, "1 / ‖ΔW‖²: every tensor's relative error counts the same"),
    "base": (_base, "1 / ‖W_base‖²: change relative to what was there"),
    "element": (_element, "1 / elements: change of an average element"),
}


def weigh(name: str, spectra: Sequence[Spectrum]) -> NDArray[np.float64]:
    """The weight of every spectrum, float64 (n,); 0 for Δ = 0."""
    weight = WEIGHTS[name][0]
    return np.array([weight(spectrum) if spectrum.energy > 0 else 0.0 for spectrum in spectra], dtype=np.float64)
