"""The conformance kit finds what is wrong with a decomposition, and says it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from lora_compress import Decomposition, Delta
from lora_compress.testing import check_decomposition

TURNS = itertools.count()


def best(delta: Delta, rank: int, *, seed: int, tolerance: float) -> tuple[Any, Any]:
    """What conforms."""
    u, sigma, vt = delta.truncated_svd(rank, seed=seed, tolerance=tolerance)
    return (u * sigma).astype(np.float32), vt


def another_each_time(delta: Delta, rank: int, **given: Any) -> Sequence[Any]:
    b, a = best(delta, rank, **given)
    return b * np.float32(1 - 1e-6 * next(TURNS)), a


def in_float64(delta: Delta, rank: int, **given: Any) -> Sequence[Any]:
    b, a = best(delta, rank, **given)
    return b.astype(np.float64), a


def one_rank_more(delta: Delta, rank: int, **given: Any) -> Sequence[Any]:
    return best(delta, rank + 1, **given)


def not_a_number(delta: Delta, rank: int, **given: Any) -> Sequence[Any]:
    b, a = best(delta, rank, **given)
    return b * np.float32(np.nan), a


def overshooting(delta: Delta, rank: int, **given: Any) -> Sequence[Any]:
    b, a = best(delta, rank, **given)
    return np.float32(3) * b, a


def worse_with_rank(delta: Delta, rank: int, **given: Any) -> Sequence[Any]:
    b, a = best(delta, rank, **given)
    return b / np.float32(rank), a


def transposed(delta: Delta, rank: int, **given: Any) -> Sequence[Any]:
    b, a = best(delta, rank, **given)
    return a.T, b.T


def one_factor(delta: Delta, rank: int, **given: Any) -> Sequence[Any]:
    return best(delta, rank, **given)[:1]


def moving_start(rows: int, cols: int, rank: int, *, rng: np.random.Generator) -> Sequence[Any]:
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, cols))]


def wide_start(rows: int, cols: int, rank: int, *, rng: np.random.Generator) -> Sequence[Any]:
    return np.zeros((rows, rank)), rng.standard_normal((rank, cols))


def another_start(rows: int, cols: int, rank: int, *, rng: np.random.Generator) -> Sequence[Any]:
    return np.zeros((rows, rank), np.float32), np.full((rank, cols), 1 + next(TURNS), np.float32)


def dead_start(rows: int, cols: int, rank: int, *, rng: np.random.Generator) -> Sequence[Any]:
    return np.zeros((rows, rank), np.float32), np.zeros((rank, cols), np.float32)


def larger_start(rows: int, cols: int, rank: int, *, rng: np.random.Generator) -> Sequence[Any]:
    return dead_start(rows, cols, rank + 1, rng=rng)


def small_seeds(delta: Delta, rank: int, *, seed: int, tolerance: float) -> Sequence[Any]:
    np.random.RandomState(seed)
    return best(delta, rank, seed=seed, tolerance=tolerance)


def no_size(rows: int, cols: int, rank: int) -> dict[str, int]:
    return {}


def falling(rows: int, cols: int, rank: int) -> dict[str, int]:
    return {"out": rows, "in": cols, "r": max(3 - rank, 1)}


def lora(**given: Any) -> Decomposition:
    return Decomposition("broken", "out r, r in", **{"fit": best, **given})


def sharing(group: Any) -> Decomposition:
    return Decomposition("broken", "layer out r, r in", group=group)


def test_what_conforms_passes() -> None:
    check_decomposition(lora())


# By what the kit has to say of it.
BROKEN = {
    "the same delta, rank and seed give other factors": lora(fit=another_each_time),
    "factors are float32": lora(fit=in_float64),
    "`r` is 2, but 1 at most at the rank 1": lora(fit=one_rank_more),
    "factor 1 holds NaN": lora(fit=not_a_number),
    "the factors are farther from Δ than nothing is": lora(fit=overshooting),
    "errors rise with the rank": lora(fit=worse_with_rank),
    "the factors make a (4, 6) matrix, the delta is (6, 4)": lora(fit=transposed),
    "1 factors for the 2 of `out r, r in`": lora(fit=one_factor),
    "training does not start from the base": lora(init=moving_start),
    "factors to train from are float32": lora(init=wide_start),
    "the same seed gives other factors to train from": lora(init=another_start),
    "training never starts: all gradients are zero": lora(init=dead_start),
    "factors to train from have other shapes": lora(init=larger_start),
    "Seed must be between 0 and 2**32 - 1": lora(fit=small_seeds),
    "a rank without parameters": lora(ladder=lambda rows, cols: [0, 1]),
    "the axes of `broken` give no size of `r`": lora(axes=no_size),
    "parameters fall while ranks rise": lora(axes=falling),
    "there is no rank for matrices of shape (6, 4)": lora(ladder=lambda rows, cols: []),
    "cannot share a factor": sharing(lambda layers: [[layer.name for layer in layers]]),
    "nowhere": sharing(lambda layers: [["nowhere"]]),
}


@pytest.fixture
def without_shrinking() -> Iterator[None]:
    """The first example that fails will do."""
    settings.register_profile("without shrinking", phases=[Phase.generate])
    settings.load_profile("without shrinking")
    yield
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_is_named(fault: str, without_shrinking: None) -> None:
    with pytest.raises((AssertionError, ValueError, KeyError), match=re.escape(fault)):
        check_decomposition(BROKEN[fault], shapes=[(6, 4)])
