"""What can be asked of ranks: a rule, a budget or an error, the ranks that a server allows, the layout.

A choice is a value; nothing here knows a spectrum. `lora_compress.ranks.plan` answers it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_compress.errors import SelectionError

AUTO, BUDGET, ERROR = "auto", "budget", "total-error"
# Rules that look at one tensor at a time, and what their value must be; None for those without one.
RULES: dict[str, tuple[float, float] | None] = {
    "rank": (1, math.inf),
    "energy": (0, 1),
    "error": (0, 1),
    "threshold": (0, math.inf),
    "ratio": (1, math.inf),
    "bulk-edge": None,
    "noise-edge": None,
    "hard-threshold": None,
    "knee": None,
}
LAYOUTS = ("peft", "uniform")
# vLLM 0.14 (`vllm.config.lora.MaxLoRARanks`): the ranks that its `max_lora_rank` can be set to.
VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, slots=True)
class RankChoice:
    """How ranks are chosen.

    `rule` is "auto", "budget" (`value` in bytes), "total-error" (`value` relative, over all tensors), or a rule of
    `RULES`. `allowed` are the ranks that may be used, ascending ((): all), `multiple` what every rank has to be a
    multiple of.
    """

    rule: str = AUTO
    value: float = 0.0
    weights: str = "balanced"
    allowed: tuple[int, ...] = ()
    multiple: int = 1
    max_rank: int | None = None
    layout: str = "peft"

    @property
    def is_global(self) -> bool:
        """Whether the rank of one tensor depends on the others."""
        return self.rule in {AUTO, BUDGET, ERROR} or self.layout == "uniform"

    @property
    def fixed(self) -> int | None:
        """The rank of every tensor, where that needs no spectrum."""
        if self.rule != "rank":
            return None
        return self.round_up(int(self.value), 2**31)

    def ranks(self, limit: int, known: int | None = None) -> list[int]:
        """Allowed ranks above 0 for a tensor that has at most `limit`, ascending; up to `known`, where that is given.

        A tensor too small for an allowed rank may have all of its own: what it lacks is padded by whoever serves it.
        """
        highest = limit if self.max_rank is None else min(limit, self.max_rank)
        most = highest if known is None else min(highest, known)
        if self.allowed:
            fitting = (rank for rank in self.allowed if self.max_rank is None or rank <= self.max_rank)
            return sorted({min(rank, highest) for rank in fitting if min(rank, highest) <= most})
        ranks = list(range(self.multiple, most + 1, self.multiple))
        last = self.highest(limit)
        return [*ranks, last] if last <= most and last % self.multiple else ranks

    def highest(self, limit: int) -> int:
        """The largest of `ranks`."""
        highest = limit if self.max_rank is None else min(limit, self.max_rank)
        if self.allowed:
            return self.ranks(limit)[-1]
        padded = -(-highest // self.multiple) * self.multiple
        whole = self.max_rank is None or padded <= self.max_rank
        return highest if whole else highest // self.multiple * self.multiple

    def round_up(self, rank: int, limit: int) -> int:
        """The smallest allowed rank of at least `rank`, or the largest there is; 0 stays 0."""
        if rank == 0 or not (self.allowed or self.multiple > 1 or self.max_rank):
            return min(rank, limit)
        if not self.allowed:
            rounded = -(-rank // self.multiple) * self.multiple
            highest = rounded if self.max_rank is None else self.max_rank // self.multiple * self.multiple
            return min(rounded, highest, limit)
        ranks = self.ranks(limit)
        return next((allowed for allowed in ranks if allowed >= rank), ranks[-1])

    def to_json(self) -> dict[str, Any]:
        """As stored in plans and manifests."""
        return {
            "rule": self.rule,
            "value": self.value,
            "weights": self.weights,
            "ranks_allowed": list(self.allowed),
            "multiple": self.multiple,
            "max_rank": self.max_rank,
            "layout": self.layout,
        }

    def describe(self) -> str:
        """In words."""
        from lora_compress.ranks.text import size

        if self.rule == BUDGET:
            return f"budget {size(int(self.value))}"
        if self.rule == ERROR:
            return f"total error {self.value:g}"
        if self.rule == "rank":
            return f"rank {int(self.value)}"
        return self.rule if RULES.get(self.rule) is None else f"{self.rule} {self.value:g}"


def choose(
    *,
    rank: int | str | None = None,
    budget: int | str | None = None,
    error: float | None = None,
    weights: str | None = None,
    ranks_allowed: str | Sequence[int] | None = None,
    max_rank: int | None = None,
    layout: str = "peft",
) -> RankChoice:
    """A choice from what a user says.

    `rank`: a number, "auto" or "RULE" or "RULE=VALUE" of `RULES`; `budget`: bytes, or a size such as "50MB"; `error`:
    share of ‖ΔW‖ over all tensors; at most one of the three. `ranks_allowed`: numbers, "8,16,32", "vllm", or "8x" for
    multiples of 8. Raises `SelectionError`.
    """
    if sum(value is not None for value in (rank, budget, error)) > 1:
        raise SelectionError("of rank, budget and error only one can be asked for")
    if max_rank is not None and max_rank < 1:
        raise SelectionError(f"the largest rank must be at least 1, not {max_rank}")
    if layout not in LAYOUTS:
        raise SelectionError(f"there is no layout `{layout}`: take one of {', '.join(LAYOUTS)}")
    allowed, multiple = _allowed(ranks_allowed, max_rank)
    if budget is not None:
        rule, value = BUDGET, float(parse_size(budget))
    elif error is not None:
        if not 0 < error < 1:
            raise SelectionError(f"the error must be between 0 and 1, not {error}")
        rule, value = ERROR, float(error)
    elif rank is None and max_rank is not None:
        # As mergekit's --max-rank.
        rule, value = "rank", float(max_rank)
    else:
        rule, value = parse_rule("auto" if rank is None else rank)
    # An error is asked for in the plain norm; a budget or "auto" is to be spent where it shows.
    weights = weights or ("delta" if rule == ERROR else "balanced")
    return RankChoice(rule, value, weights, allowed, multiple, max_rank, layout)


def parse_rule(text: int | str) -> tuple[str, float]:
    """Rule and value of "32", "auto", "energy=0.9" and the like."""
    name, equals, given = str(text).strip().partition("=")
    if name.isascii() and name.isdigit() and not equals:
        name, given, equals = "rank", name, "="
    if name == AUTO and not equals:
        return AUTO, 0.0
    if name not in RULES:
        known = ", ".join(rule if bounds is None else f"{rule}=…" for rule, bounds in RULES.items())
        raise SelectionError(f"there is no rule `{text}` for ranks: give a number, auto, {known}")
    bounds = RULES[name]
    if bounds is None:
        if equals:
            raise SelectionError(f"the rule `{name}` takes no value")
        return name, 0.0
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not bounds[0] <= value <= bounds[1] or not math.isfinite(value) or (name == "rank" and value != int(value)):
        raise SelectionError(f"`{text}`: {name} needs a number from {bounds[0]:g} to {bounds[1]:g}")
    return name, value


def parse_size(text: int | str) -> int:
    """Bytes of "50MB", "1.5 GiB" or a number; units of 1000, with an i of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", str(text).lower())
    if match is None or match[2] not in UNITS:
        raise SelectionError(f"`{text}` is not a size: write 50MB, 1.5GB or a number of bytes")
    nbytes = int(float(match[1]) * UNITS[match[2]])
    if not 0 < nbytes < 2**62:
        raise SelectionError(f"`{text}` is not a size that an adapter could have")
    return nbytes


def _allowed(given: str | Sequence[int] | None, max_rank: int | None) -> tuple[tuple[int, ...], int]:
    """The list of allowed ranks, and what they must be multiples of."""
    if given is None:
        return (), 1
    if isinstance(given, str):
        multiple = re.fullmatch(r"\s*(\d{1,6})x\s*", given)
        if multiple is not None and int(multiple[1]) > 0:
            if max_rank is not None and max_rank < int(multiple[1]):
                raise SelectionError(f"no multiple of {multiple[1]} is at most {max_rank}")
            return (), int(multiple[1])
        parts: Sequence[int | str] = VLLM if given.strip().lower() == "vllm" else given.split(",")
    else:
        parts = given
    try:
        ranks = sorted({int(part) for part in parts})
    except ValueError:
        ranks = []
    if not ranks or ranks[0] < 1 or ranks[-1] > 2**20:
        raise SelectionError(f"`{given}` is not a list of ranks: write 8,16,32 or vllm or 8x (multiples of 8)")
    if max_rank is not None and ranks[0] > max_rank:
        raise SelectionError(f"none of the allowed ranks {given} is at most {max_rank}")
    return tuple(ranks), 1
