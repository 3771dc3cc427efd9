#!/usr/bin/env python3
"""Train an adapter with Lightning. Its checkpoints hold the adapter only; --resume goes on from one.

python examples/lightning_callback.py --output adapter/ [--model DIR --text FILE --rate 5e-4] [--resume FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from inputs import load, options
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lora_compress.torch import attach
from lora_compress.torch.lightning import AdapterCheckpoints
from torch.utils.data import DataLoader


class Adapted(LightningModule):
    """A causal language model with adapters."""

    def __init__(self, model: Any, decomposition: str, rank: int, rate: float) -> None:
        super().__init__()
        self.model, self.rate, self.losses = model, rate, list[float]()
        self.adapters = attach(model, decomposition, rank)

    def training_step(self, ids: torch.Tensor) -> torch.Tensor:
        """Loss of a batch (n, context) of token ids."""
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Only the factors are trained."""
        return torch.optim.AdamW(self.adapters.param_groups(self.rate), weight_decay=0.0)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return the losses."""
    parser = options(__doc__ or "")
    parser.add_argument("--checkpoints", default="checkpoints")
    parser.add_argument("--resume", help="a checkpoint")
    args = parser.parse_args(arguments)
    model, windows = load(args.model, args.text, args.context)

    module = Adapted(model, args.decomposition, args.rank, args.rate)
    batches = DataLoader(windows, batch_size=8)
    trainer = Trainer(
        # Whole epochs: with `max_steps`, Lightning repeats a batch when it goes on from a checkpoint.
        max_epochs=-(-args.steps // len(batches)),
        precision="bf16-mixed",
        callbacks=[AdapterCheckpoints(), ModelCheckpoint(args.checkpoints, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, batches, ckpt_path=args.resume)

    module.adapters.save(args.output, base=args.model)
    return module.losses


if __name__ == "__main__":
    main()
