"""Alternating least squares: exact where an exact answer exists, never rising, at rest only where no factor can
gain.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import Decomposition, Delta
from lora_compress.decompositions import als
from lora_compress.decompositions.network import Network

from tests.conftest import Pair
from tests.test_networks import CONTRACTIONS

SIZES = {
    "out": 60,
    "in": 40,
    "r": 3,
    "s": 2,
    "p": 4,
    "q": 3,
    "o1": 6,
    "o2": 10,
    "i1": 5,
    "i2": 8,
    "a": 3,
    "b": 4,
    "c": 3,
}


def error(network: Network, factors: list[Any], values: Any) -> float:
    return float(
        np.linalg.norm(values - network.dense([f.astype(np.float64) for f in factors])) / np.linalg.norm(values)
    )


@pytest.mark.parametrize(
    "name", ["ab", "abc", "lokr", "tensor train, rows first", "tensor train, interleaved", "full", "turned"]
)
def test_planted_factors_are_found(name: str, rng: np.random.Generator) -> None:
    network = Network.parse(CONTRACTIONS[name])
    planted = network.dense([rng.standard_normal(shape) for shape in network.shapes(SIZES)])
    noise = 0.1 * planted.std() * rng.standard_normal(planted.shape)
    for values, allowed in ((planted, 1e-5), (planted + noise, 0.1)):
        delta = Delta.from_array(values.astype(np.float32), name)
        factors = als.fit(network, [SIZES], [delta], seed=0, tolerance=1e-6)[0]
        assert [factor.shape for factor in factors] == network.shapes(SIZES)
        assert error(network, factors, values) <= allowed


@given(
    st.sampled_from(list(CONTRACTIONS.values())),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 4), min_size=20, max_size=20),
)
def test_the_error_never_rises_and_is_what_is_claimed(contraction: str, seed: int, dims: list[int]) -> None:
    network = Network.parse(contraction)
    sizes = dict(zip(network.indices, dims, strict=False))
    rng = np.random.default_rng(seed)
    shape = (math.prod(sizes[i] for i in network.rows), math.prod(sizes[i] for i in network.cols))
    values = rng.standard_normal(shape).astype(np.float32)
    delta = Delta.from_array(values, "x")
    factors = [rng.standard_normal(each) for each in network.shapes(sizes)]
    before = math.inf
    for number in [*range(len(factors))] * 3:
        equations = als._equations(network, factors, number, delta, als._sides(network, sizes))
        factors[number] = equations.solve()
        claimed = delta.energy - equations.captured(factors[number])
        found = float(np.square(values - network.dense(factors)).sum())
        # Products with Δ are f32, and so are the factors that Δ is multiplied with.
        slack = 1e-5 * (delta.energy + float(np.square(network.dense([np.abs(factor) for factor in factors])).sum()))
        assert abs(claimed - found) <= slack
        assert found <= before + slack
        before = found


def test_two_factors_reach_the_optimum_of_eckart_and_young(rng: np.random.Generator) -> None:
    values = rng.standard_normal((50, 30)).astype(np.float32)
    network = Network.parse("out r, r in")
    sizes = {"out": 50, "in": 30, "r": 5}
    factors = als.fit(network, [sizes], [Delta.from_array(values, "x")], seed=0, tolerance=1e-6)[0]
    sigma = np.linalg.svd(values, compute_uv=False)
    assert error(network, factors, values) == pytest.approx(np.linalg.norm(sigma[5:]) / np.linalg.norm(sigma), rel=1e-5)


def test_the_same_seed_gives_the_same_factors_and_names_start_apart(rng: np.random.Generator) -> None:
    values, network = rng.standard_normal((60, 40)).astype(np.float32), Network.parse(CONTRACTIONS["loha"])

    def fit(name: str, seed: int) -> bytes:
        factors = als.fit(network, [SIZES], [Delta.from_array(values, name)], seed=seed, tolerance=1e-2)[0]
        return b"".join(factor.tobytes() for factor in factors)

    assert fit("x", 0) == fit("x", 0)
    assert len({fit("x", 0), fit("x", 1), fit("y", 0)}) == 3


def test_zero_and_degenerate_deltas(rng: np.random.Generator) -> None:
    network = Network.parse("out r, r in, out s, s in")
    for values in (np.zeros((6, 5)), np.ones((6, 5)), np.eye(6, 5), np.outer(np.arange(6), np.ones(5))):
        sizes = {"out": 6, "in": 5, "r": 2, "s": 2}
        factors = als.fit(network, [sizes], [Delta.from_array(values.astype(np.float32), "x")], seed=0, tolerance=1e-3)[
            0
        ]
        assert all(np.isfinite(factor).all() for factor in factors)


def test_factors_too_large_to_solve_for_are_refused(rng: np.random.Generator) -> None:
    network = Network.parse("out p, p q, q in")
    sizes = {"out": 200, "in": 200, "p": 80, "q": 80}
    with pytest.raises(ValueError, match="factor 2 of `out p, p q, q in` is too large"):
        als.fit(
            network,
            [sizes],
            [Delta.from_array(rng.standard_normal((200, 200)).astype(np.float32), "x")],
            seed=0,
            tolerance=1e-3,
        )


def divisor(size: int) -> int:
    return next(part for part in (4, 3, 2, 1) if size % part == 0)


def lokr_axes(rows: int, cols: int, rank: int) -> dict[str, int]:
    o1, i1 = divisor(rows), divisor(cols)
    return {"o1": o1, "o2": rows // o1, "i1": i1, "i2": cols // i1, "r": min(rank, rows // o1, cols // i1)}


@pytest.mark.parametrize(
    "decomposition",
    [
        Decomposition("three", "out p, p q, q in"),
        Decomposition("hadamard", "out r, r in, out s, s in"),
        Decomposition("kronecker", "o1 i1, o2 r, r i2 -> (o1 o2) (i1 i2)", axes=lokr_axes),
    ],
    ids=lambda item: item.name,
)
def test_plugins_without_a_fit_extract(
    decomposition: Decomposition, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    from tests.test_plugins import plugin, registering, use

    use(monkeypatch, ("mine", plugin(register_decompositions=registering(decomposition))))
    result = lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition=decomposition.name, dtype="F32")
    assert 0 < result.error < 1
    assert lora_compress.verify(*pair, tmp_path / "out").ok
    lora_compress.merge(pair[0], [tmp_path / "out"], tmp_path / "merged")
