#!/usr/bin/env python3
"""Train an adapter in a plain PyTorch loop.

python examples/plain_loop.py --output adapter/ [--model DIR --text FILE --rate 5e-4]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from inputs import load, options
from lora_compress.torch import attach

BATCH = 8


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return the losses."""
    args = options(__doc__ or "").parse_args(arguments)
    model, windows = load(args.model, args.text, args.context)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()

    adapters = attach(model, args.decomposition, args.rank)
    print(adapters)
    optimizer = torch.optim.AdamW(adapters.param_groups(args.rate), weight_decay=0.0)
    losses = []
    for step in range(args.steps):
        ids = windows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)].to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step + 1}: loss {losses[-1]:.4f}")

    # What PEFT and vLLM load, and `lora-compress merge BASE adapter/ -o merged/` merges.
    adapters.save(args.output, base=args.model)
    # The same in memory: first one rounding into the weights, then the base again, to the bit.
    adapters.merge()
    adapters.detach()
    return losses


if __name__ == "__main__":
    main()
