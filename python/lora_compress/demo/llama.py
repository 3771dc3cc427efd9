"""A Llama forward pass in NumPy: just enough to measure the loss of the demonstration's models without PyTorch.

RMSNorm, rotary embeddings in the half-split form of transformers, grouped-query attention, SwiGLU, tied head (Touvron
et al. 2023, arXiv 2302.13971). All in float32; shapes are (windows, positions, …).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_compress.model import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]


@dataclass(frozen=True)
class Llama:
    """A loaded model."""

    config: dict[str, Any]
    weights: dict[str, Array]

    @classmethod
    def open(cls, path: Path) -> Llama:
        """Load a checkpoint in the layout of transformers."""
        model = Model.open(path)
        return cls(model.config, {t.name: model.checkpoint.read(t.name) for t in model.checkpoint.tensors()})

    def loss(self, text: bytes) -> float:
        """Mean cross-entropy in nats per byte, over windows as long as the model's context."""
        window = int(self.config["max_position_embeddings"])
        windows = np.frombuffer(text, np.uint8)[: len(text) // window * window].reshape(-1, window)
        # A few windows at a time, so that attention scores stay in cache.
        losses = [self._losses(part) for part in np.array_split(windows, max(len(windows) // 4, 1))]
        return float(np.concatenate(losses).mean())

    def _losses(self, ids: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Cross-entropy of each token after the first."""
        logits = self.logits(ids)[:, :-1]
        logits -= logits.max(-1, keepdims=True)
        log_total: NDArray[np.float64] = np.log(np.exp(logits).sum(-1, dtype=np.float64))
        return log_total - np.take_along_axis(logits, ids[:, 1:, None].astype(np.int64), -1)[..., 0]

    def logits(self, ids: NDArray[np.integer[Any]]) -> Array:
        """Logits of token ids (windows, positions)."""
        hidden = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(int(self.config["num_hidden_layers"])):
            prefix = f"model.layers.{layer}."
            hidden = hidden + self._attention(prefix + "self_attn.", self._norm(prefix + "input_layernorm", hidden))
            hidden = hidden + self._mlp(prefix + "mlp.", self._norm(prefix + "post_attention_layernorm", hidden))
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return self._norm("model.norm", hidden) @ head.T

    def _linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[name + ".weight"].T

    def _norm(self, name: str, x: Array) -> Array:
        mean_square = np.square(x).mean(-1, keepdims=True)
        scaled: Array = x / np.sqrt(mean_square + np.float32(self.config["rms_norm_eps"]))
        return scaled * self.weights[name + ".weight"]

    def _mlp(self, prefix: str, x: Array) -> Array:
        gate = self._linear(prefix + "gate_proj", x)
        return self._linear(prefix + "down_proj", gate / (1 + np.exp(-gate)) * self._linear(prefix + "up_proj", x))

    def _attention(self, prefix: str, x: Array) -> Array:
        windows, positions, _ = x.shape
        heads, kv_heads = int(self.config["num_attention_heads"]), int(self.config["num_key_value_heads"])

        def split(name: str, count: int) -> Array:
            return self._linear(prefix + name, x).reshape(windows, positions, count, -1).transpose(0, 2, 1, 3)

        q, k = self._rotate(split("q_proj", heads)), self._rotate(split("k_proj", kv_heads))
        v = split("v_proj", kv_heads)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = q @ k.transpose(0, 1, 3, 2) / np.float32(np.sqrt(q.shape[-1]))
        scores += np.triu(np.full((positions, positions), -np.inf, np.float32), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        return self._linear(prefix + "o_proj", mixed.transpose(0, 2, 1, 3).reshape(windows, positions, -1))

    def _rotate(self, x: Array) -> Array:
        theta = float(self.config["rope_parameters"]["rope_theta"])
        half = x.shape[-1] // 2
        angles = np.outer(np.arange(x.shape[-2]), theta ** (-np.arange(half) / half)).astype(np.float32)
        cos, sin = np.cos(angles), np.sin(angles)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
