"""A decomposition is data: a contraction of factors over named indices, the sizes of those indices, and a way to fit
it.

The contraction (`decompositions/network.py` has the grammar) says what the factors multiply to. From it the host
derives how many there are, their shapes at a given rank, the parameter count, ΔW, its product with inputs and the
gradients of that, and the exact lowering to a pair (B, A). What cannot be derived has a default that a plugin may do
better: `fit`, `init`, `ladder`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from lora_compress.decompositions import als
from lora_compress.decompositions.network import LAYER, Network

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_compress._native import Delta

    Factor = NDArray[np.float32]

Shape = tuple[int, int]


class Layer(NamedTuple):
    """A matrix to decompose: the name of its tensor, and its shape."""

    name: str
    rows: int
    cols: int


class Fit(Protocol):
    """Finds factors for one delta, in the order of the contraction, float32.

    The factors' bonds may be smaller than those of `rank` where the delta needs no more. Must be deterministic in
    (delta, rank, seed).
    """

    def __call__(self, delta: Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[Factor]:
        """Fit `delta` at `rank`; the error may exceed the best possible one by `tolerance`, relatively."""
        ...


class GroupFit(Protocol):
    """As `Fit`, for layers that share factors: a list with one array for each layer where the contraction says `layer`,
    one array for all where it does not.
    """

    def __call__(
        self, deltas: Sequence[Delta], rank: int, *, seed: int, tolerance: float
    ) -> Sequence[Factor | Sequence[Factor]]:
        """Fit all deltas of a group. They are made when they are taken from `deltas`, and not kept by it."""
        ...


class Axes(Protocol):
    """Sizes of all indices but plain `out` and `in`, for a (rows, cols) delta at a rank."""

    def __call__(self, rows: int, cols: int, rank: int) -> Mapping[str, int]:
        """One size for each index."""
        ...


class Init(Protocol):
    """Factors to train from, of the shapes of a (rows, cols) matrix at a rank, with a ΔW of zero."""

    def __call__(self, rows: int, cols: int, rank: int, *, rng: np.random.Generator) -> Sequence[Factor]:
        """One float32 array for each factor."""
        ...


class Group(Protocol):
    """Which layers share factors."""

    def __call__(self, layers: Sequence[Layer]) -> Sequence[Sequence[str]]:
        """Names of the layers of each group; a layer that is in none is a group of its own."""
        ...


class Ladder(Protocol):
    """The ranks that a (rows, cols) matrix can have, ascending; for a group, of all rows and all columns together."""

    def __call__(self, rows: int, cols: int) -> Sequence[int]:
        """Numbers of at least 1; more parameters for larger ones."""
        ...


@dataclass(frozen=True)
class Decomposition:
    """A named contraction with a way to fit it: `fit`, or alternating least squares where there is none.

    name: `[a-z0-9-]+`, what `--decomposition` takes.
    contraction: what the factors multiply to, `"out r, r in"` for instance.
    description: a few words for `lora-compress plugins list`.
    axes: sizes of the indices. Without it every bond has the rank as its size; a contraction that splits the rows or
        the columns of ΔW needs it.
    fit: a `Fit`, or a `GroupFit` where the contraction says `layer`.
    init: factors to train from; without it one factor is zero and the others are random.
    group: which layers share factors; a contraction that says `layer` needs it.
    ladder: the ranks there are; without it all up to the shorter side.

    Raises `ContractionError` (a `ValueError`) at construction when the contraction cannot be read.
    """

    name: str
    contraction: str
    _: KW_ONLY
    description: str = ""
    axes: Axes | None = None
    fit: Fit | GroupFit | None = None
    init: Init | None = None
    group: Group | None = None
    ladder: Ladder | None = None

    def __post_init__(self) -> None:
        network = self.network
        if self.axes is None and (network.rows, network.cols) != (("out",), ("in",)):
            raise ValueError(f"`{self.contraction}` splits ΔW: `axes` has to give the sizes of {network.indices}")
        if network.is_grouped != (self.group is not None):
            raise ValueError(
                f"`{self.contraction}` shares factors: `group` has to say which layers do"
                if network.is_grouped
                else f"`group` says which layers share factors, but none of `{self.contraction}` says `{LAYER}`"
            )

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
        return {index: int(sizes[index]) for index in network.indices}

    def shapes(self, rows: int, cols: int, rank: int) -> list[tuple[int, ...]]:
        """Shapes of the factors of a (rows, cols) delta at `rank`."""
        return self.network.shapes(self.sizes(rows, cols, rank))

    def parameters(self, shapes: Sequence[Shape], rank: int) -> int:
        """Number of parameters of layers of these (rows, cols) at `rank`, shared factors counted once.

        Raises `ValueError` when layers cannot share a factor because they would need different shapes.
        """
        layers = [self.shapes(*shape, rank) for shape in shapes]
        count = 0
        for number, own in enumerate(self.network.own):
            found = [layer[number] for layer in layers]
            if own:
                count += sum(math.prod(shape) for shape in found)
            elif found:
                if len({*found}) > 1:
                    raise ValueError(f"layers of shapes {found[0]} and {found[-1]} cannot share a factor")
                count += math.prod(found[0])
        return count

    def ranks(self, shapes: Sequence[Shape]) -> Sequence[int]:
        """The ranks that a matrix, or a group of them, can have, ascending."""
        rows, cols = sum(shape[0] for shape in shapes), sum(shape[1] for shape in shapes)
        return range(1, min(rows, cols) + 1) if self.ladder is None else sorted(map(int, self.ladder(rows, cols)))

    def lowered_rank(self, rows: int, cols: int, rank: int) -> int:
        """The rank of `lower` for factors of a (rows, cols) delta at `rank`."""
        sizes = self.sizes(rows, cols, rank)
        _, bonds = self.network.cut(sizes)
        return min(math.prod(sizes[index] for index in bonds), rows, cols)

    def groups(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """The layers by group, in their order; each alone where nothing is shared."""
        by_name = {layer.name: layer for layer in layers}
        shared = self.group(layers) if self.group is not None else ()
        # A name that is not there, or there twice, is a fault of the plugin's.
        grouped = [[by_name.pop(name) for name in names] for names in shared]
        grouped += [[layer] for layer in by_name.values()]
        place = {layer.name: number for number, layer in enumerate(layers)}
        return sorted((group for group in grouped if group), key=lambda group: place[group[0].name])

    def factors_of(self, deltas: Sequence[Delta], rank: int, *, seed: int, tolerance: float) -> list[list[Factor]]:
        """Factors of every delta of a group at a rank, by `fit`, or by alternating least squares. Shared ones are the
        same array for all.

        Raises `ValueError` for factors that are not finite float32 arrays, do not fit the contraction, the deltas or
        each other, or have larger bonds than the rank allows.
        """
        if self.fit is None:
            sizes = [self.sizes(*delta.shape, rank) for delta in deltas]
            return als.fit(self.network, sizes, deltas, seed=seed, tolerance=tolerance)
        found: Any = self.fit(
            deltas if self.network.is_grouped else deltas[0],  # type: ignore[arg-type]
            rank,
            seed=seed,
            tolerance=tolerance,
        )
        if not isinstance(found, Sequence):
            raise ValueError(f"a fit returns a list of factors, not {type(found).__name__}")
        if len(found) != len(self.network.own):
            raise ValueError(f"{len(found)} factors for the {len(self.network.own)} of `{self.contraction}`")
        columns = []
        for number, (factor, own) in enumerate(zip(found, self.network.own, strict=True)):
            column = list(factor) if own and self.network.is_grouped else [factor] * len(deltas)
            if len(column) != len(deltas):
                raise ValueError(f"{len(column)} of factor {number + 1} for {len(deltas)} layers")
            columns.append(column)
        layers = [list(factors) for factors in zip(*columns, strict=True)]
        for factors, delta in zip(layers, deltas, strict=True):
            self.check(factors, delta.shape, rank)
        return layers

    def check(self, factors: Sequence[Any], shape: Shape, rank: int) -> None:
        """Raise `ValueError` unless these are factors of a matrix of that shape, with bonds of at most that rank."""
        if len(factors) != len(self.network.own):
            raise ValueError(f"{len(factors)} factors for the {len(self.network.own)} of `{self.contraction}`")
        for number, factor in enumerate(factors):
            if not isinstance(factor, np.ndarray) or factor.dtype != np.float32:
                kind = factor.dtype if isinstance(factor, np.ndarray) else type(factor).__name__
                raise ValueError(f"factor {number + 1} is {kind}: factors are float32 arrays")
            if not np.isfinite(factor).all():
                raise ValueError(f"factor {number + 1} holds NaN or an infinity")
        found, allowed = self.network.sizes(factors), self.sizes(*shape, rank)
        sides = self.network.rows, self.network.cols
        made = tuple(math.prod(found[index] for index in side) for side in sides)
        if made != shape:
            raise ValueError(f"the factors make a {made} matrix, the delta is {shape}")
        for index, size in found.items():
            if size > allowed[index]:
                raise ValueError(f"`{index}` is {size}, but {allowed[index]} at most at the rank {rank}")

    def improve(
        self,
        deltas: Sequence[Delta],
        layers: Sequence[Sequence[NDArray[Any]]],
        *,
        tolerance: float = 1e-4,
        sweeps: int = als.SWEEPS,
    ) -> list[list[Factor]]:
        """Factors of every layer, improved by alternating least squares: the error never rises. For a `fit` that knows
        a good start.
        """
        sizes = [self.network.sizes(factors) for factors in layers]
        return als.fit(self.network, sizes, deltas, seed=0, tolerance=tolerance, start=layers, sweeps=sweeps)

    def initial(self, rows: int, cols: int, rank: int, *, seed: int) -> list[Factor]:
        """Factors to train from, with a ΔW of zero: by `init`, or one factor zero and the others normal, so that their
        product with inputs of variance 1 has variance 1/3 like LoRA's (Hu et al. 2022). What layers share is alike for
        the same seed, and not zero.
        """
        if self.init is not None:
            return list(self.init(rows, cols, rank, rng=np.random.default_rng(seed)))
        network, sizes = self.network, self.sizes(rows, cols, rank)
        mine = [number for number, own in enumerate(network.own) if own]
        zero = next((number for number in mine if set(network.terms[number]) & set(network.rows)), mine[0])
        others = max(len(self.network.terms) - 1, 1)
        bonds = math.prod(sizes[index] for index in network.bonds)
        # Each of `bonds` summands is a product of `others` normals; the bonds that end in the zero factor are its own.
        own = math.prod(sizes[index] for index in network.terms[zero] if index in network.bonds)
        deviation = (own / (3 * cols * bonds)) ** (0.5 / others)
        factors = []
        for number, shape in enumerate(network.shapes(sizes)):
            values = np.random.default_rng([seed, number]).standard_normal(shape) * deviation
            factors.append((values if number != zero else np.zeros(shape)).astype(np.float32))
        return factors

    def dense(self, factors: Sequence[Any]) -> Any:
        """ΔW (rows, cols) of one layer's NumPy or torch factors."""
        return self.network.dense(factors)

    def forward(self, x: Any, factors: Sequence[Any]) -> Any:
        """x·ΔWᵀ for x of shape (…, cols), without ΔW where that costs less."""
        return self.network.forward(x, factors)

    def adjoint(self, x: Any, dy: Any, factors: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Gradients of ⟨dy, forward(x)⟩ with respect to x and to every factor."""
        return self.network.adjoint(x, dy, factors)

    def lower(self, factors: Sequence[Factor]) -> tuple[Factor, Factor]:
        """One layer's factors as a pair B (rows, r), A (r, cols) with B·A = ΔW, exact up to rounding.

        Raises `ValueError` when the factors do not fit the contraction.
        """
        return self.network.lower_small(factors)
