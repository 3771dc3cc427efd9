"""Checkpoints of transformers' Trainer without the base.

The Trainer needs no help to train: what requires gradients is the factors, and so is all that its optimizer holds.
Only its checkpoints are of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback

from lora_compress.errors import SelectionError
from lora_compress.torch.adapter import all_factors
from lora_compress.torch.checkpoints import base_names

# What the Trainer looks at when it is made. It means PEFT's own layers, which a model is saved by: so only for then.
HAS_ADAPTERS = "_hf_peft_config_loaded"


@contextmanager
def quantised(model: nn.Module) -> Iterator[None]:
    """`with quantised(model): trainer = Trainer(model, …)`: the Trainer refuses quantised models without adapters, and
    knows PEFT's only.

    Raises `SelectionError` for a model without factors to train, and for a quantisation that gradients do not pass.
    """
    if not any(each.requires_grad for each in all_factors(model)):
        raise SelectionError("the model has no factors to train: `attach` first")
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_trainable:
        raise SelectionError(f"{type(quantiser).__name__} does not support training")
    before = getattr(model, HAS_ADAPTERS, False)
    setattr(model, HAS_ADAPTERS, True)
    try:
        yield
    finally:
        setattr(model, HAS_ADAPTERS, before)


class AdapterCheckpoints(TrainerCallback):
    """`Trainer(model, …, callbacks=[AdapterCheckpoints()])`: checkpoints hold what is trained, beside the optimizer.

    They resume on the same base with adapters attached in the same way, as all checkpoints of a Trainer do, and
    `load_best_model_at_end` works; it says that the base's keys are missing, which are in the model already. Models
    that the Trainer saves by FSDP's or DeepSpeed's own ways are saved whole.
    """

    def __init__(self) -> None:
        self._base: set[str] = set()
        self._before: tuple[Any, Any] | None = None

    # From the end of a step to what follows it: that is where the Trainer saves. Elsewhere `save_pretrained` means the
    # whole model, also after a run that failed.
    def _leave_out(self, *_: Any, model: Any, **__: Any) -> None:
        if self._before is None:
            kept = getattr(model, "_keys_to_ignore_on_save", None)
            self._base = self._base or base_names(model)
            self._before = model, kept
            model._keys_to_ignore_on_save = {*(kept or ()), *self._base}

    def _restore(self, *_: Any, **__: Any) -> None:
        if self._before is not None:
            model, kept = self._before
            model._keys_to_ignore_on_save = kept
            self._before = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """What is trained may be something else now."""
        self._restore()
        self._base = set()

    on_step_end = on_epoch_end = _leave_out
    on_save = on_step_begin = on_epoch_begin = on_train_end = _restore
