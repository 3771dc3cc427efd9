"""Trains of any length against the definition: accuracy, bonds, orthonormal cores.

Bounds are the theorem's, plus backward errors of the factorisations: a small multiple of size·eps·‖T‖ a step (Golub &
Van Loan 2013, §5.4).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_compress_tensor_train import tt_round, tt_svd
from numpy.typing import NDArray

Array = NDArray[np.float64]

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
ERRORS = st.sampled_from([0.0, 1e-8, 0.01, 0.2, 0.7, 1.0])
SEEDS = st.integers(0, 2**32 - 1)
EPS = np.finfo(np.float64).eps


def full(cores: list[Array]) -> Array:
    """The tensor of a train."""
    product = np.ones((1, 1))
    for core in cores:
        product = np.tensordot(product, core, 1)
    return product.reshape([core.shape[1] for core in cores])


def slack(tensor: Array) -> float:
    """What rounding may add to an error."""
    return 16 * tensor.ndim * max(tensor.size, 8) * EPS * float(np.linalg.norm(tensor))


def tails(tensor: Array, at: int) -> Array:
    """ε of the unfolding between axes at − 1 and at, for every rank from 0 on."""
    sigma = np.linalg.svd(tensor.reshape(math.prod(tensor.shape[:at]), -1), compute_uv=False)
    return np.append(np.sqrt(np.cumsum(np.square(sigma)[::-1])[::-1]), 0.0)


def random_train(rng: np.random.Generator, shape: tuple[int, ...], bond: int) -> list[Array]:
    """Cores with bonds of one size, of decaying importance."""
    bonds = [1, *[bond] * (len(shape) - 1), 1]
    sizes = zip(bonds[:-1], shape, bonds[1:], strict=True)
    return [rng.standard_normal(size) * 0.3 ** np.arange(size[2]) for size in sizes]


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A train of small bonds and some noise, so that accuracies make a difference."""
    return full(random_train(rng, shape, 3)) + 10.0 ** -rng.integers(0, 12) * rng.standard_normal(shape)


def check(tensor: Array, cores: list[Array], error: float) -> None:
    """Accurate as asked, and no bond larger than its unfolding needs for its share of the error."""
    missed = float(np.linalg.norm(tensor - full(cores)))
    assert missed <= error * float(np.linalg.norm(tensor)) + slack(tensor)
    bonds = [core.shape[2] for core in cores[:-1]]
    best = [tails(tensor, at + 1) for at in range(len(bonds))]
    certificate = math.hypot(*(tail[bond] for tail, bond in zip(best, bonds, strict=True)))
    assert missed <= certificate + slack(tensor)
    share = error * float(np.linalg.norm(tensor)) / math.sqrt(max(len(bonds), 1))
    for tail, bond in zip(best, bonds, strict=True):
        assert bond == 1 or tail[bond - 1] > share - slack(tensor)


@settings(max_examples=100, deadline=None)
@given(SHAPES, ERRORS, SEEDS)
def test_tt_svd_keeps_its_promise(shape: tuple[int, ...], error: float, seed: int) -> None:
    tensor = random_tensor(np.random.default_rng(seed), shape)
    cores = tt_svd(tensor, error)
    check(tensor, cores, error)
    for core in cores[:-1]:
        columns = core.reshape(-1, core.shape[2])
        np.testing.assert_allclose(columns.T @ columns, np.eye(core.shape[2]), atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(SHAPES, ERRORS, SEEDS)
def test_tt_round_keeps_its_promise(shape: tuple[int, ...], error: float, seed: int) -> None:
    cores = random_train(np.random.default_rng(seed), shape, 6)
    rounded = tt_round(cores, error)
    check(full(cores), rounded, error)
    assert all(after.shape[2] <= before.shape[2] for before, after in zip(cores, rounded, strict=True))
    for core in rounded[1:]:
        rows = core.reshape(core.shape[0], -1)
        np.testing.assert_allclose(rows @ rows.T, np.eye(core.shape[0]), atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), SEEDS)
def test_bonds_of_a_planted_train_are_found(axes: int, bond: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (4,) * axes
    bonds = [1, *[bond] * (axes - 1), 1]
    cores = [rng.standard_normal(size) for size in zip(bonds[:-1], shape, bonds[1:], strict=True)]
    # The sum of a train with itself: bonds twice as large, the same tensor but for a factor.
    doubled = [np.zeros((2 * left, size, 2 * right)) for left, size, right in (core.shape for core in cores)]
    for core, large in zip(cores, doubled, strict=True):
        left, _, right = core.shape
        large[:left, :, :right] = large[left:, :, right:] = core
    doubled[0] = doubled[0].sum(0, keepdims=True)
    doubled[-1] = doubled[-1].sum(2, keepdims=True)
    for found in (tt_svd(full(cores), 1e-12), tt_round(doubled, 1e-12)):
        assert all(core.shape[2] <= bond for core in found)
    np.testing.assert_allclose(full(tt_round(doubled, 0.0)), 2 * full(cores), atol=2 * slack(full(cores)))


def test_zeros_are_a_train_of_bonds_1() -> None:
    for cores in (tt_svd(np.zeros((3, 4, 2)), 0.0), tt_round([np.zeros((1, 3, 5)), np.zeros((5, 2, 1))], 0.0)):
        assert all(core.shape[0] == 1 for core in cores)
        assert not full(cores).any()


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ([], "not \\[\\]"),
        ([np.ones((2, 2))], "bond, size, bond"),
        ([np.ones((1, 2, 3)), np.ones((2, 2, 1))], "do not meet"),
        ([np.ones((1, 2, 3))], "do not meet"),
        ([np.ones((1, 0, 1))], "with elements"),
    ],
)
def test_what_is_no_train_is_refused(cores: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tt_round(cores, 0.1)


@pytest.mark.parametrize("error", [-1.0, math.nan])
def test_an_error_is_at_least_0(error: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        tt_svd(np.ones((2, 2)), error)
    with pytest.raises(ValueError, match="at least 0"):
        tt_round([np.ones((1, 2, 1))], error)


@pytest.mark.parametrize("tensor", [np.ones(()), np.ones((2, 0))])
def test_a_train_needs_elements(tensor: Array) -> None:
    with pytest.raises(ValueError, match="needs elements"):
        tt_svd(tensor, 0.1)
