"""A model in memory as the formats see one on disk: names, shapes and configuration, no values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import nn

from lora_compress._native import Checkpoint
from lora_compress.model import Model, stack_of
from lora_compress.torch.layers import CHILD


@dataclass(frozen=True)
class LiveTensors:
    """What formats ask of a checkpoint: of the base's tensors, without adapters."""

    path: Path
    shapes: dict[str, list[int]]

    def tensors(self) -> list[Any]:
        """Name and shape of every tensor, sorted."""
        return [SimpleNamespace(name=name, shape=shape) for name, shape in sorted(self.shapes.items())]

    def info(self, name: str) -> Any:
        """Shape of a tensor, or of a matrix of a stack."""
        stack = stack_of(name)
        shape = self.shapes[stack[0]][1:] if stack else self.shapes[name]
        return SimpleNamespace(name=name, shape=shape)

    def __contains__(self, name: object) -> bool:
        stack = stack_of(str(name))
        return name in self.shapes if stack is None else stack[1] < self.shapes.get(stack[0], [0])[0]

    def __len__(self) -> int:
        return len(self.shapes)


def live_model(model: nn.Module) -> Model:
    """A module, its configuration where it has one, and the name that it was loaded by. A parameter that two modules
    share is listed once, as checkpoints have it.
    """
    configuration: Any = getattr(model, "config", None)
    config: dict[str, Any] = configuration.to_dict() if hasattr(configuration, "to_dict") else {}
    # Names are those of this module, whatever it was a part of when its configuration was written.
    config["architectures"] = [_class_name(model)]
    inside = f".{CHILD}."
    shapes = {name: list(each.shape) for name, each in model.named_parameters() if inside not in f".{name}"}
    tensors = LiveTensors(Path(name_of(model)), shapes)
    return Model(tensors.path, cast("Checkpoint", tensors), config)


def name_of(model: nn.Module) -> str:
    """What a model was loaded by; its class's name where nothing says."""
    return str(getattr(model, "name_or_path", "")) or _class_name(model)


def _class_name(model: nn.Module) -> str:
    # FSDP2 and torch.compile give models other classes.
    return type(model).__name__.removeprefix("FSDP")
