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
from lora_compress.errors import PlanError, TensorError
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

    def __init__(self, changes: Changes, pairs: Sequence[Pair], workspace: Workspace) -> None:
        self._changes, self._pairs, self._workspace = changes, list(pairs), workspace
        self._kept: dict[str, Delta] = {}
        # One that is alone is as large as any in flight may be.
        self._keeps = len(pairs) == 1 or sum(pair.elements for pair in pairs) <= IN_FLIGHT

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
        delta = self._kept.get(pair.name)
        if delta is None:
            self._changes.announce(self._pairs[(at + 1) % len(self._pairs)])
            models = self._changes.base.checkpoint, self._changes.tuned.checkpoint
            delta = Delta(*models, pair.name, self._workspace)
            if self._keeps:
                self._kept[pair.name] = delta
        return delta

    def __iter__(self) -> Iterator[Delta]:
        return (self[number] for number in range(len(self)))

    def only(self, names: set[str]) -> Deltas:
        """Those of some tensors."""
        part = Deltas(self._changes, [pair for pair in self._pairs if pair.name in names], self._workspace)
        part._keeps, part._kept = self._keeps, self._kept
        return part


def decompose(
    changes: Changes,
    storing: Storing,
    planned_energies: Mapping[str, float | None],
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
    deltas = Deltas(changes, task.pairs, workspace)
    for delta in deltas:
        planned = planned_energies.get(delta.name)
        if planned is not None and abs(planned - delta.energy) > 1e-9 * delta.energy:
            raise PlanError(f"`{delta.name}` has changed since it was planned: plan again")
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
    pairs: dict[str, tuple[Float32Matrix, Float32Matrix]] = {}
    group = None
    if moved:
        found, group = _fitted(task.method, task.rank, deltas.only(moved), storing, seed=seed, tolerance=tolerance)
        for name, (error, stored, rank) in found.items():
            accounts[name] = replace(accounts[name], rank=rank, error_energy=error, decomposition=task.method.name)
            if stored is not None and rank:
                pairs[name] = stored
    for pair in task.pairs if not storing.as_factors else ():
        rank = storing.pads.get(pair.name, 0)
        if rank and (pair.name in pairs or storing.fills):
            b, a = pairs.get(pair.name, empty(*pair.base.shape))
            pairs[pair.name] = padded(b, a, rank)
            accounts[pair.name] = replace(accounts[pair.name], rank=rank)
    return Decomposed(list(accounts.values()), pairs, group)


Fitted = dict[str, tuple[float, "tuple[Float32Matrix, Float32Matrix] | None", int]]


def _fitted(
    method: Decomposition, rank: int, deltas: Deltas, storing: Storing, *, seed: int, tolerance: float
) -> tuple[Fitted, GroupFactors | None]:
    """Error, pair and rank of every delta as it will be stored; the factors where those are stored."""
    found: Fitted = {}
    first = method.network.own.index(True)
    origin = plugins.load().decompositions.origin(method.name)
    names: list[str] = []
    stored: list[list[Any]] = []
    shared: dict[int, Any] = {}
    with plugins.blame(origin, f"failed in the fit of `{method.name}` for `{deltas.names[0]}`"):
        layers = method.factors_of(deltas, rank, seed=seed, tolerance=tolerance)
        for delta, factors in zip(deltas, layers, strict=True):
            scale = storing.scale_of(delta.name)
            if scale != 1.0:
                factors = [value * np.float32(scale) if at == first else value for at, value in enumerate(factors)]
            if not storing.as_factors:
                b, a = method.lower(factors)
                b, a = round_to(b, storing.dtype), round_to(a, storing.dtype)
                found[delta.name] = _finite(delta, delta.residual_energy(b, a), storing), (b, a), b.shape[1]
                continue
            rounded = []
            for number, (value, own) in enumerate(zip(factors, method.network.own, strict=True)):
                if own or number not in shared:
                    shared[number] = round_to(np.ascontiguousarray(value), storing.dtype)
                rounded.append(shared[number])
            names.append(delta.name)
            stored.append(rounded)
            found[delta.name] = _finite(delta, residual_energy(delta, method, rounded), storing), None, rank
    if not stored:
        return found, None
    return found, GroupFactors(method.name, method.contraction, tuple(names), stored, method.network.own)


def _finite(delta: Delta, error: float, storing: Storing) -> float:
    if not error < float("inf"):
        raise TensorError(f"`{delta.name}`: its factors overflow {storing.dtype}; use --dtype F32")
    return error


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
