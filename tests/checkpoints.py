"""Checkpoints for tests, written with the safetensors library: not with the code under test."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Tensors = dict[str, NDArray[Any]]

BF16: Any = ml_dtypes.bfloat16
DTYPES: dict[str, Any] = {"BF16": BF16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


def save(folder: Path, tensors: Tensors, config: Mapping[str, Any], *, shards: int = 1) -> Path:
    """Write a model directory as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files, hidden ones too."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load(folder: Path) -> Tensors:
    """All tensors of a model directory or file."""
    if folder.is_file():
        return dict(load_file(folder))
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def tiny_llama(
    rng: np.random.Generator, *, hidden: int = 24, layers: int = 2, vocabulary: int = 40, tied: bool = False
) -> tuple[Tensors, dict[str, Any]]:
    """Random weights with the names and shapes of a Llama, and its configuration."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (hidden // 2, hidden),
            prefix + "mlp.up_proj.weight": (2 * hidden, hidden),
            prefix + "mlp.down_proj.weight": (hidden, 2 * hidden),
        }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    tensors = {name: (rng.standard_normal(shape) * 0.02).astype(BF16) for name, shape in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    return tensors, config


def tuned_from(base: Tensors, rng: np.random.Generator, *, keep: Collection[str] = (), size: float = 0.002) -> Tensors:
    """A fine-tune: every tensor moved by a full-rank difference, but for those in `keep`."""
    return {
        name: tensor
        if name in keep
        else (tensor.astype(np.float32) + size * rng.standard_normal(tensor.shape)).astype(tensor.dtype)
        for name, tensor in base.items()
    }
