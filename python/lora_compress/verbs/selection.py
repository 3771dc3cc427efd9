"""Which tensor gets which treatment: decided from names, shapes and dtypes alone, before any data is read.

Every tensor of either side ends up in exactly one of the treatments. What cannot be treated is an error that names it
and says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from lora_compress._native import TensorInfo, same_bytes
from lora_compress.errors import SelectionError
from lora_compress.model import FLOATS, HEAD, WEIGHT, Model, is_convolution, is_stack, matrices, matrix_shape

WHOLE = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


class Treatment(str, Enum):
    """What becomes of a tensor."""

    LOW_RANK = "low-rank"
    EXACT = "exact"
    UNCHANGED = "unchanged"
    EXCLUDED = "excluded"
    MISSING = "missing"
    TIED = "tied"


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the base and its counterpart in tuned, with the treatment its shape and dtype allow."""

    name: str
    base: TensorInfo
    tuned: TensorInfo
    treatment: Treatment

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of ΔW seen as a matrix: those that both sides have."""
        rows, cols = matrix_shape(self.base.shape)
        return min(rows, self.tuned.shape[0]), cols

    @property
    def rows(self) -> int:
        """Rows of the base's matrix."""
        return self.base.shape[0]

    @property
    def new_rows(self) -> int:
        """Rows that tuned has beyond the base's (a grown vocabulary); 0 where the shapes differ otherwise."""
        if not self.base.shape or self.base.shape[1:] != self.tuned.shape[1:]:
            return 0
        return max(self.tuned.shape[0] - self.base.shape[0], 0)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a kernel that is seen as one, of a float dtype on both sides."""
        # Stacked experts have their biases in a matrix, which is none.
        is_plain = len(self.base.shape) == 2 and not self.name.endswith("bias")
        is_matrix = is_plain or is_convolution(self.name, self.base.shape)
        return is_matrix and {self.base.dtype, self.tuned.dtype} <= FLOATS

    @property
    def elements(self) -> int:
        """Elements of the base's tensor."""
        size = 1
        for dim in self.base.shape:
            size *= dim
        return size


@dataclass(frozen=True, slots=True)
class Selection:
    """All tensors of both sides: those to compare, and those that one side lacks."""

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    tied_copies: tuple[str, ...]


def select(
    base: Model, tuned: Model, *, include: Sequence[str], exclude: Sequence[str], skip_missing: bool
) -> Selection:
    """Pair the tensors of two models.

    Raises `SelectionError` for patterns that match nothing, tensors that one side lacks, shapes that differ by more
    than appended rows, and dtypes that have no treatment.
    """
    ours = {tensor.name: tensor for tensor in base.checkpoint.tensors()}
    theirs = {tensor.name: tensor for tensor in tuned.checkpoint.tensors()}
    tied = tuple(name for name in sorted(set(ours) ^ set(theirs)) if _is_tied_copy(name, base, tuned))
    both = sorted(set(ours) & set(theirs))
    chosen = _chosen([*both, *sorted((set(ours) ^ set(theirs)) - set(tied))], include, exclude)
    missing = tuple(name for name in sorted(set(ours) ^ set(theirs)) if name not in tied)
    lost = [name for name in missing if name in chosen]
    if lost and not skip_missing:
        side = tuned if lost[0] in ours else base
        lacking = [name for name in lost if (name in ours) == (lost[0] in ours)]
        raise SelectionError(
            f"`{side.path}` lacks {_some(lacking)}: pass --skip-missing to go on without, or --exclude a pattern"
        )
    pairs = [
        pair for name in both for pair in _matrices(_pair(name, ours[name], theirs[name], name in chosen), base, tuned)
    ]
    return Selection(tuple(pairs), missing, tied)


def matching(option: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Names in which any of the patterns is found (one may be given alone); each must be a regular expression and find
    one.
    """
    matched: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise SelectionError(f"{option} `{pattern}` is not a regular expression: {error}") from error
        if not hits:
            raise SelectionError(
                f"{option} `{pattern}` matches no tensor; `lora-compress inspect --tensors` lists them"
            )
        matched |= hits
    return matched


def _chosen(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    included = matching("--include", include, names) if include else set(names)
    return included - matching("--exclude", exclude, names)


def _matrices(pair: Pair, base: Model, tuned: Model) -> list[Pair]:
    """The pair itself; of stacked experts a pair for each, as every expert has a ΔW of its own."""
    is_float = {pair.base.dtype, pair.tuned.dtype} <= FLOATS
    if pair.treatment is not Treatment.EXACT or not is_float or not is_stack(pair.name, pair.base.shape):
        return [pair]
    names = matrices(pair.name, pair.base.shape[0])
    return [Pair(name, base.checkpoint.info(name), tuned.checkpoint.info(name), Treatment.LOW_RANK) for name in names]


def _pair(name: str, base: TensorInfo, tuned: TensorInfo, chosen: bool) -> Pair:
    if not chosen:
        return Pair(name, base, tuned, Treatment.EXCLUDED)
    pair = Pair(name, base, tuned, Treatment.EXACT)
    alike = bool(base.shape) and base.shape[1:] == tuned.shape[1:] and not is_stack(name, base.shape)
    fewer = alike and tuned.shape[0] < base.shape[0]
    # The rows that a smaller vocabulary lacks keep the base's values, which needs factors that are zero there.
    if base.shape != tuned.shape and (not alike or (fewer and not pair.is_matrix)):
        raise SelectionError(
            f"`{name}` has shape {base.shape} in the base and {tuned.shape} in the tuned model: only "
            f"the rows of matrices may be more or fewer; --exclude '^{re.escape(name)}$' leaves it out"
        )
    if base.dtype in FLOATS and tuned.dtype in FLOATS:
        return replace(pair, treatment=Treatment.LOW_RANK) if pair.is_matrix else pair
    if base.dtype == tuned.dtype and base.dtype in WHOLE and len(base.shape) < 2:
        return Pair(name, base, tuned, Treatment.EXACT)
    # Equal bytes need no treatment, whatever their dtype: whether this is an error is known once they are compared.
    return Pair(name, base, tuned, Treatment.UNCHANGED)


def refuse(pair: Pair) -> SelectionError:
    """The error for a changed tensor whose dtypes have no treatment."""
    dtypes = pair.base.dtype if pair.base.dtype == pair.tuned.dtype else f"{pair.base.dtype} against {pair.tuned.dtype}"
    return SelectionError(
        f"`{pair.name}` ({dtypes}, shape {pair.base.shape}) has changed and looks quantised: dequantise both "
        f"models first, or leave it out with --exclude '^{re.escape(pair.name)}$'"
    )


def _is_tied_copy(name: str, base: Model, tuned: Model) -> bool:
    """Whether `name` is an output head that one side stores although it equals its own tied embedding."""
    if name != HEAD + WEIGHT:
        return False
    holder, other = (base, tuned) if name in base.checkpoint else (tuned, base)
    if holder is base:
        # Where it is the embedding once more, merging changes both; else its change has to be carried.
        return base.copied_head is not None and tuned.tied_embedding() is not None
    embedding = other.tied_embedding()
    if embedding is None or embedding not in holder.checkpoint:
        return False
    return same_bytes(holder.checkpoint, holder.checkpoint, name, embedding)


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(f"`{name}`" for name in names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"
