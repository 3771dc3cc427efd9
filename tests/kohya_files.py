"""A tiny UNet and files of kohya's for it, written with the safetensors library: not with the code under test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.checkpoints import Tensors, save

UNET = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}
QUERY = "down_blocks.0.attentions.0.to_q"
OUT = "down_blocks.0.attentions.0.to_out.0"
PROJECTION = "down_blocks.0.attentions.0.proj_in"
CONV = "down_blocks.0.resnets.0.conv1"
CONV1D = "mid_block.time_conv"
SHAPES: dict[str, tuple[int, ...]] = {
    QUERY: (8, 12),
    OUT: (12, 8),
    PROJECTION: (8, 12, 1, 1),
    CONV: (10, 8, 3, 3),
    CONV1D: (6, 8, 3),
}
METADATA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_network_args": '{"conv_dim": "4", "conv_alpha": "1", "mine": 1}',
    "ss_tag_frequency": '{"cat": {"ear": 3}}',
    "ss_base_model_version": "sd_v1",
    "modelspec.title": "Ünïcode",
    "sshs_model_hash": "0123",
    "of_my_own": "kept",
}


def unet(folder: Path, rng: np.random.Generator, config: Mapping[str, Any] = UNET, root: str = "") -> Path:
    """The base: five modules, a bias and a norm."""
    tensors: Tensors = {
        f"{root}{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()
    }
    tensors |= {f"{root}{QUERY}.bias": np.ones(8, np.float32), f"{root}norm.weight": np.ones(8, np.float32)}
    return save(folder, tensors, config)


def module(
    rng: np.random.Generator,
    name: str,
    rank: int = 4,
    alpha: Any = 2.0,
    prefix: str = "lora_unet_",
    dtype: Any = np.float32,
) -> Tensors:
    """Factors and alpha of one module of the base."""
    stem, shape = prefix + name.replace(".", "_"), SHAPES[name]
    ones = [1] * (len(shape) - 2)
    tensors: Tensors = {
        f"{stem}.lora_down.weight": rng.standard_normal((rank, *shape[1:])).astype(dtype),
        f"{stem}.lora_up.weight": rng.standard_normal((shape[0], rank, *ones)).astype(dtype),
    }
    # kohya stores float32; a NumPy scalar keeps its own dtype.
    value = np.array(alpha, np.float32) if type(alpha) is float else np.array(alpha)
    return tensors if alpha is None else {**tensors, f"{stem}.alpha": value}


def tucker(rng: np.random.Generator, name: str, rank: int = 3, alpha: float = 1.5, dtype: Any = np.float32) -> Tensors:
    """A convolution in three factors; the two ranks differ."""
    stem, shape = "lora_unet_" + name.replace(".", "_"), SHAPES[name]
    ones = [1] * (len(shape) - 2)
    return {
        f"{stem}.lora_down.weight": rng.standard_normal((rank, shape[1], *ones)).astype(dtype),
        f"{stem}.lora_mid.weight": rng.standard_normal((rank + 1, rank, *shape[2:])).astype(dtype),
        f"{stem}.lora_up.weight": rng.standard_normal((shape[0], rank + 1, *ones)).astype(dtype),
        f"{stem}.alpha": np.array(alpha, np.float32),
    }


def delta(tensors: Tensors, stem: str) -> NDArray[np.float64]:
    """ΔW by kohya's formula, in float64."""
    up, down = (tensors[f"{stem}.lora_{part}.weight"].astype(np.float64) for part in ("up", "down"))
    rank = len(down)
    alpha = float(tensors.get(f"{stem}.alpha", np.array(0))) or rank
    if f"{stem}.lora_mid.weight" in tensors:
        mid = tensors[f"{stem}.lora_mid.weight"].astype(np.float64)
        left, right = up.reshape(up.shape[:2]), down.reshape(down.shape[:2])
        return np.asarray(alpha / rank * np.einsum("mn...,im,nj->ij...", mid, left, right))
    product = up.reshape(len(up), rank) @ down.reshape(rank, -1)
    return np.asarray(alpha / rank * product.reshape(len(up), *down.shape[1:]))


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] = METADATA) -> Path:
    """The file."""
    save_file(tensors, path, metadata=dict(metadata))
    return path


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a file."""
    with safe_open(path, framework="numpy") as file:
        return dict(load_file(path)), dict(file.metadata() or {})
