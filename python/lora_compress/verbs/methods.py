"""How several adapters become one: the method, how much of each ΔW it keeps, and the seed of what is random.

Names are those of mergekit. PEFT calls the same `ties_svd`, `dare_linear_svd` and `dare_ties_svd`, and has `ties` and
so on for something else: there the factors A and B are trimmed or dropped each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LINEAR = "linear"
METHODS = (LINEAR, "ties", "dare_linear", "dare_ties")


@dataclass(frozen=True, slots=True)
class Method:
    """A method of `METHODS`; `densities` are one for each adapter, in (0, 1], and none for "linear"."""

    name: str = LINEAR
    densities: tuple[float, ...] = ()
    seed: int = 0

    @property
    def is_sum(self) -> bool:
        """Whether the result is the sum of the adapters, so that its factors are theirs side by side."""
        return self.name == LINEAR

    @property
    def drops(self) -> bool:
        """Whether elements are left out at random (DARE), not by magnitude (TIES)."""
        return self.name.startswith("dare")

    @property
    def elects(self) -> bool:
        """Whether the adapters elect a sign for each element (TIES), instead of being added."""
        return self.name.endswith("ties")

    def to_json(self) -> dict[str, Any]:
        """As stored in manifests."""
        return {"method": self.name} | ({} if self.is_sum else {"density": list(self.densities), "seed": self.seed})


def choose_method(name: str, density: float | Sequence[float] | None, seed: int, adapters: int) -> Method:
    """A method from what a user says, for so many adapters: a density for all or one for each. Raises `ValueError`."""
    if name not in METHODS:
        raise ValueError(f"there is no method `{name}`: take one of {', '.join(METHODS)}")
    densities = () if density is None else (density,) if isinstance(density, int | float) else tuple(density)
    if name == LINEAR and densities:
        raise ValueError("the method linear keeps all elements: it takes no density")
    if name != LINEAR and len(densities) not in {1, adapters}:
        raise ValueError(
            f"the method {name} needs densities, one for all or one for each of {adapters} adapters: {list(densities)}"
        )
    if not all(0 < each <= 1 for each in densities):
        raise ValueError(f"densities ({list(densities)}) are shares of the elements that are kept, above 0 and up to 1")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed ({seed}) must be of 64 bits")
    return Method(name, densities * adapters if len(densities) == 1 else densities, seed)
