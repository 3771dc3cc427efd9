"""A tensor network as text: which factors there are, over which indices, and what their contraction is.

    out r, r in                                 ΔW[out, in] = Σ_r B[out, r]·A[r, in]
    out p, p q, q in                            three factors, a small core in the middle
    out r, r in, out s, s in                    the Hadamard product of two low-rank matrices (LoHa)
    o1 i1, o2 r, r i2 -> (o1 o2) (i1 i2)        the Kronecker product of a small and a low-rank matrix (LoKr)
    out p, layer p q, q in                      layers that share their first and last factor, not the core between

Factors are separated by commas, their indices by spaces. What follows the arrow says which indices make up the rows and
the columns of ΔW, slowest first; without it they are `out` and `in`. Every other index is a bond, and is summed. The
word `layer` in front of a factor says that each layer of a group has one of its own, and all share those without it.
From the text follow the factors' shapes, ΔW itself, its product with inputs and the gradients of that, and an exact
pair (B, A), all for one layer at a time.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import opt_einsum

WORD = re.compile(r"\s*(?:(?P<index>[A-Za-z][A-Za-z0-9_]*)|(?P<mark>,|\(|\)|->))")
# More factors than this are contracted in an order that is found greedily.
OPTIMAL = 6
# And more than this are not read: the ways to cut a network are counted in powers of two.
MOST = 16
# Nor contractions of more characters, or factors of more indices: arrays of NumPy's have few more.
LONGEST = 1000
DIMENSIONS = 32
# Characters of a contraction that an error shows on either side of the fault.
AROUND = 40
# Marks the factors that each layer of a group has of its own.
LAYER = "layer"
BATCH = "batch of inputs"

Term = tuple[str, ...]


class ContractionError(ValueError):
    """A contraction that cannot be read; the message has the character where that shows."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        begin, end = max(position - AROUND, 0), position + AROUND
        shown = ("…" if begin else "") + text[begin:end] + ("…" if end < len(text) else "")
        super().__init__(f"`{shown if len(text) > 2 * AROUND else text}`, character {position + 1}: {problem}")
        self.position = position


@dataclass(frozen=True)
class Network:
    """A contraction that has been read. Arrays are NumPy's or torch's, all of one kind."""

    text: str
    terms: tuple[Term, ...]
    rows: Term
    cols: Term
    # Which factors each layer has of its own: all of them, unless the contraction says `layer`.
    own: tuple[bool, ...]

    @classmethod
    def parse(cls, text: str) -> Network:
        """Read a contraction. Raises `ContractionError`."""
        if len(text) > LONGEST:
            raise ContractionError(text, LONGEST, f"a contraction has at most {LONGEST} characters")
        words = list(_words(text))
        arrow = next((number for number, (_, word) in enumerate(words) if word == "->"), len(words))
        terms = _terms(text, words[:arrow])
        rows, cols = _output(text, words[arrow + 1 :]) if arrow < len(words) else ((("out", 0),), (("in", 0),))
        terms, own = _layers(text, terms)
        _check_factors(text, terms)
        used = {index for term in terms for index, _ in term}
        seen: set[str] = set()
        for index, position in (*rows, *cols):
            if index not in used:
                raise ContractionError(text, position, f"no factor has the index `{index}` of ΔW")
            if index in seen:
                raise ContractionError(text, position, f"`{index}` is named twice in ΔW")
            seen.add(index)
        counts = [index for term in terms for index in {name for name, _ in term}]
        for index, position in (item for term in terms for item in term):
            if index not in seen and counts.count(index) < 2:
                raise ContractionError(text, position, f"the bond `{index}` has only one end")
        names = (tuple(name for name, _ in group) for group in (*terms, rows, cols))
        *factors, outputs, inputs = names
        return cls(text, tuple(factors), outputs, inputs, own)

    @property
    def is_grouped(self) -> bool:
        """Whether layers share factors."""
        return not all(self.own)

    @cached_property
    def indices(self) -> Term:
        """All indices, in the order of their first use."""
        return tuple(dict.fromkeys(index for term in self.terms for index in term))

    @property
    def bonds(self) -> Term:
        """The indices that are summed."""
        return tuple(index for index in self.indices if index not in {*self.rows, *self.cols})

    @property
    def transposed(self) -> str:
        """The contraction of the same factors to ΔWᵀ."""
        factors = self.text.partition("->")[0].strip()
        return f"{factors} -> ({' '.join(self.cols)}) ({' '.join(self.rows)})"

    def shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Shape of every factor, given the size of every index."""
        return [tuple(sizes[index] for index in term) for term in self.terms]

    def parameters(self, sizes: Mapping[str, int]) -> int:
        """Elements of all factors."""
        return sum(math.prod(shape) for shape in self.shapes(sizes))

    def sizes(self, factors: Sequence[Any]) -> dict[str, int]:
        """Size of every index. Raises `ValueError` when the factors do not fit the contraction or each other."""
        if len(factors) != len(self.terms):
            raise ValueError(f"{len(factors)} factors for the {len(self.terms)} terms of `{self.text}`")
        sizes: dict[str, int] = {}
        for number, (term, factor) in enumerate(zip(self.terms, factors, strict=True)):
            shape = tuple(factor.shape)
            if len(shape) != len(term):
                raise ValueError(f"factor {number + 1} of `{self.text}` has shape {shape}, its indices are {term}")
            for index, size in zip(term, shape, strict=True):
                if sizes.setdefault(index, size) != size:
                    raise ValueError(
                        f"`{index}` of `{self.text}` is {sizes[index]} and {size} (in factor {number + 1})"
                    )
        return sizes

    def dense(self, factors: Sequence[Any]) -> Any:
        """ΔW, (rows, cols)."""
        sizes = self.sizes(factors)
        product = contract(self.terms, (*self.rows, *self.cols), factors)
        return product.reshape(_size(self.rows, sizes), _size(self.cols, sizes))

    def forward(self, x: Any, factors: Sequence[Any]) -> Any:
        """x·ΔWᵀ for x of shape (…, cols): the order of the products that costs least, ΔW itself only where that is
        it.
        """
        sizes = self.sizes(factors)
        split = x.reshape(-1, *(sizes[index] for index in self.cols))
        y = contract((*self.terms, (BATCH, *self.cols)), (BATCH, *self.rows), (*factors, split))
        return y.reshape(*x.shape[:-1], _size(self.rows, sizes))

    def adjoint(self, x: Any, dy: Any, factors: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Gradients of ⟨dy, x·ΔWᵀ⟩ with respect to x (…, cols) and to every factor; dy is (…, rows).

        A network is linear in each factor, so its gradient is the contraction of all others with x and dy.
        """
        sizes = self.sizes(factors)
        inputs = x.reshape(-1, *(sizes[index] for index in self.cols))
        outputs = dy.reshape(-1, *(sizes[index] for index in self.rows))
        ends = ((BATCH, *self.cols), (BATCH, *self.rows))
        dx = contract((*self.terms, ends[1]), ends[0], (*factors, outputs)).reshape(*x.shape)
        gradients = []
        for number, term in enumerate(self.terms):
            rest = [held for held in range(len(self.terms)) if held != number]
            terms, arrays = [self.terms[held] for held in rest], [factors[held] for held in rest]
            gradients.append(contract([*terms, *ends], term, [*arrays, inputs, outputs]))
        return dx, gradients

    def largest_product(self, sizes: Mapping[str, int]) -> int:
        """Elements of the largest array that forming ΔW makes, factors included."""
        shapes = tuple(self.shapes(sizes))
        text = equation(self.terms, (*self.rows, *self.cols))
        path = opt_einsum.contract_path(text, *shapes, shapes=True, optimize=order(len(self.terms)))[1]
        return max(int(path.largest_intermediate), *(math.prod(shape) for shape in shapes))

    def lower(self, factors: Sequence[Any]) -> tuple[Any, Any]:
        """The pair B (rows, r), A (r, cols) with B·A = ΔW and the smallest r that a cut through the network gives.

        Factors fall to one side or the other; the bonds between the sides become the rank. An index of the rows that a
        factor on the columns' side has is carried over as a bond of its own (a Kronecker delta on the other side), so
        every network has a cut.
        """
        sizes = self.sizes(factors)
        left, bonds = self.cut(sizes)
        right = tuple(number for number in range(len(self.terms)) if number not in left)
        rank = _size(bonds, sizes)
        b = self.side(factors, sizes, left, self.rows, bonds).reshape(_size(self.rows, sizes), rank)
        a = self.side(factors, sizes, right, self.cols, bonds).reshape(_size(self.cols, sizes), rank)
        return b, a.T

    def lowers_small(self, sizes: Mapping[str, int]) -> bool:
        """Whether the pair of `lower` has fewer elements than ΔW."""
        rows, cols = _size(self.rows, sizes), _size(self.cols, sizes)
        return _size(self.cut(sizes)[1], sizes) * (rows + cols) < rows * cols

    def lower_small(self, factors: Sequence[Any]) -> tuple[Any, Any]:
        """As `lower`, with the identity and ΔW itself where the cut has more bonds than ΔW has rows or columns."""
        sizes = self.sizes(factors)
        shape = _size(self.rows, sizes), _size(self.cols, sizes)
        if _size(self.cut(sizes)[1], sizes) <= min(shape):
            return self.lower(factors)
        product, identity = self.dense(factors), _identity(min(shape), like=factors[0])
        return (identity, product) if shape[0] <= shape[1] else (product, identity)

    def cut(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], Term]:
        """The smallest cut: which factors are on the rows' side, and the indices that both sides have."""
        left = min(self.cuts(), key=lambda left: (_size(self.bonds_between(left), sizes), left))
        return left, self.bonds_between(left)

    def cuts(self) -> Iterator[tuple[int, ...]]:
        """Every set of factors that could be the rows' side."""
        numbers = range(len(self.terms))
        rows_only = [
            n for n in numbers if set(self.terms[n]) & set(self.rows) and not set(self.terms[n]) & set(self.cols)
        ]
        cols_only = [
            n for n in numbers if set(self.terms[n]) & set(self.cols) and not set(self.terms[n]) & set(self.rows)
        ]
        free = [n for n in numbers if n not in rows_only and n not in cols_only]
        for count in range(len(free) + 1):
            for chosen in itertools.combinations(free, count):
                yield tuple(sorted((*rows_only, *chosen)))

    def bonds_between(self, left: Sequence[int]) -> Term:
        """Indices that both sides have, where ΔW's own count as had by the side that they belong to."""
        sides: list[set[str]] = [set(self.rows), set(self.cols)]
        for number, term in enumerate(self.terms):
            sides[number not in left] |= set(term)
        return tuple(index for index in self.indices if index in sides[0] & sides[1])

    def side(
        self, factors: Sequence[Any], sizes: Mapping[str, int], numbers: Sequence[int], own: Term, bonds: Term
    ) -> Any:
        """The product of one side's factors over (own indices, bonds)."""
        terms, arrays = [self.terms[number] for number in numbers], [factors[number] for number in numbers]
        ends = []
        for index in bonds:
            # One of ΔW's indices that the other side needs too: carried over by a delta.
            ends.append(index + "'" if index in own else index)
            if index in own:
                terms.append((index, ends[-1]))
                arrays.append(_identity(sizes[index], like=factors[0]))
        return contract(terms, (*own, *ends), arrays)


def contract(terms: Sequence[Term], output: Term, arrays: Sequence[Any]) -> Any:
    """The sum over all indices that are not in `output`, by the cheapest order of products (found once for each
    shape).
    """
    return _expression(tuple(terms), tuple(output), tuple(tuple(array.shape) for array in arrays))(*arrays)


@lru_cache(maxsize=1024)
def _expression(terms: tuple[Term, ...], output: Term, shapes: tuple[tuple[int, ...], ...]) -> Any:
    return opt_einsum.contract_expression(equation(terms, output), *shapes, optimize=order(len(terms)))


def equation(terms: Sequence[Term], output: Term) -> str:
    """The contraction as einsum writes it."""
    symbols: dict[str, str] = {}
    for index in (name for term in (*terms, output) for name in term):
        symbols.setdefault(index, opt_einsum.get_symbol(len(symbols)))
    subscripts = ",".join("".join(symbols[name] for name in term) for term in terms)
    return f"{subscripts}->{''.join(symbols[name] for name in output)}"


def order(terms: int) -> str:
    """How opt_einsum is to look for an order."""
    return "optimal" if terms <= OPTIMAL else "auto"


def _identity(size: int, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.eye(size, dtype=like.dtype)
    return like.new_zeros(size, size).fill_diagonal_(1)


def _size(indices: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[index] for index in indices)


def _words(text: str) -> Iterator[tuple[int, str]]:
    """Indices and marks with their positions."""
    position = 0
    while position < len(text.rstrip()):
        match = WORD.match(text, position)
        if match is None:
            start = position + len(text[position:]) - len(text[position:].lstrip())
            raise ContractionError(text, start, f"`{text[start]}` is neither an index nor one of `,` `(` `)` `->`")
        kind = match.lastgroup or ""
        yield match.start(kind), match[kind]
        position = match.end()


def _terms(text: str, words: Sequence[tuple[int, str]]) -> list[list[tuple[str, int]]]:
    """Factors, each a list of indices with their positions."""
    terms: list[list[tuple[str, int]]] = [[]]
    for position, word in words:
        if word in "()":
            raise ContractionError(text, position, "groups belong to the right of `->`")
        if word != ",":
            terms[-1].append((word, position))
        elif terms[-1]:
            terms.append([])
        else:
            raise ContractionError(text, position, "a factor without an index")
    if not terms[-1]:
        raise ContractionError(text, len(text.rstrip()), "a factor without an index")
    return terms


def _check_factors(text: str, terms: Sequence[list[tuple[str, int]]]) -> None:
    """Raise `ContractionError` for too many factors or indices, and for an index that a factor has twice."""
    if len(terms) > MOST:
        raise ContractionError(text, terms[MOST][0][1], f"a contraction has at most {MOST} factors")
    for term in terms:
        if len(term) > DIMENSIONS:
            raise ContractionError(text, term[DIMENSIONS][1], f"a factor has at most {DIMENSIONS} indices")
        for at, (index, position) in enumerate(term):
            if index in {name for name, _ in term[:at]}:
                raise ContractionError(text, position, f"a factor has the index `{index}` twice")


def _layers(text: str, terms: Sequence[list[tuple[str, int]]]) -> tuple[list[list[tuple[str, int]]], tuple[bool, ...]]:
    """The factors without the word `layer`, and which had it: all, if none did."""
    own = tuple(term[0][0] == LAYER for term in terms)
    for number, term in enumerate(terms):
        for index, position in term[1:] if own[number] else term:
            if index == LAYER:
                raise ContractionError(text, position, f"`{LAYER}` stands in front of a factor's indices, once")
        if own[number] and len(term) == 1:
            raise ContractionError(text, term[0][1], f"a factor has no index but `{LAYER}`")
    if all(own):
        raise ContractionError(text, terms[0][0][1], f"all factors have `{LAYER}`: nothing is shared, leave it out")
    return [term[1:] if mine else term for term, mine in zip(terms, own, strict=True)], own if any(own) else (
        True,
    ) * len(terms)


def _output(text: str, words: Sequence[tuple[int, str]]) -> tuple[Sequence[tuple[str, int]], Sequence[tuple[str, int]]]:
    """The two groups of indices after the arrow."""
    groups: list[list[tuple[str, int]]] = []
    inside = False
    for position, word in words:
        if word in {",", "->"}:
            raise ContractionError(text, position, f"`{word}` has no place to the right of `->`")
        if word == "(" and not inside:
            groups.append([])
        elif word in "()" and (word == ")") != inside:
            raise ContractionError(text, position, f"`{word}` does not match")
        elif word not in "()" and inside:
            groups[-1].append((word, position))
        elif word not in "()":
            groups.append([(word, position)])
        inside = word == "(" or (inside and word != ")")
        if len(groups) > 2:
            raise ContractionError(text, position, "ΔW has two sides: group indices, as in `(o1 o2) in`")
    if inside or len(groups) != 2 or not all(groups):
        raise ContractionError(
            text, len(text.rstrip()), "`->` needs the indices of rows and of columns, as in `(o1 o2) in`"
        )
    return groups[0], groups[1]
