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
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_compress.torch.adapter import Adapters
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
    forward: Callable[[type], Callable[..., torch.Tensor]]
    transposed: bool = False
    looks_up: bool = False

    def as_weight(self, layer: Any, delta: torch.Tensor) -> torch.Tensor:
        """ΔW (rows, cols) in the layout of the layer's weight."""
        return (delta.t() if self.transposed else delta).reshape(layer.weight.shape)

    def as_matrix(self, layer: Any, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the layer as a matrix (rows, cols)."""
        rows, cols = self.shape(layer)
        return weight.t() if self.transposed else weight.reshape(rows, cols)

    def has_plain_weight(self, layer: Any) -> bool:
        """Whether the weight is a matrix of floats: not packed by a quantisation."""
        weight = getattr(layer, "weight", None)
        return (
            isinstance(weight, torch.Tensor)
            and weight.dtype in FLOATS
            and weight.numel() == math.prod(self.shape(layer))
        )


def _linear_forward(base: Any) -> Callable[..., torch.Tensor]:
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

    return forward


def _embedding_forward(base: Any) -> Callable[..., torch.Tensor]:
    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = base.forward(self, ids)
        # Gemma's, Bart's and others multiply what they look up.
        factor = float(getattr(self, "scalar_embed_scale", getattr(self, "embed_scale", 1.0)))
        for adapter in self.adapter.running():
            y = adapter.add_rows_to(y, ids, self.padding_idx, factor)
        return y

    return forward


def _convolution_forward(base: Any) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = base.forward(self, x)
        for adapter in self.adapter.running():
            y = adapter.add_kernel_to(y, x, self)
        return y

    return forward


LINEAR = Kind("linear", lambda layer: (layer.out_features, layer.in_features), _linear_forward)
CONV1D = Kind("conv1d", lambda layer: (layer.nf, layer.nx), _linear_forward, transposed=True)
EMBEDDING = Kind(
    "embedding", lambda layer: (layer.num_embeddings, layer.embedding_dim), _embedding_forward, looks_up=True
)
CONVOLUTION = Kind(
    "convolution",
    lambda layer: (layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)),
    _convolution_forward,
)


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
        return _rebuild, (base, kind.name), self.__dict__

    members = {"forward": kind.forward(base), "__reduce_ex__": reduce, "__doc__": base.__doc__}
    made: type = type(f"Adapted{base.__name__}", (base,), {**members, "__module__": __name__, "unadapted": base})
    return made


def _rebuild(base: type, kind: str) -> Any:
    found = next(each for each in (LINEAR, CONV1D, EMBEDDING, CONVOLUTION) if each.name == kind)
    made: Any = adapted_class(base, found)
    return made.__new__(made)


def swap_in(layer: nn.Module, kind: Kind) -> Adapters:
    """The adapters of a layer, which has the class for them from now on."""
    if not hasattr(type(layer), "unadapted"):
        layer.add_module(CHILD, Adapters())
        base: Any = type(layer)
        layer.__class__ = adapted_class(base, kind)
    adapters: Adapters = getattr(layer, CHILD)
    return adapters


def swap_out(layer: Any) -> None:
    """Give a layer its own class back."""
    del layer._modules[CHILD]
    layer.__class__ = type(layer).unadapted
