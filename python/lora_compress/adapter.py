"""The adapter as the host sees it, whatever format it has on disk.

An adapter read from disk is a map from the base's tensors to parts: low-rank terms, replacements, appended rows. An
adapter being written is a stream of factors, announced beforehand by an `AdapterPlan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_compress._native import Checkpoint, LowRank, Update

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lora_compress.model import Model

    Float32Matrix = NDArray[np.float32]

# Where a stored tensor is: the file, and its name there.
Stored = tuple[Checkpoint, str]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk, its parts by the name of the base's tensor they belong to."""

    path: Path
    low_rank: Mapping[str, Sequence[LowRank]] = field(default_factory=dict)
    replacements: Mapping[str, Stored] = field(default_factory=dict)
    new_rows: Mapping[str, Stored] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def tensors(self) -> set[str]:
        """Names of all tensors of the base that the adapter changes."""
        return {*self.low_rank, *self.replacements, *self.new_rows}

    def update(self, tensor: str) -> Update:
        """What the adapter does to one tensor."""
        return Update(
            low_rank=list(self.low_rank.get(tensor, ())),
            replacements=[self.replacements[tensor]] if tensor in self.replacements else [],
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
class AdapterPlan:
    """What a format needs to know before the first factor arrives."""

    base: Model
    base_name: str
    dtype: str
    factors: Sequence[PlannedFactors]
    # The embedding whose matrix the output head shares, if its factors are to serve the head too.
    tied_embedding: str | None = None
    # Names that `is_embedding` does not recognise but the user knows to be embeddings.
    embeddings: frozenset[str] = frozenset()


class AdapterWriter(Protocol):
    """An adapter being written into a directory that is not yet visible under its final name."""

    def write(self, tensor: str, b: Float32Matrix, a: Float32Matrix) -> int:
        """Append the factors of one tensor, already rounded to the plan's dtype; return the bytes they take."""
        ...

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Complete all files. `manifest` is the account of the extraction, for the model card."""
        ...


class Format(Protocol):
    """A way to store adapters. Registered through the hook `register_formats`."""

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

    def writer(self, path: Path, plan: AdapterPlan) -> AdapterWriter:
        """Begin an adapter in the existing, empty directory `path`."""
        ...
