"""Writing factors: each group's when it arrives, and the description at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_compress._native import Writer
from lora_compress.adapter import AdapterPlan, GroupFactors
from lora_compress.formats.factors.read import CONFIG, FACTORS, SCHEMA_VERSION, stored_name


class GroupWriter:
    """An adapter of factors being written."""

    def __init__(self, path: Path, plan: AdapterPlan) -> None:
        self._path, self._plan = path, plan
        self._groups: list[dict[str, Any]] = []
        expected = [
            (name, plan.dtype, values.shape)
            for number, group in enumerate(plan.groups)
            for _, name, values in _stored(group, number)
        ]
        self._writer = Writer(path / FACTORS, expected, {"format": "pt"})

    def write_group(self, group: GroupFactors) -> list[int]:
        """Append the factors of a group. Shared ones count for its first layer."""
        sizes = dict.fromkeys(group.tensors, 0)
        width = 4 if self._plan.dtype == "F32" else 2
        for tensor, name, values in _stored(group, len(self._groups)):
            self._writer.append(name, self._plan.dtype, values)
            sizes[tensor] += width * values.size
        self._groups.append(
            {
                "decomposition": group.decomposition,
                "contraction": group.contraction,
                "tensors": list(group.tensors),
            }
        )
        return list(sizes.values())

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Complete both files."""
        self._writer.finish()
        config = {
            "schema_version": SCHEMA_VERSION,
            "base_model_name_or_path": self._plan.base_name,
            "lora_compress_version": manifest.get("version"),
            "groups": self._groups,
        }
        text = json.dumps(config, indent=1, allow_nan=False, ensure_ascii=False)
        (self._path / CONFIG).write_text(text + "\n", encoding="utf-8")


def _stored(group: GroupFactors, number: int) -> list[tuple[str, str, Any]]:
    """(tensor it counts for, name, values) of every array of a group, each once."""
    stored = []
    for at, (tensor, factors) in enumerate(zip(group.tensors, group.layers, strict=True)):
        for factor, (values, own) in enumerate(zip(factors, group.own, strict=True)):
            if own or at == 0:
                stored.append((tensor, stored_name(factor, tensor if own else None, number), values))
    return stored
