"""One tensor's ΔW of several adapters becomes one: TIES and DARE, on dense arrays.

A task vector is the ΔW of one adapter (Ilharco et al. 2023, arXiv 2212.04089). First some of its elements become 0:

- TIES (Yadav et al. 2023, arXiv 2306.01708) keeps the share d, the density, of the largest magnitudes;
- DARE (Yu et al. 2023, arXiv 2311.03099) keeps each with probability d and divides it by d, so that the expectation
  stays.

Then the adapters' weights are multiplied in, and the task vectors are added (DARE) or elect signs (TIES, DARE-TIES).
All is done panel by panel of rows, so that beside the result little is held, however many adapters there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_compress.verbs.methods import Method

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_compress.adapter import Float32Matrix

# Elements of a panel, so that a few of them fit into the second-level cache.
PANEL = 1 << 16


@dataclass(frozen=True)
class TaskVector:
    """ΔW of one adapter in one tensor, B·A + Σ whole: B (rows, k), A (k, cols), `whole` (rows, cols); float32."""

    b: Float32Matrix
    a: Float32Matrix
    whole: Sequence[Float32Matrix] = ()

    @property
    def rank(self) -> int:
        """The rank that it takes to store it."""
        shorter: int = min(self.b.shape[0], self.a.shape[1])
        return shorter if self.whole else min(shorter, self.b.shape[1])

    def rows(self, panel: slice) -> Float32Matrix:
        """Some rows, in memory of their own. The same panel is the same bits every time."""
        values = self.b[panel] @ self.a
        for matrix in self.whole:
            values += matrix[panel]
        return values


def merge(
    tensor: str,
    shape: tuple[int, int],
    vectors: Mapping[int, TaskVector],
    weights: Sequence[float],
    method: Method,
) -> Float32Matrix:
    """What `method` makes of the task vectors of one tensor: float32 of `shape`.

    `vectors` are by the number of their adapter, which says its weight, its density and, with seed and `tensor`, what
    is dropped. Adapters that are not among them have zeros there, and no vote.
    """
    merged = np.zeros(shape, np.float32)
    if not vectors:
        return merged
    sparsify: dict[int, Callable[[Float32Matrix], Float32Matrix]] = {}
    factors: dict[int, np.float32] = {}
    # What overflows is infinite, and refused by whoever decomposes it.
    with np.errstate(over="ignore", invalid="ignore"):
        for number, vector in vectors.items():
            density, weight = method.densities[number], np.float64(weights[number])
            if method.drops:
                sparsify[number] = Drop(density, (method.seed, number, tensor))
                factors[number] = (weight / density).astype(np.float32)
            else:
                sparsify[number] = Trim(density, vector, merged)
                factors[number] = weight.astype(np.float32)
        for panel in _panels(shape):
            weighted = np.stack(
                [sparsify[number](vector.rows(panel)) * factors[number] for number, vector in vectors.items()]
            )
            merged[panel] = elect(weighted) if method.elects else weighted.sum(axis=0)
    return merged


class Trim:
    """Sets all but the largest magnitudes of a task vector to 0, when called with its panels in their order.

    As many are kept as `int(density·elements)`, at least one; of those at the edge the first ones.
    """

    def __init__(self, density: float, vector: TaskVector, scratch: Float32Matrix) -> None:
        """`scratch` is memory of the vector's shape, free again afterwards."""
        self._edge = np.float32(0.0)
        self._room: int | None = None
        trimmed = scratch.size - max(int(density * scratch.size), 1)
        if trimmed > 0:
            for panel in _panels(scratch.shape):
                np.abs(vector.rows(panel), out=scratch[panel])
            magnitudes = scratch.reshape(-1)
            magnitudes.partition(trimmed)
            self._edge = magnitudes[trimmed]
            # Hardly ever are there more at the edge than there is room for, and then they have to be counted.
            if magnitudes[:trimmed].max() == self._edge:
                self._room = int(np.count_nonzero(magnitudes[trimmed:] == self._edge))

    def __call__(self, values: Float32Matrix) -> Float32Matrix:
        """The next panel, trimmed in place."""
        magnitudes = np.abs(values)
        values *= magnitudes >= self._edge
        if self._room is not None:
            at_edge = np.flatnonzero(magnitudes == self._edge)
            values.reshape(-1)[at_edge[self._room :]] = 0.0
            self._room = max(self._room - len(at_edge), 0)
        return values


class Drop:
    """Sets elements of a task vector to 0 at random, when called with its panels in their order.

    The random numbers are those of Philox (Salmon et al. 2011), keyed by what names the task vector: neither the order
    of tensors nor threads matter. The generator's raw output is the same in every release of NumPy.
    """

    def __init__(self, density: float, key: tuple[int, int, str]) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self._random = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        self._density = density

    def __call__(self, values: Float32Matrix) -> Float32Matrix:
        """The next panel, in place."""
        if self._density < 1:
            raw: NDArray[np.uint64] = self._random.random_raw((values.size + 1) // 2)
            halves = raw.astype("<u8", copy=False).view("<u4")[: values.size].reshape(values.shape)
            values *= halves < np.uint32(self._density * 2**32)
        return values


def elect(weighted: NDArray[np.float32]) -> Float32Matrix:
    """TIES' election and disjoint mean: (adapters, rows, cols) to (rows, cols), float32.

    The sign of an element is that of the sum, + where that is 0; the element is the mean of those that have it. As the
    weights are in the values, an adapter votes with its weight, and one of weight 0 or with a 0 here has no say. The
    mean is over the number of those that agree, so that a common weight scales the result, as the paper's λ does.
    mergekit divides by the sum of their weights instead; PEFT has this mean, but votes without weights.
    """
    # Adding 0 makes a + of −0.
    sign = np.copysign(np.float32(1.0), weighted.sum(axis=0) + np.float32(0.0))
    agrees = weighted * sign > 0
    count = np.maximum(agrees.sum(axis=0, dtype=np.float32), np.float32(1.0))
    merged: Float32Matrix = (weighted * agrees).sum(axis=0) / count
    return merged


def _panels(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows that are worked on at a time: by the shape alone."""
    height = max(PANEL // max(shape[1], 1), 1)
    for begin in range(0, shape[0], height):
        yield slice(begin, min(begin + height, shape[0]))
