"""A decomposition is data: a contraction of factors over named indices, the sizes of those indices, and a way to fit
it.

The contraction (`decompositions/network.py` has the grammar) says what the factors multiply to. From it the host
derives how many there are, their shapes at a given rank, the parameter count, ΔW, its product with inputs, and the
exact lowering to a pair (B, A). What cannot be derived is how to find good factors: that is `fit`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora_compress.decompositions import als
from lora_compress.decompositions.network import Network

if TYPE_CHECKING:
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


class Axes(Protocol):
    """Sizes of all indices but plain `out` and `in`, for a (rows, cols) delta at a rank."""

    def __call__(self, rows: int, cols: int, rank: int) -> Mapping[str, int]:
        """One size for each index."""
        ...


@dataclass(frozen=True)
class Decomposition:
    """A named contraction with a way to fit it: `fit`, or alternating least squares where there is none.

    Without `axes` every bond has the rank as its size; a contraction that splits the rows or the columns of ΔW needs
    it. Raises `ContractionError` (a `ValueError`) at construction when the contraction cannot be read.
    """

    name: str
    contraction: str
    fit: Fit | None = None
    description: str = ""
    axes: Axes | None = None

    def __post_init__(self) -> None:
        network = self.network
        if self.axes is None and (network.rows, network.cols) != (("out",), ("in",)):
            raise ValueError(f"`{self.contraction}` splits ΔW: `axes` has to give the sizes of {network.indices}")

    @cached_property
    def network(self) -> Network:
        """The contraction, read."""
        return Network.parse(self.contraction)

    def sizes(self, rows: int, cols: int, rank: int) -> dict[str, int]:
        """Size of every index. Raises `ValueError` when those of `axes` do not multiply to (rows, cols)."""
        network = self.network
        sizes = {"out": rows, "in": cols}
        sizes |= dict.fromkeys(network.bonds, rank) if self.axes is None else self.axes(rows, cols, rank)
        missing = [index for index in network.indices if index not in sizes]
        if missing:
            raise ValueError(f"the axes of `{self.name}` give no size of `{missing[0]}`")
        found = tuple(math.prod(sizes[index] for index in group) for group in (network.rows, network.cols))
        if found != (rows, cols):
            raise ValueError(f"the axes of `{self.name}` make a {found} matrix of one that is {(rows, cols)}")
        return {index: sizes[index] for index in network.indices}

    def shapes(self, rows: int, cols: int, rank: int) -> list[tuple[int, ...]]:
        """Shapes of the factors of a (rows, cols) delta at `rank`."""
        return self.network.shapes(self.sizes(rows, cols, rank))

    def parameters(self, rows: int, cols: int, rank: int) -> int:
        """Number of parameters at `rank`."""
        return self.network.parameters(self.sizes(rows, cols, rank))

    def lowered_rank(self, rows: int, cols: int, rank: int) -> int:
        """The rank of `lower` for factors of a (rows, cols) delta at `rank`."""
        sizes = self.sizes(rows, cols, rank)
        _, bonds = self.network.cut(sizes)
        return min(math.prod(sizes[index] for index in bonds), rows, cols)

    def factors_of(self, delta: Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[Factor]:
        """Factors for a delta at a rank, by `fit`, or by alternating least squares."""
        if self.fit is not None:
            return self.fit(delta, rank, seed=seed, tolerance=tolerance)
        return als.fit(self.network, self.sizes(*delta.shape, rank), delta, seed=seed, tolerance=tolerance)

    def dense(self, factors: Sequence[Any]) -> Any:
        """ΔW (rows, cols) of NumPy or torch factors."""
        return self.network.dense(factors)

    def forward(self, x: Any, factors: Sequence[Any]) -> Any:
        """x·ΔWᵀ for x of shape (…, cols), without ΔW where that costs less."""
        return self.network.forward(x, factors)

    def lower(self, factors: Sequence[Factor]) -> tuple[Factor, Factor]:
        """Factors as one pair B (rows, r), A (r, cols) with B·A = ΔW, exact up to rounding.

        Raises `ValueError` when the factors do not fit the contraction.
        """
        b, a = self.network.lower(factors)
        if b.shape[1] <= min(b.shape[0], a.shape[1]):
            return b, a
        # A cut with more bonds than ΔW has rows or columns: ΔW itself is the smaller factor.
        product = self.network.dense(factors)
        identity = np.eye(min(product.shape), dtype=product.dtype)
        return (identity, product) if product.shape[0] <= product.shape[1] else (product, identity)
