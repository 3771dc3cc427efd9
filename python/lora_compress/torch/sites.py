"""Where adapters go: the weights of a model that are asked for, each once, and what becomes of their values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_compress.errors import SelectionError
from lora_compress.model import matrices
from lora_compress.torch.adapter import Adapter, Adapters
from lora_compress.torch.experts import stack_kind
from lora_compress.torch.layers import CHILD, CONV1D, FLOATS, LINEAR, Kind, kind_of

ALL_LINEAR = "all-linear"
Targets = str | Callable[[str, nn.Module], bool]
WEIGHT = ".weight"


@dataclass(frozen=True)
class Layer:
    """A layer that can have adapters, by its path."""

    path: str
    module: Any
    kind: Kind
    parameter: str = "weight"

    @property
    def weight(self) -> Any:
        """The parameter that ΔW is added to."""
        return self.module._parameters[self.parameter] if self.kind.stacks else self.module.weight

    @property
    def tensor(self) -> str:
        """Its name in the model."""
        return f"{self.path}.{self.parameter}".removeprefix(".")

    @property
    def stack(self) -> int:
        """How many matrices it has; 0 for one that is a matrix."""
        return int(self.weight.shape[0]) if self.kind.stacks else 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of ΔW, or of each in a stack."""
        if not self.kind.stacks:
            return self.kind.shape(self.module)
        rows, cols = self.weight.shape[1:]
        return (cols, rows) if self.kind.transposed else (rows, cols)

    @property
    def place(self) -> str:
        """Where its adapters are in the model."""
        place = f"{self.path}.{CHILD}".removeprefix(".")
        return f"{place}.{self.parameter}" if self.kind.stacks else place

    def container(self) -> Adapters | None:
        """Its adapters; None before the first."""
        child: Any = self.module._modules.get(CHILD)
        found: Adapters | None = child if child is None or not self.kind.stacks else child[self.parameter]
        return found


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
        return self.leader.shape

    @property
    def matrices(self) -> list[str]:
        """Names of what is decomposed: its own, or that of every matrix of a stack."""
        return matrices(self.tensor, self.leader.stack) if self.leader.kind.stacks else [self.tensor]

    @property
    def is_plain(self) -> bool:
        """Whether the weight is floats that can be read and changed."""
        weight, count = self.leader.weight, max(self.leader.stack, 1) * math.prod(self.shape)
        return isinstance(weight, torch.Tensor) and weight.dtype in FLOATS and weight.numel() == count

    def matrix(self, number: int = 0) -> torch.Tensor:
        """The weight (rows, cols), or one of a stack, as the base had it. Raises `SelectionError` for a quantised
        one.
        """
        if not self.is_plain:
            raise SelectionError(f"`{self.tensor}` is quantised: start from `zero`, which does not read it")
        adapters = self.leader.container()
        kept = adapters.original if adapters is not None else None
        weight = (self.leader.weight if kept is None else kept).detach()
        return self.leader.kind.as_matrix(weight[number] if self.leader.stack else weight, self.shape)


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
            container = layer.container()
            assert container is not None  # noqa: S101 (a site has adapters)
            yield container

    def can_change(self) -> bool:
        """Whether the weight can be given other values: it is neither quantised nor sharded."""
        return self.is_plain and not hasattr(self.target.leader.weight, "full_tensor")

    def refresh(self) -> None:
        """Give the weight the value that its adapters say: the base's to the bit, or

            W = round(W₀ − Σ s·ΔW₀ + Σ s·ΔW),     summed in float32 (float64 for a float64 weight), rounded once,

        over the adapters that took their start from it and those that are merged.
        """
        weight, adapters = self.target.leader.weight, next(self.containers())
        terms = [shift for name, shift in adapters.shifts.items() if adapters[name].enabled]
        terms += [
            lambda each=adapters[name]: each.scale * each.dense() for name in adapters.merged if adapters[name].enabled
        ]
        if not terms:
            if adapters.original is not None:
                weight.data = adapters.original.to(weight.device)
                adapters.original = None
            return
        if not self.can_change():
            raise SelectionError(f"`{self.tensor}` is quantised or sharded: nothing is merged into it")
        if adapters.original is None:
            adapters.original = weight.data
        original = adapters.original.to(weight.device)
        wide = torch.promote_types(original.dtype, torch.float32)
        total = original.to(wide, copy=True)
        with torch.no_grad():
            for term in terms:
                total += self.kind.as_weight(term().to(device=total.device, dtype=wide), total.shape)
        weight.data = total.to(original.dtype)


def by_group(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites that share factors side by side, in the order of the first of each."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    return list(groups.values())


def find_targets(model: nn.Module, targets: Targets) -> list[Target]:
    """The weights that are asked for, in the model's order, stacked experts last.

    "all-linear": every linear layer but the output head; else a regular expression that is searched in the paths of
    layers, or a function of path and layer. A weight that several layers share is one target, whichever was named.
    Raises `SelectionError` where nothing is found.
    """
    layers = [Layer(path, module, kind) for path, module in model.named_modules() if (kind := kind_of(module))]
    layers = [layer for layer in layers if not _is_bypassed(model, layer.path)]
    layers += [
        Layer(path, module, kind, name)
        for path, module in model.named_modules()
        if (kind := stack_kind(path, module))
        for name in kind.stacks
    ]
    owners: dict[int, list[Layer]] = {}
    for layer in layers:
        owners.setdefault(id(layer.weight), []).append(layer)
    wanted = _chooser(model, targets)
    chosen = [tied for tied in owners.values() if any(wanted(layer) for layer in tied)]
    if not chosen:
        raise SelectionError(f"no layer that takes an adapter matches {targets!r}")
    for tied in chosen:
        if len({(layer.shape, layer.kind.transposed) for layer in tied}) > 1:
            raise SelectionError(f"`{tied[0].path}` and `{tied[1].path}` share a weight and read it differently")
        if taken := [layer.path for layer in tied if "forward" in vars(layer.module)]:
            raise SelectionError(
                f"the forward of `{taken[0]}` was replaced (by accelerate's hooks?), so an adapter would never run: "
                "attach before that"
            )
        if taken := [layer.path for layer in tied if hasattr(layer.module, CHILD) and not _has_adapters(layer)]:
            raise SelectionError(f"`{taken[0]}` has an attribute `{CHILD}` of its own")
    return [Target(tied[0].tensor, tuple(tied)) for tied in chosen]


def _chooser(model: nn.Module, targets: Targets) -> Callable[[Layer], bool]:
    if callable(targets):
        return lambda layer: bool(targets(layer.path, layer.module))
    if targets != ALL_LINEAR:
        pattern = re.compile(targets)
        return lambda layer: pattern.search(layer.tensor.removesuffix(WEIGHT)) is not None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return lambda layer: layer.kind in (LINEAR, CONV1D) and layer.module is not head and id(layer.weight) not in tables


def _has_adapters(layer: Layer) -> bool:
    return hasattr(type(layer.module), "unadapted")


def _is_bypassed(model: nn.Module, path: str) -> bool:
    """Whether a layer's forward is never called: PyTorch's attention reads the weight of its output layer."""
    parent = path.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), nn.MultiheadAttention)
