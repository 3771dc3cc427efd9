"""Resizing and combining: the best pairs of a rank from factors alone, exact sums, whole tensors kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import lora_compress
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import AdapterError, SelectionError
from lora_compress.cli import cli
from lora_compress.ranks.recompress import decompose

from tests.checkpoints import BF16, Tensors, load, save, tiny_llama, tuned_from
from tests.conftest import Pair


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(1, 40)),
    st.floats(-3, 3),
    st.booleans(),
)
def test_products_are_decomposed_as_the_dense_matrix_is(
    seed: int, sizes: tuple[int, int, int], skew: float, deficient: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows, rank, cols = sizes
    b = (10**skew * rng.standard_normal((rows, rank))).astype(np.float32)
    a = (10**-skew * rng.standard_normal((rank, cols))).astype(np.float32)
    if deficient and rank > 1:
        b[:, -1] = b[:, 0]
    dense = b.astype(np.float64) @ a.astype(np.float64)
    exact = np.linalg.svd(dense, compute_uv=False)
    product = decompose(b, a)
    whole = float(np.sum(exact**2))
    # Gram matrices square the factors: what is below some 1e-7 of the largest is not found.
    found = np.zeros(len(exact))
    found[: len(product.sigma)] = product.sigma[: len(exact)]
    assert np.abs(found - exact).max(initial=0) <= 1e-6 * (exact[0] if len(exact) else 0) + 1e-30
    for keep in {1, rank // 2, rank}:
        left, right = product.truncated(keep)
        assert left.shape[1] == right.shape[0] <= keep
        error = float(np.sum((dense - left.astype(np.float64) @ right.astype(np.float64)) ** 2))
        # The best of the rank, but for the rounding of factors and sums to float32.
        assert error <= float(np.sum(exact[keep:] ** 2)) * (1 + 1e-6) + 1e-10 * whole


def adapter(pair: Pair, out: Path, rank: int, **options: object) -> Path:
    lora_compress.extract(*pair, out, rank=rank, dtype="F32", **options)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("format_", ["peft", "factors"])
def test_a_resized_adapter_is_the_extracted_one(pair: Pair, tmp_path: Path, format_: str) -> None:
    large = adapter(pair, tmp_path / "large", 20, format=format_)
    result = lora_compress.resize(pair[0], large, tmp_path / "small", rank=5, dtype="F32")
    small = adapter(pair, tmp_path / "extracted", 5)
    assert set(result.ranks.values()) == {(20, 5), (12, 5)}
    checks = [lora_compress.verify(*pair, path) for path in (tmp_path / "small", small)]
    # Truncating a truncation is truncating: but for the tolerances of two extractions.
    assert checks[0].error == pytest.approx(checks[1].error, rel=1e-4)
    assert checks[0].ok, "a resized adapter promises nothing about tuned"
    # Norms are stored whole, and stay.
    names = {tensor.name for tensor in checks[0].tensors}
    merged = tmp_path / "merged"
    lora_compress.merge(pair[0], tmp_path / "small", merged)
    assert (load(merged)["model.norm.weight"] == load(pair[1])["model.norm.weight"]).all()
    assert "model.norm.weight" in names
    card = (tmp_path / "small" / "README.md").read_text()
    assert "made from others" in card


def test_budgets_errors_and_ladders_are_those_of_plans(pair: Pair, tmp_path: Path) -> None:
    large = adapter(pair, tmp_path / "large", 24)
    result = lora_compress.resize(pair[0], large, tmp_path / "budget", budget="8kB")
    assert result.adapter_bytes <= 8000
    assert len({after for _, after in result.ranks.values()}) > 1
    result = lora_compress.resize(pair[0], large, tmp_path / "error", error=0.5, dtype="F32")
    assert 0.4 < result.error <= 0.5
    lora_compress.resize(pair[0], large, tmp_path / "ladder", rank="energy=0.5", ranks_allowed="8,16")
    config = json.loads((tmp_path / "ladder" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} <= {8, 16}
    lora_compress.resize(pair[0], large, tmp_path / "uniform", rank=6, layout="uniform")
    config = json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (6, {})


def test_sums_are_exact_and_weighted(tmp_path: Path, rng: np.random.Generator) -> None:
    base, config = tiny_llama(rng)
    base = {name: values.astype(np.float32) for name, values in base.items()}
    for name, tensors in (("base", base), ("one", tuned_from(base, rng)), ("two", tuned_from(base, rng))):
        save(tmp_path / name, tensors, config)
    paths = [adapter((tmp_path / "base", tmp_path / name), tmp_path / f"{name}-ad", 4) for name in ("one", "two")]
    result = lora_compress.combine(tmp_path / "base", paths, tmp_path / "sum", weights=[0.5, -2], dtype="F32")
    # Exact but for the rounding of the factors.
    assert result.error < 1e-6
    assert {after for _, after in result.ranks.values()} == {8}
    lora_compress.merge(tmp_path / "base", paths, tmp_path / "both", weights=[0.5, -2])
    lora_compress.merge(tmp_path / "base", tmp_path / "sum", tmp_path / "once")
    both, once = load(tmp_path / "both"), load(tmp_path / "once")
    for name in base:
        size = np.abs(both[name] - base[name]).max() + 1e-3
        assert np.abs(both[name] - once[name]).max() <= 1e-5 * size, name
    recompressed = lora_compress.combine(tmp_path / "base", paths, tmp_path / "less", rank=4)
    assert 0 < recompressed.error < 1
    with pytest.raises(ValueError, match="weights"):
        lora_compress.combine(tmp_path / "base", paths, tmp_path / "no", weights=[1.0])


def test_tied_heads_and_new_rows_are_kept(
    make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path
) -> None:
    base, config = tiny_llama(rng, tied=True)
    tuned: Tensors = tuned_from(base, rng)
    grown = np.vstack([tuned["model.embed_tokens.weight"], np.ones((3, 24), BF16)])
    pair = make_pair(base, tuned | {"model.embed_tokens.weight": grown}, config)
    large = adapter(pair, tmp_path / "large", 8)
    lora_compress.resize(pair[0], large, tmp_path / "small", rank=3)
    written = load(tmp_path / "small")
    assert "base_model.model.lm_head.lora_A.weight" in written
    lora_compress.merge(pair[0], tmp_path / "small", tmp_path / "merged")
    assert (load(tmp_path / "merged")["model.embed_tokens.weight"][40:] == 1).all()
    # The same rows twice are the rows.
    lora_compress.combine(pair[0], [large, adapter(pair, tmp_path / "other", 2)], tmp_path / "sum")
    grown = np.vstack([tuned["model.embed_tokens.weight"], np.zeros((3, 24), BF16)])
    save(tmp_path / "third", tuned | {"model.embed_tokens.weight": grown}, config)
    third = adapter((pair[0], tmp_path / "third"), tmp_path / "third-ad", 2)
    with pytest.raises(AdapterError, match="append different rows"):
        lora_compress.combine(pair[0], [large, third], tmp_path / "no")
    with pytest.raises(AdapterError, match="append different rows"):
        lora_compress.merge(pair[0], [large, third], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_is_said(pair: Pair, tmp_path: Path) -> None:
    large = adapter(pair, tmp_path / "large", 6)
    with pytest.raises(AdapterError, match="with other values"):
        lora_compress.resize(pair[1], large, tmp_path / "no", rank=2)
    with pytest.raises(SelectionError, match="give one of pairs"):
        lora_compress.resize(pair[0], large, tmp_path / "no", rank=2, format="factors")
    with pytest.raises(SelectionError, match="budget"):
        lora_compress.resize(pair[0], large, tmp_path / "no", budget=10)
    run = CliRunner()
    arguments = [str(pair[0]), str(large), "-o", str(tmp_path / "cli")]
    assert "say how large" in run.invoke(cli, ["resize", *arguments]).output
    done = run.invoke(cli, ["resize", *arguments, "--rank", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert {row["after"] for row in json.loads(done.stdout)["ranks"].values()} == {2}
    done = run.invoke(cli, ["combine", str(pair[0]), str(large), str(large), "-o", str(tmp_path / "sum"), "-w", "1"])
    assert done.exit_code == 2
    done = run.invoke(cli, ["combine", str(pair[0]), str(large), str(large), "-o", str(tmp_path / "sum")])
    assert "ranks up to 6" in done.output
