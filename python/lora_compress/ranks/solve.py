"""The answer to a choice: ranks from spectra, and which of them depend on singular values that nobody has found yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lora_compress._native import Allocation, Spectrum
from lora_compress.errors import SelectionError
from lora_compress.ranks.choice import AUTO, BUDGET, ERROR, RankChoice
from lora_compress.ranks.weights import weigh

if TYPE_CHECKING:
    from lora_compress.ranks.plan import Plan

# What sums of energies may be off by, relatively.
ROUNDING = 1e-9
# The end of a merged LoRA is looked for up to this rank; beyond, more σ of large matrices cost more than the find is
# worth.
HIGHEST_LORA = 256


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor to rank: its spectrum, what one more rank takes in bytes, and the rank beyond which there is nothing to
    gain.
    """

    spectrum: Spectrum
    unit: int
    limit: int

    def ladder(self, choice: RankChoice) -> list[int]:
        """The ranks that it may have, as far as σ are known."""
        if self.limit == 0:
            return []
        return choice.ranks(self.limit, None if self.spectrum.is_complete else len(self.spectrum.sigma))


@dataclass(frozen=True, slots=True)
class Answer:
    """A rank for every item, and whether it might be another if more σ were known."""

    ranks: list[int]
    open: list[bool]


def solve(plan: Plan, choice: RankChoice) -> Answer:
    """Ranks of a plan's tensors under a choice. Raises `SelectionError` where it cannot be met."""
    items = items_of(plan)
    if choice.layout == "uniform":
        return _uniform(plan, items, choice)
    if choice.rule == AUTO:
        return _auto(items, choice)
    if choice.rule == BUDGET:
        items = [_above_noise(item) for item in items]
        ranks = _allocation(items, choice).for_budget(_room(plan, choice))
        return Answer(ranks, _exhausted(items, ranks, choice))
    if choice.rule == ERROR:
        return _total_error(plan, items, choice)
    return _each(items, choice)


def items_of(plan: Plan) -> list[Item]:
    """The tensors of a plan that have a spectrum, in its order."""
    items = []
    for tensor in plan.low_rank:
        if tensor.spectrum is not None:
            sigma = tensor.spectrum.sigma
            limit = int((sigma > 0).sum()) if tensor.spectrum.is_complete else min(tensor.spectrum.shape)
            items.append(Item(tensor.spectrum, tensor.unit, limit))
    return items


def curve(plan: Plan) -> list[tuple[int, float]]:
    """(bytes, error) from the smallest adapter on: steps of the plan's own ladder, weights and layout."""
    items, whole = items_of(plan), plan.delta_energy
    if not whole:
        return [(plan.fixed, 0.0)]
    lost = math.fsum(tensor.error_energy for tensor in plan.tensors if tensor.spectrum is None)
    energy = math.fsum(item.spectrum.energy for item in items)
    if plan.choice.layout == "uniform":
        unit = sum(tensor.unit for tensor in plan.tensors)
        ladder = [0, *plan.choice.ranks(max((item.limit for item in items), default=0))]
        # Zeros beyond the last direction are known to be zeros.
        open_end = any(not item.spectrum.is_complete for item in items)
        known = max(len(item.spectrum.sigma) for item in items) if open_end else ladder[-1]
        rests = [(rank, math.fsum(item.spectrum.rest(rank) for item in items)) for rank in ladder if rank <= known]
        return [(plan.fixed + rank * unit, math.sqrt((lost + rest) / whole)) for rank, rest in rests]
    _, _, added, shares = _allocation([_above_noise(item) for item in items], plan.choice).steps()
    sizes = np.concatenate([[0], np.cumsum(added.astype(np.int64))]) + plan.fixed
    left = energy * (1.0 - np.concatenate([[0.0], np.cumsum(shares)]))
    errors = np.sqrt((lost + np.maximum(left, 0.0)) / whole)
    return [(int(size), float(error)) for size, error in zip(sizes, errors, strict=True)]


def _each(items: Sequence[Item], choice: RankChoice) -> Answer:
    """A rule that looks at one tensor at a time."""
    ranks, unknown = [], []
    for item in items:
        rank = item.spectrum.rank(choice.rule, choice.value)
        known = len(item.spectrum.sigma)
        ranks.append(choice.round_up(known if rank is None else rank))
        # A rank that is rounded up needs the σ up to there, to tell its error.
        unknown.append(_is_short(item, ranks[-1]) or (rank is None and known < choice.top(item.limit)))
    return Answer(ranks, unknown)


def _auto(items: Sequence[Item], choice: RankChoice) -> Answer:
    """As many bytes as the directions take that stand out of white noise with the energy of their ΔW, spent where they
    are worth most.

    A direction that stands out carries at least about four times its even share of ‖ΔW‖². How many do says how large an
    adapter of this fine-tune should be; which ones to take is the allocation's to say. What cannot be told from
    rounding noise is never worth bytes, and a merged LoRA gets the rank that it had.
    """
    size, capped, unknown = 0, [], []
    for item in items:
        spectrum = item.spectrum
        standing, above_noise = spectrum.rank("bulk-edge"), spectrum.rank("noise-edge")
        open_end = spectrum.low_rank is None and above_noise is None
        known = len(spectrum.sigma)
        near = known < HIGHEST_LORA and spectrum.may_end_soon
        unknown.append(open_end and known < choice.top(item.limit) and (standing is None or near))
        if spectrum.low_rank is None:
            capped.append(_above_noise(item))
            wanted = len(spectrum.sigma) if standing is None else standing
            size += item.unit * choice.round_up(min(wanted, capped[-1].limit))
        else:
            capped.append(replace(item, limit=0))
    ranks = _allocation(capped, choice).for_budget(size)
    unknown = [a or b for a, b in zip(unknown, _exhausted(capped, ranks, choice), strict=True)]
    merged = [item.spectrum.low_rank for item in items]
    ranks = [rank if low is None else choice.round_up(low) for rank, low in zip(ranks, merged, strict=True)]
    return Answer(ranks, unknown)


def _above_noise(item: Item) -> Item:
    """An item without the directions that cannot be told from rounding noise: no budget is so large that they are
    worth it.
    """
    spectrum = item.spectrum
    most = spectrum.rank("noise-edge") if spectrum.low_rank is None else spectrum.low_rank
    return item if most is None else replace(item, limit=min(item.limit, most))


def _total_error(plan: Plan, items: Sequence[Item], choice: RankChoice) -> Answer:
    """The cheapest ranks that leave no more than asked over all tensors."""
    allocation = _allocation(items, choice)
    ranks = allocation.for_error(_share_to_leave(plan, items, choice))
    if ranks is not None:
        return Answer(ranks, _exhausted(items, ranks, choice))
    ranks = allocation.for_worth(0.0)
    unknown = _exhausted(items, ranks, choice)
    if not any(unknown):
        raise SelectionError(f"no allowed ranks reach an error of {choice.value:g}: allow higher ranks")
    return Answer(ranks, unknown)


def _uniform(plan: Plan, items: Sequence[Item], choice: RankChoice) -> Answer:
    """One rank for all tensors: lower ranks would be padded with zeros, and cost the same."""
    limit = max((item.limit for item in items), default=0)
    ladder = choice.ranks(limit) if limit else [0]
    unit = sum(tensor.unit for tensor in plan.tensors)
    unknown = [False] * len(items)
    if choice.rule == BUDGET:
        room = _room(plan, choice)
        rank = max((allowed for allowed in ladder if allowed * unit <= room), default=0)
        if rank == 0 and items:
            raise SelectionError(
                f"the budget of {int(choice.value):,} bytes does not hold rank {ladder[0]} for every tensor: that "
                f"takes {plan.least_bytes + ladder[0] * unit:,}"
            )
    elif choice.rule == ERROR:
        energy = math.fsum(item.spectrum.energy for item in items)
        most = _share_to_leave(plan, items, choice) ** 2 * energy * (1 + ROUNDING)
        rests = ((rank, math.fsum(item.spectrum.rest(rank) for item in items)) for rank in ladder)
        rank = next((rank for rank, rest in rests if rest <= most), ladder[-1])
        reached = math.fsum(item.spectrum.rest(rank) for item in items) <= most
        if not reached and not any(_is_short(item, rank) for item in items):
            raise SelectionError(f"no allowed rank reaches an error of {choice.value:g}: allow higher ranks")
    elif choice.rule == "rank":
        rank = choice.round_up(min(int(choice.value), max((min(item.spectrum.shape) for item in items), default=0)))
    else:
        separate = solve(plan, replace(choice, layout="peft"))
        unknown, rank = separate.open, max(separate.ranks, default=0)
        if choice.rule == AUTO and items:
            size = sum(item.unit * each for item, each in zip(items, separate.ranks, strict=True))
            merged = max((item.spectrum.low_rank or 0 for item in items), default=0)
            rank = choice.round_up(max(1, round(size / sum(item.unit for item in items)), merged))
    short = [_is_short(item, rank) for item in items]
    return Answer([rank] * len(items), [a or b for a, b in zip(unknown, short, strict=True)])


def _allocation(items: Sequence[Item], choice: RankChoice) -> Allocation:
    """The steps of all items, by falling worth."""
    spectra = [item.spectrum for item in items]
    ladders = [item.ladder(choice) for item in items]
    return Allocation(spectra, weigh(choice.weights, spectra), [item.unit for item in items], ladders)


def _exhausted(items: Sequence[Item], ranks: Sequence[int], choice: RankChoice) -> list[bool]:
    """Whether each item has taken the last rank that its known σ allow, and might take more."""
    return [
        not item.spectrum.is_complete
        and len(item.spectrum.sigma) < choice.top(item.limit)
        and rank == max(item.ladder(choice), default=0)
        for item, rank in zip(items, ranks, strict=True)
    ]


def _is_short(item: Item, rank: int) -> bool:
    """Whether fewer σ are known than the rank needs."""
    return not item.spectrum.is_complete and len(item.spectrum.sigma) < min(rank, item.limit)


def _share_to_leave(plan: Plan, items: Sequence[Item], choice: RankChoice) -> float:
    """‖Δ − BA‖ / ‖Δ‖ over the items that makes the error over all tensors what was asked."""
    lost = math.fsum(tensor.error_energy for tensor in plan.tensors if tensor.spectrum is None)
    room = choice.value**2 * plan.delta_energy - lost
    if room < 0:
        raise SelectionError(f"excluded tensors alone leave an error above {choice.value:g}")
    energy = math.fsum(item.spectrum.energy for item in items)
    return min(math.sqrt(room / energy), 1.0) if energy else 1.0


def _room(plan: Plan, choice: RankChoice) -> int:
    """What a budget leaves for factors."""
    room = int(choice.value) - plan.least_bytes
    if room < 0:
        raise SelectionError(
            f"the budget of {int(choice.value):,} bytes is less than the {plan.least_bytes:,} that norms, biases, new "
            "rows and file headers take"
        )
    return room
