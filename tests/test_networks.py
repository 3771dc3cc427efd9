"""Contractions: what is read from them, and that everything derived agrees with a plain einsum in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import Decomposition
from lora_compress.decompositions.network import ContractionError, Network

CONTRACTIONS = {
    "ab": "out r, r in",
    "abc": "out p, p q, q in",
    "loha": "out r, r in, out s, s in",
    "lokr": "o1 i1, o2 r, r i2 -> (o1 o2) (i1 i2)",
    "tensor train, rows first": "o1 a, a o2 b, b i1 c, c i2 -> (o1 o2) (i1 i2)",
    "tensor train, interleaved": "o1 i1 a, a o2 i2 -> (o1 o2) (i1 i2)",
    "canonical": "o1 r, o2 r, i1 r, i2 r -> (o1 o2) (i1 i2)",
    "full": "out in",
    "turned": "in r, r out",
    "both on every factor": "out in, out in",
    "a core alone": "out p, p q s, q in, s",
}


def reference(network: Network, factors: list[Any]) -> Any:
    """ΔW by NumPy's einsum, in float64, from the definition."""
    letters = {index: chr(ord("a") + number) for number, index in enumerate(network.indices)}
    terms = ",".join("".join(letters[index] for index in term) for term in network.terms)
    output = "".join(letters[index] for index in (*network.rows, *network.cols))
    product = np.einsum(f"{terms}->{output}", *[factor.astype(np.float64) for factor in factors], optimize=False)
    rows = math.prod(product.shape[: len(network.rows)])
    return product.reshape(rows, -1)


def sum_of_sizes(network: Network, factors: list[Any]) -> Any:
    """Σ |…|: what a rounding error is relative to, element by element."""
    return reference(network, [np.abs(factor) for factor in factors])


@st.composite
def networks(draw: st.DrawFn) -> tuple[Network, list[Any]]:
    network = Network.parse(draw(st.sampled_from(list(CONTRACTIONS.values()))))
    sizes = {index: draw(st.integers(1, 4)) for index in network.indices}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return network, [rng.standard_normal(shape).astype(np.float32) for shape in network.shapes(sizes)]


def bound(network: Network, factors: list[Any], extra: int = 0) -> Any:
    """Each product of n factors and each sum of m terms rounds at most n + m times by 2⁻²⁴, in any order."""
    sizes = network.sizes(factors)
    terms = math.prod(sizes[index] for index in network.bonds)
    count = len(factors) + terms + extra
    return count * 2.0**-24 / (1 - count * 2.0**-24) * sum_of_sizes(network, factors)


@given(networks())
def test_dense_is_the_contraction(case: tuple[Network, list[Any]]) -> None:
    network, factors = case
    assert (np.abs(network.dense(factors) - reference(network, factors)) <= bound(network, factors)).all()
    assert network.parameters(network.sizes(factors)) == sum(factor.size for factor in factors)


@given(networks())
def test_lowering_is_exact_and_as_small_as_a_cut_allows(case: tuple[Network, list[Any]]) -> None:
    network, factors = case
    b, a = network.lower(factors)
    # Multiplying by a delta rounds nothing; sums over the bonds between come on top.
    slack = bound(network, factors, extra=b.shape[1] + 4)
    assert (np.abs(b.astype(np.float64) @ a.astype(np.float64) - reference(network, factors)) <= slack).all()
    assert b.dtype == a.dtype == np.float32
    assert b.shape[1] <= max(math.prod(network.sizes(factors).values()), 1)


@given(networks(), st.integers(0, 2**32 - 1), st.lists(st.integers(1, 3), max_size=2))
def test_forward_is_the_product_with_the_transpose(
    case: tuple[Network, list[Any]], seed: int, batch: list[int]
) -> None:
    network, factors = case
    matrix, sizes = reference(network, factors), sum_of_sizes(network, factors)
    x = np.random.default_rng(seed).standard_normal((*batch, matrix.shape[1])).astype(np.float32)
    y = network.forward(x, factors)
    assert y.shape == (*batch, matrix.shape[0])
    count = len(factors) + 1 + math.prod(network.sizes(factors).values())
    slack = count * 2.0**-24 / (1 - count * 2.0**-24) * (np.abs(x).astype(np.float64) @ sizes.T)
    assert (np.abs(y - x.astype(np.float64) @ matrix.T) <= slack).all()


def test_ranks_of_lowered_networks() -> None:
    sizes = {
        "out": 12,
        "in": 10,
        "r": 3,
        "s": 2,
        "p": 4,
        "q": 3,
        "o1": 3,
        "o2": 4,
        "i1": 2,
        "i2": 5,
        "a": 3,
        "b": 2,
        "c": 4,
    }
    rng = np.random.default_rng(0)
    expected = {
        "ab": 3,
        "abc": 3,  # The smaller end of the core.
        "loha": 6,
        "lokr": 6,  # The small factor's rows carried over, times the rank: 3·3 against its columns' 2·3.
        "tensor train, rows first": 2,
        "tensor train, interleaved": 10,  # No cut helps: all columns.
    }
    for name, rank in expected.items():
        network = Network.parse(CONTRACTIONS[name])
        b, _ = network.lower([rng.standard_normal(shape) for shape in network.shapes(sizes)])
        assert b.shape[1] == rank, name


@pytest.mark.parametrize(
    ("contraction", "position", "problem"),
    [
        ("", 1, "without an index"),
        ("out r", 1, "no factor has the index `in`"),
        ("out r, s in", 5, "bond `r` has only one end"),
        ("out r s, s in", 5, "only one end"),
        ("out r, r r, r in", 10, "twice"),
        ("out r,, r in", 7, "without an index"),
        ("out r, r in,", 13, "without an index"),
        ("out r; r in", 6, "neither"),
        ("out r, r x1 -> out in", 20, "no factor has the index `in`"),
        ("(out r), r in", 1, "to the right of"),
        ("o1 r, r in -> (o1 in", 21, "needs the indices"),
        ("o1 r, r in -> o1 in o1", 21, "two sides"),
        ("o1 r, r in -> (o1 o1) in", 19, "named twice"),
        ("o1 r, r in -> o1, in", 17, "no place"),
        ("o1 r, r in -> ) in", 15, "does not match"),
        ("o1 r, r in ->", 14, "needs the indices"),
        ("out 3r, r in", 5, "neither"),
    ],
)
def test_errors_point_at_the_character(contraction: str, position: int, problem: str) -> None:
    with pytest.raises(ContractionError, match=problem) as caught:
        Network.parse(contraction)
    assert f"character {position}:" in str(caught.value)
    with pytest.raises(ValueError, match="character"):
        Decomposition("x", contraction)


def test_factors_that_do_not_fit_are_refused() -> None:
    network = Network.parse("out r, r in")
    for shapes in ([(3, 2)], [(3, 2), (4, 5)], [(3, 2), (2,)], [(3, 2, 1), (2, 5)]):
        with pytest.raises(ValueError, match="out r, r in"):
            network.lower([np.zeros(shape) for shape in shapes])


def test_axes_split_rows_and_columns() -> None:
    def axes(rows: int, cols: int, rank: int) -> Mapping[str, int]:
        return {"o1": 2, "o2": rows // 2, "i1": 5, "i2": cols // 5, "r": rank}

    lokr = Decomposition("lokr", CONTRACTIONS["lokr"], axes=axes)
    assert lokr.shapes(12, 10, 3) == [(2, 5), (6, 3), (3, 2)]
    assert lokr.parameters([(12, 10)], 3) == 10 + 18 + 6
    with pytest.raises(ValueError, match="make a"):
        lokr.shapes(13, 10, 3)
    with pytest.raises(ValueError, match="`axes` has to give"):
        Decomposition("lokr", CONTRACTIONS["lokr"])
    with pytest.raises(ValueError, match="no size of `i2`"):
        Decomposition("x", CONTRACTIONS["lokr"], axes=lambda *_: {"o1": 1, "o2": 4, "i1": 1, "r": 1}).shapes(4, 4, 1)
