"""Layers that take adapters: how a layer's weight is a matrix, and what its class becomes.

A layer keeps its identity; its class is swapped for a subclass that adds the adapters' part to what the layer does
anyway. There is one subclass for each class, so that compilers see few types, `isinstance` holds, and setting the old
class undoes it.

| layer | weight | ΔW as a matrix |
|---|---|---|
| Linear, and whatever has `in_features` and `out_features` (quantised ones) | (out, in) | the same |
| transformers' Conv1D | (in, out) | (out, in) |
| Embedding | (vocabulary, dim) | the same; rows are looked up |
| Conv1d, 2d, 3d | (out, in / groups, kernel…) | (out, in / groups · kernel) |
| stacked experts (`experts.py`) | (experts, out, in), or (experts, in, out) | a stack of (out, in) |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_compress.torch.adapter import Adapter, Adapters
from lora_compress.torch.functional import adapted_linear, is_traced

CHILD = "adapter"
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    transposed: the weight is stored as (in, out). looks_up: the rows of ΔW are on the input's side.
    """

    name: str
    shape: Callable[[Any], tuple[int, int]]
    members: Callable[[Any], dict[str, Any]]
    transposed: bool = False
    looks_up: bool = False
    # Parameters of a layer that has several, each a stack of matrices.
    stacks: tuple[str, ...] = ()

    def as_weight(self, delta: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """ΔW (rows, cols), or a stack, in the layout of a weight."""
        return (delta.mT if self.transposed else delta).reshape(shape)

    def as_matrix(self, weight: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """A weight, or one matrix of a stack, as ΔW is (rows, cols)."""
        return weight.mT if self.transposed else weight.reshape(shape)


def _linear(base: Any) -> dict[str, Any]:
    # Only where the forward is known to be this product may it be made in one step with the adapter's.
    is_stored_transposed = base.forward is Conv1D.forward
    is_plain = is_stored_transposed or base.forward is nn.Linear.forward

    def forward(self: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        running = self.adapter.running()
        if is_plain and running:
            first, weight, bias = running[0], self.weight, self.bias
            if first.pair_product is not None and not first.is_dropping():
                b, a = first.pair()
                is_frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
                if is_frozen and not is_traced(x, weight, b, a):
                    y = adapted_linear(x, weight.t() if is_stored_transposed else weight, bias, b, a, first.scale)
                    for adapter in running[1:]:
                        y = adapter.add_to(y, x)
                    return y
        y = base.forward(self, x, *args, **options)
        for adapter in running:
            y = adapter.add_to(y, x)
        return y

    return {"forward": forward}


def _embedding(base: Any) -> dict[str, Any]:
    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = base.forward(self, ids)
        for adapter in self.adapter.running():
            y = adapter.add_rows_to(y, ids, self.padding_idx, embedding_factor(self))
        return y

    return {"forward": forward}


def embedding_factor(layer: Any) -> float:
    """What an embedding multiplies its rows by when it looks them up, as Gemma's, Bart's and others do."""
    return float(getattr(layer, "scalar_embed_scale", getattr(layer, "embed_scale", 1.0)))


def _convolution(base: Any) -> dict[str, Any]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = base.forward(self, x)
        for adapter in self.adapter.running():
            y = adapter.add_kernel_to(y, x, self)
        return y

    return {"forward": forward}


# Functions, not lambdas: a layer is pickled with its kind.
def _linear_shape(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _conv1d_shape(layer: Any) -> tuple[int, int]:
    return layer.nf, layer.nx


def _embedding_shape(layer: Any) -> tuple[int, int]:
    return layer.num_embeddings, layer.embedding_dim


def _convolution_shape(layer: Any) -> tuple[int, int]:
    return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)


LINEAR = Kind("linear", _linear_shape, _linear)
CONV1D = Kind("conv1d", _conv1d_shape, _linear, transposed=True)
EMBEDDING = Kind("embedding", _embedding_shape, _embedding, looks_up=True)
CONVOLUTION = Kind("convolution", _convolution_shape, _convolution)


def kind_of(layer: nn.Module) -> Kind | None:
    """What a layer is; None for one that takes no adapter."""
    if isinstance(layer, Conv1D):
        return CONV1D
    if isinstance(layer, nn.Embedding):
        return EMBEDDING
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return CONVOLUTION
    if isinstance(layer, nn.Linear) or all(
        isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features")
    ):
        return LINEAR
    return None


@cache
def adapted_class(base: type, kind: Kind) -> type:
    """The subclass of a layer's class that adds its adapters."""

    def reduce(self: Any, _: Any) -> Any:
        # A class that is made at run time is not found by its name.
        return _rebuild, (base, kind), self.__dict__

    members = {**kind.members(base), "__reduce_ex__": reduce, "__doc__": base.__doc__}
    made: type = type(f"Adapted{base.__name__}", (base,), {**members, "__module__": __name__, "unadapted": base})
    return made


def _rebuild(base: Any, kind: Kind) -> Any:
    made: Any = adapted_class(base, kind)
    return made.__new__(made)


def swap_in(layer: nn.Module, kind: Kind) -> None:
    """Give a layer the class that has adapters, and a place for them."""
    if not hasattr(type(layer), "unadapted"):
        child = nn.ModuleDict({name: Adapters() for name in kind.stacks}) if kind.stacks else Adapters()
        layer.add_module(CHILD, child)
        base: Any = type(layer)
        layer.__class__ = adapted_class(base, kind)


def swap_out(layer: Any) -> None:
    """Give a layer its own class back, where no adapter is left."""
    if not hasattr(type(layer), "unadapted") or any(isinstance(each, Adapter) for each in layer.modules()):
        return
    del layer._modules[CHILD]
    layer.__class__ = type(layer).unadapted
