"""TIES and DARE: what they do to elements, against references written apart from them, and adapters made by them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import TensorError, set_threads
from lora_compress.cli import cli
from lora_compress.verbs import task_vectors
from lora_compress.verbs.methods import Method, choose_method
from lora_compress.verbs.task_vectors import TaskVector, elect, merge
from numpy.typing import NDArray

from tests.checkpoints import load, save, tiny_llama, tuned_from

Dense = NDArray[Any]
DENSITIES = st.sampled_from([1e-6, 0.1, 0.29, 0.5, 0.77, 1.0])


def vector(dense: Dense) -> TaskVector:
    """ΔW itself, without a pair."""
    rows, cols = dense.shape
    whole = [np.ascontiguousarray(dense, np.float32)]
    return TaskVector(np.zeros((rows, 0), np.float32), np.zeros((0, cols), np.float32), whole)


def trimmed(dense: Dense, density: float) -> Dense:
    """The largest magnitudes by a stable sort of all elements, float64."""
    flat = dense.astype(np.float64).ravel()
    kept = np.argsort(-np.abs(flat), kind="stable")[: max(int(density * flat.size), 1)]
    result = np.zeros_like(flat)
    result[kept] = flat[kept]
    return result.reshape(dense.shape)


def ties(dense: list[Dense], weights: list[float], density: float) -> Dense:
    """Yadav et al. 2023, element by element, float64; weights multiply before the election."""
    weighted = np.array([weight * trimmed(each, density) for each, weight in zip(dense, weights, strict=True)])
    result = np.zeros(dense[0].shape)
    for at in np.ndindex(*result.shape):
        votes = weighted[(slice(None), *at)]
        sign = 1 if votes.sum() >= 0 else -1
        same = votes[np.sign(votes) == sign]
        result[at] = same.mean() if len(same) else 0.0
    return result


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), DENSITIES, st.booleans())
def test_ties_is_the_papers(seed: int, adapters: int, rows: int, cols: int, density: float, small_panels: bool) -> None:
    # Small whole numbers: nothing is rounded, and magnitudes and votes are often equal.
    rng = np.random.default_rng(seed)
    dense: list[Dense] = []
    vectors = {}
    for number in range(adapters):
        b, a = rng.integers(-2, 3, (rows, 3)).astype(np.float32), rng.integers(-2, 3, (3, cols)).astype(np.float32)
        vectors[number] = TaskVector(b, a)
        dense.append(b @ a)
    weights = [*rng.integers(-2, 3, adapters).astype(float)]
    with pytest.MonkeyPatch.context() as patch:
        if small_panels:
            patch.setattr(task_vectors, "PANEL", 2 * cols)
        found = merge("w", (rows, cols), vectors, weights, Method("ties", (density,) * adapters))
    assert found.dtype == np.float32
    assert (found == ties(dense, weights, density).astype(np.float32)).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 4), DENSITIES)
def test_an_adapter_without_weight_or_values_has_no_say(seed: int, adapters: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = {number: vector(rng.standard_normal((6, 5))) for number in range(adapters)}
    weights, method = [1.0] * (adapters - 1) + [0.0], Method("ties", (density,) * adapters)
    all_but_last = {number: vectors[number] for number in range(adapters - 1)}
    without = merge("w", (6, 5), all_but_last, weights, method)
    assert (merge("w", (6, 5), vectors, weights, method) == without).all()
    zeros = vectors | {adapters - 1: vector(np.zeros((6, 5)))}
    assert (merge("w", (6, 5), zeros, [1.0] * adapters, method) == without).all()
    assert (merge("w", (6, 5), {}, weights, method) == 0).all()


def test_opposite_votes_of_equal_weight_go_to_plus() -> None:
    votes = np.array([[[1.0, -3.0]], [[-1.0, 2.0]], [[0.0, -1.0]]], np.float32)
    assert elect(votes).tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_drops_at_random_and_keeps_the_expectation(density: float, rng: np.random.Generator) -> None:
    values = rng.standard_normal((40, 50)).astype(np.float32)
    method = Method("dare_linear", (density,))
    draws = 400
    total, shares = np.zeros(values.shape), []
    for draw in range(draws):
        found = merge(f"w{draw}", values.shape, {0: vector(values)}, [1.0], method)
        assert ((found == 0) | np.isclose(found, values / density, rtol=1e-6)).all()
        total += found
        shares.append(float(np.mean(found != 0)))
    # Each element is v·k/(density·draws) with k binomial: its deviation is |v|·√((1 − density)/(density·draws)). The
    # tails beyond 7 of them hold less than 1e-11 of a normal distribution; a binomial's of these sizes, which are
    # skewed, less than 1e-7 (Bernstein: exp(−x²/2/(1 + x/(3·√(draws·density·(1 − density)))))), of 2000 elements.
    deviation = np.abs(values) * np.sqrt((1 - density) / (density * draws))
    assert (np.abs(total / draws - values) <= 7 * deviation).all()
    assert abs(np.mean(shares) - density) <= 6 * np.sqrt(density * (1 - density) / (draws * values.size))


def test_dare_is_seeded_by_seed_tensor_and_adapter(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    # An odd number of columns: panels and pairs of random numbers end at different places.
    values = rng.standard_normal((30, 7))

    def kept(tensor: str, number: int, seed: int) -> Dense:
        vectors, method = {number: vector(values)}, Method("dare_linear", (0.5, 0.5), seed)
        found: Dense = merge(tensor, (30, 7), vectors, [1.0, 1.0], method) != 0
        return found

    first = kept("w", 0, 0)
    assert (first == kept("w", 0, 0)).all()
    for other in (kept("v", 0, 0), kept("w", 1, 0), kept("w", 0, 1)):
        # Half of 210 elements agree by chance; 60 are nine deviations away.
        assert abs(np.count_nonzero(first == other) - 105) < 60
    both = {0: vector(values), 1: vector(values)}
    together = merge("w", values.shape, both, [1.0, 1.0], Method("dare_linear", (0.5, 0.5)))
    assert np.allclose(together, 2 * values * (first + kept("w", 1, 0).astype(int)), rtol=1e-6)
    elected = merge("w", values.shape, both, [1.0, 1.0], Method("dare_ties", (0.5, 0.5)))
    assert np.allclose(elected, 2 * values * (first | kept("w", 1, 0)), rtol=1e-6)


# Adapters, made with the verbs. Two fine-tunes of one base, of which the second leaves a layer alone.

Made = tuple[Path, list[Path]]


@pytest.fixture
def made(tmp_path: Path, rng: np.random.Generator) -> Made:
    return make(tmp_path, rng)


def make(folder: Path, rng: np.random.Generator, hidden: int = 24, rank: int = 4) -> Made:
    base, config = tiny_llama(rng, hidden=hidden)
    base = {name: values.astype(np.float32) for name, values in base.items()}
    save(folder / "base", base, config)
    adapters = []
    for name, keep in (("one", ""), ("two", ".layers.1.")):
        unchanged = {tensor for tensor in base if keep and keep in tensor}
        save(folder / name, tuned_from(base, rng, keep=unchanged), config)
        adapters.append(folder / f"{name}-ad")
        lora_compress.extract(folder / "base", folder / name, adapters[-1], rank=rank, dtype="F32")
    return folder / "base", adapters


def dense_of(adapter: Path) -> dict[str, Dense]:
    """B·A by module, float64; alpha is r in all that this package writes."""
    tensors = load(adapter)
    found = {}
    for name, values in tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|embedding_A)(\.weight)?", name):
            other = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            found[match[1]] = other.astype(np.float64) @ values.astype(np.float64)
    return found


def relative(found: Mapping[str, Dense], expected: Mapping[str, Dense]) -> float:
    """‖found − expected‖ / ‖expected‖ over all modules; what is not there is zeros."""
    zero = np.zeros(1)
    lost = sum(float(np.sum((found.get(name, zero) - values) ** 2)) for name, values in expected.items())
    return float(np.sqrt(lost / sum(float(np.sum(values**2)) for values in expected.values())))


def test_the_adapter_is_the_best_of_what_ties_makes(made: Made, tmp_path: Path) -> None:
    base, adapters = made
    weights, density = [1.0, -0.5], 0.4
    sources = [dense_of(path) for path in adapters]
    expected = {}
    for name in {*sources[0], *sources[1]}:
        held = [(source[name], weight) for source, weight in zip(sources, weights, strict=True) if name in source]
        for dense, _ in held:
            # Float32 could only choose other elements than float64 where magnitudes at the edge are nearly equal.
            edge = np.sort(np.abs(dense).ravel())[dense.size - int(density * dense.size) - 1 :][:2]
            assert edge[1] - edge[0] > 1e-6 * edge[1]
        expected[name] = ties([dense for dense, _ in held], [weight for _, weight in held], density)
    how: dict[str, Any] = {"weights": weights, "method": "ties", "density": density, "dtype": "F32"}
    full = lora_compress.combine(base, adapters, tmp_path / "full", rank=24, **how)
    # The two roundings of factors and their sums, by some units of float32.
    assert relative(dense_of(tmp_path / "full"), expected) < 1e-5
    assert full.error < 1e-5
    assert max(after for _, after in full.ranks.values()) > 8
    result = lora_compress.combine(base, adapters, tmp_path / "usual", **how)
    # Without a wish: the largest rank in any adapter.
    assert set(result.ranks.values()) == {(4, 4)}
    rests = {name: np.linalg.svd(dense, compute_uv=False)[4:] for name, dense in expected.items()}
    whole = sum(float(np.sum(dense**2)) for dense in expected.values())
    best = np.sqrt(sum(float(np.sum(rest**2)) for rest in rests.values()) / whole)
    error = relative(dense_of(tmp_path / "usual"), expected)
    assert error == pytest.approx(result.error, rel=1e-4)
    # The tolerance of the truncated SVD.
    assert best * (1 - 1e-6) <= error <= best * (1 + 2e-4)
    # Norms are added whatever the method.
    lora_compress.merge(base, adapters, tmp_path / "sum", weights=weights)
    lora_compress.merge(base, tmp_path / "usual", tmp_path / "merged")
    norm = "model.norm.weight"
    assert np.allclose(load(tmp_path / "merged")[norm], load(tmp_path / "sum")[norm], rtol=1e-6)
    manifest = json.loads((tmp_path / "usual" / "lora_compress" / "manifest.json").read_text())
    assert (manifest["method"], manifest["density"], manifest["seed"]) == ("ties", [0.4, 0.4], 0)
    assert "weight -0.5, density 0.4" in (tmp_path / "usual" / "README.md").read_text()


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_one_adapter_that_keeps_all_is_itself(made: Made, tmp_path: Path, method: str) -> None:
    base, adapters = made
    result = lora_compress.combine(
        base, adapters[:1], tmp_path / "same", weights=[0.7], method=method, density=1, dtype="F32"
    )
    lora_compress.combine(base, adapters[:1], tmp_path / "linear", weights=[0.7], dtype="F32")
    assert result.error < 1e-5
    assert relative(dense_of(tmp_path / "same"), dense_of(tmp_path / "linear")) < 1e-5


@pytest.mark.parametrize("format_", ["peft", "factors"])
def test_ranks_are_wished_for_as_elsewhere(made: Made, tmp_path: Path, format_: str) -> None:
    base, adapters = made
    if format_ == "factors":
        other = tmp_path / "factors"
        lora_compress.extract(base, tmp_path / "two", other, rank=6, dtype="F32", format="factors")
        adapters = [adapters[0], other]
    numbers: Iterator[int] = iter(range(9))

    def combined(**wishes: Any) -> tuple[lora_compress.verbs.combine.CombineResult, dict[str, Any]]:
        out = tmp_path / f"out{next(numbers)}"
        how: dict[str, Any] = {"method": "ties", "density": [0.3, 0.6], "dtype": "F32"}
        result = lora_compress.combine(base, adapters, out, **(how | wishes))
        return result, json.loads((out / "adapter_config.json").read_text())

    result, _ = combined(budget="20kB")
    assert 10_000 < result.adapter_bytes <= 20_000
    assert len({after for _, after in result.ranks.values()}) > 1
    result, _ = combined(error=0.05)
    assert 0.04 < result.error <= 0.05
    result, config = combined(rank="energy=0.6", ranks_allowed="8,16")
    assert {config["r"], *config["rank_pattern"].values()} <= {8, 16}
    result, config = combined(rank=6, layout="uniform")
    assert (config["r"], config["rank_pattern"]) == (6, {})
    result, config = combined(rank=30)
    assert config["r"] == 24
    result, _ = combined(method="dare_ties", rank="auto", exclude=["embed_tokens"])
    assert [warning for warning in result.warnings if "left out" in warning]
    assert 0 < result.error < 1
    result, _ = combined(rank="auto", exclude=["."])
    assert (result.error, result.ranks) == (1.0, {})


def test_what_cancels_has_no_factors(made: Made, tmp_path: Path) -> None:
    base, adapters = made
    same = [adapters[0], adapters[0]]
    how: dict[str, Any] = {"weights": [1, -1], "method": "dare_linear", "density": 1}
    wished: list[dict[str, Any]] = [{}, {"rank": 3}, {"rank": 8, "ranks_allowed": "8"}, {"error": 0.5}]
    for number, wishes in enumerate(wished):
        result = lora_compress.combine(base, same, tmp_path / f"none{number}", **how, **wishes)
        assert (result.error, {after for _, after in result.ranks.values()}) == (0.0, {0})
        assert not load(tmp_path / f"none{number}")
    lora_compress.combine(base, same, tmp_path / "zeros", **how, rank=3, layout="uniform")
    config = json.loads((tmp_path / "zeros" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (3, {})


def test_bytes_depend_on_neither_threads_nor_other_tensors(tmp_path: Path, rng: np.random.Generator) -> None:
    # Wide enough for panels, packed deltas and several jobs at a time.
    base, adapters = make(tmp_path, rng, hidden=256)
    how: dict[str, Any] = {"method": "dare_ties", "density": 0.5, "seed": 7, "base_name": "base", "command": "test"}
    try:
        for threads in (1, 4):
            set_threads(threads)
            lora_compress.combine(base, adapters, tmp_path / f"of-{threads}", **how)
            # Needs more σ than are looked for to begin with.
            result = lora_compress.combine(base, adapters, tmp_path / f"error-{threads}", error=0.3, **how)
            assert 0.25 < result.error <= 0.3
            assert max(after for _, after in result.ranks.values()) > 48
    finally:
        set_threads(0)
    files = sorted(path.relative_to(tmp_path / "of-1") for path in (tmp_path / "of-1").rglob("*") if path.is_file())
    assert len(files) == 5
    for kind in ("of", "error"):
        for file in files:
            assert (tmp_path / f"{kind}-1" / file).read_bytes() == (tmp_path / f"{kind}-4" / file).read_bytes(), file
    lora_compress.combine(base, adapters, tmp_path / "some", exclude=["q_proj", "embed"], **how)
    whole, some = load(tmp_path / "of-1"), load(tmp_path / "some")
    assert 0 < len(some) < len(whole)
    assert all(values.tobytes() == whole[name].tobytes() for name, values in some.items())
    lora_compress.combine(base, adapters, tmp_path / "other", **(how | {"seed": 8}))
    assert any(values.tobytes() != whole[name].tobytes() for name, values in load(tmp_path / "other").items())


@pytest.mark.parametrize(
    ("method", "density", "said"),
    [
        ("magic", 0.5, "there is no method `magic`: take one of linear, ties, dare_linear, dare_ties"),
        ("linear", 0.5, "takes no density"),
        ("ties", None, "ties needs densities"),
        ("dare_linear", [0.1, 0.2, 0.3], r"one for each of 2 adapters: \[0.1, 0.2, 0.3\]"),
        ("dare_ties", 0.0, "above 0 and up to 1"),
        ("ties", [0.5, 1.5], "above 0 and up to 1"),
        ("ties", float("nan"), "above 0 and up to 1"),
    ],
)
def test_wrong_methods_and_densities_are_refused(tmp_path: Path, method: str, density: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        lora_compress.combine("base", ["one", "two"], tmp_path / "no", method=method, density=density)
    assert "\n" not in str(raised.value)
    given = [density] if isinstance(density, float) else density or []
    options = [part for each in given for part in ("--density", str(each))]
    arguments = ["combine", "base", "one", "two", "-o", str(tmp_path / "no"), "--method", method, *options]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert (re.search(said, done.output) is not None) == (method != "magic")
    assert not (tmp_path / "no").exists()


def test_values_that_overflow_are_refused(made: Made, tmp_path: Path) -> None:
    base, adapters = made
    how: dict[str, Any] = {"method": "ties", "density": 0.5}
    with pytest.raises(TensorError, match=r"`lm_head.weight`: the adapters' weighted ΔW is not finite"):
        lora_compress.combine(base, adapters, tmp_path / "no", weights=[1e300, 1], **how)
    with pytest.raises(TensorError, match="overflow F16"):
        lora_compress.combine(base, adapters, tmp_path / "no", weights=[1e20, 1e20], dtype="F16", **how)
    with pytest.raises(ValueError, match="64 bits"):
        choose_method("ties", 0.5, -1, 2)
    assert not (tmp_path / "no").exists()


def test_the_command_says_what_it_did(made: Made, tmp_path: Path) -> None:
    base, adapters = made
    arguments = ["combine", str(base), *map(str, adapters), "-w", "0.5", "-w", "1", "--method", "dare_ties"]
    done = CliRunner().invoke(cli, [*arguments, "--density", "0.5", "--density", "0.9", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert re.search(r"ranks up to 4 \(before: 4\), relative error 0\.\d+ to what dare_ties makes of them", done.output)
    done = CliRunner().invoke(
        cli, [*arguments, "--density", "0.5", "-o", str(tmp_path / "json"), "--json", "--seed", "3"]
    )
    assert json.loads(done.stdout)["method"] == "dare_ties"
