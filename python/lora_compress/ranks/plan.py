"""A plan: what one read has told of every tensor, and the ranks that follow from a choice.

Spectra are facts and ranks are opinions: `Plan.choose` gives the same facts other ranks, in milliseconds and without
the checkpoints. A plan is written as JSON (`ranks/file.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lora_compress._native import Allocation, Spectrum
from lora_compress.errors import SelectionError
from lora_compress.ranks.choice import AUTO, BUDGET, ERROR, RankChoice
from lora_compress.ranks.weights import weigh


@dataclass(frozen=True)
class TensorPlan:
    """One tensor. `spectrum` is there where ranks can be chosen; `unit` is what one more rank takes, `fixed` what is
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


@dataclass(frozen=True)
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

    @cached_property
    def low_rank(self) -> tuple[TensorPlan, ...]:
        """The tensors with a spectrum."""
        return tuple(tensor for tensor in self.tensors if tensor.spectrum is not None)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every tensor that has one to choose."""
        return {tensor.name: tensor.rank for tensor in self.low_rank}

    @property
    def fixed(self) -> int:
        """Bytes of what is stored whatever the ranks."""
        return sum(tensor.fixed for tensor in self.tensors)

    @property
    def least_bytes(self) -> int:
        """Bytes of an adapter in which every rank is 0, with room for file headers: two entries for each factor."""
        named = [tensor for tensor in self.tensors if tensor.fixed or tensor.spectrum is not None]
        return self.fixed + sum(4 * (len(tensor.name) + 130) for tensor in named) + 1024

    @property
    def nbytes(self) -> int:
        """Bytes of all that would be stored, but for file headers."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def delta_energy(self) -> float:
        """‖ΔW‖² over all tensors."""
        return math.fsum(tensor.delta_energy or 0.0 for tensor in self.tensors)

    @property
    def error(self) -> float:
        """‖ΔW − stored‖ / ‖ΔW‖ over all tensors."""
        whole = self.delta_energy
        return math.sqrt(math.fsum(tensor.error_energy for tensor in self.tensors) / whole) if whole else 0.0

    def choose(self, choice: RankChoice) -> Plan:
        """The same facts with the ranks of another choice. Raises `SelectionError` where it cannot be met."""
        ranks, unsettled = _uniform(self, choice) if choice.layout == "uniform" else _ranks(self, choice)
        by_name = {tensor.name: rank for tensor, rank in zip(self.low_rank, ranks, strict=True)}
        tensors = tuple(
            replace(tensor, rank=by_name[tensor.name]) if tensor.name in by_name else tensor for tensor in self.tensors
        )
        return replace(self, choice=choice, tensors=tensors, unsettled=tuple(unsettled))

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

    def weights(self, choice: RankChoice) -> dict[str, float]:
        """What a unit of each tensor's error is worth under a choice."""
        weights = weigh(choice.weights, [_spectrum(tensor) for tensor in self.low_rank])
        return {tensor.name: float(weight) for tensor, weight in zip(self.low_rank, weights, strict=True)}

    def curve(self) -> list[tuple[int, float]]:
        """(bytes, error) of every budget, from the smallest on: steps of the current choice's ladder and weights."""
        allocation, weights, _ = _allocation(self, self.choice)
        tensors, _, added, gains = allocation.steps()
        energies = np.array([tensor.delta_energy or 0.0 for tensor in self.low_rank])
        whole = self.delta_energy
        if not whole:
            return [(0, 0.0)]
        indices = tensors.astype(np.intp)
        plain = gains * float(weights @ energies) / weights[indices] if len(indices) else gains
        rest = math.fsum(replace(tensor, rank=0).error_energy for tensor in self.tensors)
        sizes = np.concatenate([[0], np.cumsum(added.astype(np.int64))]) + self.fixed
        errors = np.sqrt(np.maximum(rest - np.concatenate([[0.0], np.cumsum(plain)]), 0.0) / whole)
        return [(int(size), float(error)) for size, error in zip(sizes, errors, strict=True)]


def _ranks(plan: Plan, choice: RankChoice) -> tuple[list[int], list[str]]:
    """Rank of every tensor with a spectrum, and the names of those that depend on σ not known."""
    if choice.rule in {AUTO, BUDGET, ERROR}:
        return _shared(plan, choice)
    ranks, unsettled = [], []
    for tensor in plan.low_rank:
        spectrum = _spectrum(tensor)
        rank = spectrum.rank(choice.rule, choice.value)
        limit = min(spectrum.shape)
        capped = choice.highest(limit)
        if rank is None and len(spectrum.sigma) < capped:
            unsettled.append(tensor.name)
        rank = len(spectrum.sigma) if rank is None else rank
        ranks.append(min(choice.round_up(rank, limit), capped))
    return ranks, unsettled


def _shared(plan: Plan, choice: RankChoice) -> tuple[list[int], list[str]]:
    """Ranks that share bytes, or an error, out among the tensors."""
    allocation, _, caps = _allocation(plan, choice)
    found: list[int] | None = None
    if choice.rule == BUDGET:
        ranks = allocation.for_budget(_room(plan, choice))
    elif choice.rule == ERROR:
        share = _share_to_leave(plan, choice)
        found = allocation.for_error(share)
        ranks = found if found is not None else allocation.for_worth(0.0)
    else:
        ranks = allocation.for_budget(_natural_size(plan, choice, caps))
    unsettled = []
    for tensor, rank, cap in zip(plan.low_rank, ranks, caps, strict=True):
        spectrum = _spectrum(tensor)
        usable = choice.ranks(cap, len(spectrum.sigma)) if cap else []
        taken = rank == max(usable, default=0) or (choice.rule == AUTO and spectrum.rank("bulk-edge") is None)
        if taken and not spectrum.is_complete and len(spectrum.sigma) < cap:
            unsettled.append(tensor.name)
    if choice.rule == ERROR and not unsettled and found is None:
        raise SelectionError(f"no allowed ranks reach an error of {choice.value:g}: allow higher ranks")
    return ranks, unsettled


def _allocation(plan: Plan, choice: RankChoice) -> tuple[Allocation, Any, list[int]]:
    """The steps of all tensors, their weights, and the rank that each is capped at."""
    spectra = [_spectrum(tensor) for tensor in plan.low_rank]
    weights = weigh(choice.weights, spectra)
    caps = [min(spectrum.shape) for spectrum in spectra]
    if choice.rule == AUTO:
        # What cannot be told from rounding noise is never worth bytes, and a merged LoRA is worth what it was.
        caps = [_above_noise(spectrum, cap) for spectrum, cap in zip(spectra, caps, strict=True)]
    ladders = [
        choice.ranks(cap, len(spectrum.sigma)) if cap else [] for spectrum, cap in zip(spectra, caps, strict=True)
    ]
    return Allocation(spectra, weights, [tensor.unit for tensor in plan.low_rank], ladders), weights, caps


def _share_to_leave(plan: Plan, choice: RankChoice) -> float:
    """‖Δ − BA‖ / ‖Δ‖ over the tensors with ranks that makes the error over all tensors what was asked.

    Weights other than "delta" say nothing of tensors without ranks: they count among themselves.
    """
    if choice.weights != "delta":
        return choice.value
    lost = math.fsum(tensor.error_energy for tensor in plan.tensors if tensor.spectrum is None)
    room = choice.value**2 * plan.delta_energy - lost
    if room < 0:
        raise SelectionError(f"excluded tensors alone leave an error above {choice.value:g}")
    energy = math.fsum(_spectrum(tensor).energy for tensor in plan.low_rank)
    return min(math.sqrt(room / energy), 1.0) if energy else 1.0


def _above_noise(spectrum: Spectrum, limit: int) -> int:
    if spectrum.low_rank is not None:
        return min(spectrum.low_rank, limit)
    above = spectrum.rank("noise-edge")
    return limit if above is None else above


def _natural_size(plan: Plan, choice: RankChoice, caps: Sequence[int]) -> int:
    """Bytes for the directions that stand out of white noise with the energy of their ΔW, tensor by tensor.

    A direction that does carries at least about four times its even share of ‖ΔW‖². How many do says how large an
    adapter of this fine-tune should be; which ones are worth most is the allocation's to say.
    """
    size = 0
    for tensor, cap in zip(plan.low_rank, caps, strict=True):
        spectrum = _spectrum(tensor)
        standing = spectrum.low_rank or spectrum.rank("bulk-edge")
        rank = min(len(spectrum.sigma) if standing is None else standing, cap)
        size += tensor.unit * choice.round_up(rank, min(spectrum.shape))
    return size


def _uniform(plan: Plan, choice: RankChoice) -> tuple[list[int], list[str]]:
    """One rank for all tensors: lower ranks would be padded with zeros, and cost the same."""
    limit = max((min(_spectrum(tensor).shape) for tensor in plan.low_rank), default=0)
    ladder = choice.ranks(limit) if limit else [0]
    unit = sum(tensor.unit for tensor in plan.low_rank)
    separate = replace(choice, layout="peft")
    unsettled: list[str] = []
    if choice.rule == BUDGET:
        rank = max((allowed for allowed in ladder if allowed * unit <= _room(plan, choice)), default=0)
        if rank == 0 and plan.low_rank:
            raise SelectionError(
                f"the budget of {int(choice.value):,} bytes does not hold rank {ladder[0]} for every tensor"
            )
    elif choice.rule == ERROR:
        most = _share_to_leave(plan, choice) ** 2 * math.fsum(_spectrum(tensor).energy for tensor in plan.low_rank)
        rests = {rank: math.fsum(_spectrum(tensor).rest(rank) for tensor in plan.low_rank) for rank in ladder}
        rank = next((rank for rank in ladder if rests[rank] <= most), ladder[-1])
    else:
        ranks, unsettled = _ranks(plan, separate)
        if choice.rule == AUTO:
            size = sum(tensor.unit * rank for tensor, rank in zip(plan.low_rank, ranks, strict=True))
            rank = choice.round_up(max(1, round(size / max(unit, 1))), limit)
        else:
            rank = max(ranks, default=0)
    short = [
        tensor.name
        for tensor in plan.low_rank
        if not _spectrum(tensor).is_complete and len(_spectrum(tensor).sigma) < min(rank, *_spectrum(tensor).shape)
    ]
    return [rank] * len(plan.low_rank), sorted({*short, *unsettled})


def _room(plan: Plan, choice: RankChoice) -> int:
    """What a budget leaves for factors."""
    room = int(choice.value) - plan.least_bytes
    if room < 0:
        raise SelectionError(
            f"the budget of {int(choice.value):,} bytes is less than the {plan.least_bytes:,} that norms, biases, new "
            "rows and file headers take"
        )
    return room


def _spectrum(tensor: TensorPlan) -> Spectrum:
    if tensor.spectrum is None:
        raise TypeError(f"`{tensor.name}` has no spectrum")
    return tensor.spectrum
