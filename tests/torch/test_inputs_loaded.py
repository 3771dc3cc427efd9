"""What PyTorch, PEFT and transformers write and read of the same inputs: files, kernels, stacked experts, names."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
import torch
from lora_compress import Checkpoint, CheckpointError
from lora_compress.torch.fidelity import Fidelity
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tests.torch.test_peft_loads import assert_all_keys_are_used


def test_every_kind_of_tensor_that_torch_saves_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 8)
    tensors: dict[str, torch.Tensor] = OrderedDict(
        f32=matrix,
        f64=matrix.double(),
        f16=matrix.half(),
        bf16=matrix.bfloat16(),
        e4m3=matrix.to(torch.float8_e4m3fn),
        e5m2=matrix.to(torch.float8_e5m2),
        parameter=nn.Parameter(torch.randn(3)),
        transposed=matrix.T,
        rows=matrix[2:4],
        columns=matrix[:, ::2],
        tied=matrix,
        scalar=torch.tensor(3.0),
        empty=torch.zeros(0, 4),
        permuted=torch.randn(2, 3, 4).permute(2, 0, 1),
    )
    torch.save(tensors, tmp_path / "model.bin")
    checkpoint = Checkpoint(tmp_path / "model.bin")
    assert [tensor.name for tensor in checkpoint.tensors()] == sorted(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(checkpoint.read(name), tensor.detach().float().numpy()), name
    others = {"ids": torch.arange(5), "mask": torch.tensor([True, False]), "u8": torch.arange(3, dtype=torch.uint8)}
    torch.save({"state_dict": others, "optimizer": {"step": 3}, "epoch": 1}, tmp_path / "epoch.pt")
    for name, tensor in others.items():
        assert Checkpoint(tmp_path / "epoch.pt").read_bytes(name) == tensor.numpy().tobytes()


def test_what_is_no_state_dict_says_so(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(
        CheckpointError, match=r"asks for `torch\.nn\.modules\.linear\.Linear`, and only tensors are read"
    ):
        Checkpoint(tmp_path / "module.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"bare pickle, PyTorch's format before 1\.6"):
        Checkpoint(tmp_path / "old.pt")
    torch.save({"w": torch.ones(1).expand(1000)}, tmp_path / "expanded.pt")
    with pytest.raises(CheckpointError, match="`w` is a view that repeats its elements"):
        Checkpoint(tmp_path / "expanded.pt")


def test_views_that_torch_negates_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch._neg_view(torch.ones(3))}, tmp_path / "negated.pt")
    with pytest.raises(CheckpointError, match="negated or conjugated view"):
        Checkpoint(tmp_path / "negated.pt")


class Convolutions(nn.Module):
    """One of each kind that PEFT knows."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 10, 3)
        self.two = nn.Conv2d(6, 10, (3, 2))
        self.pointwise = nn.Conv2d(6, 10, 1)
        self.three = nn.Conv3d(4, 6, 2)
        # As CLIP calls it: a convolution all the same.
        self.patch_embedding = nn.Conv2d(3, 8, 2)
        self.linear = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def moved(model: nn.Module, rank: int, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """The state of a fine-tune: every weight of two or more dimensions moved by a ΔW of some rank."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            continue
        lead, (rows, cols) = ((), (len(tensor), tensor[0].numel()))
        if tensor.ndim == 3 and "experts" in name:
            lead, (rows, cols) = (tensor.shape[:1], tensor.shape[1:])
        b = torch.randn(*lead, rows, rank, generator=generator)
        a = torch.randn(*lead, rank, cols, generator=generator)
        state[name] = (tensor + 0.05 * (b @ a).reshape(tensor.shape)).contiguous()
    return state


def test_peft_applies_kernels_as_we_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Convolutions()
    tuned = moved(base, 2)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    lora_compress.extract(*paths, tmp_path / "adapter", rank=2, dtype="F32")
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert_all_keys_are_used(model, tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    for name, tensor in tuned.items():
        # Products of two factors in f32, each a few roundings from the ΔW of rank 2.
        assert torch.allclose(merged[name], tensor, atol=64 * 2.0**-24 * float(tensor.abs().max())), name


def test_we_apply_kernels_as_peft_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Convolutions()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    names = ["one", "two", "pointwise", "three", "linear", "patch_embedding"]
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=names, rank_pattern={"two": 4}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    lora_compress.merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "merged.safetensors")
    ours, theirs = load_file(tmp_path / "merged.safetensors"), model.merge_and_unload().state_dict()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=64 * 2.0**-24 * float(tensor.abs().max())), name


def experts(kind: str) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    if kind == "gpt_oss":
        return GptOssForCausalLM(GptOssConfig(**common, num_local_experts=4))
    sizes = {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **sizes, decoder_sparse_step=1))


def stored(model: Any, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """A model by the names that it has in memory, stacked experts as one tensor."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_peft_applies_experts_as_we_do(tmp_path: Path, kind: str) -> None:
    model = experts(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = moved(model, 2)
    paths = stored(model, state, tmp_path / "base"), stored(model, tuned, tmp_path / "tuned")
    lora_compress.extract(*paths, tmp_path / "adapter", rank=2, dtype="F32")
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    assert_all_keys_are_used(adapted, tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    compared = 0
    for name, tensor in tuned.items():
        if "experts.gate_up_proj" in name or "experts.down_proj" in name or "q_proj" in name:
            if tensor.ndim < 2 or name.endswith("bias"):
                continue
            compared += 1
            assert torch.allclose(merged[name], tensor, atol=64 * 2.0**-24 * float(tensor.abs().max())), name
    assert compared >= 6


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
def test_we_apply_experts_as_peft_does(tmp_path: Path, kind: str, targets: list[str]) -> None:
    model = experts(kind)
    base = stored(model, model.state_dict(), tmp_path / "base")
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=[f"mlp.experts.{name}" for name in targets],
        lora_dropout=0.0,
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    lora_compress.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    ours, theirs = load_file(tmp_path / "merged" / "model.safetensors"), adapted.merge_and_unload().state_dict()
    moved = 0
    before = load_file(base / "model.safetensors")
    for name, tensor in ours.items():
        moved += not torch.equal(before[name], tensor)
        assert torch.allclose(theirs[name], tensor, atol=64 * 2.0**-24 * float(tensor.abs().max())), name
    assert moved == 2 * (1 + len(targets))
    small = lora_compress.resize(base, tmp_path / "adapter", tmp_path / "small", rank=3, dtype="F32")
    assert small.error < 1e-5


def test_experts_are_measured_as_they_are_merged(tmp_path: Path) -> None:
    model = experts("gpt_oss")
    model.save_pretrained(tmp_path / "base")
    model.load_state_dict(moved(model, 2))
    model.save_pretrained(tmp_path / "tuned")
    np.save(tmp_path / "ids.npy", np.arange(256) * 7 % 40)
    fidelity = Fidelity(tmp_path / "base", tmp_path / "tuned", tmp_path / "ids.npy", context=64, tokens=256)
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2, dtype="F32")
    # Everything of more than one dimension has moved by rank 2.
    assert fidelity(tmp_path / "base")["kl"] > 1e-3
    assert fidelity(tmp_path / "adapter")["kl"] < 1e-5


@pytest.mark.parametrize("side", ["base", "tuned", "both"])
def test_gpt2_without_its_prefix_is_the_same_model(tmp_path: Path, side: str) -> None:
    """The Hub's `gpt2` stores `h.0…` where transformers has `transformer.h.0…`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tuned = {name: tensor for name, tensor in moved(model, 2).items() if name != "lm_head.weight"}
    short = [
        {name.removeprefix("transformer."): tensor for name, tensor in each.items()}
        if side in {which, "both"}
        else each
        for which, each in (("base", state), ("tuned", tuned))
    ]
    paths = stored(model, short[0], tmp_path / "base"), stored(model, short[1], tmp_path / "tuned")
    lora_compress.extract(*paths, tmp_path / "adapter", rank=16, dtype="F32")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(paths[0]), str(tmp_path / "adapter"))
    assert_all_keys_are_used(adapted, tmp_path / "adapter")
    theirs = dict(adapted.named_parameters())
    lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == short[0].keys()
    key = "transformer.h.1.mlp.c_fc"
    layer = adapted.base_model.model.get_submodule(key)
    delta = layer.get_delta_weight("default")
    assert torch.allclose(delta, tuned[f"{key}.weight"] - state[f"{key}.weight"], atol=1e-5)
    assert any("c_fc" in name for name in theirs)
    for name, tensor in merged.items():
        full = name if name.startswith("transformer.") else f"transformer.{name}"
        assert torch.allclose(tensor, tuned[full], atol=1e-5), name
