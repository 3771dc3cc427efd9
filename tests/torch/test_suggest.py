"""`suggest`: sketches against gradients that are formed, what is found of what was planted, and what is not done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
import torch
from lora_compress import Plan, PlanError, SelectionError
from lora_compress.torch import attach, suggest
from lora_compress.torch.gradients import Halves, measure
from lora_compress.torch.sites import ALL_LINEAR, Targets, find_targets
from lora_compress.torch.suggestion import descending
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.torch.test_inputs_loaded import experts
from tests.torch.training import layers, tiny_llama

BATCHES = [{"input_ids": ids, "labels": ids} for ids in torch.arange(6 * 16).view(6, 1, 16) ** 2 % 60]


def own_loss(model: Any, batch: Any) -> torch.Tensor:
    result: torch.Tensor = model(**batch).loss
    return result


def squares(model: Any, batch: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = (model(batch) ** 2).sum()
    return result


def double(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: double(each) for name, each in batch.items()}
    return batch.double() if batch.is_floating_point() else batch


def dense(
    model: nn.Module, batches: list[Any], loss: Callable[[Any, Any], torch.Tensor], targets: Targets
) -> dict[str, list[torch.Tensor]]:
    """The gradients of both halves as torch forms them, (rows, cols), float64."""
    model = copy.deepcopy(model).double()
    found = find_targets(model, targets)
    halves = []
    for half in (0, 1):
        model.zero_grad()
        for batch in batches[half::2]:
            loss(model, double(batch)).backward()
        halves.append(
            [
                target.leader.kind.as_matrix(target.leader.weight.grad, target.shape) / len(batches[half::2])
                for target in found
            ]
        )
    return {target.tensor: [halves[0][at].clone(), halves[1][at].clone()] for at, target in enumerate(found)}


def exact(both: list[torch.Tensor], width: int) -> torch.Tensor:
    """`Halves.agreement` from dense gradients."""
    total = torch.zeros(width, dtype=torch.float64)
    for mine, other in (both, both[::-1]):
        u, sigma, vt = torch.linalg.svd(mine, full_matrices=False)
        total += (sigma * ((u.T @ other) * vt).sum(1))[:width] / 2
    return total


def assert_equal_to_dense(found: dict[str, Halves], formed: dict[str, list[torch.Tensor]], width: int) -> None:
    """With as many columns as a matrix has, nothing is lost but float32's rounding: of products of a few hundred terms
    and of the orthonormal bases, 1e-5 of ‖G‖² with room. (Single directions turn where σ are close; their sum does
    not.)
    """
    assert found.keys() == formed.keys()
    for name, both in formed.items():
        inner = float((both[0] * both[1]).sum())
        energy = float((both[0] ** 2).sum() + (both[1] ** 2).sum()) / 2
        assert found[name].inner == pytest.approx(inner, abs=1e-5 * energy)
        assert found[name].energy == pytest.approx(energy, rel=1e-5)
        whole = found[name].agreement
        assert float(whole.sum()) == pytest.approx(inner, abs=1e-5 * energy)
        sigma = torch.linalg.svdvals(both[0])
        if sigma[0] > 1.5 * sigma[1]:
            assert float(whole[0]) == pytest.approx(float(exact(both, width)[0]), abs=1e-4 * energy)


def test_full_sketches_are_the_gradient() -> None:
    model = tiny_llama()
    targets = find_targets(model, "")
    found = measure(model, targets, BATCHES, own_loss, width=64, seed=0)
    assert_equal_to_dense(found, dense(model, BATCHES, own_loss, ""), 1)


@pytest.mark.parametrize("name", [*layers()])
def test_every_kind_of_layer(name: str) -> None:
    layer, x = layers()[name]
    model, batches = nn.Sequential(layer), [x, x.flip(0), x]
    if name != "embedding":
        batches = [x, 0.5 * x.flip(0), 2 * x]
    found = measure(model, find_targets(model, ""), batches, squares, width=99, seed=0)
    assert_equal_to_dense(found, dense(model, batches, squares, ""), 1)


def test_a_tied_weight_has_the_gradients_of_both_its_uses() -> None:
    model = tiny_llama(tied=True)
    found = measure(model, find_targets(model, "embed_tokens"), BATCHES, own_loss, width=64, seed=0)
    assert_equal_to_dense(found, dense(model, BATCHES, own_loss, "embed_tokens"), 1)
    plan = suggest(model, BATCHES, targets="embed_tokens", rank=2)
    assert [tensor.name for tensor in plan.tensors] == ["model.embed_tokens.weight"]


class Planted(nn.Module):
    """A layer whose gradient is what batches say: of a low rank that all have, and noise that each has of its own."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(cols, rows, bias=False), nn.Linear(cols, rows, bias=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # ⟨ℓ, layer(r)⟩ has the gradient ℓᵀ·r.
        return (self.first(batch["r"]) * batch["l"]).sum() + (self.second(batch["r2"]) * batch["l2"]).sum()


def planted(rows: int, cols: int, strengths: list[float], noise: float, count: int = 8) -> list[dict[str, Any]]:
    """Batches for `Planted`: its first layer has these σ beside noise of that deviation, the second noise alone."""
    generator = torch.Generator().manual_seed(3)
    normal = partial(torch.randn, generator=generator)
    left, right = (torch.linalg.qr(normal(size, len(strengths)))[0].T for size in (rows, cols))
    batches = []
    for _ in range(count):
        odd, more = normal(rows, cols) * noise, normal(rows, cols) * noise
        identity = torch.eye(cols)
        batches.append(
            {
                "l": torch.cat([left * torch.tensor(strengths)[:, None], odd.T]),
                "r": torch.cat([right, identity]),
                "l2": more.T,
                "r2": identity,
            }
        )
    return batches


def the_loss(model: Any, batch: Any) -> torch.Tensor:
    result: torch.Tensor = model(batch)
    return result


def test_what_was_planted_is_found_and_noise_is_not() -> None:
    # The noise of a half has deviation 0.1/√4 and σ up to 0.05·(√96 + √64) = 0.89: its own σ² would be 0.8 each.
    strengths = [8.0, 5.0, 3.0]
    model, batches = Planted(96, 64), planted(96, 64, strengths, 0.1)
    plan = suggest(model, batches, rank=4, loss=the_loss, targets="", weights="delta")
    spectrum = next(tensor.spectrum for tensor in plan.tensors if tensor.name == "first.weight")
    # A direction's worth is off by cross products with the noise, up to 2·σ·0.05·3 (three deviations); the leading
    # ones lose what they are turned by, σ·(0.89/σ)².
    assert spectrum is not None
    for found, true in zip(spectrum.sigma[:3] ** 2, strengths, strict=True):
        assert abs(found - true**2) < 2 * true * 0.15 + 0.89**2
    # Beyond, the worth of 13 directions is a sum of that many products 0.89·N(0, 0.05²), and its running maximum is
    # below four deviations.
    assert float((spectrum.sigma[3:] ** 2).sum()) < 4 * 0.89 * 0.05 * 13**0.5
    assert plan.ranks["first.weight"] >= 3
    second = next(tensor.spectrum for tensor in plan.tensors if tensor.name == "second.weight")
    assert second is None or float((second.sigma**2).sum()) < 4 * 0.89 * 0.05 * 16**0.5
    assert "cosine" in plan.notes[1]


def test_a_narrow_sketch_finds_the_leading_directions_and_estimates_the_energy() -> None:
    model, batches = Planted(300, 200), planted(300, 200, [8.0, 5.0, 3.0], 0.02)
    targets = find_targets(model, "")
    found = measure(model, targets, batches, the_loss, width=24, seed=0)["first.weight"]
    both = dense(model, batches, the_loss, "")["first.weight"]
    # Subspace iteration with a spare of 21 columns and σ₂₅/σ₃ < 0.15: the error of a direction's worth is far below
    # (σ₂₅/σ₃)⁴ = 5e-4 of it (Halko et al., theorem 10.6 after the first of two powers).
    for mine, formed in zip(found.agreement[:3], exact(both, 3), strict=True):
        assert float(mine) == pytest.approx(float(formed), rel=5e-4)
    # The rest is noise of energy 300·200·0.01² = 6, estimated from 32 columns: √(2/32)/√rank of it, five deviations.
    energy = float((both[0] ** 2).sum() + (both[1] ** 2).sum()) / 2
    assert found.energy == pytest.approx(energy, abs=5 * 6 * (2 / 32) ** 0.5 / 100**0.5)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that was made: views of weights are none."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, each.numel())
        return result


def test_no_gradient_is_ever_formed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(384, 384) for _ in range(3)))
    batches = [torch.randn(8, 384, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with Largest({each.untyped_storage().data_ptr() for each in model.parameters()}) as seen:
        suggest(model, batches, rank=1, loss=squares)
    # The widest products: of both halves with 8 + 16 columns and 32 probes, or with such bases of both.
    assert seen.largest <= 2 * 384 * max(8 + 16 + 32, 2 * (8 + 16)) < 384 * 384
    assert all(each.grad is None and each.requires_grad for each in model.parameters())


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.embed_tokens.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    state, wanted = torch.get_rng_state(), [each.requires_grad for each in model.parameters()]
    first = suggest(model, BATCHES, rank=2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = suggest(model, iter(BATCHES), rank=2, seed=5)
    assert {**first.to_json(), "seconds": 0} == {**second.to_json(), "seconds": 0}, "dropout is seeded"
    assert [each.requires_grad for each in model.parameters()] == wanted
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_give_the_same(reentrant: bool) -> None:
    model = tiny_llama().train()
    plain = suggest(model, BATCHES, rank=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = suggest(model, BATCHES, rank=2)
    assert again.ranks == plain.ranks
    for mine, other in zip(again.low_rank, plain.low_rank, strict=True):
        assert mine.spectrum is not None
        assert other.spectrum is not None
        assert np.allclose(mine.spectrum.sigma, other.spectrum.sigma, rtol=1e-4, atol=1e-6 * other.spectrum.sigma[0])


def test_sketches_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(24, 32)), list(torch.randn(4, 16, 24))
    targets = find_targets(model, "")
    # The layer's own product is in bf16 both times; what is made of x and dy may not be.
    inside = lambda *each: squares(*each).float()  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(model, targets, batches, inside, width=32, seed=0)["0.weight"]

    def outside(model: Any, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model, batch).float()

    same = measure(model, targets, batches, outside, width=32, seed=0)["0.weight"]
    assert found.energy == pytest.approx(same.energy, rel=1e-6)
    assert torch.allclose(found.agreement, same.agreement, rtol=0, atol=1e-6 * same.energy)


def test_half_precision_and_activations_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(inplace=True), nn.Linear(32, 8)).to(torch.bfloat16)
    batches = list(torch.randn(4, 16, 24, dtype=torch.bfloat16))
    plan = suggest(model, batches, rank=2, loss=lambda model, batch: squares(model, batch).float())
    assert {tensor.dtype for tensor in plan.tensors} == {"BF16"}
    assert len(plan.ranks) == 2


def test_a_plan_is_saved_loaded_followed_and_asked_again(tmp_path: Path) -> None:
    model = tiny_llama()
    plan = suggest(model, BATCHES, rank=3)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert (loaded.ranks, loaded.notes) == (plan.ranks, plan.notes)
    assert loaded.options["spectra"] == "gradients"
    assert loaded.notes[0].startswith("the spectra are of gradients of 6 batches")
    adapters = attach(model, ranks=tmp_path / "plan.json")
    assert {site.tensor: site.adapter.rank for site in adapters.sites} == plan.stored_ranks
    taken = sum(each.numel() for each in adapters.parameters())
    assert taken * 4 == plan.nbytes
    even = attach(tiny_llama(), rank=3)
    # A budget leaves at most one step of the largest matrix.
    assert 0 <= sum(each.numel() for each in even.parameters()) - taken <= 32 + 48
    assert loaded.replan(budget=plan.file_bytes * 2 // 3).nbytes < plan.nbytes


def test_a_budget_is_kept() -> None:
    plan = suggest(tiny_llama(), BATCHES, budget="30kB", dtype=torch.bfloat16)
    assert 15_000 < plan.file_bytes <= 30_000


def test_no_extraction_follows_it(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] += 1
    model.save_pretrained(tmp_path / "tuned")
    plan = suggest(model, BATCHES, rank=2)
    with pytest.raises(PlanError, match="of gradients"):
        lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", plan=plan)


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.spare = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        y: torch.Tensor = self.used(x)
        return y


def test_layers_that_are_not_reached_get_nothing_and_are_named() -> None:
    batches = list(torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(0)))
    plan = suggest(Partly(), batches, rank=2, loss=squares)
    assert plan.stored_ranks.keys() == {"used.weight"}
    assert "rank 0 for `frozen.weight`, `spare.weight`: the loss does not reach them" in plan.notes


def refusals() -> Iterator[Any]:
    yield pytest.param({"batches": BATCHES[:1]}, "at least two", id="one-batch")
    yield pytest.param({"batches": [{"input_ids": BATCHES[0]["input_ids"]}] * 2}, "no loss", id="no-labels")
    yield pytest.param({"batches": [torch.zeros(1)] * 2}, "give a `loss`", id="a-tensor")
    yield pytest.param({"loss": lambda model, _: model.lm_head.weight.sum()}, "reaches none", id="nothing-reached")
    yield pytest.param({"loss": lambda *each: own_loss(*each) * float("nan")}, "not finite", id="nan")
    yield pytest.param({"budget": 2000}, "budget of 2,000 bytes", id="small-budget")


@pytest.mark.parametrize(("options", "says"), [*refusals()])
def test_refusals(options: dict[str, Any], says: str) -> None:
    model = tiny_llama()
    with pytest.raises(SelectionError, match=says):
        suggest(model, **{"batches": BATCHES, "targets": ALL_LINEAR, **options})
    assert all(each.requires_grad for each in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_stacked_experts_are_refused_and_what_is_beside_them_is_not() -> None:
    model = experts("gpt_oss")
    with pytest.raises(SelectionError, match="experts"):
        suggest(model, BATCHES, targets=r"experts\.")
    batches = [{name: ids % 40 for name, ids in batch.items()} for batch in BATCHES]
    assert not any("experts" in tensor.name for tensor in suggest(model, batches, rank=2).tensors)


def test_options_out_of_range() -> None:
    for options in ({"rank": 0}, {"rank": 2, "budget": "1MB"}, {"dtype": torch.int8}):
        with pytest.raises(ValueError, match=r"rank|dtype"):
            suggest(tiny_llama(), BATCHES, **options)


def test_descending_is_the_closest_descending_sequence() -> None:
    assert descending(np.array([3.0, 4.0, 1.0, -2.0, 1.0])).tolist() == [3.5, 3.5, 1.0, 0.0, 0.0]
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.standard_normal(12)
        found = descending(values)
        assert (np.diff(found) <= 1e-12).all()
        assert found.min() >= 0
        # Its total is the best total of the leading ones.
        assert found.sum() == pytest.approx(max(0.0, values.cumsum().max()))
