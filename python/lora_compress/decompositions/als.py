"""The fit that any tensor network has: alternating least squares (Carroll & Chang 1970; Kolda & Bader 2009, §3.4).

ΔW depends linearly on each factor, so with the others held the best one is a least-squares problem that is solved
exactly; taken in turn, the error never rises. Δ itself is never held: with F on the rows' side of a cut,

    W = B(F)·A,   ⟨Δ, ∂W/∂F⟩ = the network without F, contracted with Δ·Aᵀ,   ‖W‖² = the same with B·(A·Aᵀ)·Bᵀ,

and on the columns' side with Bᵀ·Δ. Every step costs one product of Δ with as many columns as the cut has. A factor that
layers share solves the sum of their equations.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_compress.decompositions.network import Network, Term, contract

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_compress._native import Delta

    Array = NDArray[np.float64]

# Sweeps over all factors, and the relative fall of the error below which another one is not worth it.
SWEEPS = 100
# Elements of a factor that are bound together in one system of equations.
LARGEST = 4096
# Directions of a system that are this much weaker than the strongest are not determined by Δ.
NEGLIGIBLE = 1e-12


def fit(
    network: Network,
    sizes: Sequence[Mapping[str, int]],
    deltas: Sequence[Delta],
    *,
    seed: int,
    tolerance: float,
    start: Sequence[Sequence[NDArray[Any]]] | None = None,
    sweeps: int = SWEEPS,
) -> list[list[NDArray[np.float32]]]:
    """Factors of these sizes for every layer's delta, float32; shared ones are the same array in every layer.

    Starts from `start`, or from truncated SVDs where the factors form a chain, else from random numbers. Stops when a
    sweep lowers Σ‖Δ − W‖ by less than `tolerance`, relatively. Finds a local optimum, which for contractions of more
    than two factors need not be the best. The same inputs and seed give the same factors. Raises `ValueError` for
    factors too large to solve for.
    """
    layers = [[np.asarray(factor, np.float64) for factor in layer] for layer in start or ()] or _start(
        network, sizes, deltas, seed
    )
    sides = [_sides(network, network.sizes(factors)) for factors in layers]
    whole = math.fsum(delta.energy for delta in deltas)
    error = math.inf
    for _ in range(sweeps):
        before = error
        for number, own in enumerate(network.own):
            equations = [
                _equations(network, factors, number, delta, side)
                for factors, delta, side in zip(layers, deltas, sides, strict=True)
            ]
            systems = equations if own else [_sum(equations)]
            solutions = [system.solve() for system in systems] * (1 if own else len(layers))
            captured = math.fsum(each.captured(best) for each, best in zip(equations, solutions, strict=True))
            for factors, best in zip(layers, solutions, strict=True):
                factors[number] = best
            error = max(whole - captured, 0.0)
        if not error < before * (1 - tolerance) ** 2 or error <= NEGLIGIBLE * whole:
            break
    shared = {number: layers[0][number].astype(np.float32) for number, own in enumerate(network.own) if not own}
    return [
        [shared[number] if number in shared else factor.astype(np.float32) for number, factor in enumerate(factors)]
        for factors in layers
    ]


def _start(
    network: Network, sizes: Sequence[Mapping[str, int]], deltas: Sequence[Delta], seed: int
) -> list[list[Array]]:
    """From truncated SVDs where factors form a chain from rows to columns, else random. What is shared comes from the
    layer with the most energy.
    """
    layers = []
    for size, delta in zip(sizes, deltas, strict=True):
        shapes = network.shapes(size)
        if _is_chain(network):
            layers.append(_chain_start(shapes, delta, seed))
            continue
        # Seeded by the tensor too, so that no two of a model start alike.
        rng = np.random.default_rng([seed, zlib.crc32(delta.name.encode())])
        layers.append([rng.standard_normal(shape) / math.sqrt(max(math.prod(shape[1:]), 1)) for shape in shapes])
    leader = layers[max(range(len(deltas)), key=lambda at: deltas[at].energy)]
    return [
        [mine if own else theirs for mine, theirs, own in zip(factors, leader, network.own, strict=True)]
        for factors in layers
    ]


def _is_chain(network: Network) -> bool:
    if len(network.terms) < 2 or not all(len(term) == 2 for term in network.terms):
        return False
    chain = [index for term in network.terms for index in term]
    inner = chain[1:-1]
    return ((chain[0],), (chain[-1],)) == (network.rows, network.cols) and inner[::2] == inner[1::2]


def _chain_start(shapes: Sequence[tuple[int, ...]], delta: Delta, seed: int) -> list[Array]:
    u, sigma, vt = delta.truncated_svd(min(shape[1] for shape in shapes[:-1]), seed=seed)
    root = np.sqrt(sigma)
    factors = [np.eye(shape[0], shape[1]) for shape in shapes]
    factors[0] = _grown(u * root, shapes[0])
    factors[-1] = _grown(root[:, None] * vt, shapes[-1])
    return factors


def _grown(values: NDArray[Any], shape: tuple[int, ...]) -> Array:
    """A matrix with zeros around it."""
    grown = np.zeros(shape)
    grown[: values.shape[0], : values.shape[1]] = values
    return grown


@dataclass(frozen=True)
class _Side:
    """One side of a cut: its factors, its own indices of ΔW, and the bonds that lead to the other side, with what they
    are called on this one.
    """

    numbers: tuple[int, ...]
    own: Term
    bonds: Term
    ends: Term
    deltas: tuple[tuple[str, str], ...]


def _sides(network: Network, sizes: Mapping[str, int]) -> tuple[_Side, _Side]:
    left, bonds = network.cut(sizes)
    right = tuple(number for number in range(len(network.terms)) if number not in left)
    return tuple(  # type: ignore[return-value]
        _Side(
            numbers,
            own,
            bonds,
            tuple(index + "'" if index in own else index for index in bonds),
            tuple((index, index + "'") for index in bonds if index in own),
        )
        for numbers, own in ((left, network.rows), (right, network.cols))
    )


@dataclass(frozen=True)
class _Equations:
    """Normal equations of one factor F, G·f = g: one system for each value of the indices that are `carried`, and one
    right-hand side for each of those that are `alone`.
    """

    term: Term
    sizes: Mapping[str, int]
    carried: Term
    inner: Term
    alone: Term
    matrix: Array
    wanted: Array

    @property
    def order(self) -> Term:
        """Indices of F as the systems have them."""
        return (*self.carried, *self.inner, *self.alone)

    def solve(self) -> Array:
        """The best F."""
        lead = tuple(self.sizes[index] for index in self.carried)
        size, columns = (math.prod(self.sizes[index] for index in part) for part in (self.inner, self.alone))
        solved = _least_squares(self.matrix.reshape(*lead, size, size), self.wanted.reshape(*lead, size, columns))
        solved = solved.reshape(tuple(self.sizes[index] for index in self.order))
        return np.ascontiguousarray(np.transpose(solved, [self.order.index(index) for index in self.term]))

    def captured(self, best: Array) -> float:
        """⟨Δ, W⟩. Summed over the layers of a shared factor it is Σ‖W‖² at the optimum."""
        return float(np.sum(self.wanted * np.transpose(best, [self.term.index(index) for index in self.order])))


def _sum(equations: Sequence[_Equations]) -> _Equations:
    first = equations[0]
    matrix, wanted = sum(each.matrix for each in equations), sum(each.wanted for each in equations)
    return _Equations(
        first.term, first.sizes, first.carried, first.inner, first.alone, np.asarray(matrix), np.asarray(wanted)
    )


def _equations(
    network: Network, factors: Sequence[Array], number: int, delta: Delta, sides: tuple[_Side, _Side]
) -> _Equations:
    """The equations of factor `number` in one layer, the others given."""
    sizes = network.sizes(factors)
    mine, other = sides if number in sides[0].numbers else sides[::-1]
    across = network.side(factors, sizes, other.numbers, other.own, other.bonds)
    flat = across.reshape(math.prod(sizes[index] for index in other.own), -1)
    multiply = delta.matmul if mine is sides[0] else delta.rmatmul
    image = multiply(flat.astype(np.float32)).astype(np.float64)
    # The bonds have one name on each side: those of the other side's own indices end in a prime there.
    image = image.reshape(*(sizes[index] for index in mine.own), *across.shape[len(other.own) :])
    gram = (flat.T @ flat).reshape(2 * across.shape[len(other.own) :])

    rest = tuple(held for held in mine.numbers if held != number)
    terms = [network.terms[held] for held in rest] + list(mine.deltas)
    arrays = [factors[held] for held in rest] + [np.eye(sizes[index]) for index, _ in mine.deltas]
    term = network.terms[number]
    shared = tuple(index for index in term if index in mine.own)
    inner = tuple(index for index in term if index not in mine.own)
    size = math.prod(sizes[index] for index in inner)
    if size > LARGEST:
        raise ValueError(
            f"factor {number + 1} of `{network.text}` is too large for alternating least squares: give a fit"
        )

    def double(names: Term) -> Term:
        """The second copy of a network: its own bonds, and the same indices of ΔW."""
        return tuple(name if name in mine.own else name + '"' for name in names)

    # Indices of ΔW that the factor has and no other carries are alike in all equations: they need not be written out.
    carried = tuple(index for index in shared if any(index in each for each in terms))
    alone = tuple(index for index in shared if index not in carried)
    absent = tuple(index for index in mine.own if index not in term and not any(index in each for each in terms))
    wanted = contract([*terms, (*mine.own, *mine.ends)], (*carried, *inner, *alone), [*arrays, image])
    copies = [*terms, *(double(each) for each in terms), (*mine.ends, *double(mine.ends))]
    matrix = contract(copies, (*carried, *inner, *double(inner)), [*arrays, *arrays, gram])
    matrix = matrix * math.prod(sizes[index] for index in absent)
    return _Equations(term, sizes, carried, inner, alone, matrix, wanted)


def _least_squares(matrix: Array, wanted: Array) -> Array:
    """The smallest solutions of symmetric systems, one for each leading index: directions that nothing determines stay
    0.
    """
    values, vectors = np.linalg.eigh(matrix)
    floor = NEGLIGIBLE * np.maximum(values[..., -1:], 0.0)
    inverse = np.where(values > floor, 1.0 / np.where(values > floor, values, 1.0), 0.0)
    turned = np.swapaxes(vectors, -1, -2) @ wanted
    return np.asarray(vectors @ (inverse[..., None] * turned))
