"""Products of a network whose order is settled once, for factors that are multiplied in every step of a training.

`Network` plans by shape at every call, with a cache; here all that can be known before the first call is: which
pairwise products there are, in which order, and whether there are any at all. What remains is a handful of matrix
products, or einsums where an index is on both sides, which compilers trace. Arrays and einsum are NumPy's or torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import opt_einsum

from lora_compress.decompositions.network import BATCH, Network, Term, equation, order

Einsum = Callable[..., Any]
# Tokens for which the order of products with inputs is chosen: a batch of training. Any other number gives the same
# values up to rounding.
TOKENS = 4096
# The index of stacked matrices, each with factors of its own.
STACK = "matrix of a stack"


@dataclass(frozen=True)
class Step:
    """One product of two operands (one, where an index is only summed), taken from those that are left.

    shared: how many indices are summed where they are the last of the first operand and the first of the second, and
        the result has the others in their order: a matrix product, which takes half of what torch does for an einsum.
    """

    positions: tuple[int, ...]
    equation: str
    shared: int = 0

    @classmethod
    def of(cls, positions: Sequence[int], equation: str) -> Step:
        """As opt_einsum describes it."""
        terms, _, output = equation.partition("->")
        found = tuple(terms.split(","))
        for (left, right), placed in ((found, positions), (found[::-1], positions[::-1])) if len(found) == 2 else ():
            count = len({*left} & {*right})
            if count and output and left[-count:] == right[:count] and output == left[:-count] + right[count:]:
                return cls(tuple(placed), f"{left},{right}->{output}", count)
        return cls(tuple(positions), equation)

    def __call__(self, einsum: Einsum, operands: Sequence[Any]) -> Any:
        """The product of the operands, in the order of `positions`."""
        if not self.shared:
            return einsum(self.equation, *operands)
        left, right = operands
        if left.ndim == right.ndim == 2 and self.shared == 1:
            return left @ right
        size = math.prod(right.shape[: self.shared])
        made = left.reshape(-1, size) @ right.reshape(size, -1)
        return made.reshape(*left.shape[: -self.shared], *right.shape[self.shared :])


@dataclass(frozen=True)
class Product:
    """A contraction step by step."""

    steps: tuple[Step, ...]

    @classmethod
    def plan(cls, terms: Sequence[Term], output: Term, sizes: Mapping[str, int]) -> Product:
        """The cheapest order for these sizes; no step where the one factor is what is asked for."""
        if len(terms) == 1 and terms[0] == output:
            return cls(())
        shapes = [tuple(sizes[index] for index in term) for term in terms]
        _, found = opt_einsum.contract_path(
            equation(tuple(terms), output), *shapes, shapes=True, optimize=order(len(terms))
        )
        return cls(tuple(Step.of(tuple(step[0]), step[2]) for step in found.contraction_list))

    def __call__(self, einsum: Einsum, arrays: Sequence[Any]) -> Any:
        """The product of the arrays, one for each term."""
        held = list(arrays)
        for step in self.steps:
            operands = [held[position] for position in step.positions]
            # From the last, so that taking one does not move the next.
            for position in sorted(step.positions, reverse=True):
                del held[position]
            held.append(step(einsum, operands))
        return held[0]


@dataclass(frozen=True)
class Side:
    """One matrix of a pair: the factors that it is made of, their product, and its shape."""

    numbers: tuple[int, ...]
    product: Product
    shape: tuple[int, ...]

    def __call__(self, einsum: Einsum, factors: Sequence[Any]) -> Any:
        """The matrix, of all factors of the network."""
        made = self.product(einsum, [factors[number] for number in self.numbers])
        return made if tuple(made.shape) == self.shape else made.reshape(self.shape)


@dataclass(frozen=True)
class Pair:
    """B (rows, r) and A (r, cols) of a network, as `Network.lower` has them."""

    b: Side
    a: Side

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2]

    def is_made_of(self, factors: Sequence[Any]) -> bool:
        """Whether B and A are these factors and nothing else, in this order."""
        sides = (self.b, self.a)
        return [(side.numbers, side.product.steps, side.shape) for side in sides] == [
            ((number,), (), tuple(factor.shape)) for number, factor in enumerate(factors)
        ]

    def __call__(self, einsum: Einsum, factors: Sequence[Any]) -> tuple[Any, Any]:
        """B and A; of a stack, with its index in front."""
        return self.b(einsum, factors), self.a(einsum, factors)


def plan_pair(network: Network, sizes: Mapping[str, int], stack: int = 0) -> Pair | None:
    """How factors of these sizes are lowered; None where the pair would have more directions than ΔW can, or needs an
    index of ΔW on both sides: products with inputs are better made from the factors then.

    stack: how many matrices there are, whose factors and pairs have their number as first index; 0 for a single one.
    """
    lead, front = ((STACK,), (stack,)) if stack else ((), ())
    # Of equally small cuts the one with most on the rows' side: where A is not trained (LoRA-XS), no input has to be
    # kept for the gradients of what is.
    left = min(
        network.cuts(), key=lambda left: (math.prod(sizes[i] for i in network.bonds_between(left)), -len(left), left)
    )
    bonds = network.bonds_between(left)
    rank = math.prod(sizes[index] for index in bonds)
    rows, cols = (math.prod(sizes[index] for index in side) for side in (network.rows, network.cols))
    if rank > min(rows, cols) or {*network.rows, *network.cols} & {*bonds}:
        return None
    right = tuple(number for number in range(len(network.terms)) if number not in left)
    sizes = {**sizes, STACK: stack}
    b = Product.plan([(*lead, *network.terms[number]) for number in left], (*lead, *network.rows, *bonds), sizes)
    a = Product.plan([(*lead, *network.terms[number]) for number in right], (*lead, *bonds, *network.cols), sizes)
    return Pair(Side(left, b, (*front, rows, rank)), Side(right, a, (*front, rank, cols)))


def plan_dense(network: Network, sizes: Mapping[str, int], stack: int = 0) -> Product:
    """ΔW over its own indices, (*rows, *cols), or of a stack of matrices, (stack, *rows, *cols)."""
    lead = (STACK,) if stack else ()
    terms = [(*lead, *term) for term in network.terms]
    return Product.plan(terms, (*lead, *network.rows, *network.cols), {**sizes, STACK: stack})


def plan_forward(network: Network, sizes: Mapping[str, int]) -> Product:
    """x·ΔWᵀ from the factors and x as (tokens, *cols), in this order; gives (tokens, *rows)."""
    terms = (*network.terms, (BATCH, *network.cols))
    return Product.plan(terms, (BATCH, *network.rows), {**sizes, BATCH: TOKENS})
