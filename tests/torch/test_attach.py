"""`attach` and what it leaves alone: classes, keys, outputs, gradients, and the base when it is gone again."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import lora_compress
import numpy as np
import pytest
import torch
from lora_compress import Initialisation, PluginError, SelectionError, Start, hookimpl
from lora_compress.initialisations.interface import Group
from lora_compress.testing import loaded
from lora_compress.torch import AdapterSet, attach
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.torch.training import DECOMPOSITIONS, IDS, layers, logits, stir, tiny_llama

LAYERS = list(layers())


pytestmark = pytest.mark.usefixtures("plugins")


def a_layer(name: str, decomposition: str, **options: Any) -> tuple[nn.Sequential, torch.Tensor, AdapterSet]:
    layer, x = layers()[name]
    model = nn.Sequential(layer)
    adapters = attach(model, decomposition, 2, targets="", dtype=torch.float64, **options)
    return model, x, adapters


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_every_decomposition_in_every_layer(name: str, decomposition: str) -> None:
    model, x, adapters = a_layer(name, decomposition, scale=0.7)
    stir(adapters, size=0.5)
    names, factors = zip(*adapters.named_parameters(), strict=True)

    def forward(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(model, dict(zip(names, factors, strict=True)), (x,))
        return result

    x = x.requires_grad_(x.is_floating_point())
    assert torch.autograd.gradcheck(forward, (x, *factors), fast_mode=True)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_is_what_it_merges_to(name: str, decomposition: str) -> None:
    model, x, adapters = a_layer(name, decomposition)
    weight = model[0].weight.detach().clone()
    before = model(x).detach()
    assert torch.equal(before, layers()[name][0](x)), "it begins at zero"
    stir(adapters, size=0.5)
    beside = model(x).detach()
    assert (beside - before).abs().max() > 0.01
    adapters.merge()
    # Sums of at most 24 products, in another order.
    assert torch.allclose(model(x), beside, rtol=0, atol=24 * 2.0**-52 * 100)
    with adapters.disabled():
        assert torch.equal(model(x), before)
    adapters.unmerge()
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), beside)
    with adapters.disabled():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_the_model_is_itself_before_during_and_after(decomposition: str) -> None:
    model = tiny_llama()
    keys, before = list(model.state_dict()), logits(model)
    types = {name: type(module) for name, module in model.named_modules()}
    adapters = attach(model, decomposition, 4)
    assert torch.equal(logits(model), before)
    added = [key for key in model.state_dict() if key not in keys]
    assert added
    assert all(".adapter.default.factor" in key for key in added)
    assert [key for key in model.state_dict() if key in keys] == keys
    assert all(isinstance(module, types[name]) for name, module in model.named_modules() if name in types)
    assert type(model.model.layers[0].mlp.up_proj) is type(model.model.layers[1].mlp.down_proj)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {*added}
    stir(adapters)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert adapters.detach() is model
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("decomposition", ["abc-shared-input", "abc-shared-depth"])
def test_layers_share_factors(decomposition: str) -> None:
    model = tiny_llama()
    adapters = attach(model, decomposition, 4)
    stir(adapters)
    model(IDS, labels=IDS).loss.backward()
    shared = model.model.layers[0].self_attn.q_proj.adapter["default"].factors()[-1]
    other = (
        model.model.layers[0].self_attn.k_proj if "input" in decomposition else model.model.layers[1].self_attn.q_proj
    )
    assert other.adapter["default"].factors()[-1] is shared
    assert sum(each is shared for each in adapters.parameters()) == 1
    alone = attach(tiny_llama(), "ab", 4)
    assert sum(each.numel() for each in adapters.parameters()) < sum(each.numel() for each in alone.parameters())


def test_the_same_seed_gives_the_same_factors_and_another_gives_others() -> None:
    first, again, other = (attach(tiny_llama(), "tensor-train", 4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    drawn = [values for name, values in first.items() if name.endswith("gate_proj.adapter.default.factor3")]
    assert not torch.equal(*drawn), "no two layers begin alike"


def test_several_adapters_by_name() -> None:
    model = tiny_llama()
    before = logits(model)
    first = attach(model, "ab", 4, name="first")
    second = attach(model, "abc", 4, name="second", targets="mlp")
    stir(first)
    alone = logits(model)
    stir(second, seed=1)
    both = logits(model)
    assert not torch.allclose(both, alone, atol=1e-3)
    with second.disabled():
        assert torch.equal(logits(model), alone)
    first.merge()
    second.merge()
    assert torch.allclose(logits(model), both, atol=1e-4)
    first.unmerge()
    assert torch.allclose(logits(model), both, atol=1e-4)
    second.detach()
    assert torch.equal(logits(model), alone)
    with pytest.raises(SelectionError, match="adapters of the name `first` already"):
        attach(model, name="first")
    first.detach()
    assert torch.equal(logits(model), before)
    assert all(each.requires_grad for each in model.parameters())


def test_a_tied_weight_has_one_delta() -> None:
    model = tiny_llama(tied=True)
    before = logits(model)
    adapters = attach(model, rank=4, targets="embed_tokens")
    assert len(adapters.sites) == 1
    assert type(model.lm_head).__name__ == "AdaptedLinear"
    stir(adapters)
    beside = logits(model)
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        delta = adapters.sites[0].adapter.dense() * adapters.sites[0].adapter.scale
        assert torch.allclose(beside, hidden @ (model.lm_head.weight + delta).t(), atol=1e-4)
    adapters.merge()
    assert torch.allclose(logits(model), beside, atol=1e-4)
    adapters.detach()
    assert torch.equal(logits(model), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_multiplies_its_embeddings_multiplies_their_delta() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    model = nn.Sequential(Scaled(12, 6))
    adapters = attach(model, rank=2, targets="")
    stir(adapters)
    beside = model(IDS % 12)
    adapters.merge()
    assert torch.allclose(model(IDS % 12), beside, atol=1e-5)


class Quantised(nn.Linear):
    """As bitsandbytes has it: the weight is packed, the forward a product with what it stands for."""

    weight: Any

    def __init__(self, cols: int, rows: int) -> None:
        super().__init__(cols, rows)
        self.step = float(self.weight.abs().max()) / 127
        codes = torch.round(self.weight.detach() / self.step).to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.reshape(self.out_features, self.in_features) * self.step
        return nn.functional.linear(x, weight.to(x.dtype), self.bias.to(x.dtype))


@pytest.mark.parametrize("decomposition", ["ab", "lokr"])
def test_a_quantised_layer_is_only_added_to(decomposition: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Quantised(16, 24))
    x = torch.randn(3, 16, requires_grad=True)
    before = model(x).detach()
    adapters = attach(model, decomposition, 4)
    stir(adapters)
    adapter = adapters.sites[0].adapter
    assert torch.allclose(model(x), before + adapter.scale * x @ adapter.dense().t(), atol=1e-5)
    model(x).sum().backward()
    assert x.grad is not None
    with pytest.raises(SelectionError, match=r"`0\.weight` is quantised"):
        adapters.merge()
    adapters.save(tmp_path / "adapter")
    adapters.detach()
    with pytest.raises(SelectionError, match="quantised: start from `zero`"):
        attach(model, init="pissa", rank=4)
    assert not any("adapter" in name for name, _ in model.named_modules())


def test_roles_of_factors() -> None:
    adapters = attach(tiny_llama(), "abc", 4, targets="q_proj|embed")
    groups = {group["role"]: group for group in adapters.param_groups(1e-3, {"out": 16})}
    assert {role: group["lr"] for role, group in groups.items()} == {"in": 1e-3, "core": 1e-3, "out": 16e-3}
    assert [tuple(each.shape) for each in groups["core"]["params"]] == [(4, 4)] * 3
    # The vocabulary is an embedding's input.
    assert [tuple(each.shape) for each in groups["in"]["params"]] == [(60, 4), (4, 32), (4, 32)]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=12, n_head=2, vocab_size=60))
    shapes = {
        group["role"]: [tuple(each.shape) for each in group["params"]]
        for group in attach(gpt2, rank=4, targets="c_attn").param_groups(1.0)
    }
    assert shapes == {"in": [(4, 12)], "out": [(36, 4)]}, "a Conv1D's ΔW is (out, in)"
    with pytest.raises(ValueError, match="`middle` is no role"):
        adapters.param_groups(1.0, {"middle": 2.0})


def test_ranks_by_tensor_and_by_plan(tmp_path: Path) -> None:
    base, tuned = tiny_llama(), tiny_llama()
    generator = torch.Generator().manual_seed(1)
    for each in tuned.parameters():
        each.data += 0.01 * torch.randn(each.shape, generator=generator)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    plan = lora_compress.plan(tmp_path / "base", tmp_path / "tuned", budget="30kB")
    plan.save(tmp_path / "plan.json")
    adapters = attach(base, ranks=tmp_path / "plan.json")
    assert {site.tensor: site.adapter.rank for site in adapters.sites} == plan.stored_ranks
    adapters.detach()
    mapping = {"model.layers.0.mlp.up_proj": 3, "layers.1.mlp.up_proj.weight": 5, "model.layers.0.mlp.down_proj": 0}
    adapters = attach(base, "tensor-train", ranks=mapping)
    assert [site.tensor for site in adapters.sites] == [f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)]
    for site, rank in zip(adapters.sites, (3, 5), strict=True):
        assert sum(each.numel() for each in site.adapter.parameters()) <= rank * (32 + 48)
    adapters.detach()
    with pytest.raises(SelectionError, match="no layer for `elsewhere`"):
        attach(base, ranks={"elsewhere": 2})


def test_initialisations_that_begin_at_the_base() -> None:
    for init, decomposition in (("pissa", "ab"), ("pissa", "abc"), ("pissa", "tensor-train"), ("olora", "ab")):
        model = tiny_llama()
        before, weight = logits(model), model.model.layers[0].mlp.up_proj.weight.detach().clone()
        adapters = attach(model, decomposition, 4, init=init)
        site = next(site for site in adapters.sites if "0.mlp.up_proj" in site.tensor)
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
        # W − s·ΔW₀ is rounded once, to half a unit of what it is made of.
        assert torch.allclose(logits(model), before, atol=1e-4)
        if init == "pissa" and decomposition == "ab":
            sigma = torch.linalg.svdvals(weight)
            delta = site.adapter.scale * site.adapter.dense()
            assert torch.allclose(torch.linalg.svdvals(delta)[:4], sigma[:4], rtol=1e-4)
            b, a = site.adapter.factors()
            assert torch.allclose(b.norm(), a.norm(), rtol=1e-4)
        with adapters.disabled():
            assert torch.equal(logits(model), before)
        stir(adapters)
        beside = logits(model)
        adapters.merge()
        assert torch.allclose(logits(model), beside, atol=1e-4)
        adapters.unmerge()
        assert torch.equal(logits(model), beside)
        adapters.detach()
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)


def test_initialisations_of_plugins_and_of_ones_own() -> None:
    def flat(group: Group) -> Start:
        shapes = group.decomposition.shapes(group.matrices[0].rows, group.matrices[0].cols, group.rank)
        return Start([[np.full(shape, 0.25, np.float32) for shape in shapes]])

    registered = ModuleType("mine")
    vars(registered)["register_initialisations"] = hookimpl(lambda register: register(Initialisation("flat", flat)))
    with loaded(registered):
        by_name = attach(tiny_llama(), init="flat", rank=4).state_dict()
    for init in (flat, Initialisation("flat", flat)):
        assert all(
            torch.equal(by_name[key], value)
            for key, value in attach(tiny_llama(), init=init, rank=4).state_dict().items()
        )
    assert all((value == 0.25).all() for value in by_name.values())
    model = tiny_llama()
    doubles: Any = [np.ones((4, 4)), np.ones((4, 4))]
    with pytest.raises(
        PluginError, match=r"`wide` failed to start factors of `ab` for `model.*`: ValueError: factor 1 is float64"
    ):
        attach(model, init=Initialisation("wide", lambda group: Start([doubles])))
    assert not any(".adapter." in name for name, _ in model.named_parameters())


def test_lora_xs_trains_the_core_alone() -> None:
    model = tiny_llama()
    adapters = attach(model, "abc", 4, init="lora-xs", scale=1.0)
    trained = [tuple(each.shape) for each in adapters.parameters() if each.requires_grad]
    assert trained == [(4, 4)] * 14
    c, core, a = adapters.sites[0].adapter.factors()
    weight = model.model.layers[0].self_attn.q_proj.weight
    u, sigma, vt = torch.linalg.svd(weight.detach())
    best = (u[:, :4] * sigma[:4]) @ vt[:4]
    assert torch.allclose(c @ a, best, atol=1e-4 * float(sigma[0]))
    assert 0 < core.abs().max() < 1e-4
    model(IDS, labels=IDS).loss.backward()
    assert all((each.grad is not None) == each.requires_grad for each in adapters.parameters())
    with pytest.raises(SelectionError, match="`lora-xs` trains the core"):
        attach(tiny_llama(), "ab", init="lora-xs")


def test_orthogonal_factors_keep_angles() -> None:
    model = tiny_llama()
    before = logits(model)
    adapters = attach(model, "ab", 4, init="orthogonal")
    assert torch.equal(logits(model), before)
    a = adapters.sites[0].adapter.factors()[1].detach()
    gram = (a @ a.t()).numpy()
    np.testing.assert_allclose(gram, np.eye(4) * gram[0, 0], atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_llama()
    adapters = attach(model, "ab", 4, dropout=0.5)
    stir(adapters)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)
    assert not torch.allclose(logits(model), first, atol=1e-3)


def test_models_with_adapters_are_copied_and_pickled() -> None:
    model = tiny_llama()
    stir(attach(model, "abc-shared-input", 4))
    for copied in (copy.deepcopy(model), torch.load(io.BytesIO(_pickled(model)), weights_only=False)):
        assert torch.equal(logits(copied), logits(model))
        layer = copied.model.layers[0].self_attn
        assert isinstance(layer.q_proj, nn.Linear)
        assert layer.k_proj.adapter["default"].factors()[1] is layer.q_proj.adapter["default"].factors()[1]


def _pickled(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def test_what_cannot_be_attached_says_so() -> None:
    model = tiny_llama()
    for fault, match in (
        ({"targets": "nothing"}, "no layer that takes an adapter matches"),
        ({"init": "piss"}, "no initialisation `piss`"),
        ({"decomposition": "none"}, "there is no decomposition"),
    ):
        with pytest.raises((SelectionError, PluginError), match=match):
            attach(model, **fault)  # type: ignore[arg-type]
    for wrong in (
        {"rank": 0}, {"rank": 4, "ranks": {}}, {"scale": "loud"}, {"scale": 2.0, "alpha": 1.0}, {"scale": 0.0},
        {"dropout": 1.0}, {"name": "a.b"}, {"name": "keys"}, {"dtype": torch.int8},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"rank|scale|dropout"):
            attach(model, **wrong)
    assert not any("adapter" in name for name, _ in model.named_modules())
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(SelectionError, match="no layer that takes an adapter"):
        attach(attention)
    model.lm_head.forward = lambda x: x
    with pytest.raises(SelectionError, match="forward of `lm_head` was replaced"):
        attach(model, targets="lm_head")
