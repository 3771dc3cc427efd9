"""Three factors: conformance, the optimum where one is known, and what theory says of sharing."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import lora_compress
import lora_compress_abc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_compress import Decomposition, Delta
from lora_compress.testing import check_decomposition, loaded
from lora_compress_abc import ABC, SHARED_DEPTH, SHARED_INPUT
from lora_compress_abc.depth import tucker2
from safetensors.numpy import save_file


@pytest.mark.parametrize("decomposition", [ABC, SHARED_INPUT], ids=lambda item: item.name)
def test_they_conform(decomposition: Decomposition) -> None:
    check_decomposition(decomposition)


def test_depth_conforms() -> None:
    # Alternating optimisation ends in local optima: a larger rank may end in a worse one.
    check_decomposition(SHARED_DEPTH, monotone=0.02)


def handles(values: list[Any]) -> list[Delta]:
    return [Delta.from_array(np.asarray(each, np.float32), f"layer {number}") for number, each in enumerate(values)]


def test_three_factors_are_the_best_pair() -> None:
    values = np.random.default_rng(0).standard_normal((40, 30))
    u, core, vt = ABC.factors_of(handles([values]), 5, seed=0, tolerance=1e-6)[0]
    sigma = np.linalg.svd(values, compute_uv=False)
    assert np.diag(core) == pytest.approx(sigma[:5], rel=1e-5)
    assert np.linalg.norm(values - u @ core @ vt) == pytest.approx(np.linalg.norm(sigma[5:]), rel=1e-5)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 8))
@settings(deadline=None, max_examples=25)
def test_a_shared_input_is_the_best_of_the_stack(seed: int, rows: list[int], rank: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal((height, 20)).astype(np.float32) for height in rows]
    layers = SHARED_INPUT.factors_of(handles(values), rank, seed=0, tolerance=1e-6)
    assert all(factors[1] is layers[0][1] for factors in layers)
    error = sum(np.linalg.norm(each - b @ a) ** 2 for each, (b, a) in zip(values, layers, strict=True))
    sigma = np.linalg.svd(np.vstack(values), compute_uv=False)
    whole = float(np.sum(sigma**2))
    assert error <= float(np.sum(sigma[rank:] ** 2)) * (1 + 1e-5) + 1e-6 * whole


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 8), st.sampled_from([(30, 20), (12, 40), (25, 25)]))
@settings(deadline=None, max_examples=25)
def test_the_error_of_depth_never_rises_and_has_its_bounds(
    seed: int, count: int, rank: int, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((shape[0], 3)), rng.standard_normal((3, shape[1]))
    values = [
        common[0] @ rng.standard_normal((3, 3)) @ common[1] + rng.uniform(0, 2) * rng.standard_normal(shape)
        for _ in range(count)
    ]
    found = tucker2(handles(values), rank, tolerance=1e-6)
    whole = sum(float(np.sum(np.square(each))) for each in values)
    # But for the rounding of f32 products, of which the energies are summed.
    assert all(after <= before + 1e-6 * whole for before, after in pairwise(found.errors))
    error = sum(
        float(np.sum(np.square(each - found.c @ core @ found.a)))
        for each, core in zip(values, found.cores, strict=True)
    )
    # Products and factors are f32.
    assert error == pytest.approx(found.errors[-1], abs=1e-5 * whole)
    # From below: the unfoldings' own optima, exactly, are bounds too, and ours is not above the best of all bounds.
    right = np.linalg.svd(np.vstack(values), compute_uv=False)
    left = np.linalg.svd(np.hstack(values), compute_uv=False)
    alone = sum(float(np.sum(np.linalg.svd(each, compute_uv=False)[rank:] ** 2)) for each in values)
    exact = max(alone, *(float(np.sum(sigma[rank:] ** 2)) for sigma in (left, right)))
    assert found.lower_bound <= exact + 1e-5 * whole
    assert found.lower_bound <= error + 1e-5 * whole
    # From above: truncating both unfoldings, HOSVD, leaves at most what each of them leaves alone.
    assert error <= sum(float(np.sum(sigma[rank:] ** 2)) for sigma in (left, right)) + 1e-3 * whole
    assert found.errors[-1] >= found.lower_bound - 1e-5 * whole


def test_planted_outer_factors_are_found() -> None:
    rng = np.random.default_rng(0)
    c, a = rng.standard_normal((60, 4)), rng.standard_normal((4, 50))
    values = [c @ rng.standard_normal((4, 4)) @ a for _ in range(6)]
    found = tucker2(handles(values), 4)
    assert found.errors[-1] <= 1e-9 * sum(float(np.sum(np.square(each))) for each in values)


def test_sharing_pays_where_directions_are_common(tmp_path: Path) -> None:
    """Queries, keys and values that read the same eight directions: at equal bytes one A leaves less than three."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((8, 64))
    names = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(3) for name in "qkv"]
    base = {name: rng.standard_normal((64, 64)).astype(np.float32) for name in names}
    tuned = {
        name: (values + rng.standard_normal((64, 8)) @ directions + 0.1 * rng.standard_normal((64, 64))).astype(
            np.float32
        )
        for name, values in base.items()
    }
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    paths = tmp_path / "base", tmp_path / "tuned"
    with loaded(lora_compress_abc):
        result = lora_compress.compare(*paths, sizes=[4], dtype="F32")
        errors = {row.decomposition: row.error or math.nan for row in result.rows}
        assert errors["abc-shared-input"] < errors["ab"] < errors["abc"]
        # One A for all blocks as well, but then one C for what they have not in common.
        assert errors["best"] <= min(errors.values())
        for form in ("peft", "factors"):
            out = tmp_path / form
            extracted = lora_compress.extract(
                *paths, out, rank=8, decomposition="abc-shared-depth", format=form, dtype="F32"
            )
            check = lora_compress.verify(*paths, out)
            assert check.ok
            assert check.error == pytest.approx(extracted.error, rel=1e-3)
