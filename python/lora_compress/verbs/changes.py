"""What tuned changed of base, and how each change will be carried: the common beginning of `plan` and `extract`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_compress._native import check_finite, energies, same_bytes
from lora_compress.adapter import Format, stores_factors
from lora_compress.errors import PlanError, SelectionError, TensorError
from lora_compress.model import FLOATS, HEAD, WEIGHT, Model, last_component
from lora_compress.ranks.plan import GRADIENTS
from lora_compress.verbs.account import TensorAccount
from lora_compress.verbs.align import open_pair
from lora_compress.verbs.parallel import ordered_map
from lora_compress.verbs.progress import Progress
from lora_compress.verbs.selection import Pair, Selection, Treatment, matching, refuse, select
from lora_compress.verbs.stacks import whole

DTYPES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Options:
    """Which tensors are looked at and how they are stored: what has to be the same for a plan and the extraction after
    it.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    embeddings: Sequence[str] = ()
    skip_missing: bool = False
    tied_head: bool = True
    format: str = "peft"
    dtype: str = "BF16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "embeddings"):
            patterns = getattr(self, name)
            object.__setattr__(self, name, (patterns,) if isinstance(patterns, str) else tuple(patterns))
        if self.dtype not in DTYPES or not 0 <= self.seed < 2**64:
            raise ValueError(f"dtype ({self.dtype}) must be one of {tuple(DTYPES)}, seed ({self.seed}) of 64 bits")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Options:
        """As read from a plan. Raises `PlanError`."""
        if stored.get("spectra") == GRADIENTS:
            raise PlanError("the plan is of gradients, to train with: plan from base and tuned to extract")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        try:
            options = cls(**values)
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan's options are malformed: {error}") from error
        alike = [type(value) for value in vars(options).values()] == [type(value) for value in vars(cls()).values()]
        patterns = (*options.include, *options.exclude, *options.embeddings)
        if not alike or not all(isinstance(pattern, str) for pattern in patterns):
            raise PlanError("the plan's options are malformed")
        return options

    def to_json(self) -> dict[str, Any]:
        """As stored in plans."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Changes:
    """Both models, and every tensor with its treatment."""

    base: Model
    tuned: Model
    selection: Selection
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]
    # The embedding whose factors serve the output head too.
    tied_embedding: str | None
    embeddings: frozenset[str] = field(default=frozenset())

    @property
    def changed(self) -> list[Pair]:
        """Pairs whose bytes differ."""
        return [pair for pair in self.pairs if pair.treatment is not Treatment.UNCHANGED]

    @property
    def low_rank(self) -> list[Pair]:
        """Pairs that factors will be found for."""
        return [pair for pair in self.pairs if pair.treatment is Treatment.LOW_RANK]

    def unit(self, pair: Pair, dtype: str) -> int:
        """Bytes that one more rank of a matrix takes in an adapter."""
        copies = 2 if pair.name == self.tied_embedding else 1
        return (pair.rows + pair.matrix[1]) * DTYPES[dtype] * copies

    @property
    def zeros(self) -> list[Pair]:
        """Matrices that get factors of zeros in the uniform layout: some servers drop a whole kind of module when one
        layer lacks it.
        """
        kinds = {last_component(pair.name) for pair in self.low_rank}
        same = (
            pair for pair in self.pairs if pair.treatment is Treatment.UNCHANGED and pair.is_matrix and pair.elements
        )
        return [pair for pair in same if last_component(pair.name) in kinds]

    def announce(self, pair: Pair) -> None:
        """Let the disk read a pair while another is computed."""
        for model in (self.base, self.tuned):
            model.checkpoint.announce(pair.name)


def find_changes(base: str | Path, tuned: str | Path, target: Format, options: Options, progress: Progress) -> Changes:
    """Open both models, pair their tensors, compare bytes, and settle every treatment. Raises as `extract` does."""
    base_model, tuned_model, renamed = open_pair(base, tuned)
    selection = select(
        base_model,
        tuned_model,
        include=options.include,
        exclude=options.exclude,
        skip_missing=options.skip_missing,
    )
    pairs = _compare(base_model, tuned_model, selection.pairs, progress)
    pairs, warnings = _assign(base_model, target, pairs)
    low_rank = {pair.name for pair in pairs if pair.treatment is Treatment.LOW_RANK}
    # A format of factors has no names of its own for the head: merging changes the one matrix.
    copied = base_model.copied_head if HEAD + WEIGHT in selection.tied_copies else None
    shared = copied[1] if copied else base_model.tied_embedding()
    tied = shared if options.tied_head and not stores_factors(target) else None
    if any(name.endswith(HEAD + WEIGHT) for name in selection.missing):
        tied = None  # Tuned has a head of its own: the embedding's factors are not the head's.
    return Changes(
        base_model,
        tuned_model,
        selection,
        tuple(pairs),
        (*renamed, *warnings),
        tied if tied in low_rank else None,
        frozenset(matching("--embedding", options.embeddings, sorted(low_rank))),
    )


def nothing_changed(changes: Changes) -> str:
    """Why there is nothing to store, in words."""
    if changes.base.path.resolve() == changes.tuned.path.resolve():
        return f"base and tuned are the same model, `{changes.base.path}`"
    excluded = any(pair.treatment is Treatment.EXCLUDED for pair in changes.pairs)
    where = "any tensor that is not excluded" if excluded else "any tensor"
    return f"`{changes.tuned.path}` does not differ from `{changes.base.path}` in {where}"


def unmeasured_account(pair: Pair) -> TensorAccount:
    """The account of one changed pair as far as names, shapes and dtypes tell: `nbytes` is what is stored whatever its
    rank.
    """
    rows = pair.new_rows if pair.treatment in {Treatment.LOW_RANK, Treatment.EXACT} else 0
    stored = pair.tuned.nbytes if pair.treatment is Treatment.EXACT else _row_bytes(pair) * rows
    account = TensorAccount(pair.name, pair.base.dtype, tuple(pair.base.shape), pair.treatment, new_rows=rows)
    return replace(account, nbytes=stored)


def account_of(changes: Changes, pair: Pair) -> TensorAccount:
    """The account of one changed pair before factors are found; of a matrix to decompose without its energies.

    Raises `TensorError` for values that are not finite.
    """
    account = unmeasured_account(pair)
    base, tuned = changes.base.checkpoint, changes.tuned.checkpoint
    if pair.base.dtype not in FLOATS or pair.tuned.dtype not in FLOATS:
        unknown = None if pair.treatment is not Treatment.EXACT else 0.0
        return replace(account, delta_energy=None, base_energy=None, error_energy=unknown)
    if pair.treatment is Treatment.EXCLUDED:
        try:
            energy, base_energy = energies(base, tuned, pair.name)
        except TensorError:
            # Values or shapes that allow no difference: unknown.
            return replace(account, delta_energy=None, base_energy=None, error_energy=None)
        return replace(account, delta_energy=energy, base_energy=base_energy, error_energy=energy)
    if pair.new_rows:
        check_finite(tuned, pair.name, pair.base.shape[0])
    if pair.treatment is Treatment.EXACT:
        energy, base_energy = energies(base, tuned, pair.name)
        return replace(account, delta_energy=energy, base_energy=base_energy)
    return account


def untouched(changes: Changes) -> list[TensorAccount]:
    """Accounts of the tensors that were not compared, or compared equal."""
    accounts = [
        TensorAccount(pair.name, pair.base.dtype, tuple(pair.base.shape), pair.treatment)
        for pair in changes.pairs
        if pair.treatment is Treatment.UNCHANGED
    ]
    selection = changes.selection
    for treatment, names in ((Treatment.MISSING, selection.missing), (Treatment.TIED, selection.tied_copies)):
        for name in names:
            holder = changes.base if name in changes.base.checkpoint else changes.tuned
            info = holder.checkpoint.info(name)
            accounts.append(TensorAccount(name, info.dtype, tuple(info.shape), treatment))
    return accounts


def _row_bytes(pair: Pair) -> int:
    return pair.tuned.nbytes // pair.tuned.shape[0] if pair.tuned.shape and pair.tuned.shape[0] else 0


def _compare(base: Model, tuned: Model, pairs: Sequence[Pair], progress: Progress) -> list[Pair]:
    """Mark the pairs whose bytes are equal as unchanged; refuse changed ones that have no treatment."""
    progress.begin("comparing", sum(pair.tuned.nbytes for pair in pairs), len(pairs))
    compared = []

    def job(pair: Pair) -> bool:
        return same_bytes(base.checkpoint, tuned.checkpoint, pair.name)

    for pair, same in ordered_map(job, pairs, lambda _: 1):
        if same:
            compared.append(replace(pair, treatment=Treatment.UNCHANGED))
        elif pair.treatment is Treatment.UNCHANGED:
            raise refuse(pair)
        else:
            compared.append(pair)
        progress.advance(pair.tuned.nbytes, 1, pair.name)
    return compared


def _assign(base: Model, target: Format, pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
    """Turn low-rank into exact where the format has no name for the factors."""
    candidates = [pair.name for pair in pairs if pair.treatment is Treatment.LOW_RANK and pair.elements]
    carried = target.carries(base, candidates)
    assigned, warnings = [], []
    for pair in pairs:
        if pair.treatment is Treatment.LOW_RANK and pair.matrix[0] < pair.rows:
            if pair.name not in carried or stores_factors(target):
                raise SelectionError(
                    f"tuned has {pair.rows - pair.matrix[0]} rows fewer in `{pair.name}`, which the format "
                    f"`{target.name}` cannot carry: --exclude '^{re.escape(pair.name)}$' leaves it out"
                )
            warnings.append(
                f"tuned has {pair.rows - pair.matrix[0]} rows fewer in `{pair.name}`: these keep the base's values"
            )
        if pair.treatment is Treatment.LOW_RANK and pair.name not in carried:
            pair = replace(pair, treatment=Treatment.EXACT)
            # Once for all experts of a tensor.
            name = whole(pair.name)
            warnings.append(f"`{name}` is stored whole: the format `{target.name}` has no name for its factors")
        elif pair.treatment is Treatment.EXACT and len(pair.base.shape) > 2:
            warnings.append(f"`{pair.name}` is stored whole: it is neither a convolution nor a stack of experts")
        assigned.append(pair)
    return assigned, list(dict.fromkeys(warnings))
