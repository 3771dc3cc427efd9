"""The best scale of an adapter: a one-dimensional search of KL(tuned ‖ base + s·BA) on calibration tokens.

Truncated factors are shorter than ΔW. In the Frobenius norm s = 1 is the best scale for them all the same, since what
is left out is orthogonal to what is kept. For the model's predictions it need not be: directions that were cut had
effects that the kept ones can make up for in part, so s a little above 1 is often better. How much is found here, on
half of the tokens; the other half says whether to believe it. Never used unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_compress.errors import SelectionError
from lora_compress.model import Model
from lora_compress.torch.fidelity import CONTEXT, TOKENS, Adapted, Target, load
from lora_compress.torch.tokens import read_tokens
from lora_compress.verbs.merge import read_adapter
from lora_compress.verbs.side_file import read_manifest

# Where the best scale is looked for. The upper end is far above what restoring ‖ΔW‖ would ask for at useful ranks.
LEAST, MOST = 0.8, 1.6
TOLERANCE = 0.02


@dataclass(frozen=True)
class ScaleSearch:
    """What a search found. KL in nats per token: (at scale 1, at the best scale) on both halves of the tokens.

    `scale` is one number, or one for each kind of module; 1 where the held-out half does not agree. `at_edge`: the best
    lies at the end of the interval that was searched, and beyond it may be better.
    """

    scale: float | Mapping[str, float]
    calibration: tuple[float, float]
    heldout: tuple[float, float]
    trials: tuple[tuple[float, float], ...]
    tokens: int
    at_edge: bool = False

    def to_json(self) -> dict[str, Any]:
        """As printed and stored beside the scale."""
        return {
            "scale": dict(self.scale) if isinstance(self.scale, Mapping) else self.scale,
            "calibration_kl": {"at_1": self.calibration[0], "at_best": self.calibration[1]},
            "heldout_kl": {"at_1": self.heldout[0], "at_best": self.heldout[1]},
            "tokens": self.tokens,
            "at_edge": self.at_edge,
        }

    @property
    def improved(self) -> bool:
        """Whether the held-out half agrees that `scale` is better than 1."""
        return self.heldout[1] < self.heldout[0]


def search_scale(
    base: str | Path,
    tuned: str | Path,
    adapter: str | Path,
    calibration: str | Path,
    *,
    by_module: bool = False,
    context: int = CONTEXT,
    tokens: int = TOKENS,
    device: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ScaleSearch:
    """Find the scale of a causal language model's adapter.

    Parameters
    ----------
    base, tuned: model directories that transformers loads.
    adapter: an adapter of tuned − base with scale 1.
    calibration: text, or token ids as .npy or .json.
    by_module: after the common scale, one for each kind of module (`q_proj`, …), in turn.
    context, tokens: length of a window, and how many tokens to use in all.
    device: where to compute; a GPU if there is one.

    Raises `SelectionError` when transformers does not load the model, or names its weights otherwise than the
    checkpoint.
    """
    model = Model.open(base)
    if read_manifest(Path(adapter)).get("scale", 1.0) != 1.0:
        raise SelectionError(f"`{adapter}` already has a scale: extract it with scale 1 to search one")
    windows = read_tokens(calibration, Path(tuned), context=context, most=tokens)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.inference_mode():
        target = Target(load(tuned, place), windows)
        scaled = Adapted(load(base, place), model, read_adapter(adapter, model))
        calibrate, check = target.halves()

        def loss(scales: Mapping[str, float], half: list[int]) -> float:
            scaled.set(scales)
            return target.divergence(scaled.model, half)

        ones = dict.fromkeys(scaled.kinds, 1.0)
        trials = {1.0: loss(ones, calibrate)}

        def common(scale: float) -> float:
            trials[scale] = loss(dict.fromkeys(scaled.kinds, scale), calibrate)
            progress(f"scale {scale:.3f}: KL {trials[scale]:.5f}")
            return trials[scale]

        golden_section(common, LEAST, MOST, TOLERANCE)
        best = min(trials, key=lambda scale: trials[scale])
        found: list[dict[str, float]] = [ones, dict.fromkeys(scaled.kinds, best)]
        if by_module:
            found.append(_by_module(found[1], lambda scales: loss(scales, calibrate), trials[best], progress))
        # The held-out half chooses among the candidates that calibration has found.
        checked = [loss(scales, check) for scales in found]
        chosen = min(range(len(found)), key=lambda number: checked[number])
        tried = max(chosen, len(found) - 1) if chosen else len(found) - 1
        calibrated = trials[1.0], loss(found[tried], calibrate)
    scale = found[2] if chosen == 2 else found[chosen][scaled.kinds[0]] if scaled.kinds else 1.0
    edge = min(best - LEAST, MOST - best) <= TOLERANCE
    heldout = checked[0], checked[tried]
    return ScaleSearch(scale, calibrated, heldout, tuple(sorted(trials.items())), windows.numel(), edge)


def _by_module(
    start: Mapping[str, float],
    loss: Callable[[Mapping[str, float]], float],
    lowest: float,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """A scale for each kind of module, one after the other around the common one; only what lowers the loss is kept."""
    scales = dict(start)
    for kind, common in start.items():
        near, value = golden_section(
            lambda scale, kind=kind: loss({**scales, kind: scale}),  # type: ignore[misc]
            max(LEAST, common - 0.2),
            common + 0.2,
            2 * TOLERANCE,
        )
        if value < lowest:
            scales[kind], lowest = near, value
        progress(f"{kind}: scale {scales[kind]:.3f}")
    return scales


def golden_section(
    function: Callable[[float], float], left: float, right: float, tolerance: float
) -> tuple[float, float]:
    """The minimum of a unimodal function in [left, right], to ±tolerance (Kiefer 1953): the point, and the value
    there.
    """
    ratio = (math.sqrt(5) - 1) / 2
    x, y = right - ratio * (right - left), left + ratio * (right - left)
    at_x, at_y = function(x), function(y)
    while right - left > 2 * tolerance:
        if at_x < at_y:
            right, y, at_y = y, x, at_x
            x = right - ratio * (right - left)
            at_x = function(x)
        else:
            left, x, at_x = x, y, at_y
            y = left + ratio * (right - left)
            at_y = function(y)
    return (x, at_x) if at_x < at_y else (y, at_y)
