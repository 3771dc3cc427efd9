"""`tensor-train`: the conformance kit, its error certificate against SVDs of every unfolding, and a pair end to end."""

from __future__ import annotations

import math
from pathlib import Path

import lora_compress
import lora_compress_tensor_train
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_compress.testing import check_decomposition, loaded, reference
from lora_compress_tensor_train import TENSOR_TRAIN
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

UNIT = 2.0**-24
TOLERANCE = 1e-4
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.sampled_from([1, 6, 7, 12, 16, 30]), st.sampled_from([1, 4, 5, 16, 18]))


def energy_beyond(matrix: NDArray[np.float64], rank: int) -> float:
    """ε² of the best matrix of a rank."""
    return float(np.square(np.linalg.svd(matrix, compute_uv=False)[rank:]).sum())


def rounding(factors: list[NDArray[np.float32]], whole: float) -> float:
    """What float32 may add to the error: the product Δ·Wᵀ with a rounded W, ‖Δ‖ and ‖W‖ = √b its factors, and one
    rounding of each core (Higham 2002, §3.1).
    """
    _, third, last = factors[1:]
    cols, bond = int(third.shape[1] * last.shape[1]), int(third.shape[0])
    largest = float(np.linalg.norm(reference(TENSOR_TRAIN, [np.abs(factor) for factor in factors])))
    return UNIT * ((cols + 4) * whole * math.sqrt(bond) + 4 * largest)


def test_it_conforms() -> None:
    check_decomposition(TENSOR_TRAIN)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 40), st.sampled_from(["random", "decaying", "kronecker"]), SEEDS)
def test_errors_are_below_the_sum_over_the_bonds(shape: tuple[int, int], rank: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = TENSOR_TRAIN.sizes(*shape, rank)
    o1, o2, i1, i2 = (size[index] for index in ("o1", "o2", "i1", "i2"))
    values = rng.standard_normal(shape)
    if kind == "decaying":
        values *= np.outer(0.7 ** np.arange(shape[0]), 0.7 ** np.arange(shape[1]))
    if kind == "kronecker":
        values = 0.1 * values + np.kron(rng.standard_normal((o1, i1)), rng.standard_normal((o2, i2)))
    rounded = values.astype(np.float32)
    factors = TENSOR_TRAIN.factors_of([lora_compress.Delta.from_array(rounded)], rank, seed=0, tolerance=TOLERANCE)[0]
    wide = rounded.astype(np.float64)
    bound = (
        energy_beyond(wide, size["b"]) * (1 + TOLERANCE) ** 2
        + energy_beyond(wide.reshape(o1, -1), size["a"])
        + energy_beyond(wide.reshape(-1, i2), size["c"])
    )
    error = float(np.linalg.norm(wide - reference(TENSOR_TRAIN, factors)))
    assert error <= math.sqrt(bound) + rounding(factors, float(np.linalg.norm(wide)))


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 6), st.sampled_from([0.0, 1e-3, 0.3]), SEEDS)
def test_a_planted_train_is_found(shape: tuple[int, int], rank: int, noise: float, seed: int) -> None:
    """The planted train leaves the noise, so that the best one leaves no more, and this one √3 of it."""
    rng = np.random.default_rng(seed)
    planted = reference(TENSOR_TRAIN, [rng.standard_normal(each) for each in TENSOR_TRAIN.shapes(*shape, rank)])
    planted /= np.linalg.norm(planted)
    values = (planted + noise * rng.standard_normal(shape)).astype(np.float32)
    factors = TENSOR_TRAIN.factors_of([lora_compress.Delta.from_array(values)], rank, seed=0, tolerance=TOLERANCE)[0]
    best = float(np.linalg.norm(values - planted))
    error = float(np.linalg.norm(values - reference(TENSOR_TRAIN, factors)))
    whole = float(np.linalg.norm(values))
    # A delta of low rank is found to within float32 rounding of ‖Δ‖, not to `TOLERANCE` of an error of zero.
    assert error <= math.sqrt(3) * best * (1 + TOLERANCE) + 16 * UNIT * whole + rounding(factors, whole)


@pytest.mark.parametrize(("rows", "cols"), [(12, 20), (13, 1), (64, 64)])
def test_a_full_rank_leaves_nothing_out(rows: int, cols: int) -> None:
    values = np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)
    rank = min(rows, cols)
    factors = TENSOR_TRAIN.factors_of([lora_compress.Delta.from_array(values)], rank, seed=0, tolerance=TOLERANCE)[0]
    whole = float(np.linalg.norm(values))
    assert np.linalg.norm(values - TENSOR_TRAIN.dense(factors)) <= 16 * UNIT * whole + rounding(factors, whole)


def test_sizes_and_parameters() -> None:
    assert TENSOR_TRAIN.shapes(4096, 14336, 16) == [(64, 16), (16, 64, 16), (16, 112, 16), (16, 128)]
    assert TENSOR_TRAIN.parameters([(4096, 14336)], 16) == 64 * 16 + 16 * 64 * 16 + 16 * 112 * 16 + 16 * 128
    assert TENSOR_TRAIN.shapes(7, 9, 100) == [(7, 7), (7, 1, 7), (7, 3, 3), (3, 3)]
    assert TENSOR_TRAIN.lowered_rank(4096, 14336, 16) == 16


def test_training_starts_as_loras_does() -> None:
    first, second, third, last = TENSOR_TRAIN.initial(256, 400, 8, seed=3)
    assert not second.any()
    # Entries of the columns' product: variance 1/(3·cols). Few of them are independent, hence the width.
    assert np.var(np.tensordot(third, last, 1)) * 3 * 400 == pytest.approx(1.0, rel=0.5)
    assert np.var(first) * first.shape[1] == pytest.approx(1.0, rel=0.5)


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
    merged = {}
    with loaded(lora_compress_tensor_train):
        for kind in ("factors", "peft"):
            out = tmp_path / kind
            options = {"decomposition": "tensor-train", "format": kind, "dtype": "F32"}
            result = lora_compress.extract(*models, out, rank=4, **options)  # type: ignore[arg-type]
            checked = lora_compress.verify(*models, out)
            assert checked.ok
            assert checked.error == pytest.approx(result.error, rel=1e-5)
            lora_compress.merge(models[0], [out], tmp_path / f"merged {kind}")
            merged[kind] = load_file(tmp_path / f"merged {kind}" / "model.safetensors")
    for name in base:
        delta = lora_compress.Delta.from_array(tuned[name] - base[name], name)
        factors = TENSOR_TRAIN.factors_of([delta], 4, seed=0, tolerance=TOLERANCE)[0]
        largest = reference(TENSOR_TRAIN, [np.abs(factor) for factor in factors])
        # Both are W + ΔW, rounded once; ΔW is summed over all bonds in one order or another.
        rounded = 4 + math.prod(TENSOR_TRAIN.sizes(*delta.shape, 4)[bond] for bond in TENSOR_TRAIN.network.bonds)
        slack = 2 * UNIT * (np.abs(merged["peft"][name]) + (rounded + 8) * largest)
        assert (np.abs(merged["factors"][name] - merged["peft"][name]) <= slack).all()
        assert not np.array_equal(merged["factors"][name], base[name])
