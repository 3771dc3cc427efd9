"""Which layers of a model are alike, by the names that transformers and diffusers give them: for decompositions whose
factors are shared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_compress.decompositions.interface import Layer
from lora_compress.model import module_of

# Layers that are given the same input, by the last component of their names.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("fc_q", "fc_k", "fc_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# In cross-attention the queries come from elsewhere than keys and values.
CROSS = re.compile(r"cross|encoder_att|EncDec|attn2|encdec", re.IGNORECASE)
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def same_input(layers: Sequence[Layer]) -> list[list[str]]:
    """Names of layers side by side that multiply the same input: queries, keys and values; gate and up."""
    kinds = {name: number for number, names in enumerate(SAME_INPUT) for name in names}
    groups: dict[tuple[str, int, bool, int], list[str]] = {}
    for layer in layers:
        parent, _, last = (module_of(layer.name) or "").rpartition(".")
        if last in kinds:
            # The first of each kind are the queries.
            alone = CROSS.search(parent) is not None and last == SAME_INPUT[kinds[last]][0]
            groups.setdefault((parent, kinds[last], alone, layer.cols), []).append(layer.name)
    return [names for names in groups.values() if len(names) > 1]


def across_depth(layers: Sequence[Layer]) -> list[list[str]]:
    """Names of layers of one kind and shape whose names differ in the number of the block alone."""
    groups: dict[tuple[str, int, int], list[str]] = {}
    for layer in layers:
        if NUMBER.search(layer.name):
            groups.setdefault((NUMBER.sub("*", layer.name, count=1), layer.rows, layer.cols), []).append(layer.name)
    return [names for names in groups.values() if len(names) > 1]
