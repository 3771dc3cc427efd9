"""Property tests over shapes, dtypes, ranks and values, against float64."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import Delta
from numpy.typing import NDArray

from tests.checkpoints import DTYPES, Tensors, load, save

UNIT = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}
TINY = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126, "F64": 2.0**-1022}


@st.composite
def fine_tunes(draw: st.DrawFn) -> tuple[str, Tensors, Tensors]:
    """One matrix, base and tuned, of any float dtype and shape; sizes from 1, and magnitudes over many binades."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    magnitude = 2.0 ** draw(st.integers(-8, 4))
    step = magnitude * 2.0 ** -draw(st.integers(0, 10))
    base = (rng.standard_normal((rows, cols)) * magnitude).astype(DTYPES[dtype])
    rank = draw(st.integers(1, min(rows, cols)))
    delta = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols)) * step
    return dtype, {"a.weight": base}, {"a.weight": (base.astype(np.float64) + delta).astype(DTYPES[dtype])}


def f64(tensors: Tensors) -> NDArray[np.float64]:
    matrix: NDArray[np.float64] = tensors["a.weight"].astype(np.float64)
    return matrix


def run(base: Tensors, tuned: Tensors, folder: Path, **options: Any) -> tuple[Any, Tensors, Tensors]:
    save(folder / "base", base, {})
    save(folder / "tuned", tuned, {})
    result = lora_compress.extract(folder / "base", folder / "tuned", folder / "out", **options)
    lora_compress.merge(folder / "base", [folder / "out"], folder / "merged")
    return result, load(folder / "out"), load(folder / "merged")


@given(fine_tunes(), st.integers(1, 50), st.sampled_from(["BF16", "F16", "F32"]), st.integers(0, 2**32))
def test_merged_forward_equals_base_forward_plus_adapter(
    case: tuple[str, Tensors, Tensors], rank: int, dtype: str, seed: int
) -> None:
    stored, base, tuned = case
    if (f64(base) == f64(tuned)).all():
        return
    with tempfile.TemporaryDirectory() as folder:
        result, factors, merged = run(base, tuned, Path(folder), rank=rank, dtype=dtype)
    if not result.tensors[0].rank:
        return
    b, a = (factors[f"base_model.model.a.lora_{side}.weight"].astype(np.float64) for side in "BA")
    w, got = f64(base), f64(merged)
    r, n = a.shape
    x = np.random.default_rng(seed).standard_normal((n, 3))
    separate, together = w @ x + b @ (a @ x), got @ x
    # Element by element: one rounding of W + BA to the stored dtype, the f32 sum of r + 1 terms, and f64 for the rest.
    gamma = (r + 2) * 2.0**-24 / (1 - (r + 2) * 2.0**-24)
    weight = UNIT[stored] * np.maximum(np.abs(w + b @ a), TINY[stored]) * (1 + gamma)
    weight = weight + gamma * (np.abs(w) + np.abs(b) @ np.abs(a)) * (1 + UNIT[stored])
    slack = (n + r + 4) * 2.0**-52 * ((np.abs(w) + np.abs(b) @ np.abs(a)) @ np.abs(x))
    assert (np.abs(together - separate) <= weight @ np.abs(x) + slack).all()


@given(fine_tunes(), st.integers(1, 50))
def test_error_identity_and_optimality(case: tuple[str, Tensors, Tensors], rank: int) -> None:
    _, base, tuned = case
    delta = (f64(tuned) - f64(base)).astype(np.float32)
    handle = Delta.from_array(delta)
    u, sigma, vt = handle.truncated_svd(rank, seed=1) if delta.any() else (None, np.zeros(0), None)
    exact = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    assert len(sigma) <= min(rank, *delta.shape)
    norm = np.linalg.norm(exact)
    # Small matrices go through ΔᵀΔ in f64: by Weyl's inequality σ² is off by at most what rounding does to that matrix
    # and its eigenvalues, some max(m, n)·2⁻⁵³·‖Δ‖².
    assert np.allclose(
        np.square(sigma), np.square(exact[: len(sigma)]), rtol=0, atol=1e-13 * norm**2 * max(delta.shape)
    )
    if u is None or vt is None:
        return
    captured = np.square(sigma).sum()
    residual = handle.residual_energy((u * sigma).astype(np.float32), vt)
    # ‖Δ − UσVᵀ‖² = T − Σσ², up to f32 factors: relative to T, a few f32 roundings.
    assert abs(residual - (handle.energy - captured)) <= 32 * 2.0**-24 * max(delta.shape) ** 0.5 * handle.energy


@given(fine_tunes())
def test_error_never_grows_with_rank(case: tuple[str, Tensors, Tensors]) -> None:
    _, base, tuned = case
    handle = Delta.from_array((f64(tuned) - f64(base)).astype(np.float32))
    if handle.energy == 0:
        return
    last = np.inf
    for rank in range(1, min(handle.shape) + 1):
        u, sigma, vt = handle.truncated_svd(rank)
        error = handle.residual_energy((u * sigma).astype(np.float32), vt)
        assert error <= last + 2.0**-20 * handle.energy
        last = error


@given(st.sampled_from(["BF16", "F16"]), st.lists(st.integers(0, 2**16 - 1), min_size=6, max_size=6))
def test_an_untouched_tensor_keeps_every_bit(dtype: str, bits: list[int]) -> None:
    raw = np.array(bits, np.uint16).view(DTYPES[dtype]).reshape(2, 3)
    one = np.ones((2, 2), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"a.weight": one, "odd": raw}
        _, _, merged = run(tensors, {**tensors, "a.weight": one * 2}, Path(folder), rank=1)
    assert (merged["odd"].view(np.uint16) == raw.view(np.uint16)).all()


@given(fine_tunes(), st.integers(0, 2**63))
def test_the_same_seed_gives_the_same_bytes(case: tuple[str, Tensors, Tensors], seed: int) -> None:
    _, base, tuned = case
    if (f64(base) == f64(tuned)).all():
        return
    outputs = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            run(base, tuned, Path(folder), rank=3, seed=seed)
            outputs.append([file.read_bytes() for file in sorted((Path(folder) / "out").glob("*.safetensors"))])
    assert outputs[0] == outputs[1]


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([2.0**-149, 2.0**-140, 1e-38, 1e-30, 1e30, 1e37]))
def test_extreme_magnitudes_are_decomposed(rows: int, cols: int, size: float) -> None:
    rng = np.random.default_rng(rows * 13 + cols)
    tuned = (rng.integers(1, 8, (rows, cols)) * size).astype(np.float32)
    base = np.zeros_like(tuned)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result, _, merged = run({"a.weight": base}, {"a.weight": tuned}, folder, rank=12, dtype="F32")
    # √σ·U and √σ·V are far from the ends of the range; the product is as exact as f32 is there.
    ulp = np.maximum(np.abs(tuned.astype(np.float64)) * 2.0**-24, 2.0**-149)
    bound = 32 * np.maximum(ulp, 2.0**-24 * np.abs(tuned).max())
    assert (np.abs(f64(merged) - tuned.astype(np.float64)) <= bound).all()
    energy = np.square(tuned.astype(np.float64)).sum()
    assert abs(result.tensors[0].delta_energy - energy) <= 144 * 2.0**-53 * energy
