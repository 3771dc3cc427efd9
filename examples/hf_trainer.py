#!/usr/bin/env python3
"""Train an adapter with transformers' Trainer. Its checkpoints hold the adapter only; --resume goes on from the last.

python examples/hf_trainer.py --output adapter/ [--model DIR --text FILE --rate 5e-4] [--resume]
"""

from __future__ import annotations

from collections.abc import Sequence

from inputs import load, options
from lora_compress.torch import attach
from lora_compress.torch.hf_trainer import AdapterCheckpoints
from transformers import Trainer, TrainingArguments


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train, save, and return the losses."""
    parser = options(__doc__ or "")
    parser.add_argument("--checkpoints", default="checkpoints")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(arguments)
    model, windows = load(args.model, args.text, args.context)

    adapters = attach(model, args.decomposition, args.rank)
    trainer = Trainer(
        model,
        TrainingArguments(
            args.checkpoints,
            max_steps=args.steps,
            learning_rate=args.rate,
            logging_steps=1,
            save_steps=10,
            report_to="none",
        ),
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        callbacks=[AdapterCheckpoints()],
    )
    trainer.train(resume_from_checkpoint=args.resume)

    adapters.save(args.output, base=args.model)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
