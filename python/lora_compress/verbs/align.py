"""Names of base and tuned that differ in how they begin: `model.layers…` on one side, `layers…` on the other.

Which beginning stands for which is what most tensors with the same ending and shape say. Names that have no counterpart
after that stay as they are, and are told as missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_compress.model import Model

Shapes = Mapping[str, Sequence[int]]
# Names of either side that are looked at: as many layers as any model has, for every kind of tensor.
VOTERS = 64
# A renaming has to explain this share of the names that the smaller side has alone.
ENOUGH = 0.5


def open_pair(base: str | Path, tuned: str | Path) -> tuple[Model, Model, list[str]]:
    """Both models, tuned's tensors by the names that base has for them, and a warning where they are not its own.

    Raises as `Model.open` does.
    """
    base_model, tuned_model = Model.open(base), Model.open(tuned)
    ours, theirs = (
        {tensor.name: tuple(tensor.shape) for tensor in model.checkpoint.tensors()}
        for model in (base_model, tuned_model)
    )
    notes = [*base_model.checkpoint.notes, *tuned_model.checkpoint.notes]
    found = renaming(ours, theirs)
    if found is None:
        return base_model, tuned_model, notes
    (theirs_begin, ours_begin), names = found
    warning = (
        f"tensors of `{tuned_model.path}` are taken by the base's names: `{ours_begin}…` for `{theirs_begin}…` "
        f"({len(names)} tensors)"
    )
    return base_model, replace(tuned_model, checkpoint=tuned_model.checkpoint.renamed(names)), [*notes, warning]


def renaming(base: Shapes, tuned: Shapes) -> tuple[tuple[str, str], dict[str, str]] | None:
    """How tuned's names begin and how base's do instead, with the new name of every tensor that has one; None where
    there is nothing to rename or no renaming explains it.
    """
    lacking = {name: shape for name, shape in base.items() if name not in tuned}
    strangers = {name: shape for name, shape in tuned.items() if name not in base}
    if not lacking or not strangers:
        return None
    by_ending: dict[tuple[str, ...], list[str]] = {}
    for name in lacking:
        by_ending.setdefault(_ending(name), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    step = max(len(strangers) // VOTERS, 1)
    for name in list(strangers)[::step]:
        # A model has hundreds of tensors of one ending; the right counterpart shares more than the ending.
        candidates = [other for other in by_ending.get(_ending(name), ()) if lacking[other] == strangers[name]]
        votes.update({_beginnings(name, other) for other in candidates})
    if not votes:
        return None
    # The most votes; of equal ones the shortest, which says least.
    begins = min(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1]), pair))
    if not _is_wrapping(*begins):
        return None
    names = {}
    for name in strangers:
        new = begins[1] + name.removeprefix(begins[0])
        if name.startswith(begins[0]) and new in lacking:
            names[name] = new
    is_enough = len(names) >= ENOUGH * min(len(lacking), len(strangers))
    # Models that share more names than this are named alike: what differs then are other tensors.
    return (begins, names) if is_enough and len(names) > len(base) - len(lacking) else None


def _is_wrapping(one: str, other: str) -> bool:
    """Whether one beginning is the other with modules around it: not another layer, and not another tower."""
    shorter, longer = sorted((one.split("."), other.split(".")), key=len)
    left = iter(longer)
    inserted = Counter(longer) - Counter(shorter)
    return all(part in left for part in shorter) and not any(part.isdecimal() for part in inserted)


def _ending(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-2:])


def _beginnings(name: str, other: str) -> tuple[str, str]:
    """What is left of both in front of the components that they end in alike."""
    left, right = name.split("."), other.split(".")
    same = 0
    while same < min(len(left), len(right)) and left[-1 - same] == right[-1 - same]:
        same += 1
    return tuple("".join(f"{part}." for part in parts[: len(parts) - same]) for parts in (left, right))  # type: ignore[return-value]
