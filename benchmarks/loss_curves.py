#!/usr/bin/env python3
"""SmolLM2-135M fine-tuned on the Jargon File by pairs, three factors and a tensor train of equally many parameters;
each best adapter then merged by the command line, and the merged model's loss beside the adapted one's.

python benchmarks/loss_curves.py --cache DIR --json DIR [--steps N]

Every arm sees the same batches of one window of 512 tokens, in bf16 autocast over float32 weights, with AdamW and one
cycle of the learning rate; each has its own best of the rates. Losses are of text that was not trained on, in nats per
token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import lora_compress_abc
import lora_compress_tensor_train
import torch
from lora_compress.testing import loaded
from lora_compress.torch import AdapterSet, attach
from measure import report
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).with_name("ranks")))
from fine_tunes import HELDOUT_TOKENS, jargon_tokens, pair, windows
from plot import line_chart

ARMS = ("ab", "abc", "tensor-train")
RATES = (5e-4, 2e-3)
# As many parameters as pairs of this rank have in every linear layer.
RANK = 8
HELDOUT_WINDOWS = 4


def heldout_loss(model: Any, text: torch.Tensor, *, autocast: bool = True) -> float:
    """Nats per token over windows of text."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return sum(float(model(each[None], labels=each[None]).loss) for each in text) / len(text)


def train(model: Any, adapters: AdapterSet, rate: float, batches: list[torch.Tensor], text: torch.Tensor) -> Any:
    """Held-out losses by step, at powers of two and at the end."""
    optimizer = torch.optim.AdamW(adapters.param_groups(rate), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=len(batches), pct_start=0.1)
    measured = {*takewhile(lambda step: step < len(batches), (2**n for n in count())), len(batches)}
    curve = []
    for step, ids in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in measured:
            curve.append((step, heldout_loss(model, text)))
    return curve


def merged_losses(adapters: AdapterSet, base: Path, text: torch.Tensor) -> dict[str, float]:
    """Loss in float32 of the adapted model, and of what the command line makes of base and adapter: in the base's BF16,
    and in F32, which rounds nothing away.
    """
    from transformers import AutoModelForCausalLM

    losses = {"adapted": heldout_loss(adapters.model, text, autocast=False)}
    with tempfile.TemporaryDirectory() as scratch:
        adapters.save(f"{scratch}/adapter", base=base)
        for dtype in ("BF16", "F32"):
            command = [sys.executable, "-m", "lora_compress", "merge", str(base), f"{scratch}/adapter", "--quiet"]
            subprocess.run([*command, "--dtype", dtype, "-o", f"{scratch}/{dtype}"], check=True)
            model = AutoModelForCausalLM.from_pretrained(f"{scratch}/{dtype}", dtype=torch.float32)
            losses[f"merged {dtype}"] = heldout_loss(model, text, autocast=False)
    return losses


def measure_all(cache: Path, steps: int) -> tuple[list[dict[str, Any]], float]:
    """A row for each arm and rate, and the base's loss."""
    from transformers import AutoModelForCausalLM

    folder = pair(cache, "smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    batches = list(windows(jargon_tokens(cache)[:-HELDOUT_TOKENS], steps, 1))
    text = load_file(folder / "heldout.safetensors")["ids"][:HELDOUT_WINDOWS]
    ranks = {name: RANK for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
    start, rows = heldout_loss(model, text), []
    for arm in ARMS:
        runs = []
        for rate in RATES:
            adapters = attach(model, arm, ranks=ranks)
            curve = train(model, adapters, rate, batches, text)
            runs.append({"arm": arm, "parameters": sum(each.numel() for each in adapters.parameters()), "rate": rate})
            runs[-1] |= {"loss": curve[-1][1], "curve": curve, "state": adapters.state_dict()}
            print(arm, rate, curve, flush=True)
            adapters.detach()
        best = min(runs, key=lambda run: run["loss"])
        adapters = attach(model, arm, ranks=ranks)
        adapters.load_state_dict(best["state"])
        best |= merged_losses(adapters, folder / "base", text)
        adapters.detach()
        rows += [{key: value for key, value in run.items() if key != "state"} for run in runs]
    return rows, start


def draw(path: Path, rows: list[dict[str, Any]], start: float) -> None:
    """Each arm at its best rate, and the base as a line."""
    lines = {arm: min((r for r in rows if r["arm"] == arm), key=lambda row: row["loss"])["curve"] for arm in ARMS}
    steps = [step for step, _ in lines["ab"]]
    lines["base"] = [(steps[0], start), (steps[-1], start)]
    panel = ("SmolLM2-135M on the Jargon File", lines)
    path.write_text(line_chart([panel], "steps", "nats per token", 1e9, 1, lambda step: f"{step:g}"))


def main() -> None:
    """Train all arms, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    # Beside whatever is installed: the plugins of this clone.
    with loaded(lora_compress_abc, lora_compress_tensor_train):
        rows, start = measure_all(args.cache, args.steps)
    report("loss-curves", rows, args.json, base_loss=start, steps=args.steps, tokens_a_step=512)
    draw(args.json.parent / "loss-curves.svg", rows, start)


if __name__ == "__main__":
    main()
