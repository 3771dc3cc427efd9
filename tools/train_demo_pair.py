#!/usr/bin/env python3
"""Train the base/tuned pair that `lora-compress demo` ships: a byte-level Llama with a tied embedding.

The base learns the King James Bible and a first glimpse of the Jargon File; the tuned model is a *full* fine-tune of it
on the whole Jargon File: every weight moves, no low-rank structure is planted. Both texts are in the public domain and
come from Debian:

    apt-get install bible-kjv-text dict-jargon dictzip
    bible -f 'Gen1:1-Rev22:21' > kjv.txt </dev/null
    dictzip -dc /usr/share/dictd/jargon.dict.dz > jargon.txt
    python tools/train_demo_pair.py kjv.txt jargon.txt python/lora_compress/demo/data

Needs torch and transformers. Takes about ten minutes on two cores. Weights are written in BF16, beside a piece of the
Jargon File that neither training saw (`heldout.txt`).
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 256
GLIMPSE = slice(0, 200_000)
HELDOUT = slice(900_000, 900_000 + 16_384)
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    dtype="bfloat16",
)


def batches(text: bytes, steps: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (batch,), generator=generator)
        yield torch.stack([data[start : start + CONTEXT] for start in starts])


def heldout_loss(model: LlamaForCausalLM, text: bytes) -> float:
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        return float(model.eval()(windows, labels=windows).loss)


def train(
    model: LlamaForCausalLM, text: bytes, *, steps: int, batch: int, lr: float, seed: int, heldout: bytes
) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps, pct_start=0.1)
    for step, ids in enumerate(batches(text, steps, batch, seed)):
        loss = model.train()(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  held-out {heldout_loss(model, heldout):.3f}", flush=True)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The head is tied: as in every Hugging Face checkpoint, the shared matrix is stored once, under the embedding's
    # name.
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kjv", type=Path)
    parser.add_argument("jargon", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--tuned-steps", type=int, default=400)
    args = parser.parse_args()

    kjv = re.sub(rb"(?m)^\w+?\d+:\d+ ", b"", args.kjv.read_bytes())
    jargon = args.jargon.read_bytes()
    heldout, tuning = jargon[HELDOUT], jargon[: HELDOUT.start] + jargon[HELDOUT.stop :]

    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).float()
    train(model, kjv + jargon[GLIMPSE], steps=args.base_steps, batch=16, lr=3e-3, seed=1, heldout=heldout)
    save(model, args.out / "base")
    train(model, tuning, steps=args.tuned_steps, batch=16, lr=5e-4, seed=2, heldout=heldout)
    save(model, args.out / "tuned")
    (args.out / "heldout.txt").write_bytes(heldout)


if __name__ == "__main__":
    main()
