"""Checkpoints of Lightning without the base (`pip install lightning`)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from lora_compress.torch.checkpoints import base_names


class AdapterCheckpoints(Callback):
    """`Trainer(…, callbacks=[AdapterCheckpoints()])`: checkpoints hold what is trained, beside the optimizer.

    They resume (`fit(…, ckpt_path=…)`) in a module whose base is loaded and has adapters attached in the same way.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let checkpoints lack what they lack."""
        pl_module.strict_loading = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take the base out of a checkpoint."""
        base = base_names(pl_module)
        checkpoint["state_dict"] = {name: each for name, each in checkpoint["state_dict"].items() if name not in base}
