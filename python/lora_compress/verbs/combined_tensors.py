"""What adapters together make of one tensor after the other: its σ, and the best pair of a rank.

`Sum` stays in the space of factors: the sum of adapters is one pair of factors side by side. `Consensus` is of TIES and
DARE, whose result is no product of few factors: it is formed densely whenever it is needed, a few tensors at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lora_compress._native import Delta, Spectrum, round_to
from lora_compress.decompositions import ab
from lora_compress.errors import TensorError
from lora_compress.ranks.recompress import Product, decompose, distance
from lora_compress.verbs.decompose import empty
from lora_compress.verbs.methods import Method
from lora_compress.verbs.plan import TOLERANCE
from lora_compress.verbs.task_vectors import TaskVector, merge

if TYPE_CHECKING:
    from lora_compress.adapter import Adapter, Float32Matrix

# How far above the best error of their rank factors may be, relatively: what `extract` takes when not told otherwise.
WITHIN = 1e-4

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Factors:
    """A pair as it is stored, and what it leaves: ‖ΔW‖² and ‖ΔW − B·A‖²."""

    b: Float32Matrix
    a: Float32Matrix
    energy: float
    lost: float


class Combined(Protocol):
    """Tensors that adapters make together. All methods may run in threads, one at a time for each tensor."""

    @property
    def is_cheap(self) -> bool:
        """Whether σ cost no more than what finding the factors costs anyway."""
        ...

    def cost(self, tensor: str) -> int:
        """What `ordered_map` is to take a tensor for."""
        ...

    def usual_rank(self, tensor: str) -> int:
        """The rank where nobody asks for one."""
        ...

    def spectrum(self, tensor: str, count: int) -> Spectrum | None:
        """The leading σ, `count` of them or all; None where ΔW is 0."""
        ...

    def energy(self, tensor: str) -> float:
        """‖ΔW‖²."""
        ...

    def factors(self, tensor: str, rank: int, dtype: str) -> Factors:
        """The best pair of up to `rank`, rounded."""
        ...


class Sum:
    """Σ w·ΔW, exactly. Its usual rank is the number of its directions."""

    is_cheap = True

    def __init__(self, parts: Sequence[Adapter], weights: Sequence[float], shapes: Shapes) -> None:
        self._parts, self._weights, self._shapes = parts, weights, shapes
        self._products: dict[str, Product] = {}

    def cost(self, tensor: str) -> int:
        """Little, as factors are thin: a dozen results may wait to be written."""
        return 1 << 22

    def usual_rank(self, tensor: str) -> int:
        """As many as it has directions."""
        return len(self._product(tensor).sigma)

    def spectrum(self, tensor: str, count: int) -> Spectrum | None:
        """All σ."""
        found = self._product(tensor).sigma
        shape = self._shapes[tensor]
        sigma = np.zeros(min(shape))
        sigma[: found.size] = found
        energy = float(np.sum(sigma**2))
        return Spectrum(shape, sigma.tolist(), energy) if energy else None

    def energy(self, tensor: str) -> float:
        """‖ΔW‖²."""
        return float(np.sum(decompose(*self._side_by_side(tensor)).sigma ** 2))

    def factors(self, tensor: str, rank: int, dtype: str) -> Factors:
        """The best pair of up to `rank`, rounded."""
        product = self._product(tensor)
        b, a = (round_to(factor, dtype) for factor in product.truncated(rank))
        return Factors(b, a, float(np.sum(product.sigma**2)), distance((product.b, product.a), (b, a)))

    def _product(self, tensor: str) -> Product:
        if tensor not in self._products:
            self._products[tensor] = decompose(*self._side_by_side(tensor))
        return self._products[tensor]

    def _side_by_side(self, tensor: str) -> tuple[Float32Matrix, Float32Matrix]:
        """All adapters' factors, weights in the left ones."""
        left, right = map(list, zip(empty(*self._shapes[tensor]), strict=True))
        for part, weight in zip(self._parts, self._weights, strict=True):
            for pair in part.terms(tensor):
                if not isinstance(pair, tuple):
                    # A decomposition without a small pair: ΔW itself beside an identity, the smaller way round.
                    identity = np.eye(min(pair.shape), dtype=np.float32)
                    pair = (identity, pair) if pair.shape[0] <= pair.shape[1] else (pair, identity)
                left.append(pair[0] * np.float32(weight))
                right.append(pair[1])
        return np.hstack(left), np.vstack(right)


class Consensus:
    """What TIES or DARE make of the adapters' ΔW. Its usual rank is the largest that the tensor has in any of them."""

    is_cheap = False

    def __init__(self, parts: Sequence[Adapter], weights: Sequence[float], shapes: Shapes, method: Method) -> None:
        self._parts, self._weights, self._shapes, self._method = parts, weights, shapes, method

    def cost(self, tensor: str) -> int:
        """Elements; each takes some ten bytes while it is worked on."""
        rows, cols = self._shapes[tensor]
        return rows * cols

    def usual_rank(self, tensor: str) -> int:
        """The largest in any adapter."""
        return max((vector.rank for vector in self._vectors(tensor).values()), default=0)

    def spectrum(self, tensor: str, count: int) -> Spectrum | None:
        """The leading σ, as many as asked."""
        delta = self._delta(tensor)
        count = min(count, *delta.shape)
        return delta.spectrum(count, seed=self._method.seed, tolerance=TOLERANCE) if delta.energy else None

    def energy(self, tensor: str) -> float:
        """‖ΔW‖²."""
        return self._delta(tensor).energy

    def factors(self, tensor: str, rank: int, dtype: str) -> Factors:
        """The best pair of up to `rank`, rounded."""
        delta = self._delta(tensor)
        if not (rank and delta.energy):
            return Factors(*empty(*delta.shape), delta.energy, delta.energy)
        found = ab.fit(delta, rank, seed=self._method.seed, tolerance=WITHIN)
        b, a = (round_to(factor, dtype) for factor in found)
        return Factors(b, a, delta.energy, delta.residual_energy(b, a))

    def _delta(self, tensor: str) -> Delta:
        shape = self._shapes[tensor]
        values = merge(tensor, shape, self._vectors(tensor), self._weights, self._method)
        try:
            return Delta.from_array(values, tensor)
        except TensorError as error:
            raise TensorError(f"`{tensor}`: the adapters' weighted ΔW is not finite: mind the weights") from error

    def _vectors(self, tensor: str) -> dict[int, TaskVector]:
        """The adapters that change the tensor, by number."""
        vectors = {}
        for number, part in enumerate(self._parts):
            terms = part.terms(tensor)
            pairs = [empty(*self._shapes[tensor]), *(term for term in terms if isinstance(term, tuple))]
            whole = [term for term in terms if not isinstance(term, tuple)]
            if terms:
                b, a = zip(*pairs, strict=True)
                vectors[number] = TaskVector(np.hstack(b), np.vstack(a), whole)
        return vectors
