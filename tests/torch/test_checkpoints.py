"""Checkpoints without the base: what is in them, and that nothing else of the model changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lora_compress import SelectionError
from lora_compress.torch import attach
from lora_compress.torch.checkpoints import base_names
from lora_compress.torch.hf_trainer import AdapterCheckpoints, quantised
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tests.torch.training import IDS, all_plugins, logits, tiny_llama

DATA = [{"input_ids": (IDS[0] + n) % 60, "labels": (IDS[0] + n) % 60} for n in range(8)]


def trainer(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, **options}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=2, report_to="none", **options)
    return Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=[AdapterCheckpoints(), *callbacks]
    )


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_factors_are_kept_and_what_else_is_trained(tied: bool) -> None:
    model = tiny_llama(tied=tied)
    with all_plugins():
        adapters = attach(model, "abc", 4, init="lora-xs")
    model.model.norm.weight.requires_grad_(requires_grad=True)
    kept = {*model.state_dict()} - base_names(model)
    assert kept == {*adapters.state_dict(), "model.norm.weight"}


class Packed(nn.Linear):
    """A layer that stores itself in a way of its own."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = self.weight.detach().sum()


def test_what_layers_store_beside_parameters_goes_with_them() -> None:
    model = nn.Sequential(Packed(4, 4), Packed(4, 4), nn.Sequential(nn.Linear(4, 4)))
    # As CLIP's temperature: a parameter of the model itself, above all others.
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    adapters = attach(model, rank=2, targets="^(0|2)")
    model[1].requires_grad_(requires_grad=True)
    model[2][0] = checkpoint_wrapper(model[2][0])
    kept = {*model.state_dict()} - base_names(model)
    factors = {name.replace("_checkpoint_wrapped_module.", "") for name, _ in adapters.named_parameters()}
    assert len(factors) == 4
    assert kept == {*factors, "1.weight", "1.bias", "1.packed"}


def test_the_best_checkpoint_is_loaded_and_the_model_is_saved_whole_afterwards(tmp_path: Path) -> None:
    model = tiny_llama()
    whole = {*model.state_dict()}
    adapters = attach(model, rank=4)
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    run = trainer(model, tmp_path / "run", load_best_model_at_end=True, **best)
    run.train()
    checkpoint = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert {*checkpoint} == {*adapters.state_dict()}
    assert all(torch.equal(each, checkpoint[name]) for name, each in adapters.state_dict().items())
    adapters.merge()
    adapters.detach()
    model.save_pretrained(tmp_path / "saved")
    assert {*load_file(tmp_path / "saved" / "model.safetensors")} == whole


@pytest.mark.parametrize("bits", [4, 8])
def test_factors_beside_a_quantised_base_are_trained_and_gone_on_with(bits: int, tmp_path: Path) -> None:
    """QLoRA (Dettmers et al. 2023), by bitsandbytes."""
    tiny_llama().save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def run(**options: Any) -> tuple[Any, Any, Any]:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation, device_map="cpu")
        adapters = attach(model, rank=4, scale=1.0)
        with pytest.raises(ValueError, match="purely quantized"):
            trainer(model, tmp_path / "run")
        with quantised(model):
            made = trainer(model, tmp_path / "run", **options)
        made.train(resume_from_checkpoint=options.get("max_steps") == 4)
        return model, adapters, made

    model, adapters, _ = run(max_steps=2)
    assert not model._hf_peft_config_loaded
    with mock.patch.object(type(model.hf_quantizer), "is_trainable", False):  # noqa: SIM117
        with pytest.raises(SelectionError, match="does not support training"), quantised(model):
            pass
    with pytest.raises(SelectionError, match="no factors to train"), quantised(tiny_llama()):
        pass
    before = {name: each.clone() for name, each in adapters.state_dict().items()}
    checkpoint = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert {*checkpoint} == {*before}
    model, adapters, second = run(max_steps=4)
    assert second.state.global_step == 4
    assert any(not torch.equal(each, before[name]) for name, each in adapters.state_dict().items())
    beside = logits(model)
    adapters.save(tmp_path / "adapter", base=tmp_path / "base")
    adapters.detach()
    attach(model, init=tmp_path / "adapter")
    assert torch.equal(logits(model), beside)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation, device_map="cpu")
    # In training, as ours: bitsandbytes multiplies otherwise in evaluation on a CPU.
    theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).train()
    # PEFT multiplies its factors in float32 too, in another order.
    assert torch.allclose(logits(theirs), beside, atol=1e-5)


class Interruption(TrainerCallback):
    """A power cut after three steps."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"dropout": 0.1}])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(options: dict[str, Any], tmp_path: Path) -> None:
    def losses(run: Any) -> list[float]:
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    model = tiny_llama()
    adapters = attach(model, rank=4, **options)
    undisturbed = trainer(model, tmp_path / "undisturbed", max_steps=6)
    undisturbed.train()
    broken = tiny_llama()
    attach(broken, rank=4, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer(broken, tmp_path / "run", Interruption(), max_steps=6).train()
    assert not broken._keys_to_ignore_on_save
    again = tiny_llama()
    resumed = attach(again, rank=4, **options)
    run = trainer(again, tmp_path / "run", max_steps=6)
    run.train(resume_from_checkpoint=True)
    assert losses(run) == losses(undisturbed)
    assert all(torch.equal(each, adapters.state_dict()[name]) for name, each in resumed.state_dict().items())
