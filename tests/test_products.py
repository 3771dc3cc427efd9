"""Products planned once are those that the network makes at every call."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from lora_compress.decompositions.network import Network
from lora_compress.decompositions.products import Step, plan_dense, plan_forward, plan_pair

SIZES = {"out": 6, "in": 8, "r": 2, "s": 2, "p": 2, "q": 3, "o1": 3, "o2": 2, "i1": 4, "i2": 2, "a": 2, "b": 2, "c": 2}
PAIRS = (
    "out r, r in",
    "out p, p q, q in",
    "r in, out r",
    "out r, r in, out s, s in",
    "o1 a, a o2 b, b i1 c, c i2 -> (o1 o2) (i1 i2)",
)
OTHERS = ("o1 i1 a, a o2 i2 -> (o1 o2) (i1 i2)", "o1 i1, o2 r, r i2 -> (o1 o2) (i1 i2)", "out in")
# Sums of at most 24 products of 4 numbers of size 1, in float64.
CLOSE = 24 * 4 * 2.0**-50


@pytest.mark.parametrize("text", [*PAIRS, *OTHERS])
def test_planned_products_are_the_networks(text: str, rng: np.random.Generator) -> None:
    network = Network.parse(text)
    factors = [rng.uniform(-1, 1, shape) for shape in network.shapes(SIZES)]
    x = rng.uniform(-1, 1, (5, 8))
    dense = network.dense(factors)
    made = plan_dense(network, SIZES)(np.einsum, factors).reshape(6, 8)
    np.testing.assert_allclose(made, dense, atol=CLOSE)
    split = x.reshape(5, *(SIZES[index] for index in network.cols))
    found = plan_forward(network, SIZES)(np.einsum, [*factors, split]).reshape(5, 6)
    np.testing.assert_allclose(found, x @ dense.T, atol=8 * CLOSE)
    pair = plan_pair(network, SIZES)
    assert (pair is not None) == (text in PAIRS)
    if pair is not None:
        b, a = pair(np.einsum, factors)
        assert (b.shape, a.shape) == ((6, pair.rank), (pair.rank, 8))
        np.testing.assert_allclose(b @ a, dense, atol=CLOSE)


@pytest.mark.parametrize("text", ["out r, r in, g, g", "out r, r in, p q, p q", "out r, r in, p q, q p"])
def test_factors_that_multiply_to_a_number_scale_the_others(text: str, rng: np.random.Generator) -> None:
    network, sizes = Network.parse(text), SIZES | {"g": 3}
    factors = [rng.uniform(-1, 1, shape) for shape in network.shapes(sizes)]
    made = plan_dense(network, sizes)(np.einsum, factors)
    np.testing.assert_allclose(made, network.dense(factors), atol=CLOSE)


def test_steps_are_the_einsums_that_they_stand_for(rng: np.random.Generator) -> None:
    sizes = {"a": 2, "b": 3, "c": 4}
    terms = ["".join(each) for count in (1, 2, 3) for each in permutations("abc", count)]
    shortcuts = 0
    for left, right in product(terms, terms):
        shared = {*left} & {*right}
        outputs = {"".join(each) for each in permutations(sorted({*left, *right} - shared))}
        for output in outputs:
            step = Step.of((0, 1), f"{left},{right}->{output}")
            shortcuts += step.shared > 0
            operands = [rng.uniform(-1, 1, [sizes[index] for index in term]) for term in (left, right)]
            expected = np.einsum(f"{left},{right}->{output}", *operands)
            found = step(np.einsum, [operands[position] for position in step.positions])
            np.testing.assert_allclose(found, expected, atol=CLOSE, err_msg=f"{left},{right}->{output}")
    assert shortcuts > 20


def test_a_pair_is_its_factors_themselves(rng: np.random.Generator) -> None:
    factors = [rng.standard_normal((6, 2)), rng.standard_normal((2, 8))]
    pair = plan_pair(Network.parse("out r, r in"), SIZES)
    assert pair is not None
    assert pair.is_made_of(factors)
    assert all(made is factor for made, factor in zip(pair(np.einsum, factors), factors, strict=True))
    other = plan_pair(Network.parse("r in, out r"), SIZES)
    assert other is not None
    assert not other.is_made_of(factors[::-1])


def test_the_core_is_on_the_side_of_the_rows() -> None:
    pair = plan_pair(Network.parse("out p, p q, q in"), SIZES | {"q": 2})
    assert pair is not None
    assert (pair.b.numbers, pair.a.numbers) == ((0, 1), (2,))


def test_the_transposed_contraction(rng: np.random.Generator) -> None:
    for text in (*PAIRS, *OTHERS):
        network = Network.parse(text)
        factors = [rng.standard_normal(shape) for shape in network.shapes(SIZES)]
        transposed = Network.parse(network.transposed).dense(factors)
        np.testing.assert_allclose(transposed, network.dense(factors).T, atol=CLOSE)
