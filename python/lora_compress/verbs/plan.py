"""`plan`: spectra of every changed matrix, and the ranks, sizes and errors that follow. Writes nothing but a plan.

Every matrix is visited once and its leading singular values are found, up to a bound. Where a rank turns out to depend
on more of them, those matrices alone are visited again with twice the bound.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_compress import plugins
from lora_compress._native import Delta, Spectrum, Workspace
from lora_compress.errors import PlanError, SelectionError
from lora_compress.ranks.choice import RankChoice, choose
from lora_compress.ranks.plan import Plan, TensorPlan
from lora_compress.verbs.account import TensorAccount
from lora_compress.verbs.changes import (
    Changes,
    Options,
    account_of,
    find_changes,
    nothing_changed,
    unmeasured_account,
    untouched,
)
from lora_compress.verbs.parallel import ordered_map
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.selection import Pair, Treatment
from lora_compress.verbs.stacks import join_accounts, join_sizes, join_spectra, whole

# σ are needed to a few digits; energies to the tolerance of the factors are found when factors are.
TOLERANCE = 1e-3


def plan(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | str | None = None,
    budget: int | str | None = None,
    error: float | None = None,
    weights: str | None = None,
    ranks_allowed: str | Sequence[int] | None = None,
    max_rank: int | None = None,
    layout: str | None = None,
    bound: int | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan the extraction of an adapter.

    Parameters
    ----------
    base, tuned: as for `extract`.
    rank, budget, error, weights, ranks_allowed, max_rank, layout: as for `extract`.
    bound: how many singular values to find in each matrix at first; more are found where ranks depend on them.
    options: which tensors are looked at and how they would be stored.
    progress: receives progress reports.

    Raises as `extract` does.
    """
    if bound is not None and bound < 1:
        raise ValueError(f"bound ({bound}) must be at least 1")
    choice = choose(
        rank=rank,
        budget=budget,
        error=error,
        weights=weights,
        ranks_allowed=ranks_allowed,
        max_rank=max_rank,
        layout=layout,
    )
    options = options or Options()
    progress = progress or Silent()
    target = plugins.load().formats[options.format]
    changes = find_changes(base, tuned, target, options, progress)
    return plan_changes(changes, choice, options, bound=bound, progress=progress, base=str(base), tuned=str(tuned))


def plan_changes(
    changes: Changes,
    choice: RankChoice,
    options: Options,
    *,
    base: str,
    tuned: str,
    bound: int | None = None,
    progress: Progress,
) -> Plan:
    """As `plan`, for changes that have been found."""
    started = time.perf_counter()
    fingerprints = {"base": changes.base.fingerprint, "tuned": changes.tuned.fingerprint}
    measured = _measure(changes, changes.changed, {}, choice, options, bound, progress)
    while True:
        result = Plan(
            base,
            tuned,
            fingerprints,
            options.to_json(),
            choice,
            _tensors(changes, measured, options),
            sum(tensor.stored_nbytes for tensor in changes.tuned.checkpoint.tensors()),
            time.perf_counter() - started,
            changes.warnings,
        ).choose(choice)
        again = [pair for pair in changes.changed if whole(pair.name) in result.unsettled]
        if not again:
            return result
        known = {tensor.name: len(tensor.spectrum.sigma) for tensor in result.low_rank if tensor.spectrum is not None}
        doubled = {pair.name: 2 * known[whole(pair.name)] for pair in again}
        measured |= _measure(changes, again, doubled, choice, options, None, progress)


def check_made_for(plan: Plan, changes: Changes, options: Options) -> None:
    """Raise `PlanError` for a plan that cannot be followed: of other models than these or of what they were before they
    changed, of other tensors or sizes, or without the σ that its ranks depend on.
    """
    for side, model, name in (("base", changes.base, plan.base), ("tuned", changes.tuned, plan.tuned)):
        if model.fingerprint != plan.fingerprints[side]:
            raise PlanError(
                f"the plan was made for another {side} model than `{model.path}` (it says `{name}`), or that has "
                "changed since: plan again"
            )
    planned = {tensor.name: tensor for tensor in plan.tensors}
    unmeasured = [*untouched(changes), *map(unmeasured_account, changes.changed)]
    accounts = {account.name: account for account in join_accounts(unmeasured)}
    units, matrices = _units(changes, options), {whole(pair.name) for pair in changes.low_rank}
    for name in sorted({*planned, *accounts}):
        tensor, account = planned.get(name), accounts.get(name)
        if tensor is None or account is None:
            raise PlanError(f"`{name}` is {'not in the plan' if tensor is None else 'in the plan only'}: plan again")
        unit = units.get(name, 0)
        has_none = tensor.spectrum is None and name in matrices and tensor.delta_energy != 0.0
        said = (tensor.shape, tensor.treatment, tensor.new_rows, tensor.fixed, tensor.unit)
        found = (account.shape, account.treatment.value, account.new_rows, account.nbytes, unit)
        if said != found or has_none:
            raise PlanError(f"the plan does not say of `{name}` what the models do: plan again")
    if plan.unsettled:
        raise PlanError(
            f"the rank of `{plan.unsettled[0]}` depends on singular values that the plan does not have: plan again "
            "from the models with this choice"
        )


def check_energies(planned: Mapping[str, float | None], found: Sequence[TensorAccount]) -> None:
    """Raise `PlanError` where ‖ΔW‖² of a tensor, or of the experts of a stack together, is not what was planned: values
    that changed can escape a fingerprint.
    """
    for account in join_accounts(found):
        energy = planned.get(account.name)
        if energy is not None and abs(energy - (account.delta_energy or 0.0)) > 1e-9 * energy:
            raise PlanError(f"`{account.name}` has changed since it was planned: plan again")


Measured = dict[str, tuple[TensorAccount, Spectrum | None]]


def _measure(
    changes: Changes,
    pairs: Sequence[Pair],
    bounds: Mapping[str, int],
    choice: RankChoice,
    options: Options,
    bound: int | None,
    progress: Progress,
) -> Measured:
    """Account and spectrum of every pair."""
    progress.begin("reading spectra", sum(pair.tuned.nbytes for pair in pairs), len(pairs))
    job = partial(_spectrum, changes, bounds, choice, options, bound, Workspace())
    measured: Measured = {}
    for pair, result in ordered_map(job, pairs, lambda pair: pair.elements, changes.announce):
        measured[pair.name] = result
        progress.advance(pair.tuned.nbytes, 1, pair.name)
    return measured


def _spectrum(
    changes: Changes,
    bounds: Mapping[str, int],
    choice: RankChoice,
    options: Options,
    bound: int | None,
    workspace: Workspace,
    pair: Pair,
) -> tuple[TensorAccount, Spectrum | None]:
    """Runs in a thread."""
    account = account_of(changes, pair)
    if pair.treatment is not Treatment.LOW_RANK:
        return account, None
    delta = Delta(changes.base.checkpoint, changes.tuned.checkpoint, pair.name, workspace)
    account = replace(account, delta_energy=delta.energy, base_energy=delta.base_energy)
    if delta.energy == 0.0:
        return account, None
    count = min(bounds.get(pair.name) or bound or first_bound(choice, delta.shape), *delta.shape)
    return account, delta.spectrum(count, seed=options.seed, tolerance=TOLERANCE)


def first_bound(choice: RankChoice, shape: tuple[int, int]) -> int:
    """How many σ are probably enough.

    The directions that stand out of white noise, which "auto" looks for, are rarely more than a thirtieth of the
    shorter side of a large matrix.
    """
    natural = max(48, min(shape) // 32)
    return max(natural, choice.fixed or 0)


def _units(changes: Changes, options: Options) -> dict[str, int]:
    """What one more rank takes, in bytes, of every matrix that may get factors, and of every stack of some."""
    mine = {whole(pair.name) for pair in [*changes.low_rank, *changes.zeros] if pair.elements}
    return join_sizes(
        {pair.name: changes.unit(pair, options.dtype) for pair in changes.pairs if whole(pair.name) in mine}
    )


def _tensors(changes: Changes, measured: Measured, options: Options) -> tuple[TensorPlan, ...]:
    units = _units(changes, options)
    spectra = join_spectra({name: spectrum for name, (_, spectrum) in measured.items()})
    accounts = join_accounts([*(account for account, _ in measured.values()), *untouched(changes)])
    tensors = [
        TensorPlan(
            account.name,
            account.dtype,
            account.shape,
            account.treatment.value,
            account.delta_energy,
            account.base_energy,
            account.new_rows,
            account.nbytes,
            units.get(account.name, 0),
            spectra.get(account.name),
        )
        for account in accounts
    ]
    if not any(tensor.fixed or tensor.spectrum is not None for tensor in tensors):
        raise SelectionError(nothing_changed(changes))
    return tuple(sorted(tensors, key=lambda tensor: tensor.name))
