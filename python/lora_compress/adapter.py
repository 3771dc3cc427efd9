"""The adapter as the host sees it, whatever format it has on disk.

An adapter read from disk is a map from the base's tensors to parts: low-rank terms, computed terms, replacements,
appended rows. An adapter being written is a stream of factors, announced beforehand by an `AdapterPlan`: pairs (B, A)
that every decomposition lowers to, or, for a format that stores them, the factors themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_compress._native import Checkpoint, LowRank, Update

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora_compress.model import Model

    Float32Matrix = NDArray[np.float32]
    # What makes a pair B, A or a whole difference when the tensor's turn comes.
    Compute = Callable[[], tuple[Float32Matrix, Float32Matrix] | Float32Matrix]

# Where a stored tensor is: the file, and its name there.
Stored = tuple[Checkpoint, str]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk, its parts by the name of the base's tensor they belong to."""

    path: Path
    low_rank: Mapping[str, Sequence[LowRank]] = field(default_factory=dict)
    computed: Mapping[str, Sequence[Compute]] = field(default_factory=dict)
    replacements: Mapping[str, Stored] = field(default_factory=dict)
    new_rows: Mapping[str, Stored] = field(default_factory=dict)
    # What the file says of itself, for formats that have a place for it.
    metadata: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def tensors(self) -> set[str]:
        """Names of all tensors of the base that the adapter changes."""
        return {*self.factored(), *self.replacements, *self.new_rows}

    def factored(self) -> set[str]:
        """Names of the tensors that get a ΔW of factors, stored or computed."""
        return {*self.low_rank, *self.computed}

    def terms(self, tensor: str) -> list[tuple[Float32Matrix, Float32Matrix] | Float32Matrix]:
        """What is added to a tensor, with its scale: pairs (B, A), or whole matrices of decompositions that have no
        small pair. Raises as reading does.
        """
        return [
            *(term.factors() for term in self.low_rank.get(tensor, ())),
            *(compute() for compute in self.computed.get(tensor, ())),
        ]

    def update(self, tensor: str) -> Update:
        """What the adapter does to one tensor."""
        return Update(
            low_rank=list(self.low_rank.get(tensor, ())),
            computed=list(self.computed.get(tensor, ())),
            replacements=[(*self.replacements[tensor], 1.0)] if tensor in self.replacements else [],
            new_rows=self.new_rows.get(tensor),
        )


@dataclass(frozen=True, slots=True)
class PlannedFactors:
    """Factors that will be written for one tensor: B (rows, r), A (r, cols) with r ≤ `rank`."""

    tensor: str
    rows: int
    cols: int
    rank: int


@dataclass(frozen=True, slots=True)
class GroupFactors:
    """The factors of layers that were decomposed together, in the order of the contraction: `layers[l][k]` is factor k
    of `tensors[l]`. One that layers share is the same array in all of them.
    """

    decomposition: str
    contraction: str
    tensors: tuple[str, ...]
    layers: Sequence[Sequence[Any]]
    # Which factors each layer has of its own.
    own: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What a format needs to know before the first factor arrives."""

    base: Model
    base_name: str
    dtype: str
    factors: Sequence[PlannedFactors] = ()
    # For formats that store factors instead; the arrays are stand-ins that have the largest shapes.
    groups: Sequence[GroupFactors] = ()
    # The embedding whose matrix the output head shares, if its factors are to serve the head too.
    tied_embedding: str | None = None
    # Names that `is_embedding` does not recognise but the user knows to be embeddings.
    embeddings: frozenset[str] = frozenset()
    # Of the adapter that this one is made from, for formats that have a place for it.
    metadata: Mapping[str, str] = field(default_factory=dict)


class AdapterWriter(Protocol):
    """An adapter being written into a directory that is not yet visible under its final name."""

    def write(self, tensor: str, b: Float32Matrix, a: Float32Matrix) -> int:
        """Append the factors of one tensor, already rounded to the plan's dtype; return the bytes they take."""
        ...

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Complete all files. `manifest` is the account of the extraction, for the model card."""
        ...


class FactorsWriter(Protocol):
    """As `AdapterWriter`, for a format that stores the factors themselves."""

    def write_group(self, group: GroupFactors) -> list[int]:
        """Append the factors of a group, already rounded to the plan's dtype; return the bytes they take, by tensor."""
        ...

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Complete all files."""
        ...


class Format(Protocol):
    """A way to store adapters. Registered through the hook `register_formats`.

    A format that stores a decomposition's own factors has an attribute `stores_factors` that is true, and its `writer`
    returns a `FactorsWriter`.
    """

    @property
    def name(self) -> str:
        """Name on the command line: `[a-z0-9-]+`."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether `path` holds an adapter of this format; looks at names only."""
        ...

    def read(self, path: Path, base: Model) -> Adapter:
        """Read an adapter for `base`. Raises `AdapterError` for anything in it that would not be applied."""
        ...

    def carries(self, base: Model, tensors: Sequence[str]) -> set[str]:
        """Those of the 2-D `tensors` whose low-rank deltas the format can store."""
        ...

    def writer(self, path: Path, plan: AdapterPlan) -> AdapterWriter | FactorsWriter:
        """Begin an adapter in the existing, empty directory `path`."""
        ...


def stores_factors(form: Format) -> bool:
    """Whether a format stores factors themselves instead of pairs."""
    return bool(getattr(form, "stores_factors", False))
