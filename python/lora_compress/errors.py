"""Every exception that this package raises on purpose.

All derive from `LoraCompressError`, and their messages name the file or tensor and say what to do. Files that cannot be
read or written raise the usual subclasses of `OSError`.
"""

from lora_compress._native import CheckpointError, LoraCompressError, TensorError

__all__ = [
    "AdapterError",
    "CheckpointError",
    "LoraCompressError",
    "OutputExistsError",
    "PlanError",
    "PluginError",
    "SelectionError",
    "TensorError",
]


class AdapterError(LoraCompressError):
    """An adapter cannot be read, or says something that this package does not apply."""


class OutputExistsError(LoraCompressError):
    """The output exists and may not be replaced."""


class PlanError(LoraCompressError):
    """A file is not a plan, or the plan was made for other checkpoints."""


class PluginError(LoraCompressError):
    """A plugin cannot be loaded, collides with another, or failed; the message names it."""


class SelectionError(LoraCompressError):
    """The tensors of base and tuned do not fit together as asked, or a pattern matches none."""
