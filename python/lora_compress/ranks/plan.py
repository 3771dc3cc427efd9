"""A plan: what one read has told of every tensor, and the ranks that follow from a choice.

Spectra are facts and ranks are opinions: `Plan.choose` gives the same facts other ranks, in milliseconds and without
the checkpoints. A plan is written as JSON (`ranks/file.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_compress._native import Spectrum
from lora_compress.model import is_embedding
from lora_compress.ranks.choice import RankChoice, choose
from lora_compress.ranks.solve import curve, items_of, solve
from lora_compress.ranks.text import size
from lora_compress.ranks.weights import weigh

# An entry of a safetensors header beside the tensor's name, the longest that PEFT's keys and our offsets make it; and
# what two files take beside their entries.
ENTRY = 125
FILES = 1024
# In `options`, of a plan whose spectra are of gradients instead of ΔW (`lora_compress.torch.suggest`): it says what to
# train and belongs to no pair of checkpoints, so its fingerprints are none.
GRADIENTS, NO_CHECKPOINT = "gradients", "0" * 64


@dataclass(frozen=True)
class TensorPlan:
    """One tensor. `spectrum` is there where ranks can be chosen (a matrix without one has a `unit` all the same where
    the uniform layout gives it zeros); `unit` is what one more rank takes, `fixed` what is
    stored whatever the ranks (exact tensors, new rows), both in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    treatment: str
    delta_energy: float | None
    base_energy: float | None
    new_rows: int = 0
    fixed: int = 0
    unit: int = 0
    spectrum: Spectrum | None = None
    rank: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the adapter."""
        return self.fixed + self.unit * self.rank

    @property
    def error_energy(self) -> float:
        """‖ΔW − stored‖² over the rows of the base; 0 where that is unknown."""
        if self.spectrum is not None:
            return self.spectrum.rest(self.rank)
        return self.delta_energy or 0.0 if self.treatment == "excluded" else 0.0


@dataclass(frozen=True, repr=False)
class Plan:
    """Tensors, the choice that their ranks follow, and what the spectra were made from."""

    base: str
    tuned: str
    fingerprints: Mapping[str, str]
    options: Mapping[str, Any]
    choice: RankChoice
    tensors: tuple[TensorPlan, ...]
    tuned_bytes: int
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    # Tensors whose rank depends on σ that are not known: these have what is known.
    unsettled: tuple[str, ...] = field(default=())

    @property
    def is_of_gradients(self) -> bool:
        """Whether the spectra are those of gradients (`lora_compress.torch.suggest`): nothing is there to extract."""
        return self.options.get("spectra") == GRADIENTS

    @cached_property
    def low_rank(self) -> tuple[TensorPlan, ...]:
        """The tensors with a spectrum."""
        return tuple(tensor for tensor in self.tensors if tensor.spectrum is not None)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every tensor that has one to choose."""
        return {tensor.name: tensor.rank for tensor in self.low_rank}

    @property
    def stored_ranks(self) -> dict[str, int]:
        """Rank of every tensor that gets factors, be they zeros."""
        return {tensor.name: tensor.rank for tensor in self.tensors if tensor.rank}

    @property
    def fixed(self) -> int:
        """Bytes of what is stored whatever the ranks."""
        return sum(tensor.fixed for tensor in self.tensors)

    @property
    def least_bytes(self) -> int:
        """Bytes of an adapter in which every rank is 0, with room for file headers."""
        entries = 0
        for tensor in self.tensors:
            # Two factors; four where they serve a tied head too, which only an embedding's can. And what is stored
            # whole.
            stored = tensor.spectrum is not None or (tensor.unit > 0 and self.choice.layout == "uniform")
            factors = 0 if not stored else 4 if is_embedding(tensor.name) else 2
            entries += (factors + (tensor.fixed > 0) + (tensor.new_rows > 0)) * (len(tensor.name) + ENTRY)
        return self.fixed + entries + FILES

    @property
    def nbytes(self) -> int:
        """Bytes of all that would be stored, but for file headers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of the adapter's files, headers included: an upper bound by a few thousand."""
        return self.nbytes - self.fixed + self.least_bytes

    @property
    def delta_energy(self) -> float:
        """‖ΔW‖² over all tensors."""
        return math.fsum(tensor.delta_energy or 0.0 for tensor in self.tensors)

    @property
    def error(self) -> float:
        """‖ΔW − stored‖ / ‖ΔW‖ over all tensors."""
        whole = self.delta_energy
        return math.sqrt(math.fsum(tensor.error_energy for tensor in self.tensors) / whole) if whole else 0.0

    def __repr__(self) -> str:
        return (
            f"Plan({self.tuned!r}: {self.choice.describe()}, {size(self.file_bytes)}, ranks up to "
            f"{max(self.ranks.values(), default=0)}, error {self.error:.4f})"
        )

    def replan(self, **wishes: Any) -> Plan:
        """The same facts with other wishes, those of `lora_compress.plan` (`budget="20MB"`, …); what is not said
        stays.
        """
        return self.choose(choose(**wishes, instead_of=self.choice))

    def choose(self, choice: RankChoice) -> Plan:
        """The same facts with the ranks of another choice. Raises `SelectionError` where it cannot be met."""
        # What headers take depends on the layout: on the one that is asked for, not on the one before.
        answer = solve(replace(self, choice=choice), choice)
        names = [tensor.name for tensor in self.low_rank]
        by_name = dict(zip(names, answer.ranks, strict=True))
        if choice.layout == "uniform":
            by_name |= {tensor.name: max(answer.ranks, default=0) for tensor in self.tensors if tensor.unit}
        else:
            by_name |= {tensor.name: 0 for tensor in self.tensors if tensor.spectrum is None}
        tensors = tuple(
            replace(tensor, rank=by_name[tensor.name]) if tensor.name in by_name else tensor for tensor in self.tensors
        )
        unsettled = tuple(name for name, is_open in zip(names, answer.open, strict=True) if is_open)
        return replace(self, choice=choice, tensors=tensors, unsettled=unsettled)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file. Raises `PlanError` when it is none, `OSError` when it cannot be read."""
        from lora_compress.ranks import file

        return file.read(Path(path))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        from lora_compress.ranks import file

        file.write(self, Path(path))

    def to_json(self) -> dict[str, Any]:
        """The plan as one JSON object (docs/plan.schema.json)."""
        from lora_compress.ranks import file

        return file.to_json(self)

    def to_html(self) -> str:
        """The report: one page that needs no network."""
        from lora_compress.report import page

        return page(self.to_json())

    def _repr_html_(self) -> str:
        """The report inside a notebook."""
        from lora_compress.report import notebook

        return notebook(self.to_json())

    def weights(self) -> dict[str, float]:
        """What a unit of each tensor's error is worth."""
        spectra = [item.spectrum for item in items_of(self)]
        weights = weigh(self.choice.weights, spectra)
        return {tensor.name: float(weight) for tensor, weight in zip(self.low_rank, weights, strict=True)}

    def curve(self) -> list[tuple[int, float]]:
        """(bytes, error) of every size, from the smallest on."""
        return curve(self)
