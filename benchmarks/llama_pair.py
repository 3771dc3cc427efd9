#!/usr/bin/env python3
"""Write a Llama-3-8B-shaped base/tuned pair with few layers, as sharded BF16 safetensors.

Tuned = base + a power-law low-rank part (256 directions, σ_i ~ i^-½, rms 0.0015) + white noise (rms 0.0005) in every
linear layer; embedding, head and norms are unchanged, so that a good extractor spends nothing on them. One tensor is in
memory at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from lora_compress._native import Writer

HIDDEN, INTERMEDIATE, KV = 4096, 14336, 1024
LINEAR: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def shapes(layers: int, vocabulary: int) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Tensors by shard: one for the embeddings, one for each layer."""
    total = layers + 1
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}

    def shard(number: int) -> str:
        return f"model-{number:05d}-of-{total:05d}.safetensors"

    embeddings: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (vocabulary, HIDDEN)),
        ("lm_head.weight", (vocabulary, HIDDEN)),
    ]
    shards[shard(1)] = [*embeddings, ("model.norm.weight", (HIDDEN,))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        parts = {**LINEAR, "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
        shards[shard(layer + 2)] = [(f"{prefix}{name}.weight", shape) for name, shape in parts.items()]
    return shards


def tensors(seed: list[int], name: str, shape: tuple[int, ...]) -> Iterator[Any]:
    """The tensor of the base, then that of tuned."""
    rng = np.random.default_rng(seed)
    if len(shape) == 1:
        ones = np.ones(shape, np.float32)
        yield from (ones, ones)
        return
    base = (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16).astype(np.float32)
    yield base
    if "proj" not in name:
        yield base
        return
    decay = np.arange(1, 257, dtype=np.float32) ** -0.5
    delta = (rng.standard_normal((shape[0], 256), np.float32) * decay) @ rng.standard_normal(
        (256, shape[1]), np.float32
    )
    delta *= 0.0015 / delta.std()
    yield base + delta + 0.0005 * rng.standard_normal(shape, np.float32)


def write_pair(out: Path, layers: int, vocabulary: int = 32_000, seed: int = 0) -> None:
    """Write `out/base` and `out/tuned`."""
    sides = [out / "base", out / "tuned"]
    weight_map: dict[str, str] = {}
    for number, (file, group) in enumerate(shapes(layers, vocabulary).items()):
        for side in sides:
            side.mkdir(parents=True, exist_ok=True)
        expected = [(name, "BF16", shape) for name, shape in group]
        writers = [Writer(side / file, expected, {"format": "pt"}) for side in sides]
        for position, (name, shape) in enumerate(group):
            for writer, values in zip(writers, tensors([seed, number, position], name, shape), strict=True):
                writer.append(name, "BF16", values)
            weight_map[name] = file
        for writer in writers:
            writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": vocabulary, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    for side in sides:
        index = {"metadata": {}, "weight_map": weight_map}
        (side / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
        (side / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    write_pair(arguments.out, arguments.layers)
