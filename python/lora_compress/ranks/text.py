"""Sizes and lists in words."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: int) -> str:
    """Bytes for people, in units of 1000 as disks and Hubs count."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB" if value < 1000 else f"{value:,.0f} GB"


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    listed = ", ".join(f"`{name}`" for name in names[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"
