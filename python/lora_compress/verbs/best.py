"""`--decomposition best`: every installed decomposition is fitted at the same size, and each layer or group of layers
gets the one that leaves the least error.

Groups overlap: one decomposition has a layer with its neighbours, another with those of all blocks. A group is taken
where it leaves less than its layers each by the best way of its own, those that gain most first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lora_compress import plugins
from lora_compress._native import Workspace
from lora_compress.errors import PluginError, SelectionError, TensorError
from lora_compress.verbs.changes import Changes
from lora_compress.verbs.decompose import Storing, decompose
from lora_compress.verbs.parallel import ordered_map
from lora_compress.verbs.progress import Progress
from lora_compress.verbs.tasks import Task, tasks

BEST = plugins.BEST
# The pair that every other decomposition is held against.
PAIR = "ab"
# What is taken instead of what came before has to gain this share of the error, or rounding would decide.
WORTH = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A task, and the error energy that it leaves in all of its tensors."""

    task: Task
    error: float

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors."""
        return tuple(pair.name for pair in self.task.pairs)


def best_tasks(
    changes: Changes,
    storing: Storing,
    ranks: Mapping[str, int],
    progress: Progress,
    *,
    seed: int,
    tolerance: float,
) -> tuple[list[Task], list[str]]:
    """The work that leaves the least error at the size that `ranks` of pairs have; and warnings of decompositions that
    failed and were left out.
    """
    candidates: list[Candidate] = []
    warnings = []
    whole: list[Task] = []
    # The built-in pair first: where two are equal, it is kept.
    methods = sorted(plugins.load().decompositions, key=lambda method: (method.name != PAIR, method.name))
    for method in methods:
        job = partial(decompose, changes, storing, seed=seed, tolerance=tolerance, workspace=Workspace())
        found = []
        try:
            work = tasks(changes, method, ranks, None, as_factors=storing.as_factors)
            whole = [task for task in work if task.method is None]
            fitted = [task for task in work if task.method is not None]
            progress.begin(f"trying {method.name}", sum(task.nbytes for task in fitted), len(fitted))
            for task, done in ordered_map(job, fitted, lambda task: task.elements):
                errors = [account.error_energy or 0.0 for account in done.accounts]
                found.append(Candidate(task, math.fsum(errors)))
                progress.advance(task.nbytes, 1, task.name)
        except (PluginError, SelectionError, TensorError) as error:
            if method.name == PAIR:
                raise
            warnings.append(f"`{method.name}` was left out: {error}")
            continue
        candidates += found
    return sorted([*whole, *chosen(candidates)], key=lambda task: task.name), warnings


def chosen(candidates: Sequence[Candidate]) -> list[Task]:
    """Tasks that cover every tensor once. Each tensor has a candidate of its own."""
    single: dict[str, Candidate] = {}
    for candidate in candidates:
        if len(candidate.names) > 1:
            continue
        known = single.get(candidate.names[0])
        if known is None or candidate.error < (1 - WORTH) * known.error:
            single[candidate.names[0]] = candidate
    groups = []
    for number, candidate in enumerate(candidates):
        alone = math.fsum(single[name].error for name in candidate.names)
        gain = alone - candidate.error
        if len(candidate.names) > 1 and gain > WORTH * alone:
            groups.append((-gain, number, candidate))
    left = dict(single)
    taken = []
    for _, _, candidate in sorted(groups, key=lambda group: group[:2]):
        if all(name in left for name in candidate.names):
            taken.append(candidate.task)
            for name in candidate.names:
                del left[name]
    return [*taken, *(candidate.task for candidate in left.values())]
