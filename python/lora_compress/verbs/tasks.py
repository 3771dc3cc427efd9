"""What is decomposed together, by which decomposition, and at what rank: the list of work of an extraction.

Ranks are given or planned. `--rank N` alone is the decomposition's own rank. All other wishes are planned for pairs (B,
A), whose spectra tell what each rank keeps; for a decomposition whose rank is another thing they say how much each
matrix may take, and it gets the largest rank of its own that fits: parameters where the format stores factors, rows
and columns of the pair where it stores pairs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_compress import plugins
from lora_compress.adapter import GroupFactors, PlannedFactors
from lora_compress.decompositions.interface import Decomposition, Layer
from lora_compress.errors import SelectionError
from lora_compress.verbs.changes import Changes
from lora_compress.verbs.selection import Pair, Treatment


@dataclass(frozen=True)
class Task:
    """Changed tensors that are worked on together. `method` is None where nothing is decomposed, `rank` is 0 where no
    rank was given or none fits.
    """

    pairs: tuple[Pair, ...]
    method: Decomposition | None = None
    rank: int = 0

    @property
    def name(self) -> str:
        """Name of the first tensor."""
        return self.pairs[0].name

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(pair.elements for pair in self.pairs)

    @property
    def nbytes(self) -> int:
        """Bytes that are read of the tuned model."""
        return sum(pair.tuned.nbytes for pair in self.pairs)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, cols) of every tensor that is decomposed."""
        return [pair.matrix for pair in self.pairs] if self.method is not None else []


def tasks(
    changes: Changes, method: Decomposition, ranks: Mapping[str, int], own_rank: int | None, *, as_factors: bool
) -> list[Task]:
    """All changed tensors, each in one task, in the order of the models' names.

    `ranks` has a rank for every matrix that may be stored; `own_rank` is the decomposition's, where a number was all
    that was asked for. Raises `PluginError` where the decomposition's own rules fail.
    """
    pairs = {pair.name: pair for pair in changes.low_rank if pair.elements}
    whole = [Task((pair,)) for pair in changes.changed if pair.name not in pairs]
    origin = plugins.load().decompositions.origin(method.name)
    with plugins.blame(origin, f"failed to group layers or to size the factors of `{method.name}`"):
        groups = method.groups([Layer(pair.name, *pair.matrix) for pair in pairs.values()])
        decomposed = []
        for group in groups:
            task = Task(tuple(pairs[layer.name] for layer in group), method)
            decomposed.append(replace(task, rank=_rank(task, method, ranks, own_rank, as_factors=as_factors)))
    return sorted([*whole, *decomposed], key=lambda task: task.name)


def _rank(
    task: Task, method: Decomposition, ranks: Mapping[str, int], own_rank: int | None, *, as_factors: bool
) -> int:
    shapes = task.shapes
    allowed = [ranks.get(pair.name, 0) for pair in task.pairs]
    rungs = method.ranks(shapes)
    if not any(allowed) or not rungs:
        return 0
    if own_rank is not None:
        # A ladder may begin above what was asked for.
        return rungs[max(bisect_right(rungs, own_rank) - 1, 0)]
    if as_factors:
        room = sum(rank * sum(shape) for rank, shape in zip(allowed, shapes, strict=True))
        return _largest(rungs, lambda rank: method.parameters(shapes, rank) <= room)
    wanted = list(zip(shapes, allowed, strict=True))
    return _largest(rungs, lambda rank: all(method.lowered_rank(*shape, rank) <= most for shape, most in wanted))


def _largest(rungs: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest rung that fits, 0 where none does: what one rung takes, the next takes too."""
    low, high = 0, len(rungs)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(rungs[middle]) else (low, middle)
    return rungs[low - 1] if low else 0


def check_some_fit(work: Sequence[Task], method: Decomposition, ranks: Mapping[str, int], *, as_factors: bool) -> None:
    """Raise `SelectionError` where matrices may have bytes, and no rank of the decomposition takes so few in any."""
    wanted = [task for task in work if task.method is not None and any(ranks.get(pair.name) for pair in task.pairs)]
    if wanted and not any(task.rank for task in wanted):
        instead = "" if as_factors else ", or store its factors themselves with --format factors"
        raise SelectionError(
            f"no rank of `{method.name}` fits into what pairs of the planned ranks take: allow more{instead}"
        )


def planned_pairs(work: Sequence[Task], pads: Mapping[str, int]) -> list[PlannedFactors]:
    """The largest pairs that work can end in, padding included.

    Raises `SelectionError` for a decomposition whose factors would become pairs as large as the matrices.
    """
    planned = []
    largest = pair_elements = parameters = elements = 0
    for task in work:
        method = task.method
        if method is None:
            continue
        for pair, shape in zip(task.pairs, task.shapes, strict=True):
            lowered = method.lowered_rank(*shape, task.rank) if task.rank else 0
            largest, elements = max(largest, lowered), elements + pair.elements
            pair_elements += lowered * sum(shape)
            rank = max(lowered, pads.get(pair.name, 0))
            if rank:
                planned.append(PlannedFactors(pair.name, pair.rows, shape[1], rank))
        parameters += method.parameters(task.shapes, task.rank) if task.rank else 0
    if pair_elements >= elements and pair_elements > parameters:
        raise SelectionError(
            f"pairs of this decomposition would be as large as the matrices (ranks up to {largest}): store its factors "
            "themselves, with --format factors"
        )
    return planned


def planned_groups(work: Sequence[Task]) -> list[GroupFactors]:
    """The largest factors that work can end in, as stand-ins without memory of their own."""
    groups = []
    for task in work:
        if task.method is None or not task.rank:
            continue
        stand_ins: list[list[Any]] = [
            [np.broadcast_to(np.float32(0), shape) for shape in task.method.shapes(*shape, task.rank)]
            for shape in task.shapes
        ]
        names = tuple(pair.name for pair in task.pairs)
        groups.append(
            GroupFactors(task.method.name, task.method.contraction, names, stand_ins, task.method.network.own)
        )
    return groups


def zeros(changes: Changes, ranks: Mapping[str, int]) -> list[PlannedFactors]:
    """Pairs of zeros of the uniform layout."""
    return [
        PlannedFactors(pair.name, pair.rows, pair.matrix[1], ranks[pair.name])
        for pair in changes.pairs
        if pair.treatment is Treatment.UNCHANGED and ranks.get(pair.name)
    ]
