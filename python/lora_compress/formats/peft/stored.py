"""PEFT's directory from factors as another format has them: only names and configuration are new."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_compress.errors import SelectionError
from lora_compress.formats.peft.layout import CONFIG, WEIGHTS, Layout, Place
from lora_compress.formats.peft.write import configuration
from lora_compress.formats.stored import StoredPair, shapes, write
from lora_compress.model import Model


def write_stored(folder: Path, base: Model, base_name: str, pairs: Sequence[StoredPair], dtype: str | None) -> int:
    """Write weights and configuration into `folder`; return the bytes of the factors.

    A convolution's factors are `lora_A.weight` (r, in, k…) and `lora_B.weight` (out, r, 1…), as PEFT's `Conv2d` has
    them.
    """
    layout = Layout(base, [pair.tensor for pair in pairs])
    places = {pair.tensor: _place(layout, pair.tensor) for pair in pairs}
    tensors = [
        tensor
        for pair in pairs
        for tensor in pair.tensors(
            (places[pair.tensor].b_key, places[pair.tensor].a_key),
            shapes(base.checkpoint.info(pair.tensor).shape, pair.rank),
            dtype,
        )
    ]
    size = write(folder / WEIGHTS, tensors, {"format": "pt"})
    alphas = {places[pair.tensor].target: _short(pair.alpha) for pair in pairs}
    ranks = {places[pair.tensor].target: pair.rank for pair in pairs}
    config = configuration(base, base_name, ranks, alphas, int(_usual(ranks.values())), _usual(alphas.values()))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return size


def _place(layout: Layout, tensor: str) -> Place:
    place = layout.place(tensor)
    if place is None or place.transposed or place.is_parameter:
        # An embedding's are the other way round, and some layers have none.
        raise SelectionError(
            f"PEFT has no name for factors of `{tensor}` as they are: `resize` writes what it can read"
        )
    return place


def _usual(values: Iterable[float]) -> float:
    """The value of most modules, the largest of several such."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _short(alpha: float) -> float:
    """A whole number as one: PEFT annotates `lora_alpha` as int."""
    return int(alpha) if alpha.is_integer() else alpha
