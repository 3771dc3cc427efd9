#!/usr/bin/env python3
"""Train an adapter with Accelerate, on any number of devices, with checkpoints of the adapter only.

accelerate launch examples/accelerate_loop.py --output adapter/ [--model DIR …] [--checkpoint FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from inputs import load, options
from lora_compress.torch import attach
from torch.utils.data import DataLoader


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return the losses of the first process."""
    parser = options(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, help="go on from it where it exists; written at the end")
    args = parser.parse_args(arguments)
    model, windows = load(args.model, args.text, args.context)

    # Before `prepare`, which wraps the model and replaces its forward.
    adapters = attach(model, args.decomposition, args.rank)
    optimizer = torch.optim.AdamW(adapters.param_groups(args.rate), weight_decay=0.0)
    accelerator = Accelerator(mixed_precision="bf16")
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(windows, batch_size=8))
    model.train()
    done = 0
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=accelerator.device, weights_only=True)
        adapters.load_state_dict(state["adapters"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]

    losses = []
    for ids in islice(loader, done, args.steps):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        accelerator.print(f"step {done + len(losses)}: loss {losses[-1]:.4f}")

    if args.checkpoint:
        state = {"adapters": adapters.state_dict(), "optimizer": optimizer.state_dict(), "step": done + len(losses)}
        accelerator.save(state, args.checkpoint)
    if accelerator.is_main_process:
        adapters.save(args.output, base=args.model)
    return losses


if __name__ == "__main__":
    main()
