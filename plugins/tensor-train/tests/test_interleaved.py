"""`tensor-train-interleaved`: the conformance kit, the optimum by Eckart–Young, and the sizes of its splits."""

from __future__ import annotations

import math

import lora_compress
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_compress.testing import check_decomposition, reference
from lora_compress_tensor_train import INTERLEAVED
from lora_compress_tensor_train.interleaved import rearranged
from numpy.typing import NDArray

UNIT = 2.0**-24
TOLERANCE = 1e-4
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.sampled_from([1, 6, 7, 12, 16, 30]), st.sampled_from([1, 4, 5, 16, 18]))


def fitted(values: NDArray[np.float32], rank: int) -> list[NDArray[np.float32]]:
    delta = lora_compress.Delta.from_array(values)
    return INTERLEAVED.factors_of([delta], rank, seed=0, tolerance=TOLERANCE)[0]


def rounding(factors: list[NDArray[np.float32]], whole: float) -> float:
    """What float32 may add: singular vectors to within a few roundings of ‖Δ‖, and two roundings of each factor."""
    largest = np.linalg.norm(reference(INTERLEAVED, [np.abs(factor) for factor in factors]))
    return 16 * UNIT * whole + 4 * UNIT * float(largest)


def test_it_conforms() -> None:
    check_decomposition(INTERLEAVED)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 40), SEEDS)
def test_it_is_the_best_of_its_rank(shape: tuple[int, int], rank: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    size = INTERLEAVED.sizes(*shape, rank)
    split = values.astype(np.float64).reshape([size[index] for index in ("o1", "o2", "i1", "i2")])
    matrix = split.transpose(0, 2, 1, 3).reshape(size["o1"] * size["i1"], -1)
    best = math.sqrt(np.square(np.linalg.svd(matrix, compute_uv=False)[rank:]).sum())
    factors = fitted(values, rank)
    error = float(np.linalg.norm(values - reference(INTERLEAVED, factors)))
    assert error <= best * (1 + TOLERANCE) + rounding(factors, float(np.linalg.norm(values)))


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(1, 3), SEEDS)
def test_planted_kronecker_products_are_found(shape: tuple[int, int], rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = INTERLEAVED.sizes(*shape, rank)
    products = [
        np.kron(rng.standard_normal((size["o1"], size["i1"])), rng.standard_normal((size["o2"], size["i2"])))
        for _ in range(rank)
    ]
    values = np.sum(products, axis=0).astype(np.float32)
    factors = fitted(values, rank)
    whole = float(np.linalg.norm(values))
    assert np.linalg.norm(values - reference(INTERLEAVED, factors)) <= UNIT * whole + rounding(factors, whole)


def test_more_than_a_panel_is_rearranged_alike() -> None:
    """Δ of more than 2²² elements is rearranged part by part."""
    values = np.random.default_rng(0).standard_normal((4096, 2048)).astype(np.float32)
    sizes = INTERLEAVED.sizes(4096, 2048, 1)
    split = values.reshape([sizes[index] for index in ("o1", "o2", "i1", "i2")])
    matrix = split.transpose(0, 2, 1, 3).reshape(sizes["o1"] * sizes["i1"], -1)
    assert np.array_equal(rearranged(lora_compress.Delta.from_array(values)), matrix)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_rank_costs_no_more_than_one_of_a_pair(rows: int, cols: int) -> None:
    assert INTERLEAVED.parameters([(rows, cols)], 1) <= rows + cols
    ranks = INTERLEAVED.ranks([(rows, cols)])
    assert len(ranks) >= 1
    assert INTERLEAVED.sizes(rows, cols, ranks[-1] + 1)["a"] == ranks[-1]


def test_sizes() -> None:
    assert INTERLEAVED.shapes(4096, 4096, 5) == [(64, 64, 5), (5, 64, 64)]
    assert sum(math.prod(shape) for shape in INTERLEAVED.shapes(7, 9, 2)) == 2 * (7 + 9)
