"""What can be asked of ranks: a rule, a budget or an error, the ranks that a server allows, the layout.

A choice is a value; nothing here knows a spectrum. `lora_compress.ranks.plan` answers it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
# Named here for whoever only asks; `lora_compress.ranks.weights` says what they are.
WEIGHTS = ("balanced", "delta", "relative", "base", "element")
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
    def has_ladder(self) -> bool:
        """Whether only some ranks are allowed, so that factors are padded with zeros up to one of them."""
        return bool(self.allowed) or self.multiple > 1

    @property
    def pads(self) -> bool:
        """Whether factors of fewer directions than their rank get zeros."""
        return self.has_ladder or self.layout == "uniform"

    @property
    def fixed(self) -> int | None:
        """The rank of every tensor, where that needs no spectrum."""
        return self.round_up(int(self.value)) if self.rule == "rank" else None

    def ranks(self, limit: int, known: int | None = None) -> list[int]:
        """Allowed ranks above 0 for a tensor that can use `limit`, ascending; up to `known`, where that is given.

        The last one may be beyond the limit, padded with zeros, where a smaller one would lose directions.
        """
        most = limit if known is None else min(limit, known)
        if not self.has_ladder:
            return list(range(1, min(most, self.max_rank or most) + 1))
        if self.allowed:
            rungs = [rank for rank in self.allowed if rank <= (self.max_rank or rank)]
        else:
            last = min(-(-limit // self.multiple) * self.multiple, self.max_rank or limit + self.multiple)
            rungs = list(range(self.multiple, last + 1, self.multiple))
        end = next((at + 1 for at, rank in enumerate(rungs) if rank >= limit), len(rungs))
        return [rank for rank in rungs[:end] if known is None or rank <= known]

    def top(self, limit: int) -> int:
        """The largest of `ranks`."""
        return self.ranks(limit)[-1] if self.has_ladder and limit else min(limit, self.max_rank or limit)

    def round_up(self, rank: int) -> int:
        """The smallest allowed rank of at least `rank`, or the largest there is; 0 stays 0."""
        if not self.has_ladder:
            return min(rank, self.max_rank or rank)
        return self.ranks(rank)[-1] if rank else 0

    def fixed_ranks(self, limits: Mapping[str, int]) -> dict[str, int]:
        """`fixed` for matrices of these shorter sides: no more than that, but where factors are padded."""
        largest = max(limits.values(), default=0)
        fixed = self.round_up(min(int(self.value), largest)) if self.layout == "uniform" else self.fixed or 0
        return {name: fixed if self.pads else min(fixed, limit) for name, limit in limits.items()}

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

        words = self.rule if RULES.get(self.rule) is None else f"{self.rule} {self.value:g}"
        if self.rule == BUDGET:
            words = f"budget {size(int(self.value))}"
        elif self.rule == ERROR:
            words = f"total error {self.value:g}"
        elif self.rule == "error":
            words = f"error of each matrix {self.value:g}"
        if self.max_rank is not None and (self.rule, self.value) != ("rank", self.max_rank):
            words += f", at most {self.max_rank}"
        return words


def choose(
    *,
    rank: int | str | None = None,
    budget: int | str | None = None,
    error: float | None = None,
    weights: str | None = None,
    ranks_allowed: str | Sequence[int] | None = None,
    max_rank: int | None = None,
    layout: str | None = None,
    instead_of: RankChoice | None = None,
) -> RankChoice:
    """A choice from what a user says.

    `rank`: a number, "auto" or "RULE" or "RULE=VALUE" of `RULES`; `budget`: bytes, or a size such as "50MB"; `error`:
    share of ‖ΔW‖ over all tensors; at most one of the three. `ranks_allowed`: numbers, "8,16,32", "vllm", or "8x" for
    multiples of 8. Raises `SelectionError`.
    """
    before = instead_of or RankChoice()
    if sum(value is not None for value in (rank, budget, error)) > 1:
        raise SelectionError("of rank, budget and error only one can be asked for")
    if max_rank is not None and (type(max_rank) is not int or max_rank < 1):
        raise SelectionError(f"the largest rank must be a number of at least 1, not {max_rank!r}")
    layout = before.layout if layout is None else layout
    if layout not in LAYOUTS:
        raise SelectionError(f"there is no layout `{layout}`: take one of {', '.join(LAYOUTS)}")
    cap = before.max_rank if max_rank is None else max_rank
    allowed, multiple = (before.allowed, before.multiple) if ranks_allowed is None else _allowed(ranks_allowed)
    if cap is not None and cap < (allowed[0] if allowed else multiple):
        raise SelectionError(f"none of the allowed ranks is at most {cap}")
    if budget is not None:
        rule, value = BUDGET, float(parse_size(budget))
    elif error is not None:
        if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < 1:
            raise SelectionError(f"the error must be between 0 and 1, not {error}")
        rule, value = ERROR, float(error)
    elif rank is not None:
        rule, value = parse_rule(rank)
    elif instead_of is None and max_rank is not None and ranks_allowed is None:
        # As mergekit's --max-rank.
        rule, value = "rank", float(max_rank)
    else:
        rule, value = before.rule, before.value
    if weights is None:
        # An error is asked for in the plain norm; a budget or "auto" is to be spent where it shows.
        usual = "delta" if rule == ERROR else "balanced"
        weights = before.weights if instead_of is not None and rule == before.rule else usual
    if weights not in WEIGHTS:
        raise SelectionError(f"there are no weights `{weights}`: take one of {', '.join(WEIGHTS)}")
    return RankChoice(rule, value, weights, allowed, multiple, cap, layout)


def parse_rule(text: int | str) -> tuple[str, float]:
    """Rule and value of "32", "auto", "energy=0.9" and the like."""
    name, equals, given = str(text).strip().partition("=")
    if name.isascii() and name.isdigit() and not equals:
        name, given, equals = "rank", name, "="
    if name == AUTO and not equals:
        return AUTO, 0.0
    if name not in RULES:
        rules = ((rule, bounds) for rule, bounds in RULES.items() if rule != "rank")
        known = ", ".join(rule if bounds is None else f"{rule}=…" for rule, bounds in rules)
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
        if name == "rank":
            raise SelectionError(f"`{text}` is no rank: ranks are whole numbers from 1 on")
        example = {"energy": "0.9", "error": "0.3", "threshold": "0.01", "ratio": "50"}[name]
        raise SelectionError(f"`{text}`: write {name}={example}, with a number from {bounds[0]:g} to {bounds[1]:g}")
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


def _allowed(given: str | Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The list of allowed ranks, and what they must be multiples of."""
    if isinstance(given, str):
        multiple = re.fullmatch(r"\s*(\d{1,6})x\s*", given)
        if multiple is not None and int(multiple[1]) > 0:
            return (), int(multiple[1])
        parts = [*map(str, VLLM)] if given.strip().lower() == "vllm" else given.split(",")
    else:
        parts = [*map(str, given)]
    try:
        ranks = sorted({int(part) for part in parts})
    except ValueError:
        ranks = []
    if not ranks or ranks[0] < 1 or ranks[-1] > 2**20:
        raise SelectionError(f"`{given}` is not a list of ranks: write 8,16,32 or vllm or 8x (multiples of 8)")
    return tuple(ranks), 1
