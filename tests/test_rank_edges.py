"""Ranks where they are easy to get wrong: exactly low-rank changes, ladders, one rank for all, plans that lie."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import CheckpointError, Plan, PlanError, SelectionError
from lora_compress.ranks.choice import WEIGHTS, choose
from lora_compress.ranks.recognise import recognise
from lora_compress.ranks.weights import WEIGHTS as WEIGHT_FUNCTIONS
from safetensors.numpy import load_file

from tests.checkpoints import BF16, Tensors, load, save, tiny_llama, tuned_from
from tests.conftest import Pair


def low_rank(rng: np.random.Generator, shape: tuple[int, ...], rank: int, size: float = 0.02) -> Any:
    rows, cols = shape
    return size / rank**0.5 * (rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols)))


def merged(rng: np.random.Generator, shapes: dict[str, tuple[int, int]], ranks: dict[str, int], dtype: Any) -> Any:
    """A base, and what merging LoRAs of these ranks makes of it."""
    base: Tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    tuned: Tensors = {
        name: (tensor.astype(np.float64) + low_rank(rng, shapes[name], ranks[name])).astype(dtype)
        for name, tensor in base.items()
    }
    return base, tuned


def stored_ranks(adapter: Path) -> set[int]:
    factors = load_file(adapter / "adapter_model.safetensors")
    return {tensor.shape[0] for name, tensor in factors.items() if name.endswith(("lora_A.weight", "embedding_A"))}


@pytest.mark.parametrize("ladder", ["8,16", "vllm", "8x", "3,9"])
@pytest.mark.parametrize(
    "wish", [{"rank": "auto"}, {"budget": "1MB"}, {"error": 0.1}, {"rank": 16}, {"rank": "energy=0.9"}]
)
def test_exactly_low_rank_changes_fit_on_ladders(
    make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path, ladder: str, wish: dict[str, Any]
) -> None:
    paths = make_pair(
        *merged(rng, {"w.weight": (100, 100), "v.weight": (100, 30)}, {"w.weight": 5, "v.weight": 5}, np.float32)
    )
    plan = lora_compress.plan(*paths, ranks_allowed=ladder, **wish)
    listed = {"8,16": {8, 16}, "vllm": {1, 8, 16, 32}, "8x": {8, 16}, "3,9": {3, 9}}[ladder]
    assert set(plan.ranks.values()) <= listed
    result = lora_compress.extract(*paths, tmp_path / "out", ranks_allowed=ladder, dtype="F32", **wish)
    assert {account.rank for account in result.tensors} == set(plan.ranks.values()) == stored_ranks(tmp_path / "out")
    assert result.error == pytest.approx(plan.error, abs=2e-3)
    if wish.get("rank") != "energy=0.9" and "error" not in wish:
        assert result.error < 1e-3, "all five directions are kept"
    assert lora_compress.verify(*paths, tmp_path / "out").ok


def test_a_few_retrained_rows_of_an_embedding_are_not_lost(
    make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path
) -> None:
    base: Tensors = {"embed_tokens.weight": rng.standard_normal((500, 64)).astype(BF16)}
    tuned = {"embed_tokens.weight": base["embed_tokens.weight"].copy()}
    tuned["embed_tokens.weight"][:5] = rng.standard_normal((5, 64)).astype(BF16)
    paths = make_pair(base, tuned)
    result = lora_compress.extract(*paths, tmp_path / "out", budget="1MB", ranks_allowed="8,16,32")
    assert (result.rank, result.error < 0.01) == (8, True)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize(
    ("shape", "rank"), [((256, 256), 64), ((128, 512), 64), ((576, 192), 64), ((384, 384), 128), ((512, 512), 256)]
)
def test_merged_loras_of_high_rank_in_narrow_matrices(
    make_pair: Callable[..., Pair], rng: np.random.Generator, shape: tuple[int, int], rank: int, dtype: Any
) -> None:
    base: Tensors = {"w.weight": rng.standard_normal(shape).astype(dtype)}
    tuned = {"w.weight": (base["w.weight"].astype(np.float64) + low_rank(rng, shape, rank, 0.2)).astype(dtype)}
    plan = lora_compress.plan(*make_pair(base, tuned))
    assert plan.ranks == {"w.weight": rank}
    assert recognise(plan).merged_rank == rank


def test_one_rank_for_all_does_not_cut_a_merged_lora(make_pair: Callable[..., Pair], rng: np.random.Generator) -> None:
    shapes = {"a.weight": (200, 200), "b.weight": (200, 200)}
    paths = make_pair(*merged(rng, shapes, {"a.weight": 4, "b.weight": 16}, np.float32))
    plan = lora_compress.plan(*paths, layout="uniform")
    assert set(plan.ranks.values()) == {16}
    assert plan.error < 1e-3


def test_small_matrices_of_full_rank_are_no_merged_lora(
    make_pair: Callable[..., Pair], rng: np.random.Generator
) -> None:
    base: Tensors = {"head.weight": rng.standard_normal((3, 300)).astype(np.float32)}
    tuned = {"head.weight": base["head.weight"] + 0.1 * rng.standard_normal((3, 300)).astype(np.float32)}
    assert recognise(lora_compress.plan(*make_pair(base, tuned))).merged_rank is None


@pytest.mark.parametrize("layout", ["peft", "uniform"])
def test_errors_are_those_of_all_tensors_whatever_the_weights(pair: Pair, layout: str) -> None:
    for weights in WEIGHTS:
        plan = lora_compress.plan(*pair, error=0.4, weights=weights, layout=layout)
        assert plan.error <= 0.4 * (1 + 1e-6), weights
    with pytest.raises(SelectionError, match=r"an error of 0\.01"):
        lora_compress.plan(*pair, error=0.01, max_rank=4, layout=layout)


def test_an_error_that_is_missed_is_said(pair: Pair, tmp_path: Path) -> None:
    result = lora_compress.extract(*pair, tmp_path / "out", error=0.2, scale=1.5)
    assert result.error > 0.2
    assert any("above the 0.2 asked for" in warning for warning in result.warnings)
    (warning,) = lora_compress.extract(*pair, tmp_path / "f32", error=0.2, dtype="F32").warnings
    assert "of the tuned model's bytes" in warning


def test_the_uniform_curve_has_one_point_for_each_rank(pair: Pair) -> None:
    plan = lora_compress.plan(*pair, rank=6, layout="uniform")
    curve = dict(plan.curve())
    unit = sum(tensor.unit for tensor in plan.tensors)
    assert set(curve) == {plan.fixed + rank * unit for rank in range(25)}
    assert curve[plan.nbytes] == pytest.approx(plan.error)


def test_a_uniform_rank_above_all_matrices_is_capped(pair: Pair, tmp_path: Path) -> None:
    planned = lora_compress.plan(*pair, rank=100_000, layout="uniform")
    result = lora_compress.extract(*pair, tmp_path / "out", rank=100_000, layout="uniform")
    assert result.rank == max(planned.ranks.values()) == 24


def test_fixed_and_planned_ranks_give_the_same_factors(tmp_path: Path, rng: np.random.Generator) -> None:
    base, config = tiny_llama(rng)
    tuned = tuned_from(base, rng)
    name = "model.layers.0.mlp.up_proj.weight"
    # Zeros of another sign only, and a grown vocabulary.
    base[name][0, 0] = 0.0
    tuned[name] = base[name].copy()
    tuned[name][0, 0] = -0.0
    tuned["model.embed_tokens.weight"] = np.concatenate(
        [tuned["model.embed_tokens.weight"], base["lm_head.weight"][:2]]
    )
    save(tmp_path / "base", base, config)
    save(tmp_path / "tuned", tuned, config)
    paths = tmp_path / "base", tmp_path / "tuned"
    for layout in ("peft", "uniform"):
        plan = lora_compress.plan(*paths, rank=6, layout=layout)
        by_plan = lora_compress.extract(*paths, tmp_path / "plan", plan=plan, force=True)
        by_number = lora_compress.extract(*paths, tmp_path / "number", rank=6, layout=layout, force=True)
        assert [dataclasses.astuple(account) for account in by_plan.tensors] == [
            dataclasses.astuple(account) for account in by_number.tensors
        ]
        one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plan", "number"))
        assert one.keys() == two.keys()
        assert all(one[key].tobytes() == two[key].tobytes() for key in one)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float32, BF16]),
    st.sampled_from([(30, 20), (64, 48), (20, 50)]),
    st.sampled_from(["low", "noisy", "decaying"]),
    st.sampled_from(
        [
            {"rank": "auto"},
            {"budget": 6000},
            {"rank": "energy=1"},
            {"error": 0.3},
            {"rank": "auto", "layout": "uniform"},
        ]
    ),
)
def test_saved_plans_give_the_same_ranks(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: Any, shape: Any, kind: str, wish: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("plans")
    base: Tensors = {"w.weight": rng.standard_normal(shape).astype(dtype)}
    change = low_rank(rng, shape, 8 if kind != "decaying" else min(shape))
    if kind == "noisy":
        change = change + 1e-3 * rng.standard_normal(shape)
    paths = (
        save(folder / "base", base, {}),
        save(folder / "tuned", {"w.weight": (base["w.weight"].astype(np.float64) + change).astype(dtype)}, {}),
    )
    plan = lora_compress.plan(*paths, **wish)
    plan.save(folder / "plan.json")
    again = Plan.load(folder / "plan.json")
    assert (again.ranks, again.unsettled, again.error) == (plan.ranks, plan.unsettled, plan.error)
    assert again.choice == plan.choice


def test_other_wishes_keep_what_is_not_said(pair: Pair, tmp_path: Path) -> None:
    before = choose(budget="50kB", ranks_allowed="8x", max_rank=16, weights="relative", layout="uniform")
    after = choose(max_rank=24, instead_of=before)
    assert after == dataclasses.replace(before, max_rank=24)
    assert choose(rank=8, instead_of=before).rule == "rank"
    assert choose(layout="peft", instead_of=before).layout == "peft"
    assert choose(ranks_allowed="4x", max_rank=32).rule == "auto", "a cap of a ladder is no rank"


def test_zero_shares_survive_the_trip(pair: Pair, tmp_path: Path) -> None:
    for wish in ("energy=0", "error=0", "threshold=0"):
        plan = lora_compress.plan(*pair, rank=wish)
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").ranks == plan.ranks


def test_plans_without_the_singular_values_they_need_are_not_followed(pair: Pair, tmp_path: Path) -> None:
    plan = lora_compress.plan(*pair, rank=2, bound=2).choose(choose(error=0.05))
    assert plan.unsettled
    with pytest.raises(PlanError, match="does not have"):
        lora_compress.extract(*pair, tmp_path / "out", plan=plan)


def test_plans_that_lie_are_found_out(pair: Pair, tmp_path: Path) -> None:
    data = lora_compress.plan(*pair, rank=4).to_json()
    row = next(number for number, tensor in enumerate(data["tensors"]) if "sigma" in tensor)

    def attempt(change: Callable[[Any], Any]) -> str:
        copy = json.loads(json.dumps(data))
        change(copy)
        (tmp_path / "plan.json").write_text(json.dumps(copy))
        with pytest.raises((PlanError, SelectionError, CheckpointError)) as caught:
            lora_compress.extract(*pair, tmp_path / "out", plan=tmp_path / "plan.json")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "plan again" in attempt(lambda plan: plan["tensors"].pop(row))
    assert "plan again" in attempt(lambda plan: plan["tensors"][row].pop("sigma"))
    assert "twice" in attempt(lambda plan: plan["tensors"].append(plan["tensors"][row]))
    assert "plan again" in attempt(lambda plan: plan["tensors"][row].update(unit=0))
    assert "treatment" in attempt(lambda plan: plan["tensors"][row].update(treatment="<b>x"))
    assert "shape" in attempt(lambda plan: plan["tensors"][row].update(shape=[2**61, 2**61]))
    assert "plan again" in attempt(lambda plan: plan["options"].update(dtype="F32"))
    assert "malformed" in attempt(lambda plan: plan["options"].update(include=[3]))
    assert "malformed" in attempt(lambda plan: plan["options"].update(seed=-1))
    assert "not valid JSON" in attempt(lambda plan: plan["tensors"][row].update(name="\ud800"))
    assert "changed since" in attempt(
        lambda plan: plan["tensors"][row].update(delta_energy=plan["tensors"][row]["delta_energy"] * 1.01)
    )
    attempt(lambda plan: [tensor.update(sigma=[]) for tensor in plan["tensors"] if "sigma" in tensor])


def test_edits_that_fingerprints_miss_are_found_by_their_energy(
    make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path
) -> None:
    base: Tensors = {"embed_tokens.weight": rng.standard_normal((2000, 64)).astype(np.float32)}
    tuned = {
        "embed_tokens.weight": base["embed_tokens.weight"] + 0.01 * low_rank(rng, (2000, 64), 3).astype(np.float32)
    }
    paths = make_pair(base, tuned)
    plan = lora_compress.plan(*paths, error=0.1)
    later = load(paths[1])
    later["embed_tokens.weight"][40:60] += 1.0
    save(paths[1], later, {})
    with pytest.raises(PlanError, match="changed since it was planned"):
        lora_compress.extract(*paths, tmp_path / "out", plan=plan)


def test_budgets_buy_no_noise(make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path) -> None:
    paths = make_pair(*merged(rng, {"w.weight": (100, 80)}, {"w.weight": 5}, np.float32))
    assert lora_compress.plan(*paths, budget="1GB").ranks == {"w.weight": 5}


def test_names_of_weights_agree() -> None:
    assert tuple(WEIGHT_FUNCTIONS) == WEIGHTS


def test_options_out_of_range_are_refused(pair: Pair) -> None:
    for bound in (0, -1):
        with pytest.raises(ValueError, match="bound"):
            lora_compress.plan(*pair, bound=bound)
    with pytest.raises(ValueError, match="seed"):
        lora_compress.Options(seed=-1)
    wishes: list[dict[str, Any]] = [{"max_rank": "4"}, {"ranks_allowed": [8.5]}, {"weights": "no", "rank": 3}]
    for wish in [*wishes, {"error": float("nan")}]:
        with pytest.raises(SelectionError):
            choose(**wish)
    with pytest.raises(SelectionError, match="qproj"):
        lora_compress.extract(*pair, "out", rank=2, scale={"qproj": 2.0})


def test_zeros_of_the_uniform_layout_are_planned_and_paid_for(pair: Pair, tmp_path: Path) -> None:
    for wish in ({"rank": 3}, {"budget": "40kB"}, {"rank": "auto"}):
        plan = lora_compress.plan(*pair, layout="uniform", **wish)
        result = lora_compress.extract(*pair, tmp_path / "out", plan=plan, force=True)
        assert sum(account.nbytes for account in result.tensors) == plan.nbytes
        assert result.adapter_bytes <= plan.file_bytes
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").nbytes == plan.nbytes
        if "budget" in wish:
            assert result.adapter_bytes <= 40_000
            # The same from a plan of another layout.
            assert lora_compress.plan(*pair).replan(**wish, layout="uniform").nbytes == plan.nbytes


def test_headers_have_room_for_any_order(
    make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path
) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    shapes = [(1, 20), (1, 20), (3, 25)]
    base: Tensors = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(names, shapes, strict=True)
    }
    tuned = base | {names[2]: base[names[2]] + 1}
    result = lora_compress.extract(*make_pair(base, tuned), tmp_path / "out", rank=1, layout="uniform", dtype="F32")
    assert result.rank == 1


def test_a_rank_that_is_rounded_up_has_the_error_of_that_rank(
    make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path
) -> None:
    base: Tensors = {"w.weight": rng.standard_normal((200, 200)).astype(np.float32)}
    change = low_rank(rng, (200, 200), 47) + 0.01 * rng.standard_normal((200, 200))
    paths = make_pair(base, {"w.weight": base["w.weight"] + change.astype(np.float32)})
    for wish in ("energy=0.5", "bulk-edge", "4"):
        plan = lora_compress.plan(*paths, rank=wish, ranks_allowed="128", bound=2)
        result = lora_compress.extract(*paths, tmp_path / "out", plan=plan, force=True)
        assert result.error == pytest.approx(plan.error, rel=1e-2), wish


def test_decompositions_of_another_rank_keep_what_is_asked_of_pairs(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_plugins import plugin, registering, use

    loha = lora_compress.Decomposition("hadamard", "out r, r in, out s, s in")
    use(monkeypatch, ("mine", plugin(register_decompositions=registering(loha))))
    # A Hadamard product of rank 2 is a pair of rank 4.
    for wish, ranks in (
        ({"rank": 5, "max_rank": 5}, {4}),
        ({"rank": 5, "layout": "uniform"}, {5}),
        ({"rank": 5, "ranks_allowed": "6x"}, {6}),
    ):
        out = tmp_path / "-".join(wish)
        result = lora_compress.extract(*pair, out, decomposition="hadamard", **wish)
        assert {tensor.rank for tensor in result.tensors if tensor.rank} == ranks
        assert lora_compress.verify(*pair, out).ok
    result = lora_compress.extract(*pair, tmp_path / "out", decomposition="hadamard", rank=3, dtype="F32")
    assert result.rank == 9
    with pytest.raises(SelectionError, match="--format factors"):
        lora_compress.extract(*pair, tmp_path / "large", decomposition="hadamard", rank=8)
    assert lora_compress.verify(*pair, tmp_path / "out").ok
