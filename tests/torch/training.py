"""Small models and decompositions for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lora_compress_abc
import lora_compress_lokr
import lora_compress_tensor_train
import torch
from lora_compress.testing import loaded
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

PLUGINS = (lora_compress_abc, lora_compress_lokr, lora_compress_tensor_train)
DECOMPOSITIONS = (
    "ab",
    "abc",
    "abc-shared-input",
    "abc-shared-depth",
    "tensor-train",
    "tensor-train-interleaved",
    "lokr",
)
IDS = torch.arange(24)[None] * 7 % 60


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


@contextmanager
def all_plugins() -> Iterator[None]:
    """First-party plugins, and one thread: on small products more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with loaded(*PLUGINS):
            yield
    finally:
        torch.set_num_threads(before)


def tiny_llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """One layer of each type that takes adapters, and inputs for it, float64."""
    torch.manual_seed(0)
    inputs = {
        "linear": (nn.Linear(6, 8), torch.randn(2, 3, 6)),
        "linear-without-bias": (nn.Linear(6, 8, bias=False), torch.randn(4, 6)),
        "conv1d-of-transformers": (Conv1D(8, 6), torch.randn(2, 3, 6)),
        "embedding": (nn.Embedding(12, 6, padding_idx=1), torch.tensor([[0, 3, 5], [5, 11, 2]])),
        "conv1d": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 5)),
        "conv2d": (nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=1), torch.randn(2, 4, 4, 5)),
        "conv2d-in-groups": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(1, 4, 4, 4)),
        "conv3d": (nn.Conv3d(2, 6, 2, dilation=(1, 1, 2)), torch.randn(1, 2, 3, 3, 4)),
    }
    return {name: (layer.double(), x.double() if x.is_floating_point() else x) for name, (layer, x) in inputs.items()}


def stir(adapters: Any, seed: int = 0, size: float = 0.1) -> None:
    """Move factors as training would: none stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapters.parameters():
            factor.add_(torch.randn(factor.shape, generator=generator, dtype=torch.float32).to(factor) * size)
