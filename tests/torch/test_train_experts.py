"""Experts that one parameter holds as a stack: trained, merged, and stored as PEFT has them."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lora_compress
import pytest
import torch
from lora_compress import PluginError, SelectionError, Start
from lora_compress.initialisations.built_in import zero
from lora_compress.initialisations.interface import Group
from lora_compress.torch import attach
from peft import PeftModel
from safetensors.torch import load_file

from tests.torch import training
from tests.torch.test_inputs_loaded import experts, stored
from tests.torch.test_peft_loads import assert_all_keys_are_used
from tests.torch.training import stir

IDS = torch.arange(24)[None] * 7 % 40
STACKS = r"experts\.(gate_up|down)_proj"
KINDS = pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])


logits = partial(training.logits, ids=IDS)
pytestmark = pytest.mark.usefixtures("plugins")


@KINDS
@pytest.mark.parametrize("decomposition", ["ab", "abc", "abc-shared-input", "tensor-train", "lokr"])
def test_a_stack_is_what_it_merges_to(kind: str, decomposition: str) -> None:
    model = experts(kind).eval()
    keys, before = list(model.state_dict()), logits(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    adapters = attach(model, decomposition, 3, targets=STACKS)
    assert torch.equal(logits(model), before)
    assert len(adapters.sites) == 4
    model(IDS, labels=IDS).loss.backward()
    assert any(float(factor.grad.abs().max()) > 0 for factor in adapters.parameters() if factor.grad is not None)
    stir(adapters, size=0.3)
    beside = logits(model)
    assert (beside - before).abs().max() > 1e-3
    assert torch.equal(logits(copy.deepcopy(model)), beside)
    adapters.merge()
    assert torch.allclose(logits(model), beside, atol=1e-5)
    with adapters.disabled():
        assert torch.equal(logits(model), before)
    adapters.detach()
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == classes


@KINDS
@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"decomposition": "abc"}])
def test_peft_and_our_merge_read_stacks(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = experts(kind).eval()
    base = stored(model, {name: each.clone() for name, each in model.state_dict().items()}, tmp_path / "base")
    untouched = copy.deepcopy(model)
    adapters = attach(model, rank=3, targets=rf"{STACKS}|q_proj", **options)
    stir(adapters, size=0.3)
    beside = logits(model)
    adapters.save(tmp_path / "adapter", base=base)
    theirs = PeftModel.from_pretrained(untouched, str(tmp_path / "adapter")).eval()
    assert_all_keys_are_used(theirs, tmp_path / "adapter")
    # Sums of 24 products in two layers, of logits below 1.
    assert torch.allclose(logits(theirs), beside, atol=1e-5)
    lora_compress.merge(base, tmp_path / "adapter", tmp_path / "merged")
    adapters.merge()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if ".adapter." not in name:
            assert torch.allclose(merged[name], tensor, atol=64 * 2.0**-24 * float(tensor.abs().max())), name


@KINDS
def test_stacks_are_loaded_again(kind: str, tmp_path: Path) -> None:
    model = experts(kind).eval()
    for number, form in enumerate(("peft", "factors")):
        adapters = attach(model, rank=3, targets=STACKS, scale=0.5)
        stir(adapters, size=0.3)
        beside = logits(model)
        adapters.save(tmp_path / str(number), format=form)
        stir(adapters, seed=1)
        adapters.load(tmp_path / str(number))
        assert torch.equal(logits(model), beside)
        adapters.detach()
        again = attach(model, init=tmp_path / str(number), scale=0.5)
        assert torch.equal(logits(model), beside)
        again.detach()


@KINDS
@pytest.mark.parametrize("decomposition", ["ab", "abc", "lokr"])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_stacks_are_compiled_whole(kind: str, decomposition: str, implementation: str) -> None:
    model = experts(kind).eval()
    # The loop over experts depends on the data: no compiler sees through it, with or without adapters.
    model.set_experts_implementation(implementation)
    adapters = attach(model, decomposition, 3, targets=STACKS)
    stir(adapters, size=0.3)

    def loss_and_gradients(step: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = step(IDS, labels=IDS).loss
        loss.backward()
        return [loss.detach(), *(factor.grad.clone() for factor in adapters.parameters() if factor.grad is not None)]

    torch.compiler.reset()
    eager = loss_and_gradients(model)
    compiled = loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert len(eager) == len(compiled) > 4
    for ours, theirs in zip(compiled, eager, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_experts_that_need_fewer_directions_begin_with_them() -> None:
    model = experts("qwen2_moe").eval()
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    with torch.no_grad():
        weight[1] = weight[1, :, :1] @ weight[1, :1]
    before = logits(model)
    attach(model, rank=3, targets=STACKS, init="pissa")
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_experts_begin_alike() -> None:
    def odd(group: Group) -> Start:
        frozen = frozenset({0}) if group.matrices[0].name.endswith("[0]") else frozenset()
        return Start(zero(group).layers, frozen=frozen)

    with pytest.raises(
        PluginError, match=r"`odd` failed to start factors of `ab` for `.*proj`: .*same for all experts"
    ):
        attach(experts("gpt_oss"), targets=STACKS, init=odd)


def test_experts_have_no_dropout() -> None:
    with pytest.raises(SelectionError, match="no input of its own"):
        attach(experts("gpt_oss"), targets=STACKS, dropout=0.1)
