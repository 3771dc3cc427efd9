"""`lokr`: the conformance kit, planted products, an error that never rises, and a pair end to end."""

from __future__ import annotations

import math
from pathlib import Path

import lora_compress
import lora_compress_lokr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_compress.testing import check_decomposition, loaded, reference
from lora_compress_lokr import LOKR, rearranged, start
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

UNIT = 2.0**-24
TOLERANCE = 1e-4
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.sampled_from([1, 6, 7, 12, 16, 64]), st.sampled_from([1, 4, 5, 24, 32]))


def error(values: NDArray[np.float32], factors: list[NDArray[np.float32]]) -> float:
    return float(np.linalg.norm(values - reference(LOKR, factors)))


def rounding(factors: list[NDArray[np.float32]], whole: float) -> float:
    """What float32 may add: products with Δ, summed over up to its 64 rows or columns, and one rounding of each factor
    (Higham 2002, §3.1).
    """
    largest = float(np.linalg.norm(reference(LOKR, [np.abs(factor) for factor in factors])))
    return UNIT * ((64 + 4) * whole + 4 * largest)


def test_it_conforms() -> None:
    check_decomposition(LOKR)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 8), st.sampled_from(["random", "kronecker"]), SEEDS)
def test_the_error_never_rises_above_the_start(shape: tuple[int, int], rank: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise, planted = rng.standard_normal(shape), [rng.standard_normal(each) for each in LOKR.shapes(*shape, rank)]
    values = (noise if kind == "random" else 0.3 * noise + reference(LOKR, planted)).astype(np.float32)
    delta = lora_compress.Delta.from_array(values)
    begun = start(delta, rank, seed=0, tolerance=TOLERANCE)
    factors = LOKR.factors_of([delta], rank, seed=0, tolerance=TOLERANCE)[0]
    assert error(values, factors) <= error(values, begun) + rounding(factors, float(np.linalg.norm(values)))


def test_the_error_falls_where_the_start_is_not_the_best() -> None:
    values = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    delta = lora_compress.Delta.from_array(values)
    factors = LOKR.factors_of([delta], 1, seed=0, tolerance=TOLERANCE)[0]
    assert error(values, factors) < error(values, start(delta, 1, seed=0, tolerance=TOLERANCE)) - 1e-3


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 4), SEEDS)
def test_a_planted_product_is_found(shape: tuple[int, int], rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    planted = reference(LOKR, [rng.standard_normal(each) for each in LOKR.shapes(*shape, rank)])
    values = planted.astype(np.float32)
    delta = lora_compress.Delta.from_array(values)
    factors = LOKR.factors_of([delta], rank, seed=0, tolerance=TOLERANCE)[0]
    whole = float(np.linalg.norm(values))
    assert error(values, factors) <= UNIT * whole + rounding(factors, whole)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_first_factor_is_small(rows: int, cols: int) -> None:
    size = LOKR.sizes(rows, cols, 10**6)
    assert size["o1"] <= 8
    assert size["i1"] <= 8
    assert size["o1"] <= size["o2"]
    assert size["i1"] <= size["i2"]
    assert size["r"] == min(size["o2"], size["i2"]) == LOKR.ranks([(rows, cols)])[-1]


def test_sizes_and_parameters() -> None:
    assert LOKR.shapes(4096, 14336, 16) == [(8, 8), (512, 16), (16, 1792)]
    assert LOKR.parameters([(4096, 14336)], 16) == 64 + 16 * (512 + 1792)
    assert LOKR.shapes(13, 10, 3) == [(1, 2), (13, 3), (3, 5)]


def test_more_than_a_panel_is_rearranged_alike() -> None:
    """Blocks of more than 2²² elements are rearranged part by part."""
    values = np.random.default_rng(0).standard_normal((4400, 8000)).astype(np.float32)
    split = values.reshape(8, 550, 8, 1000).transpose(0, 2, 1, 3).reshape(64, -1)
    assert np.array_equal(rearranged(lora_compress.Delta.from_array(values)), split)


def test_a_pair_end_to_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (24, 24), "self_attn.k_proj": (12, 24), "mlp.down_proj": (24, 60)}
    base = {
        f"model.layers.{number}.{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for number in range(2)
        for name, shape in shapes.items()
    }
    tuned = {name: values + rng.standard_normal(values.shape).astype(np.float32) for name, values in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    models = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    with loaded(lora_compress_lokr):
        options = {"decomposition": "lokr", "format": "factors", "dtype": "F32"}
        result = lora_compress.extract(*models, tmp_path / "out", rank=2, **options)  # type: ignore[arg-type]
        checked = lora_compress.verify(*models, tmp_path / "out")
        assert checked.ok
        assert checked.error == pytest.approx(result.error, rel=1e-5)
        lora_compress.merge(models[0], [tmp_path / "out"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, values in base.items():
        delta = lora_compress.Delta.from_array(tuned[name] - values, name)
        factors = LOKR.factors_of([delta], 2, seed=0, tolerance=TOLERANCE)[0]
        exact = values + reference(LOKR, factors)
        largest = reference(LOKR, [np.abs(factor) for factor in factors])
        # ΔW sums r products of three numbers; W + ΔW is rounded once.
        slack = UNIT * (np.abs(exact) + (3 + 2 + 4) * largest) * (1 + math.sqrt(UNIT))
        assert (np.abs(merged[name] - exact) <= slack).all()
