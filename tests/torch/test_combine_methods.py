"""TIES on ΔW is what PEFT computes, and PEFT loads the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
import torch
from lora_compress.verbs.methods import Method
from lora_compress.verbs.task_vectors import TaskVector, merge
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from transformers import LlamaConfig, LlamaForCausalLM

MODULES = ["q_proj", "down_proj"]


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 0.3, 0.3], [0.5, 2.0, -1.0]])
def test_the_election_is_pefts(weights: list[float], density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(300, 70, generator=generator) for _ in weights]
    vectors = {
        number: TaskVector(np.zeros((300, 0), np.float32), np.zeros((0, 70), np.float32), [tensor.numpy()])
        for number, tensor in enumerate(tensors)
    }
    ours = merge("w", (300, 70), vectors, weights, Method("ties", (density,) * 3))
    # PEFT's votes have no weights: where they differ they are given with the values, which changes no trimming.
    common = len(set(weights)) == 1
    given = tensors if common else [weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]
    theirs = merge_utils.ties(given, torch.tensor(weights if common else [1.0] * 3), density)
    assert (ours == 0).sum() == (theirs == 0).sum()
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    if density == 1:
        linear = merge("w", (300, 70), vectors, weights, Method("dare_linear", (1.0,) * 3))
        expected = merge_utils.dare_linear(tensors, torch.tensor(weights), density)
        # A sum of three, in float32.
        size = np.max(
            [np.abs(weight * tensor.numpy()) for weight, tensor in zip(weights, tensors, strict=True)], axis=0
        )
        assert (np.abs(linear - expected.numpy()) <= 3 * 2.0**-23 * size).all()


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """ΔW of an adapter by module, as PEFT forms it."""
    found = {name: module for name, module in model.named_modules() if adapter in getattr(module, "lora_A", {})}
    return {name: module.get_delta_weight(adapter).detach().double() for name, module in found.items()}


def test_an_adapter_is_what_peft_makes_by_ties_svd(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(llama(), LoraConfig(r=6, lora_alpha=9, target_modules=MODULES), "one")
    model.add_adapter("two", LoraConfig(r=4, lora_alpha=4, target_modules=MODULES))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(tmp_path / "adapters"))
    model.add_weighted_adapter(["one", "two"], [0.7, 0.7], "made", combination_type="ties_svd", density=0.4)
    theirs = deltas(model, "made")
    paths = [tmp_path / "adapters" / name for name in ("one", "two")]
    for method in ("ties", "dare_ties"):
        result = lora_compress.combine(
            tmp_path / "base", paths, tmp_path / method, weights=[0.7, 0.7], method=method, density=0.4, dtype="F32"
        )
        assert set(result.ranks.values()) == {(6, 6)}
    ours = deltas(PeftModel.from_pretrained(llama(), str(tmp_path / "ties"), "made"), "made")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4
    for name, expected in theirs.items():
        # Both are the best pair of one matrix, ours through its Gram matrix in float64 at this size: what is left is
        # float32's rounding, over the distance of the σ on both sides of the cut.
        assert (ours[name] - expected).norm() < 1e-4 * expected.norm(), name
    random = deltas(PeftModel.from_pretrained(llama(), str(tmp_path / "dare_ties"), "made"), "made")
    assert all((random[name] - expected).norm() > 0.1 * expected.norm() for name, expected in theirs.items())
