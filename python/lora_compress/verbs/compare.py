"""`compare`: what every decomposition keeps of a fine-tune at equal bytes.

For each size, every decomposition extracts an adapter of its own factors, the whole way to files: each layer or group
of layers may take the bytes that pairs (B, A) of a planned rank would, and gets the largest rank that fits.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_compress import plugins
from lora_compress.errors import PluginError, SelectionError, TensorError
from lora_compress.ranks.choice import RankChoice, choose
from lora_compress.ranks.plan import Plan
from lora_compress.ranks.text import size as in_words
from lora_compress.verbs.account import SCHEMA_VERSION, TensorAccount, total_error
from lora_compress.verbs.best import BEST, PAIR
from lora_compress.verbs.changes import Options
from lora_compress.verbs.extract import FACTORS, extract
from lora_compress.verbs.plan import plan
from lora_compress.verbs.progress import Progress, Silent

# Ranks of pairs whose bytes are compared at, where none are given.
SIZES = (4, 16, 64)

Measure = Callable[[Path], Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One decomposition at one size. `error` is ‖ΔW − stored‖ / ‖ΔW‖ over all tensors; `problem` says why there is
    none.
    """

    size: str
    decomposition: str
    allowed_bytes: int
    nbytes: int = 0
    error: float | None = None
    seconds: float = 0.0
    tensors: tuple[TensorAccount, ...] = ()
    # What a model merged with it was measured to have: "kl", "loss".
    measured: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`: each tensor's error, and what it was decomposed by."""
        return {
            "size": self.size,
            "decomposition": self.decomposition,
            "allowed_bytes": self.allowed_bytes,
            "bytes": self.nbytes,
            "error": self.error,
            "seconds": self.seconds,
            **self.measured,
            "problem": self.problem or None,
            "tensors": [
                {
                    "name": tensor.name,
                    "decomposition": tensor.decomposition,
                    "rank": tensor.rank,
                    "error": tensor.error,
                    "delta_energy": tensor.delta_energy,
                    "error_energy": tensor.error_energy,
                    "bytes": tensor.nbytes,
                }
                for tensor in self.tensors
            ],
        }


@dataclass(frozen=True, repr=False)
class CompareResult:
    """All rows, by size and then by error."""

    base: str
    tuned: str
    dtype: str
    rows: tuple[Row, ...]
    contractions: Mapping[str, str]
    reference: Mapping[str, Mapping[str, float]]
    seconds: float
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        winners = (f"{size}: {next(row.decomposition for row in self.rows if row.size == size)}" for size in self.sizes)
        return f"CompareResult({self.tuned!r}, least error at {', '.join(winners)})"

    @property
    def sizes(self) -> list[str]:
        """The sizes, in their order."""
        return list(dict.fromkeys(row.size for row in self.rows))

    def pair_error(self, size: str) -> float | None:
        """The error of `ab` at a size."""
        found = [row.error for row in self.rows if (row.size, row.decomposition) == (size, PAIR)]
        return found[0] if found else None

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`, and read by `report --comparison`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "base": self.base,
            "tuned": self.tuned,
            "dtype": self.dtype,
            "decompositions": dict(self.contractions),
            "reference": {name: dict(values) for name, values in self.reference.items()},
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "rows": [row.to_json() for row in self.rows],
        }


def compare(
    base: str | Path,
    tuned: str | Path,
    *,
    sizes: Sequence[int | str] = SIZES,
    decompositions: Sequence[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    skip_missing: bool = False,
    dtype: str = "BF16",
    seed: int = 0,
    tolerance: float = 1e-4,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> CompareResult:
    """Compare decompositions at equal bytes.

    Parameters
    ----------
    base, tuned, include, exclude, embeddings, skip_missing, dtype, seed, tolerance: as for `extract`.
    sizes: a number is a rank, for the bytes of pairs (B, A) of that rank in every matrix; "5MB" is a budget, shared out
        among the matrices as `plan` does.
    decompositions: names; all that are registered, and "best" of them, when absent. `ab` is always among them.
    measure: what to find out about each adapter, called with its directory: `lora_compress.torch.fidelity` has one.
        Called with `base` and `tuned` too.
    progress: receives progress reports.

    A decomposition that fails is a row with a `problem`; what `extract` raises for the models is raised here too.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    host = plugins.load()
    if isinstance(decompositions, str):
        decompositions = [decompositions]
    names = list(decompositions) if decompositions is not None else [item.name for item in host.decompositions]
    for name in names:
        if name != BEST:
            host.decompositions[name]
    if decompositions is None and len(names) > 1:
        names.append(BEST)
    names = [PAIR, *(name for name in dict.fromkeys(names) if name != PAIR)]
    if not sizes:
        raise ValueError("at least one size is needed")
    choices = {_label(size): _choice(size) for size in sizes}
    options = Options(include, exclude, embeddings, skip_missing, format=FACTORS, dtype=dtype, seed=seed)
    largest = max((int(choice.value) for choice in choices.values() if choice.rule == "rank"), default=None)
    facts = plan(base, tuned, rank=largest, options=options, progress=progress)
    rows: list[Row] = []
    warnings: dict[str, None] = dict.fromkeys(facts.notes)
    reference = {side: dict(measure(Path(path))) for side, path in (("base", base), ("tuned", tuned)) if measure}
    for label, choice in choices.items():
        planned = _settled(facts, choice, base, tuned, options, progress)
        found = []
        for name in names:
            row, said = _row(planned, label, name, base, tuned, tolerance, measure, progress)
            found.append(row)
            warnings |= dict.fromkeys(said)
        rows += sorted(found, key=lambda row: (row.error is None, row.error or 0.0, names.index(row.decomposition)))
    contractions = {name: host.decompositions[name].contraction for name in names if name != BEST}
    return CompareResult(
        str(base),
        str(tuned),
        dtype,
        tuple(rows),
        contractions,
        reference,
        time.perf_counter() - started,
        tuple(warnings),
    )


def _row(
    planned: Plan,
    label: str,
    name: str,
    base: str | Path,
    tuned: str | Path,
    tolerance: float,
    measure: Measure | None,
    progress: Progress,
) -> tuple[Row, Sequence[str]]:
    """One adapter: extracted into a directory that is removed again."""
    row = Row(label, name, planned.nbytes)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result = extract(
                base,
                tuned,
                Path(scratch) / "adapter",
                plan=planned,
                decomposition=name,
                tolerance=tolerance,
                progress=progress,
            )
        except (PluginError, SelectionError, TensorError) as error:
            if name == PAIR:
                raise
            return replace(row, problem=str(error)), ()
        row = replace(
            row,
            nbytes=sum(tensor.nbytes for tensor in result.tensors),
            error=total_error(result.tensors),
            seconds=result.seconds,
            tensors=tuple(tensor for tensor in result.tensors if tensor.delta_energy),
        )
        if measure is not None:
            row = replace(row, measured=dict(measure(result.out)))
    return row, result.warnings


def _label(size: int | str) -> str:
    if isinstance(size, str) and size.isdecimal():
        size = int(size)
    return f"rank {size}" if isinstance(size, int) else in_words(int(choose(budget=size).value))


def _choice(size: int | str) -> RankChoice:
    if isinstance(size, str) and size.isdecimal():
        size = int(size)
    return choose(rank=size) if isinstance(size, int) else choose(budget=size)


def _settled(
    facts: Plan, choice: RankChoice, base: str | Path, tuned: str | Path, options: Options, progress: Progress
) -> Plan:
    """The plan for a size; planned anew where that takes more singular values than are known."""
    planned = facts.choose(choice)
    if not planned.unsettled:
        return planned
    if choice.rule == "rank":
        return plan(base, tuned, rank=int(choice.value), options=options, progress=progress)
    return plan(base, tuned, budget=int(choice.value), options=options, progress=progress)
