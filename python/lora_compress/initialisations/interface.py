"""An initialisation is a function from layers to the factors that their training starts from."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_compress._native import Delta
from lora_compress.decompositions.interface import Decomposition

Factor = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """One layer's ΔW that is to be: its tensor's name and shape, and the base's weight as a matrix, float32."""

    name: str
    rows: int
    cols: int
    weight: Callable[[], Factor]


@dataclass(frozen=True)
class Group:
    """Layers whose factors begin together: one, or those that share factors."""

    decomposition: Decomposition
    matrices: Sequence[Matrix]
    rank: int
    scale: float
    seed: int

    def seed_of(self, matrix: Matrix) -> int:
        """A seed that no other tensor has."""
        return (self.seed << 32) + zlib.crc32(matrix.name.encode())

    def deltas(self) -> list[Delta]:
        """The base's weights, for a decomposition to fit."""
        return [Delta.from_array(np.ascontiguousarray(each.weight()), each.name) for each in self.matrices]


@dataclass(frozen=True)
class Start:
    """Factors for every layer of a group, in the order of the contraction; shared ones are the same array in all.

    frozen: numbers of the factors that are not trained. shifts: the base loses s·ΔW of these factors.
    """

    layers: Sequence[Sequence[Factor]]
    frozen: frozenset[int] = frozenset()
    shifts: bool = False


@dataclass(frozen=True)
class Initialisation:
    """A named way to begin.

    name: `[a-z0-9-]+`, what `attach(init=…)` takes.
    start: the factors of a group of layers. Deterministic in the group. What it cannot begin is a `SelectionError`.
    description: a few words for `lora-compress plugins list`.
    """

    name: str
    start: Callable[[Group], Start]
    description: str = ""

    def factors_of(self, group: Group) -> Start:
        """The factors of a group.

        Raises `ValueError` for what is not that: other shapes than the layers', the contraction's and the rank's;
        values that are not finite float32; shared factors that differ.
        """
        start = self.start(group)
        if not isinstance(start, Start):
            raise ValueError(f"an initialisation returns a Start, not {type(start).__name__}")
        if len(start.layers) != len(group.matrices):
            raise ValueError(f"factors of {len(start.layers)} layers for {len(group.matrices)}")
        own = group.decomposition.network.own
        for factors, matrix in zip(start.layers, group.matrices, strict=True):
            group.decomposition.check(factors, (matrix.rows, matrix.cols), group.rank)
            for number, (mine, first) in enumerate(zip(factors, start.layers[0], strict=True)):
                if not own[number] and not np.array_equal(mine, first):
                    raise ValueError(f"factor {number + 1} is shared, but not the same for all layers")
        if strangers := start.frozen - set(range(len(own))):
            raise ValueError(f"there is no factor number {min(strangers)} to be frozen")
        return start
