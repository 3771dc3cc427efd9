"""Planning: ranks by rules, budgets and errors; plan files; what a fine-tune is recognised as."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import lora_compress
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import Plan, PlanError, RankChoice, SelectionError, Spectrum
from lora_compress.ranks import file
from lora_compress.ranks.choice import choose, parse_size
from lora_compress.ranks.plan import TensorPlan
from lora_compress.ranks.recognise import recognise
from lora_compress.ranks.weights import WEIGHTS
from safetensors.numpy import load_file

from tests.checkpoints import BF16, DTYPES, Tensors, load, save, tiny_llama, tuned_from
from tests.conftest import Pair


def decaying(rng: np.random.Generator, shape: tuple[int, ...], power: float) -> Any:
    """A full-rank matrix whose singular values fall as i^-power."""
    (rows, cols), size = shape, min(shape)
    left, _ = np.linalg.qr(rng.standard_normal((rows, size)))
    right, _ = np.linalg.qr(rng.standard_normal((cols, size)))
    return (left * np.arange(1, size + 1) ** -power) @ right.T


@pytest.fixture
def tuned_pair(make_pair: Callable[..., Pair], rng: np.random.Generator) -> Pair:
    """Matrices of several sizes and strengths, and a norm."""
    shapes = {"a.weight": (60, 40), "b.weight": (40, 90), "c.weight": (64, 64), "embed_tokens.weight": (200, 40)}
    base: Tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tuned: Tensors = {
        name: tensor
        + np.float32(0.02 * (number + 1)) * decaying(rng, tensor.shape, 0.5 + 0.2 * number).astype(np.float32)
        for number, (name, tensor) in enumerate(base.items())
    }
    base["norm.weight"] = np.ones(40, np.float32)
    tuned["norm.weight"] = np.full(40, 1.01, np.float32)
    return make_pair(base, tuned)


def test_a_plan_tells_what_an_extraction_will_give(tuned_pair: Pair, tmp_path: Path) -> None:
    plan = lora_compress.plan(*tuned_pair, budget="20kB")
    result = lora_compress.extract(*tuned_pair, tmp_path / "out", plan=plan, tolerance=1e-6)
    assert {account.name: account.rank for account in result.tensors if account.rank} == plan.ranks
    assert result.error == pytest.approx(plan.error, rel=1e-3)
    assert sum(account.nbytes for account in result.tensors) == plan.nbytes
    assert result.adapter_bytes <= 20_000
    assert plan.nbytes > 0.7 * 20_000, "the budget is used"
    exact = next(tensor for tensor in plan.tensors if tensor.name == "norm.weight")
    assert (exact.treatment, exact.fixed, exact.rank) == ("exact", 160, 0)


def test_spectra_are_those_of_numpy(tuned_pair: Pair) -> None:
    before, after = load(tuned_pair[0]), load(tuned_pair[1])
    for tensor in lora_compress.plan(*tuned_pair).low_rank:
        assert tensor.spectrum is not None
        delta = after[tensor.name].astype(np.float64) - before[tensor.name].astype(np.float64)
        sigma = np.linalg.svd(delta, compute_uv=False)
        known = tensor.spectrum.sigma
        assert tensor.spectrum.energy == pytest.approx(np.square(delta).sum(), rel=1e-6)
        # θ ≤ σ by interlacing, and the energy they miss is within the tolerance of what is left.
        assert (known <= sigma[: len(known)] * (1 + 1e-6)).all()
        missing = np.square(sigma[: len(known)]).sum() - np.square(known).sum()
        assert missing <= 2.1e-3 * np.square(sigma[len(known) :]).sum() + 1e-6 * np.square(sigma).sum()


def test_rounding_energy_is_that_of_the_spacing(make_pair: Callable[..., Pair], rng: np.random.Generator) -> None:
    for name, dtype in DTYPES.items():
        base = rng.standard_normal((50, 30)).astype(dtype)
        tuned = (base.astype(np.float64) * (1 + 0.1 * rng.standard_normal(base.shape))).astype(dtype)
        tuned[:20] = base[:20]
        paths = make_pair({"w.weight": base}, {"w.weight": tuned})
        (tensor,) = lora_compress.plan(*paths).low_rank
        wide, changed = tuned.astype(np.float64), tuned.astype(np.float64) != base.astype(np.float64)
        bits = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}[name]
        exponents = np.floor(np.log2(np.abs(wide[changed])))
        if name == "F16":
            exponents = np.maximum(exponents, -14)
        expected = np.square(2.0 ** (exponents - bits + 1)).sum() / 12
        assert tensor.spectrum is not None
        assert tensor.spectrum.rounding_energy == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("budget", [9_000, 12_345, 30_000, 10**9])
@pytest.mark.parametrize("layout", ["peft", "uniform"])
def test_budgets_hold_on_disk(tuned_pair: Pair, tmp_path: Path, budget: int, layout: str) -> None:
    result = lora_compress.extract(*tuned_pair, tmp_path / "out", budget=budget, layout=layout, dtype="F16")
    assert result.adapter_bytes <= budget
    assert lora_compress.verify(*tuned_pair, tmp_path / "out").ok


def test_a_whole_models_error_is_met_at_the_least_size(tuned_pair: Pair, tmp_path: Path) -> None:
    for error in (0.8, 0.5, 0.2, 0.05):
        plan = lora_compress.plan(*tuned_pair, error=error)
        assert plan.error <= error * (1 + 1e-6)
        whole = plan.delta_energy
        for tensor in plan.low_rank:
            assert tensor.spectrum is not None
            more = tensor.spectrum.rest(max(tensor.rank - 1, 0)) - tensor.spectrum.rest(tensor.rank)
            assert tensor.rank == 0 or math.sqrt(plan.error**2 + more / whole) > error, "no direction could be left out"
    result = lora_compress.extract(*tuned_pair, tmp_path / "out", error=0.3, dtype="F32")
    assert 0.25 < result.error <= 0.3 * (1 + 1e-4)


def test_rules_for_each_tensor(tuned_pair: Pair) -> None:
    plan = lora_compress.plan(*tuned_pair, rank="energy=0.99")
    checks: dict[str, Callable[[Any, int], bool]] = {
        "energy=0.9": lambda s, k: s.rest(k) <= 0.1 * s.energy * (1 + 1e-9) and s.rest(k - 1) > 0.1 * s.energy,
        "error=0.5": lambda s, k: s.error(k) <= 0.5 and s.error(k - 1) > 0.5,
        "threshold=0.01": lambda s, k: (s.sigma > 0.01).sum() == k,
        "ratio=5": lambda s, k: (s.sigma >= s.sigma[0] / 5).sum() == k,
        "7": lambda s, k: k == 7,
    }
    for rule, check in checks.items():
        chosen = plan.choose(choose(rank=rule))
        assert all(check(tensor.spectrum, tensor.rank) for tensor in chosen.low_rank), rule
        assert not chosen.unsettled


def test_more_singular_values_are_found_where_ranks_depend_on_them(tuned_pair: Pair) -> None:
    plan = lora_compress.plan(*tuned_pair, rank="energy=0.999", bound=2)
    assert not plan.unsettled
    assert plan.ranks == lora_compress.plan(*tuned_pair, rank="energy=0.999", bound=40).ranks
    assert max(plan.ranks.values()) > 16
    few = lora_compress.plan(*tuned_pair, rank=2, bound=2)
    assert few.choose(choose(rank="energy=0.999")).unsettled


def test_auto_does_not_depend_on_how_many_singular_values_are_found_first(tuned_pair: Pair) -> None:
    plans = [lora_compress.plan(*tuned_pair, bound=bound) for bound in (2, 10, 40)]
    assert plans[0].ranks == plans[1].ranks == plans[2].ranks
    for tensor in plans[0].low_rank:
        assert tensor.spectrum is not None
        assert tensor.rank <= (tensor.spectrum.sigma > tensor.spectrum.noise_edge).sum()


@pytest.mark.parametrize("given_ranks", ["8,16,32", "vllm", "8x", [3, 9]])
def test_only_allowed_ranks_are_used(tuned_pair: Pair, given_ranks: Any) -> None:
    for asked in ({"budget": "15kB"}, {"rank": "auto"}, {"rank": "energy=0.9"}, {"rank": 5}, {"error": 0.4}):
        plan = lora_compress.plan(*tuned_pair, ranks_allowed=given_ranks, max_rank=32, **asked)
        listed = {"8,16,32": {8, 16, 32}, "vllm": {1, 8, 16, 32}, "8x": {8, 16, 24, 32}}.get(str(given_ranks), {3, 9})
        assert set(plan.ranks.values()) <= listed | {0}, asked


def test_max_rank_alone_is_the_rank_as_in_mergekit(tuned_pair: Pair, tmp_path: Path) -> None:
    assert set(lora_compress.plan(*tuned_pair, max_rank=6).ranks.values()) == {6}
    assert max(lora_compress.plan(*tuned_pair, budget="1MB", max_rank=6).ranks.values()) == 6
    assert lora_compress.extract(*tuned_pair, tmp_path / "out", max_rank=6).rank == 6


def test_the_uniform_layout_has_one_rank_and_zeros_for_layers_that_did_not_change(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank="auto", layout="uniform")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {tensor.shape[0 if name.endswith(("A.weight", "embedding_A")) else 1] for name, tensor in factors.items()}
    assert ranks == {config["r"]}
    padded = factors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    assert not padded.astype(np.float32).any()
    assert lora_compress.verify(*pair, tmp_path / "out").ok


def test_scale_is_folded_into_the_factors(tuned_pair: Pair, tmp_path: Path) -> None:
    one = lora_compress.extract(*tuned_pair, tmp_path / "one", rank=8, dtype="F32")
    two = lora_compress.extract(*tuned_pair, tmp_path / "two", rank=8, dtype="F32", scale=1.25)
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in a:
        factor = 1.25 if "lora_B" in name or "embedding_A" in name else 1.0
        assert np.allclose(b[name], factor * a[name], rtol=1e-6)
    # ‖Δ − sΔ_k‖² = ‖Δ‖² − (2s − s²)‖Δ_k‖²: s = 1 is the best in this norm.
    assert two.error > one.error
    assert lora_compress.verify(*tuned_pair, tmp_path / "two").ok


def test_plan_files_survive_the_trip_and_answer_other_wishes(tuned_pair: Pair, tmp_path: Path) -> None:
    plan = lora_compress.plan(*tuned_pair, budget="20kB", ranks_allowed="2x", weights="relative")
    file.write(plan, tmp_path / "plan.json")
    again = file.read(tmp_path / "plan.json")
    assert (again.ranks, again.choice, again.options) == (plan.ranks, plan.choice, plan.options)
    assert again.error == pytest.approx(plan.error, rel=1e-7)
    other = choose(budget="15kB")
    assert again.choose(other).ranks == plan.choose(other).ranks
    assert not list(tmp_path.glob(".*partial"))
    result = lora_compress.extract(*tuned_pair, tmp_path / "out", plan=tmp_path / "plan.json")
    assert result.choice == plan.choice


def test_plans_show_themselves_in_notebooks(tuned_pair: Pair) -> None:
    html = lora_compress.plan(*tuned_pair)._repr_html_()
    assert html.startswith("<iframe")
    assert "srcdoc" in html


def test_plans_of_other_checkpoints_are_refused(tuned_pair: Pair, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = lora_compress.plan(*tuned_pair)
    with pytest.raises(PlanError, match="another base"):
        lora_compress.extract(tuned_pair[1], tuned_pair[0], tmp_path / "out", plan=plan)
    tensors = load(tuned_pair[1])
    tensors["a.weight"] = tensors["a.weight"] + rng.standard_normal(tensors["a.weight"].shape).astype(np.float32)
    save(tmp_path / "later", tensors, {})
    with pytest.raises(PlanError, match="another tuned"):
        lora_compress.extract(tuned_pair[0], tmp_path / "later", tmp_path / "out", plan=plan)
    with pytest.raises(PlanError, match="plan again"):
        lora_compress.extract(*tuned_pair, tmp_path / "out", plan=plan, rank=3)


def test_fingerprints_do_not_depend_on_shards(tmp_path: Path, rng: np.random.Generator) -> None:
    from lora_compress._native import Checkpoint, fingerprint

    tensors, config = tiny_llama(rng)
    folders = [save(tmp_path / str(shards), tensors, config, shards=shards) for shards in (1, 3)]
    one, three = (fingerprint(Checkpoint(folder)) for folder in folders)
    assert one == three
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    assert fingerprint(Checkpoint(save(tmp_path / "other", tensors, config))) != one


def test_plan_files_follow_their_schema(
    tuned_pair: Pair, pair: Pair, make_pair: Callable[..., Pair], rng: np.random.Generator
) -> None:
    kernels = [{"conv.weight": rng.standard_normal((8, 4, 3, 3)).astype(np.float32)} for _ in range(2)]
    schema = json.loads((Path(__file__).parents[1] / "docs" / "plan.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    seen: set[str] = set()
    for plan in (
        lora_compress.plan(*tuned_pair),
        lora_compress.plan(*pair, error=0.4, ranks_allowed="8x", max_rank=16),
        lora_compress.plan(*make_pair(*kernels), rank=2),
    ):
        data = json.loads(json.dumps(plan.to_json()))
        jsonschema.validate(data, schema)
        assert data.keys() == schema["properties"].keys()
        seen |= {key for row in data["tensors"] for key in row}
    assert seen == schema["properties"]["tensors"]["items"]["properties"].keys()


def broken(data: Any, *path: Any, value: Any) -> Any:
    """A copy of a plan with one value replaced."""
    copy = json.loads(json.dumps(data))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


def test_hostile_plan_files_are_one_clear_error(tuned_pair: Pair, tmp_path: Path) -> None:
    good = file.to_json(lora_compress.plan(*tuned_pair))
    attacks = [
        [],
        {},
        {"kind": "lora-compress plan"},
        broken(good, "schema_version", value=99),
        broken(good, "tensors", value={}),
        broken(good, "tensors", value=[3]),
        broken(good, "tensors", value=[]),
        broken(good, "tensors", 0, "sigma", value=[1.0, 2.0]),
        broken(good, "tensors", 0, "sigma", value=["x"]),
        broken(good, "tensors", 0, "sigma", value=[-1.0]),
        broken(good, "tensors", 0, "sigma", value=[1e200] * 3),
        broken(good, "tensors", 0, "shape", value=[2**80, 3]),
        broken(good, "tensors", 0, "shape", value=[60]),
        broken(good, "tensors", 0, "delta_energy", value=-1),
        broken(good, "tensors", 0, "unit", value=1.5),
        broken(good, "tensors", 0, "name", value=None),
        broken(good, "choice", "rule", value="__import__"),
        broken(good, "choice", "weights", value="none"),
        broken(good, "choice", "ranks_allowed", value=[0]),
        broken(good, "choice", "max_rank", value="7"),
        broken(good, "options", value={"include": 3}),
        broken(good, "options", value=[]),
        broken(good, "fingerprints", value={}),
    ]
    for number, attack in enumerate(attacks):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(attack))
        with pytest.raises((PlanError, SelectionError, lora_compress.CheckpointError)) as caught:
            lora_compress.extract(*tuned_pair, tmp_path / "out", plan=path)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    (tmp_path / "text.json").write_text('{"kind": "lora-compress plan", "seconds": NaN}')
    with pytest.raises(lora_compress.CheckpointError, match="not valid JSON"):
        file.read(tmp_path / "text.json")


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_merged_lora_is_recognised_with_its_rank(
    make_pair: Callable[..., Pair], rng: np.random.Generator, rank: int, dtype: str, tmp_path: Path
) -> None:
    shapes = {"a.weight": (200, 160), "b.weight": (120, 260)}
    base: Tensors = {name: (0.02 * rng.standard_normal(shape)).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    tuned: Tensors = {}
    for name, (rows, cols) in shapes.items():
        product = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols))
        tuned[name] = (base[name].astype(np.float64) + 0.002 / rank**0.5 * product).astype(DTYPES[dtype])
    paths = make_pair(base, tuned)
    plan = lora_compress.plan(*paths)
    assert set(plan.ranks.values()) == {rank}
    assert recognise(plan).merged_rank == rank
    result = lora_compress.extract(*paths, tmp_path / "out")
    assert {account.rank for account in result.tensors} == {rank}


def test_a_fine_tune_is_no_merged_lora_and_gives_no_warning(tuned_pair: Pair) -> None:
    plan = lora_compress.plan(*tuned_pair)
    assert recognise(plan).merged_rank is None
    assert recognise(plan).warnings == ()


def test_rounding_noise_and_wrong_bases_are_told_with_numbers(
    make_pair: Callable[..., Pair], rng: np.random.Generator
) -> None:
    base: Tensors = {"w.weight": rng.standard_normal((300, 200)).astype(BF16)}
    noisy = base["w.weight"].astype(np.float64) * (1 + 2.0**-8.5 * rng.choice([-1, 1], (300, 200)))
    paths = make_pair(base, {"w.weight": noisy.astype(BF16)})
    plan = lora_compress.plan(*paths)
    # Each element moved by about one spacing, so that a twelfth to a third of its energy is what rounding adds.
    assert recognise(plan).noise_share > 0.05
    paths = make_pair(base, {"w.weight": rng.standard_normal((300, 200)).astype(BF16)})
    (warning,) = recognise(lora_compress.plan(*paths)).warnings
    assert "no fine-tune of this base" in warning
    assert "1.41" in warning
    large = base["w.weight"].astype(np.float32) + 0.5 * rng.standard_normal((300, 200)).astype(np.float32)
    (warning,) = recognise(lora_compress.plan(*make_pair(base, {"w.weight": large.astype(BF16)}))).warnings
    assert "its spectra are flat" in warning


def test_nothing_above_the_noise_is_said_and_not_stored(
    make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path
) -> None:
    base: Tensors = {"w.weight": rng.standard_normal((300, 200)).astype(np.float32)}
    tuned: Tensors = {"w.weight": base["w.weight"] + 1e-3 * rng.standard_normal((300, 200)).astype(np.float32)}
    paths = make_pair(base, tuned)
    assert lora_compress.plan(*paths).ranks == {"w.weight": 0}
    with pytest.raises(SelectionError, match="no direction of any ΔW is worth storing"):
        lora_compress.extract(*paths, tmp_path / "out")
    assert lora_compress.extract(*paths, tmp_path / "out", rank=4).rank == 4


def test_tensors_of_rank_0_are_accounted_for(tuned_pair: Pair, tmp_path: Path) -> None:
    result = lora_compress.extract(*tuned_pair, tmp_path / "out", budget=plan_least(tuned_pair) + 700)
    left_out = [account for account in result.tensors if account.treatment == "low-rank" and account.rank == 0]
    assert left_out
    assert all(account.error_energy == account.delta_energy and account.nbytes == 0 for account in left_out)
    check = lora_compress.verify(*tuned_pair, tmp_path / "out")
    assert check.ok
    assert check.error == pytest.approx(result.error, rel=1e-6)


def plan_least(paths: Pair) -> int:
    return lora_compress.plan(*paths, rank=1).least_bytes


def test_tied_heads_cost_twice(tmp_path: Path, rng: np.random.Generator) -> None:
    base, config = tiny_llama(rng, tied=True)
    save(tmp_path / "base", base, config)
    save(tmp_path / "tuned", tuned_from(base, rng, size=0.01), config)
    paths = tmp_path / "base", tmp_path / "tuned"
    units = {tensor.name: tensor.unit for tensor in lora_compress.plan(*paths, rank=1).low_rank}
    assert units["model.embed_tokens.weight"] == 2 * 2 * (40 + 24)
    single = lora_compress.plan(*paths, rank=1, options=lora_compress.Options(tied_head=False))
    assert {t.name: t.unit for t in single.low_rank}["model.embed_tokens.weight"] == 2 * (40 + 24)
    result = lora_compress.extract(*paths, tmp_path / "out", rank="energy=0.8")
    plan = lora_compress.plan(*paths, rank="energy=0.8")
    assert sum(account.nbytes for account in result.tensors) == plan.nbytes


@pytest.mark.parametrize(
    "wish",
    [
        {"rank": "0"},
        {"rank": "-3"},
        {"rank": "energy=2"},
        {"rank": "energy"},
        {"rank": "knee=3"},
        {"rank": "best"},
        {"rank": "rank=1.5"},
        {"rank": "threshold=nan"},
        {"rank": 4, "budget": "1MB"},
        {"budget": "much"},
        {"budget": "0"},
        {"budget": "5XB"},
        {"error": 1.5},
        {"ranks_allowed": "a,b"},
        {"ranks_allowed": "0x"},
        {"ranks_allowed": "8,16", "max_rank": 4},
        {"max_rank": 0},
        {"layout": "grid"},
    ],
)
def test_wishes_that_make_no_sense_are_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(SelectionError):
        choose(**wish)


def test_a_budget_too_small_for_what_is_stored_anyway_is_refused(tuned_pair: Pair) -> None:
    with pytest.raises(SelectionError, match="is less than"):
        lora_compress.plan(*tuned_pair, budget=100)
    with pytest.raises(SelectionError, match="does not hold rank"):
        lora_compress.plan(*tuned_pair, budget=plan_least(tuned_pair) + 10, layout="uniform")


def test_sizes() -> None:
    sizes: dict[int | str, int] = {
        "50MB": 50_000_000,
        "1.5 GiB": 1_610_612_736,
        "20k": 20_000,
        123: 123,
        "7": 7,
        "2 mib": 2_097_152,
    }
    assert {text: parse_size(text) for text in sizes} == sizes


spectrum_lists = st.lists(
    st.tuples(
        st.integers(1, 30),
        st.integers(1, 30),
        st.lists(st.floats(1e-3, 10), min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=6,
)


@given(spectrum_lists, st.sampled_from(sorted(WEIGHTS)), st.floats(0, 1))
def test_the_curve_agrees_with_plans_of_its_budgets(rows: Any, weights: str, where: float) -> None:
    tensors = []
    for number, (m, n, values) in enumerate(rows):
        sigma = sorted(values, reverse=True)[: min(m, n)]
        energy = math.fsum(value**2 for value in sigma)
        spectrum = Spectrum((m, n), sigma, energy, base_energy=100.0)
        tensors.append(
            TensorPlan(f"t{number}", "F32", (m, n), "low-rank", energy, 100.0, unit=4 * (m + n), spectrum=spectrum)
        )
    plan = Plan("b", "t", {"base": "", "tuned": ""}, {}, choose(rank=1, weights=weights), tuple(tensors), 1000)
    curve = plan.curve()
    errors = [error for _, error in curve]
    assert errors == sorted(errors, reverse=True)
    assert curve[-1][1] == pytest.approx(0.0, abs=1e-6)
    size, error = curve[int(where * (len(curve) - 1))]
    # A budget of exactly a point of the curve gives that point.
    again = plan.choose(choose(budget=max(size + plan.least_bytes, 1), weights=weights))
    assert again.nbytes == size
    assert again.error == pytest.approx(error, abs=1e-6)


@given(
    st.one_of(
        st.just(()), st.lists(st.integers(1, 40), min_size=1, max_size=5).map(lambda ranks: tuple(sorted(set(ranks))))
    ),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 40)),
    st.integers(1, 50),
    st.integers(1, 60),
)
def test_ladders(allowed: tuple[int, ...], multiple: int, cap: int | None, limit: int, known: int) -> None:
    if cap is not None and cap < (allowed[0] if allowed else multiple):
        return  # Refused by `choose`.
    choice = RankChoice(allowed=allowed, multiple=1 if allowed else multiple, max_rank=cap)
    rungs = [rank for rank in (allowed or range(choice.multiple, 200, choice.multiple)) if cap is None or rank <= cap]
    below = [rank for rank in rungs if rank < limit]
    # The first that is enough, where there is one.
    expected = rungs[: len(below) + 1]
    assert choice.ranks(limit) == expected
    assert choice.round_up(limit) == (expected[-1] if choice.has_ladder else min(limit, cap or limit))
    assert choice.ranks(limit, known) == [rank for rank in expected if rank <= known]
