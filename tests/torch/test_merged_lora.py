"""A LoRA that PEFT has merged in bf16 into real weights is recognised: the true rank of every layer, no exceptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_compress
import pytest
import torch
from lora_compress.ranks.recognise import recognise

from tests.torch.real_weights import minilm


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_true_ranks_of_merged_loras(rank: int, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(rank)
    model: Any = AutoModel.from_pretrained(minilm(tmp_path / "download"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "word_embeddings"]
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                # Products are then a few percent of the weights, as those of trained adapters are.
                parameter.copy_(torch.randn_like(parameter) * 0.028 / rank**0.25)
    adapted.merge_and_unload().save_pretrained(tmp_path / "tuned")
    plan = lora_compress.plan(tmp_path / "base", tmp_path / "tuned")
    assert len(plan.low_rank) == 6 * 5 + 1
    found = {tensor.name: tensor.spectrum.low_rank for tensor in plan.low_rank if tensor.spectrum is not None}
    assert set(found.values()) == {rank}, found
    assert set(plan.ranks.values()) == {rank}
    assert recognise(plan).merged_rank == rank
