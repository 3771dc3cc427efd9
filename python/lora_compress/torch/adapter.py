"""The factors of one weight as a module, and the adapters of one layer.

A layer has a child `adapter`, a dict of `Adapter`s by name, so that its factors are `<module>.adapter.<name>.factor0`,
`factor1`, … in the order of the contraction, and the base's own keys stay as they are. Factors that layers share belong
to the first of them; the others look them up there at every use, so that no state dict has a tensor twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lora_compress.decompositions.interface import Decomposition
from lora_compress.decompositions.products import plan_dense, plan_forward, plan_pair
from lora_compress.torch.functional import add_low_rank, compute_dtype

FACTOR = "factor"


class Adapter(nn.Module):
    """Factors of a (rows, cols) matrix ΔW and their scale s.

    stack: how many matrices there are, each with factors of its own: their number is the first index of every factor.
    lent: factors that belong to another layer's adapter, by number.
    frozen: numbers of the factors that are not trained.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        factors: Sequence[torch.Tensor],
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        stack: int = 0,
        lent: Mapping[int, Adapter] | None = None,
        frozen: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        network = decomposition.network
        sizes = network.sizes([factor[0] for factor in factors] if stack else factors)
        self.decomposition, self.rank, self.scale, self.dropout = decomposition, rank, scale, dropout
        self.enabled, self.stack = True, stack
        self.rows, self.cols = (math.prod(sizes[index] for index in side) for side in (network.rows, network.cols))
        # A dict hides the lenders from `named_modules`: they are no children.
        self._lent = dict(lent or {})
        self._names = [f"{FACTOR}{number}" for number in range(len(factors))]
        for number, values in enumerate(factors):
            if number not in self._lent:
                self.register_parameter(self._names[number], nn.Parameter(values, number not in frozen))
        self.pair_product = plan_pair(network, sizes, stack)
        self._is_pair = self.pair_product is not None and self.pair_product.is_made_of(factors)
        self._forward_product, self._dense_product = plan_forward(network, sizes), plan_dense(network, sizes, stack)
        self._col_sizes = [sizes[index] for index in network.cols]

    def factors(self) -> list[torch.Tensor]:
        """All factors in the order of the contraction, lent ones too."""
        own: dict[str, Any] = self._parameters
        if not self._lent:
            return [own[name] for name in self._names]
        return [
            self._lent[number]._parameters[name] if number in self._lent else own[name]
            for number, name in enumerate(self._names)
        ]

    def own_factors(self) -> dict[int, nn.Parameter]:
        """The factors that are this layer's to train and to store."""
        return {number: getattr(self, name) for number, name in enumerate(self._names) if number not in self._lent}

    def is_dropping(self) -> bool:
        """Whether inputs have to be thinned out first."""
        return self.dropout > 0.0 and self.training

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B (rows, r), A (r, cols) of a network that lowers to a pair, or stacks of them; differentiable."""
        factors = self.factors()
        if self._is_pair:
            return factors[0], factors[1]
        assert self.pair_product is not None  # noqa: S101 (whoever asks has looked)
        return self.pair_product(torch.einsum, factors)

    def dense(self) -> torch.Tensor:
        """ΔW without its scale, (rows, cols) or a stack of those, differentiable."""
        return self.dense_of(self.factors())

    def dense_of(self, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same of other factors of these sizes."""
        made: torch.Tensor = self._dense_product(torch.einsum, factors)
        return made.reshape(*made.shape[: self.stack > 0], self.rows, self.cols)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y + s·x·ΔWᵀ for x (…, cols), y (…, rows)."""
        if self.is_dropping():
            x = F.dropout(x, self.dropout)
        if self.pair_product is not None:
            return add_low_rank(y, x, *self.pair(), self.scale)
        return torch.add(y, self._product(x, y.dtype).reshape(y.shape), alpha=self.scale)

    def _product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x·ΔWᵀ by the network's own contraction."""
        split = x.to(dtype).reshape(-1, *self._col_sizes)
        result: torch.Tensor = self._forward_product(torch.einsum, [*(f.to(dtype) for f in self.factors()), split])
        return result

    def add_rows_to(self, y: torch.Tensor, ids: torch.Tensor, padding: int | None, factor: float) -> torch.Tensor:
        """y + s·factor·ΔW[ids] for an embedding's ids (…), y (…, cols)."""
        scale = self.scale * factor
        if self.pair_product is None:
            return torch.add(y, F.embedding(ids, self.dense(), padding).to(y.dtype), alpha=scale)
        b, a = self.pair()
        u, a = F.embedding(ids, b, padding).to(y.dtype), a.to(y.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), u.reshape(-1, u.shape[-1]), a, alpha=scale).view(y.shape)

    def add_kernel_to(self, y: torch.Tensor, x: torch.Tensor, layer: Any) -> torch.Tensor:
        """y + s·(x ∗ ΔW) for a convolution: by its A with the layer's kernel and a B of ones in every direction."""
        if self.is_dropping():
            x = F.dropout(x, self.dropout)
        x = x.to(compute_dtype(x))
        kernel, groups = layer.weight.shape[1:], layer.groups
        if self.pair_product is None or groups > 1:
            made = layer._conv_forward(x, self.dense().view(layer.weight.shape).to(x.dtype), None)
        else:
            b, a = self.pair()
            u = layer._conv_forward(x, a.reshape(-1, *kernel).to(x.dtype), None)
            made = CONVOLUTIONS[len(kernel) - 1](u, b.reshape(*b.shape, *[1] * (len(kernel) - 1)).to(x.dtype))
        return torch.add(y, made.to(y.dtype), alpha=self.scale)

    def add_to_stack(self, weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """W + s·ΔW of a stack (matrices, rows, cols), or of the transposes, in one step where there are pairs. It is in
        W's dtype: of a bf16 weight, steps that are small beside it are rounded away in the forward.
        """
        if self.pair_product is None:
            delta = self.dense().to(weight.dtype)
            return torch.add(weight, delta.mT if transposed else delta, alpha=self.scale)
        b, a = (factor.to(weight.dtype) for factor in self.pair())
        if transposed:
            b, a = a.mT, b.mT
        return torch.baddbmm(weight, b, a, alpha=self.scale)

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        return f"{self.decomposition.name}, {self.rows}×{self.cols}, rank={self.rank}, scale={self.scale:g}"


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Adapters(nn.ModuleDict):
    """The adapters of one layer by name, and how its weight came to be what it is.

    original: the base's weight as it was, where the layer's is another one now; the very tensor, so that giving it back
        gives back every bit.
    merged: names of the adapters that are in the weight.
    shifts: −s·B₀·A₀ of initialisations that begin at the base's weight (PiSSA), by name: functions that form it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.original: torch.Tensor | None = None
        self.merged: tuple[str, ...] = ()
        self.shifts: dict[str, Any] = {}

    def running(self) -> list[Adapter]:
        """The adapters that act beside the weight."""
        return [each for name, each in self._modules.items() if each.enabled and name not in self.merged]


def all_factors(module: nn.Module) -> list[nn.Parameter]:
    """The factors of all adapters in a module."""
    return [each for child in module.modules() if isinstance(child, Adapters) for each in child.parameters()]
