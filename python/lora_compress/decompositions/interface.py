"""A decomposition is data: a contraction of factors over named indices.

`"out r, r in"` says that ΔW[out, in] = Σ_r B[out, r]·A[r, in]. From the contraction the host derives how many factors
there are, their shapes for a given rank, the parameter count, and the exact lowering to a pair (B, A). What cannot be
derived is how to find good factors: that is `fit`.

This release reads *chains*: factors of two indices, the first beginning with `out`, the last ending with `in`,
neighbours sharing one bond. Every bond gets the rank as its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora_compress._native import Delta

    Factor = NDArray[np.float32]


class Fit(Protocol):
    """Finds factors for one delta, in the order of the contraction, float32.

    The factors' bonds may be smaller than `rank` where the delta needs no more. Must be deterministic in (delta, rank,
    seed).
    """

    def __call__(self, delta: Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[Factor]:
        """Fit `delta` at `rank`; the error may exceed the best possible one by `tolerance`, relatively."""
        ...


@dataclass(frozen=True)
class Decomposition:
    """A named contraction with a way to fit it.

    Raises `ValueError` at construction when the contraction is not a chain from `out` to `in`.
    """

    name: str
    contraction: str
    fit: Fit
    description: str = ""

    def __post_init__(self) -> None:
        terms = self.terms
        if len(terms) < 2:
            raise ValueError(f"`{self.contraction}`: at least two factors are needed")
        for number, term in enumerate(terms):
            if len(term) != 2:
                raise ValueError(f"`{self.contraction}`: term {number + 1} has {len(term)} indices instead of two")
        bonds = [index for term in terms for index in term]
        if bonds[0] != "out" or bonds[-1] != "in":
            raise ValueError(f"`{self.contraction}`: the first index must be `out`, the last `in`")
        inner = bonds[1:-1]
        if inner[::2] != inner[1::2] or len(set(inner)) * 2 != len(inner) or {"in", "out"} & set(inner):
            raise ValueError(f"`{self.contraction}`: neighbouring terms must share exactly one bond of their own")

    @property
    def terms(self) -> tuple[tuple[str, ...], ...]:
        """Index names of each factor."""
        return tuple(tuple(term.split()) for term in self.contraction.split(","))

    def shapes(self, rows: int, cols: int, rank: int) -> list[tuple[int, int]]:
        """Shapes of the factors of a (rows, cols) delta at `rank`."""
        sizes = {"out": rows, "in": cols}
        return [(sizes.get(left, rank), sizes.get(right, rank)) for left, right in self.terms]

    def parameters(self, rows: int, cols: int, rank: int) -> int:
        """Number of parameters at `rank`."""
        return sum(left * right for left, right in self.shapes(rows, cols, rank))

    def lower(self, factors: Sequence[Factor]) -> tuple[Factor, Factor]:
        """Factors as one pair B (rows, r), A (r, cols) with B·A = ΔW: all but the last are multiplied out.

        Raises `ValueError` when the factors do not fit the contraction.
        """
        if len(factors) != len(self.terms):
            raise ValueError(f"{len(factors)} factors for the {len(self.terms)} terms of `{self.contraction}`")
        for number, (left, right) in enumerate(pairwise(factors)):
            if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
                shapes = f"{left.shape} and {right.shape}"
                raise ValueError(f"factors {number + 1} and {number + 2} of `{self.contraction}` have shapes {shapes}")
        lowered: Any = reduce(lambda left, right: left @ right, factors[:-1])
        return lowered, factors[-1]
