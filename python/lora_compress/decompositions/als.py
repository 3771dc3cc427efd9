"""The fit that any tensor network has: alternating least squares (Carroll & Chang 1970; Kolda & Bader 2009, §3.4).

ΔW depends linearly on each factor, so with the others held the best one is a least-squares problem that is solved
exactly; taken in turn, the error never rises. Δ itself is never held: with F on the rows' side of a cut,

    W = B(F)·A,   ⟨Δ, ∂W/∂F⟩ = the network without F, contracted with Δ·Aᵀ,   ‖W‖² = the same with B·(A·Aᵀ)·Bᵀ,

and on the columns' side with Bᵀ·Δ. Every step costs one product of Δ with as many columns as the cut has.
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

# Sweeps over all factors, and the relative fall of the error below which another one is not worth it.
SWEEPS = 100
# Elements of a factor that are bound together in one system of equations.
LARGEST = 4096
# Directions of a system that are this much weaker than the strongest are not determined by Δ.
NEGLIGIBLE = 1e-12


def fit(
    network: Network, sizes: Mapping[str, int], delta: Delta, *, seed: int, tolerance: float
) -> list[NDArray[np.float32]]:
    """Factors of these sizes for `delta`, float32. The same inputs and seed give the same factors.

    Stops when a sweep lowers ‖Δ − W‖ by less than `tolerance`, relatively. Finds a local optimum, which for
    contractions of more than two factors need not be the best. Raises `ValueError` for factors too large to solve for.
    """
    factors = _start(network, sizes, delta, seed)
    error = math.inf
    for _ in range(SWEEPS):
        before = error
        for number in range(len(factors)):
            factors[number], error = _solve(network, factors, number, delta)
        if not error < before * (1 - tolerance) ** 2 or error <= NEGLIGIBLE * delta.energy:
            break
    return [factor.astype(np.float32) for factor in factors]


def _start(network: Network, sizes: Mapping[str, int], delta: Delta, seed: int) -> list[NDArray[np.float64]]:
    """From the truncated SVD where factors form a chain from rows to columns, else random."""
    shapes = network.shapes(sizes)
    chain = [*network.terms[0][:1], *(index for term in network.terms for index in term), *network.terms[-1][-1:]]
    ends = chain[2:-2]
    is_chain = all(len(term) == 2 for term in network.terms) and len(network.terms) > 1
    if is_chain and (chain[:1], chain[-1:]) == ([*network.rows], [*network.cols]) and ends[::2] == ends[1::2]:
        rank = min(shape[1] for shape in shapes[:-1])
        u, sigma, vt = delta.truncated_svd(rank, seed=seed)
        root = np.sqrt(sigma)
        ones = [np.eye(shape[0], shape[1]) for shape in shapes]
        ones[0] = _grown(u * root, shapes[0])
        ones[-1] = _grown(root[:, None] * vt, shapes[-1])
        return ones
    # Seeded by the tensor too, so that no two of a model start alike.
    rng = np.random.default_rng([seed, zlib.crc32(delta.name.encode())])
    return [rng.standard_normal(shape) / math.sqrt(max(math.prod(shape[1:]), 1)) for shape in shapes]


def _grown(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float64]:
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


def _solve(
    network: Network, factors: Sequence[NDArray[np.float64]], number: int, delta: Delta
) -> tuple[NDArray[np.float64], float]:
    """The best factor `number`, the others given; and ‖Δ − W‖² with it."""
    sizes = network.sizes(factors)
    sides = _sides(network, sizes)
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
    if math.prod(sizes[index] for index in inner) > LARGEST:
        raise ValueError(
            f"factor {number + 1} of `{network.text}` is too large for alternating least squares: give a fit"
        )

    def double(names: Term) -> Term:
        """The second copy of a network: its own bonds, and the same indices of ΔW."""
        return tuple(name if name in mine.own else name + '"' for name in names)

    right_side = contract([*terms, (*mine.own, *mine.ends)], (*shared, *inner), [*arrays, image])
    # Indices of ΔW that the factor has and no other carries are alike in all equations: they need not be written out.
    carried = tuple(index for index in shared if any(index in each for each in terms))
    absent = tuple(index for index in mine.own if index not in term and not any(index in each for each in terms))
    copies = [*terms, *(double(each) for each in terms), (*mine.ends, *double(mine.ends))]
    matrix = contract(copies, (*carried, *inner, *double(inner)), [*arrays, *arrays, gram])
    matrix = matrix * math.prod(sizes[index] for index in absent)
    size = math.prod(sizes[index] for index in inner)
    alone = tuple(index for index in shared if index not in carried)
    order = (*carried, *inner, *alone)
    wanted = np.moveaxis(right_side, range(right_side.ndim), [order.index(index) for index in (*shared, *inner)])
    lead = tuple(sizes[index] for index in carried)
    solved = _least_squares(matrix.reshape(*lead, size, size), wanted.reshape(*lead, size, -1))
    solved = solved.reshape(tuple(sizes[index] for index in order))
    best = np.moveaxis(solved, range(solved.ndim), [term.index(index) for index in order])
    # At the optimum ⟨Δ, W⟩ = ‖W‖².
    captured = float(
        np.sum(right_side * np.moveaxis(best, range(best.ndim), [(*shared, *inner).index(i) for i in term]))
    )
    return np.ascontiguousarray(best), max(delta.energy - captured, 0.0)


def _least_squares(matrix: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest solutions of symmetric systems, one for each leading index: directions that nothing determines stay
    0.
    """
    values, vectors = np.linalg.eigh(matrix)
    floor = NEGLIGIBLE * np.maximum(values[..., -1:], 0.0)
    inverse = np.where(values > floor, 1.0 / np.where(values > floor, values, 1.0), 0.0)
    turned = np.swapaxes(vectors, -1, -2) @ wanted
    return np.asarray(vectors @ (inverse[..., None] * turned))
