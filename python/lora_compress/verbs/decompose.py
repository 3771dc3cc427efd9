"""One task of an extraction: deltas become factors, rounded as they will be stored, and their error is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from lora_compress import plugins
from lora_compress._native import Delta, Workspace, round_to
from lora_compress.adapter import GroupFactors
from lora_compress.decompositions.interface import Decomposition
from lora_compress.errors import TensorError
from lora_compress.model import last_component
from lora_compress.verbs.account import TensorAccount
from lora_compress.verbs.changes import Changes, account_of
from lora_compress.verbs.parallel import IN_FLIGHT
from lora_compress.verbs.selection import Pair
from lora_compress.verbs.tasks import Task

if TYPE_CHECKING:
    from lora_compress.adapter import Float32Matrix

# Rows of a residual that are formed at a time, in elements.
PANEL = 1 << 22


@dataclass(frozen=True)
class Storing:
    """How factors are stored: as themselves or as pairs, in which dtype, scaled by what, padded to which ranks."""

    as_factors: bool
    dtype: str
    scale: float | Mapping[str, float]
    # Ranks up to which pairs get zeros; none where the choice does not pad. With `fills`, matrices without a pair get
    # one.
    pads: Mapping[str, int]
    fills: bool

    def scale_of(self, tensor: str) -> float:
        """The scale of one tensor."""
        return self.scale.get(last_component(tensor), 1.0) if isinstance(self.scale, Mapping) else self.scale


@dataclass(frozen=True)
class Decomposed:
    """What became of a task: accounts of its tensors, and pairs by tensor, or the factors of the group."""

    accounts: list[TensorAccount]
    pairs: Mapping[str, tuple[Float32Matrix, Float32Matrix]]
    group: GroupFactors | None = None


class Deltas(Sequence[Delta]):
    """The deltas of a group. Small ones are kept, large ones are made whenever they are taken."""

    def __init__(
        self, changes: Changes, pairs: Sequence[Pair], workspace: Workspace, kept: dict[str, Delta] | None
    ) -> None:
        self._changes, self._pairs, self._workspace, self._kept = changes, list(pairs), workspace, kept

    @classmethod
    def of(cls, changes: Changes, pairs: Sequence[Pair], workspace: Workspace) -> Deltas:
        """Of these tensors. One that is alone is kept: it is as large as any in flight may be."""
        small = len(pairs) == 1 or sum(pair.elements for pair in pairs) <= IN_FLIGHT
        return cls(changes, pairs, workspace, {} if small else None)

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [pair.name for pair in self._pairs]

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, at: int) -> Delta: ...
    @overload
    def __getitem__(self, at: slice) -> list[Delta]: ...
    def __getitem__(self, at: int | slice) -> Delta | list[Delta]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        pair = self._pairs[at]
        if self._kept is not None and pair.name in self._kept:
            return self._kept[pair.name]
        self._changes.announce(self._pairs[(at + 1) % len(self._pairs)])
        delta = Delta(self._changes.base.checkpoint, self._changes.tuned.checkpoint, pair.name, self._workspace)
        if self._kept is not None:
            self._kept[pair.name] = delta
        return delta

    def __iter__(self) -> Iterator[Delta]:
        return (self[number] for number in range(len(self)))

    def only(self, names: set[str]) -> Deltas:
        """Those of some tensors."""
        pairs = [pair for pair in self._pairs if pair.name in names]
        return Deltas(self._changes, pairs, self._workspace, self._kept)


def decompose(
    changes: Changes,
    storing: Storing,
    task: Task,
    *,
    seed: int,
    tolerance: float,
    workspace: Workspace,
) -> Decomposed:
    """Accounts and stored factors of one task. Runs in a thread."""
    accounts = {pair.name: account_of(changes, pair) for pair in task.pairs}
    if task.method is None:
        return Decomposed(list(accounts.values()), {})
    deltas = Deltas.of(changes, task.pairs, workspace)
    for delta in deltas:
        accounts[delta.name] = replace(
            accounts[delta.name],
            delta_energy=delta.energy,
            base_energy=delta.base_energy,
            # Without energy but with other bytes: zeros of another sign, or new rows only.
            error_energy=delta.energy,
        )
    # A large one is made anew where it is needed: none is held beside another.
    del delta
    moved = {name for name, account in accounts.items() if account.delta_energy} if task.rank else set()
    stored = Stored({}, {}, {})
    if moved:
        origin = plugins.load().decompositions.origin(task.method.name)
        with plugins.blame(origin, f"failed in the fit of `{task.method.name}` for `{task.name}`"):
            deltas = deltas.only(moved)
            layers = task.method.factors_of(deltas, task.rank, seed=seed, tolerance=tolerance)
            layers = [
                _scaled(task.method, factors, storing.scale_of(name))
                for name, factors in zip(deltas.names, layers, strict=True)
            ]
            store = _as_factors if storing.as_factors else _as_pairs
            stored = store(task.method, deltas, layers, storing.dtype)
    for name, error in stored.errors.items():
        if not error < float("inf"):
            raise TensorError(f"`{name}`: its factors overflow {storing.dtype}; use --dtype F32")
        accounts[name] = replace(
            accounts[name], rank=stored.ranks.get(name, task.rank), error_energy=error, decomposition=task.method.name
        )
    pairs = dict(stored.pairs)
    for pair in task.pairs if not storing.as_factors else ():
        rank = storing.pads.get(pair.name, 0)
        if rank and (pair.name in pairs or storing.fills):
            b, a = pairs.get(pair.name, empty(*pair.matrix))
            pairs[pair.name] = padded(b, a, rank)
            accounts[pair.name] = replace(accounts[pair.name], rank=rank)
    for pair in task.pairs:
        if pair.name in pairs and pair.matrix[0] < pair.rows:
            b, a = pairs[pair.name]
            # Nothing is known of rows that tuned does not have.
            pairs[pair.name] = np.pad(b, ((0, pair.rows - len(b)), (0, 0))), a
    return Decomposed(list(accounts.values()), pairs, stored.group)


@dataclass(frozen=True)
class Stored:
    """Factors as they will be stored, with error energies: pairs and their ranks, or a group."""

    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    pairs: Mapping[str, tuple[Float32Matrix, Float32Matrix]]
    group: GroupFactors | None = None


def _scaled(method: Decomposition, factors: list[Any], scale: float) -> list[Any]:
    """ΔW `scale` times: a network is linear in each factor, so one of the layer's own takes it all."""
    if scale == 1.0:
        return factors
    first = method.network.own.index(True)
    return [value * np.float32(scale) if number == first else value for number, value in enumerate(factors)]


def _as_pairs(method: Decomposition, deltas: Deltas, layers: Sequence[Sequence[Any]], dtype: str) -> Stored:
    """Every layer's factors lowered to a pair; one without a direction is none."""
    errors, pairs = {}, {}
    for delta, factors in zip(deltas, layers, strict=True):
        b, a = (round_to(factor, dtype) for factor in method.lower(factors))
        errors[delta.name] = delta.residual_energy(b, a)
        if b.shape[1]:
            pairs[delta.name] = (b, a)
    ranks = {name: pairs[name][0].shape[1] if name in pairs else 0 for name in errors}
    return Stored(errors, ranks, pairs)


def _as_factors(method: Decomposition, deltas: Deltas, layers: Sequence[Sequence[Any]], dtype: str) -> Stored:
    """The factors themselves; what layers share is rounded once and stays one array."""
    own = method.network.own
    shared = {
        number: round_to(np.ascontiguousarray(value), dtype)
        for number, value in enumerate(layers[0])
        if not own[number]
    }
    rounded = [
        [
            round_to(np.ascontiguousarray(value), dtype) if own[number] else shared[number]
            for number, value in enumerate(factors)
        ]
        for factors in layers
    ]
    errors = {
        delta.name: residual_energy(delta, method, factors) for delta, factors in zip(deltas, rounded, strict=True)
    }
    group = GroupFactors(method.name, method.contraction, tuple(deltas.names), rounded, own)
    return Stored(errors, {}, {}, group)


def residual_energy(delta: Delta, method: Decomposition, factors: Sequence[Any]) -> float:
    """‖Δ − W‖² of one layer's factors: by their pair where that is small, else from W itself, panel by panel."""
    network = method.network
    if network.lowers_small(network.sizes(factors)):
        b, a = network.lower(factors)
        return delta.residual_energy(np.ascontiguousarray(b), np.ascontiguousarray(a))
    dense = network.dense(factors)
    rows, cols = delta.shape
    energy, height = 0.0, max(PANEL // max(cols, 1), 1)
    for begin in range(0, rows, height):
        residual = delta.rows(begin, begin + height).astype(np.float64) - dense[begin : begin + height]
        energy += float(np.einsum("ij,ij->", residual, residual))
    return energy


def padded(b: Any, a: Any, rank: int) -> tuple[Float32Matrix, Float32Matrix]:
    """Factors with directions of zeros up to `rank`."""
    missing = max(rank - b.shape[1], 0)
    grown = np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))
    return grown[0].astype(np.float32), grown[1].astype(np.float32)


def empty(rows: int, cols: int) -> tuple[Float32Matrix, Float32Matrix]:
    """A pair of rank 0."""
    return np.zeros((rows, 0), np.float32), np.zeros((0, cols), np.float32)
