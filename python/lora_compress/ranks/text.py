"""Sizes in words."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """Bytes for people, in units of 1000 as disks and Hubs count."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB" if value < 1000 else f"{value:,.0f} GB"
