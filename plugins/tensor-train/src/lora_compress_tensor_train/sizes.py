"""How the rows and the columns of ΔW are split in two."""

from __future__ import annotations

from functools import lru_cache


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


@lru_cache(maxsize=1024)
def near_square(number: int) -> tuple[int, int]:
    """The two factors of a number that are closest to each other, the larger one first; a prime and 1 for a prime."""
    large = next(divisor for divisor in divisors(number) if divisor * divisor >= number)
    return large, number // large


@lru_cache(maxsize=1024)
def interleaved(rows: int, cols: int) -> tuple[int, int, int, int]:
    """o1, o2, i1, i2 with o1·o2 = rows, i1·i2 = cols and the smallest o1·i1 + o2·i2; of equally small ones those whose
    splits are closest to square.
    """
    splits = [(o1, rows // o1, i1, cols // i1) for o1 in divisors(rows) for i1 in divisors(cols)]

    def cost(split: tuple[int, int, int, int]) -> tuple[int, int]:
        o1, o2, i1, i2 = split
        return o1 * i1 + o2 * i2, max(o1, o2) + max(i1, i2)

    return min(splits, key=cost)
