#!/usr/bin/env python3
"""What it costs that a decomposition is a plugin: steps of training with `ab` by `attach`, against the same fused step
with B and A written into the layer's forward, and PEFT; and abc and a tensor train at the same rank. On any device.

python benchmarks/training_overhead.py [--device cpu] [--width 512] [--tokens 512] [--steps 30] [--json DIR]

Arms take turns within every round, and each is compared with the hard-coded one of its own round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_compress_abc
import lora_compress_tensor_train
import torch
from lora_compress.testing import loaded
from lora_compress.torch import attach
from lora_compress.torch.functional import adapted_linear
from measure import report
from peft import LoraConfig, get_peft_model
from torch import nn
from training import LINEARS
from transformers import LlamaConfig, LlamaForCausalLM

RANK = 16
WARM_UP = 3


class HardCoded(nn.Linear):  # type: ignore[misc]
    """A frozen layer with a pair, and nothing that could be otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The fused step."""
        return adapted_linear(x, self.weight, self.bias, self.b, self.a, 4.0)


def hard_coded(model: Any) -> Any:
    """Pairs without a plugin."""
    model.requires_grad_(requires_grad=False)
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in LINEARS:
            layer.__class__ = HardCoded
            layer.a = nn.Parameter(torch.randn(RANK, layer.in_features, device=layer.weight.device) * 0.01)
            layer.b = nn.Parameter(torch.zeros(layer.out_features, RANK, device=layer.weight.device))
    return model


def attached(decomposition: str) -> Callable[[Any], Any]:
    """A decomposition by its name."""

    def arm(model: Any) -> Any:
        attach(model, decomposition, RANK)
        return model

    return arm


def peft(model: Any) -> Any:
    """LoRA as PEFT has it when not told otherwise."""
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=LINEARS))


ARMS: dict[str, Callable[[Any], Any]] = {
    "hard-coded": hard_coded,
    "ab": attached("ab"),
    "abc": attached("abc"),
    "tensor-train": attached("tensor-train"),
    "PEFT": peft,
}


def main() -> None:
    """Take turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=512, hidden_size=options.width, intermediate_size=3 * options.width, num_attention_heads=8,
        num_key_value_heads=2, num_hidden_layers=options.layers,
    )  # fmt: skip
    ids = torch.arange(options.tokens, device=options.device)[None] * 7 % 512
    steps = {}
    with loaded(lora_compress_abc, lora_compress_tensor_train):
        for name, arm in ARMS.items():
            torch.manual_seed(0)
            steps[name] = step_of(arm(LlamaForCausalLM(config).to(options.device)), ids)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(WARM_UP + options.steps):
            for name, step in steps.items():
                seconds = step()
                if number >= WARM_UP:
                    times[name].append(seconds)
    first = times["hard-coded"]
    rows = [
        {
            "arm": name,
            "ms": 1000 * statistics.median(found),
            "least ms": 1000 * min(found),
            "of hard-coded": statistics.median(mine / base for mine, base in zip(found, first, strict=True)),
            "of its least": min(found) / min(first),
        }
        for name, found in times.items()
    ]
    report("training_overhead", rows, options.json)


def step_of(model: Any, ids: torch.Tensor) -> Callable[[], float]:
    """One forward and backward, in seconds."""

    def step() -> float:
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        if ids.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        model.zero_grad()
        return seconds

    return step


if __name__ == "__main__":
    main()
