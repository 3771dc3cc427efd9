"""What the examples share: their options, and a model with text for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lora_compress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# A Llama of 0.8 M parameters that reads bytes and has read the Bible; it ships with the package.
TINY = Path(lora_compress.__file__).parent / "demo" / "data" / "base"
LICENSE = Path(__file__).parents[1] / "LICENSE"


def options(description: str) -> argparse.ArgumentParser:
    """Options that all examples have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="directory of a causal language model")
    parser.add_argument("--text", type=Path, default=LICENSE, help="UTF-8 text to learn")
    parser.add_argument("--context", type=int, default=64, help="tokens in a window")
    parser.add_argument("--output", type=Path, required=True, help="directory for the adapter; it may not exist")
    parser.add_argument("--decomposition", default="ab", help="any that `lora-compress plugins list` shows")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=5e-3, help="the tiny model's; 2e-4 to 1e-3 for real ones")
    return parser


def load(model: Path, text: Path, context: int) -> tuple[Any, torch.Tensor]:
    """The model, and windows of token ids (n, context) in a random order that is always the same."""
    torch.manual_seed(0)
    if model == TINY:
        ids = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    else:
        ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8")).input_ids)
    windows = ids[: len(ids) // context * context].view(-1, context)
    return AutoModelForCausalLM.from_pretrained(model), windows[torch.randperm(len(windows))]
