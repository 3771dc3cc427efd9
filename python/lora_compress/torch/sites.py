"""Where adapters go: the weights of a model that are asked for, each once, and what becomes of their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_compress.errors import SelectionError
from lora_compress.torch.adapter import Adapter, Adapters
from lora_compress.torch.layers import CHILD, CONV1D, LINEAR, Kind, kind_of

ALL_LINEAR = "all-linear"
Targets = str | Callable[[str, nn.Module], bool]
WEIGHT = ".weight"


@dataclass(frozen=True)
class Layer:
    """A layer that can have adapters, by its path."""

    path: str
    module: Any
    kind: Kind


@dataclass(frozen=True)
class Target:
    """A weight that gets a ΔW: its name, and the layers that have it; several where it is tied."""

    tensor: str
    layers: tuple[Layer, ...]

    @property
    def leader(self) -> Layer:
        """The layer that its factors belong to."""
        return self.layers[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of ΔW."""
        return self.leader.kind.shape(self.leader.module)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is floats that can be read and changed."""
        return self.leader.kind.has_plain_weight(self.leader.module)

    def matrix(self) -> torch.Tensor:
        """The weight (rows, cols), as the base had it. Raises `SelectionError` for a quantised one."""
        if not self.is_plain:
            raise SelectionError(f"`{self.tensor}` is quantised: start from `zero`, which does not read it")
        module = self.leader.module
        child = module._modules.get(CHILD)
        kept = child.original if child is not None else None
        return self.leader.kind.as_matrix(module, (module.weight if kept is None else kept).detach())


@dataclass(frozen=True, eq=False)
class Site:
    """A target with its adapter. `group` names the first of the tensors that it shares factors with; `start` are the
    factors that the weight has lost, where the initialisation took them from it.
    """

    target: Target
    adapter: Adapter
    group: str
    start: Sequence[torch.Tensor] | None = None
    borrowed: Sequence[Adapter] = field(default=())

    @property
    def tensor(self) -> str:
        """Name of the weight."""
        return self.target.tensor

    @property
    def kind(self) -> Kind:
        """What the layer is."""
        return self.target.leader.kind

    @property
    def is_plain(self) -> bool:
        """Whether the weight is floats."""
        return self.target.is_plain

    @property
    def adapters(self) -> list[Adapter]:
        """Its adapter in every layer that has the weight."""
        return [self.adapter, *self.borrowed]

    def containers(self) -> Iterator[Adapters]:
        """The adapters of every layer that has the weight."""
        for layer in self.target.layers:
            yield layer.module._modules[CHILD]

    def can_change(self) -> bool:
        """Whether the weight can be given other values: it is neither quantised nor sharded."""
        return self.is_plain and not hasattr(self.target.leader.module.weight, "full_tensor")

    def refresh(self) -> None:
        """Give the weight the value that its adapters say: the base's to the bit, or

            W = round(W₀ − Σ s·ΔW₀ + Σ s·ΔW),     summed in float32 (float64 for a float64 weight), rounded once,

        over the adapters that took their start from it and those that are merged.
        """
        module, kind = self.target.leader.module, self.kind
        adapters: Adapters = module._modules[CHILD]
        terms = [shift for name, shift in adapters.shifts.items() if adapters[name].enabled]
        terms += [
            lambda each=adapters[name]: each.scale * each.dense() for name in adapters.merged if adapters[name].enabled
        ]
        if not terms:
            if adapters.original is not None:
                module.weight.data = adapters.original.to(module.weight.device)
                adapters.original = None
            return
        if not self.can_change():
            raise SelectionError(f"`{self.tensor}` is quantised or sharded: nothing is merged into it")
        if adapters.original is None:
            adapters.original = module.weight.data
        original = adapters.original.to(module.weight.device)
        wide = torch.promote_types(original.dtype, torch.float32)
        total = original.to(wide, copy=True)
        with torch.no_grad():
            for term in terms:
                total += kind.as_weight(module, term().to(device=total.device, dtype=wide))
        module.weight.data = total.to(original.dtype)


def find_targets(model: nn.Module, targets: Targets) -> list[Target]:
    """The weights that are asked for, in the model's order.

    "all-linear": every linear layer but the output head; else a regular expression that is searched in the paths of
    layers, or a function of path and layer. A weight that several layers share is one target, whichever was named.
    Raises `SelectionError` where nothing is found.
    """
    layers = [Layer(path, module, kind) for path, module in model.named_modules() if (kind := kind_of(module))]
    layers = [layer for layer in layers if not _is_bypassed(model, layer.path)]
    owners: dict[int, list[Layer]] = {}
    for layer in layers:
        owners.setdefault(id(layer.module.weight), []).append(layer)
    wanted = _chooser(model, targets)
    chosen = [tied for tied in owners.values() if any(wanted(layer) for layer in tied)]
    if not chosen:
        raise SelectionError(f"no layer that takes an adapter matches {targets!r}")
    for tied in chosen:
        if len({(layer.kind.shape(layer.module), layer.kind.transposed) for layer in tied}) > 1:
            raise SelectionError(f"`{tied[0].path}` and `{tied[1].path}` share a weight and read it differently")
        if taken := [layer.path for layer in tied if "forward" in vars(layer.module)]:
            raise SelectionError(
                f"the forward of `{taken[0]}` was replaced (by accelerate's hooks?), so an adapter would never run: "
                "attach before that"
            )
        if taken := [layer.path for layer in tied if hasattr(layer.module, CHILD) and not _has_adapters(layer)]:
            raise SelectionError(f"`{taken[0]}` has an attribute `{CHILD}` of its own")
    return [Target(tied[0].path + WEIGHT if tied[0].path else "weight", tuple(tied)) for tied in chosen]


def _chooser(model: nn.Module, targets: Targets) -> Callable[[Layer], bool]:
    if callable(targets):
        return lambda layer: bool(targets(layer.path, layer.module))
    if targets != ALL_LINEAR:
        pattern = re.compile(targets)
        return lambda layer: pattern.search(layer.path) is not None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return lambda layer: (
        layer.kind in (LINEAR, CONV1D) and layer.module is not head and id(layer.module.weight) not in tables
    )


def _has_adapters(layer: Layer) -> bool:
    return isinstance(layer.module._modules.get(CHILD), Adapters)


def _is_bypassed(model: nn.Module, path: str) -> bool:
    """Whether a layer's forward is never called: PyTorch's attention reads the weight of its output layer."""
    parent = path.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), nn.MultiheadAttention)
