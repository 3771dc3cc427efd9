#!/usr/bin/env python3
"""Write base/tuned pairs with the shapes of real models, as sharded BF16 safetensors.

`llama`: Llama-3-8B with few layers. Tuned = base + a power-law low-rank part (256 directions, σ_i ~ i^-½, rms 0.0015) +
white noise (rms 0.0005) in every linear layer; embedding, head and norms are unchanged, so that a good extractor spends
nothing on them. `smollm`: SmolLM2-135M, 210 small matrices and a tied embedding, all of them changed. One tensor is in
memory at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from lora_compress._native import Writer


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama, and whether its embedding is tied to the head and changed by the fine-tune."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    layers: int

    def linear(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's linear modules."""
        kv = self.hidden // self.heads * self.kv_heads
        square, up = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        return {
            "self_attn.q_proj": square, "self_attn.k_proj": (kv, self.hidden), "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": square, "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": up[::-1],
        }  # fmt: skip


ARCHITECTURES = {
    "llama": Architecture(4096, 14336, 32, 8, 32_000, tied=False, layers=2),
    "smollm": Architecture(576, 1536, 9, 3, 49_152, tied=True, layers=30),
}


def shapes(model: Architecture, layers: int) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Tensors by shard: one for the embeddings, one for each layer."""
    total = layers + 1
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}

    def shard(number: int) -> str:
        return f"model-{number:05d}-of-{total:05d}.safetensors"

    names = ["model.embed_tokens.weight"] if model.tied else ["model.embed_tokens.weight", "lm_head.weight"]
    embeddings: list[tuple[str, tuple[int, ...]]] = [(name, (model.vocabulary, model.hidden)) for name in names]
    shards[shard(1)] = [*embeddings, ("model.norm.weight", (model.hidden,))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (model.hidden,))
        shards[shard(layer + 2)] = [
            (f"{prefix}{name}.weight", shape) for name, shape in {**model.linear(), **norms}.items()
        ]
    return shards


def tensors(seed: list[int], shape: tuple[int, ...], *, changed: bool) -> Iterator[Any]:
    """The tensor of the base, then that of tuned."""
    rng = np.random.default_rng(seed)
    if len(shape) == 1:
        ones = np.ones(shape, np.float32)
        yield from (ones, ones)
        return
    base = (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16).astype(np.float32)
    yield base
    if not changed:
        yield base
        return
    decay = np.arange(1, 257, dtype=np.float32) ** -0.5
    delta = (rng.standard_normal((shape[0], 256), np.float32) * decay) @ rng.standard_normal(
        (256, shape[1]), np.float32
    )
    delta *= 0.0015 / delta.std()
    yield base + delta + 0.0005 * rng.standard_normal(shape, np.float32)


def write_pair(out: Path, model: Architecture, layers: int, seed: int = 0) -> None:
    """Write `out/base` and `out/tuned`."""
    sides = [out / "base", out / "tuned"]
    weight_map: dict[str, str] = {}
    for number, (file, group) in enumerate(shapes(model, layers).items()):
        for side in sides:
            side.mkdir(parents=True, exist_ok=True)
        expected = [(name, "BF16", shape) for name, shape in group]
        writers = [Writer(side / file, expected, {"format": "pt"}) for side in sides]
        for position, (name, shape) in enumerate(group):
            both = tensors([seed, number, position], shape, changed=model.tied or "proj" in name)
            for writer, values in zip(writers, both, strict=True):
                writer.append(name, "BF16", values)
            weight_map[name] = file
        for writer in writers:
            writer.finish()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": model.hidden,
        "intermediate_size": model.intermediate, "num_hidden_layers": layers, "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads, "vocab_size": model.vocabulary, "tie_word_embeddings": model.tied,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    for side in sides:
        index = {"metadata": {}, "weight_map": weight_map}
        (side / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
        (side / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    chosen = ARCHITECTURES[arguments.model]
    write_pair(arguments.out, chosen, arguments.layers or chosen.layers)
