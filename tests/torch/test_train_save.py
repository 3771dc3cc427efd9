"""What training made, on disk: PEFT loads it, the command line merges it, training goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_compress
import pytest
import torch
from lora_compress import SelectionError
from lora_compress.errors import OutputExistsError
from lora_compress.torch import AdapterSet, attach
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from tests.torch.test_peft_loads import assert_all_keys_are_used
from tests.torch.training import logits, stir, tiny_llama

# Roundings of float32 on the way from one order of sums to another, relative to the largest logit: products of 48 terms
# in two layers of seven weights each.
SAME = 14 * 48 * 2.0**-24


pytestmark = pytest.mark.usefixtures("plugins")


def trained(model: Any, *arguments: Any, **options: Any) -> AdapterSet:
    adapters = attach(model, *arguments, **options)
    stir(adapters)
    return adapters


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ab", {}),
    ("ab", {"init": "pissa"}),
    ("ab", {"init": "olora"}),
    ("ab", {"init": "orthogonal", "scale": 0.3}),
    ("ab", {"targets": "embed_tokens|q_proj"}),
    ("ab", {"ranks": {f"model.layers.{n}.mlp.up_proj": 2 + n for n in range(2)}}),
    ("abc", {}),
    ("abc", {"init": "lora-xs"}),
    ("abc", {"init": "pissa"}),
    ("abc-shared-input", {}),
    ("abc-shared-depth", {}),
    ("tensor-train", {}),
]


@pytest.mark.parametrize(("decomposition", "options"), CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_peft_and_our_merge_read_what_was_trained(
    decomposition: str, options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = tiny_llama(tied=tied)
    model.save_pretrained(tmp_path / "base")
    before = logits(model)
    adapters = trained(model, decomposition, **({"rank": 4} if "ranks" not in options else {}), **options)
    beside = logits(model)
    size = float(beside.abs().max())
    assert (beside - before).abs().max() > 100 * SAME * size
    adapters.save(tmp_path / "adapter", base=tmp_path / "base")
    theirs = PeftModel.from_pretrained(loaded(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    assert_all_keys_are_used(theirs, tmp_path / "adapter")
    assert (logits(theirs) - beside).abs().max() < SAME * size
    lora_compress.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (logits(loaded(tmp_path / "merged")) - beside).abs().max() < SAME * size
    adapters.merge()
    assert (logits(model) - beside).abs().max() < SAME * size


@pytest.mark.parametrize("decomposition", ["ab", "abc-shared-input", "tensor-train-interleaved", "lokr"])
def test_factors_are_stored_as_they_are(decomposition: str, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    # A scale that is a power of two: multiplied into the factors and out again it changes no bit.
    adapters = trained(model, decomposition, 4, scale=0.5)
    adapters.save(tmp_path / "adapter", format="factors")
    beside, state = logits(model), {name: each.clone() for name, each in adapters.state_dict().items()}
    lora_compress.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (logits(loaded(tmp_path / "merged")) - beside).abs().max() < SAME * float(beside.abs().max())
    stir(adapters, seed=1)
    adapters.load(tmp_path / "adapter")
    assert all(torch.equal(each, state[name]) for name, each in adapters.state_dict().items())
    adapters.detach()
    again = attach(model, decomposition, scale=0.5, init=tmp_path / "adapter")
    assert {name: tuple(each.shape) for name, each in again.state_dict().items()} == {
        name: tuple(each.shape) for name, each in state.items()
    }
    assert torch.equal(logits(model), beside)


def test_pairs_are_loaded_and_continued_bit_by_bit(tmp_path: Path) -> None:
    model = tiny_llama()
    adapters = trained(model, rank=4, scale=0.5)
    adapters.save(tmp_path / "adapter")
    beside = logits(model)
    stir(adapters, seed=1)
    adapters.load(tmp_path / "adapter")
    assert torch.equal(logits(model), beside)
    adapters.detach()
    adapters = attach(model, init=tmp_path / "adapter", scale=0.5)
    assert torch.equal(logits(model), beside)
    adapters.detach()
    attach(model, "abc", 4, init=tmp_path / "adapter")
    # Fitted by a truncated SVD of ΔW.
    assert torch.allclose(logits(model), beside, atol=1e-3)


@pytest.mark.parametrize("decomposition", ["ab", "abc", "tensor-train"])
def test_training_goes_on_from_an_extracted_fine_tune(decomposition: str, tmp_path: Path) -> None:
    base, tuned = tiny_llama(), tiny_llama()
    generator = torch.Generator().manual_seed(1)
    for each in tuned.parameters():
        each.data += 0.02 * torch.randn(each.shape, generator=generator)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "extracted", rank=32, dtype="F32")
    norm = base.model.norm.weight.detach().clone()
    adapters = attach(base, decomposition, None if decomposition == "ab" else 32, init=tmp_path / "extracted")
    assert torch.equal(base.model.norm.weight, tuned.model.norm.weight), "norms are stored whole"
    expected = logits(tuned)
    if decomposition != "tensor-train":
        assert torch.allclose(logits(base), expected, atol=1e-3)
    stir(adapters)
    beside = logits(base)
    adapters.save(tmp_path / "continued", base=tmp_path / "base")
    lora_compress.merge(tmp_path / "base", tmp_path / "continued", tmp_path / "merged")
    assert (logits(loaded(tmp_path / "merged")) - beside).abs().max() < 4 * SAME * float(beside.abs().max())
    adapters.detach()
    assert torch.equal(base.model.norm.weight, norm)


def test_a_conv1d_is_stored_the_way_its_weight_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=12, n_head=2, vocab_size=60, n_positions=32)).eval()
    model.save_pretrained(tmp_path / "base")
    for number, (decomposition, form) in enumerate(
        [("ab", None), ("abc", "factors"), ("tensor-train", "factors"), ("lokr", None)]
    ):
        adapters = trained(model, decomposition, 2, targets="c_attn|mlp")
        beside = logits(model)
        folder = tmp_path / f"adapter{number}"
        adapters.save(folder, base=tmp_path / "base", format=form)
        lora_compress.merge(tmp_path / "base", folder, tmp_path / f"merged{number}")
        assert torch.allclose(logits(loaded(tmp_path / f"merged{number}")), beside, atol=1e-4)
        stir(adapters, seed=1)
        adapters.load(folder)
        assert torch.allclose(logits(model), beside, atol=1e-4)
        adapters.detach()


def test_convolutions_are_stored_as_peft_has_them(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.wide, self.long = nn.Conv2d(4, 6, 3, padding=1), nn.Conv1d(6, 8, 5)
            self.table = nn.Embedding(10, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.long(self.wide(x).flatten(2) + self.table(torch.tensor([3])).t())
            return result

    model, x = Net(), torch.randn(2, 4, 5, 5)
    adapters = trained(model, rank=2, targets="")
    adapters.save(tmp_path / "adapter", format="factors")
    adapters.load(tmp_path / "adapter")
    beside = model(x).detach()
    adapters.detach()
    adapters = attach(model, init=tmp_path / "adapter")
    assert torch.allclose(model(x), beside, atol=1e-5)
    adapters.detach()
    adapters = attach(model, init=tmp_path / "adapter", targets="wide|long")
    adapters.save(tmp_path / "convolutions")
    beside = model(x).detach()
    theirs = PeftModel.from_pretrained(Net(), str(tmp_path / "convolutions")).eval()
    assert torch.allclose(theirs(x), beside, atol=1e-5)


def test_the_files_of_a_bf16_run(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    adapters = trained(model, rank=4)
    adapters.save(tmp_path / "adapter", dtype="BF16", base_name="me/base")
    stored = lora_compress.Checkpoint(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {each.dtype for each in stored.tensors()} == {"BF16"}
    assert "me/base" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(OutputExistsError):
        adapters.save(tmp_path / "adapter")
    adapters.save(tmp_path / "adapter", force=True)


def test_save_pretrained_and_state_dicts_are_those_of_any_model(tmp_path: Path) -> None:
    model = tiny_llama()
    adapters = trained(model, "abc-shared-depth", 4)
    model.save_pretrained(tmp_path / "whole")
    stored = lora_compress.Checkpoint(tmp_path / "whole")
    assert {each.name for each in stored.tensors()} == {*model.state_dict()}
    assert {*adapters.state_dict()} == {name for name in model.state_dict() if ".adapter." in name}
    again = tiny_llama()
    other = attach(again, "abc-shared-depth", 4)
    outcome = again.load_state_dict(adapters.state_dict(), strict=False)
    assert outcome.unexpected_keys == []
    assert torch.equal(logits(again), logits(model))
    stir(other, seed=1)
    other.load_state_dict(adapters.state_dict())
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(SelectionError, match="in the adapters only"):
        other.load_state_dict({})
    restored = LlamaForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(restored.model.norm.weight, model.model.norm.weight)


def test_what_files_cannot_say_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    adapters = trained(model, rank=4, init="pissa")
    with pytest.raises(SelectionError, match="a difference of two products"):
        adapters.save(tmp_path / "adapter", format="factors")
    adapters.save(tmp_path / "adapter")
    with pytest.raises(SelectionError, match="began with a part of the base"):
        adapters.load(tmp_path / "adapter")
    adapters.detach()
    other = attach(model, rank=4, targets="mlp")
    with pytest.raises(SelectionError, match="in one of"):
        other.load(tmp_path / "adapter")
    other.detach()
    six = attach(model, rank=6)
    with pytest.raises(SelectionError, match="`ab` at rank 6 loses"):
        six.load(tmp_path / "adapter")
    with pytest.raises(SelectionError, match="say which rank"):
        attach(model, "abc", init=tmp_path / "adapter", name="other")
