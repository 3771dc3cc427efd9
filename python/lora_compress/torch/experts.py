"""Experts that are stacked in parameters of one layer (transformers 5): the layer's own forward, with W + s·ΔW for W.

The forward reads its parameters as often as it likes, so the sums are formed once, before it begins, and read in their
place while it runs. Everything outside of a forward sees the base's parameters.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from lora_compress.model import is_stack
from lora_compress.torch.layers import FLOATS, Kind

HELD = "_held_stacks"


def stack_kind(path: str, module: nn.Module) -> Kind | None:
    """What a layer with stacks of experts is, by its path; None for one without."""
    names = tuple(
        name
        for name, each in module.named_parameters(recurse=False)
        if each.dtype in FLOATS and is_stack(f"{path}.{name}", list(each.shape))
    )
    return _kind(names, bool(getattr(module, "is_transposed", False))) if names else None


@cache
def _kind(names: tuple[str, ...], transposed: bool) -> Kind:
    return Kind("experts", _no_shape, _Members(names, transposed), transposed, stacks=names)


def _no_shape(_: Any) -> tuple[int, int]:
    raise NotImplementedError("a stack's matrices have the shape of its parameter")


class _Members:
    """What the class of such a layer has. (An object, not a closure, so that layers can be pickled.)"""

    def __init__(self, names: tuple[str, ...], transposed: bool) -> None:
        self.names, self.transposed = names, transposed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Members) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.names, self.transposed))

    def __call__(self, base: Any) -> dict[str, Any]:
        def forward(layer: Any, *args: Any, **options: Any) -> Any:
            formed = {}
            for name in self.names:
                weight = layer._parameters[name]
                for adapter in layer.adapter[name].running():
                    weight = adapter.add_to_stack(weight, transposed=self.transposed)
                formed[name] = weight
            setattr(layer, HELD, formed)
            try:
                return base.forward(layer, *args, **options)
            finally:
                delattr(layer, HELD)

        return {"forward": forward, **{name: _reading(name) for name in self.names}}


def _reading(name: str) -> property:
    def read(layer: Any) -> Any:
        held = layer.__dict__.get(HELD)
        return layer._parameters[name] if held is None else held[name]

    return property(read)
