"""What a LoRA cannot carry, beside the adapter: `lora_compress/exact.safetensors` and `lora_compress/manifest.json`.

A directory of their own keeps both out of sight of servers, some of which load every safetensors file they find next to
the adapter. Tensors are stored as tuned has them, in its dtype, under `exact:NAME` (the rows that the base has too) or
`new_rows:NAME` (the rows that follow).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_compress._native import Checkpoint, Writer
from lora_compress.adapter import Adapter, Stored
from lora_compress.errors import AdapterError
from lora_compress.model import read_json
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.selection import Pair, Treatment

FOLDER = "lora_compress"
EXACT = "exact.safetensors"
MANIFEST = "manifest.json"
WHOLE, ROWS = "exact:", "new_rows:"


def write_exact(adapter: Path, tuned: Checkpoint, pairs: Sequence[Pair]) -> None:
    """Store the tensors with treatment exact, and the new rows of any tensor, from `tuned`."""
    stored = [
        pair
        for pair in pairs
        if pair.treatment is Treatment.EXACT or (pair.treatment is Treatment.LOW_RANK and pair.new_rows)
    ]
    if not stored:
        return
    (adapter / FOLDER).mkdir(exist_ok=True)
    expected = [(prefix + pair.name, pair.tuned.dtype, pair.tuned.shape) for pair in stored for prefix in (WHOLE, ROWS)]
    writer = Writer(adapter / FOLDER / EXACT, expected)
    for pair in stored:
        rows = pair.base.shape[0] if pair.base.shape else None
        if pair.treatment is Treatment.EXACT:
            writer.append_stored(WHOLE + pair.name, tuned, pair.name, 0, rows)
        if pair.new_rows:
            writer.append_stored(ROWS + pair.name, tuned, pair.name, rows or 0)
    writer.finish()


def write_stored(
    adapter: Path,
    base: Checkpoint,
    replaced: Mapping[str, Sequence[tuple[Checkpoint, str, float]]],
    rows: Mapping[str, Stored],
) -> None:
    """Store tensors that adapters replace: one of weight 1 as it is, else base + Σ weight·(theirs − base), in the
    base's dtype; and the rows that are appended.
    """
    if not replaced and not rows:
        return
    (adapter / FOLDER).mkdir(exist_ok=True)
    expected = []
    for name, sources in replaced.items():
        is_copy = _is_copy(sources)
        dtype = sources[0][0].info(sources[0][1]).dtype if is_copy else base.info(name).dtype
        expected.append((WHOLE + name, dtype, base.info(name).shape))
    expected += [(ROWS + name, held.info(key).dtype, held.info(key).shape) for name, (held, key) in rows.items()]
    writer = Writer(adapter / FOLDER / EXACT, expected)
    for name, sources in sorted(replaced.items()):
        if _is_copy(sources):
            writer.append_stored(WHOLE + name, sources[0][0], sources[0][1])
            continue
        values = base.read(name).astype(np.float64)
        change = sum(weight * (held.read(key).astype(np.float64) - values) for held, key, weight in sources)
        writer.append(WHOLE + name, base.info(name).dtype, (values + change).astype(np.float32))
    for name, (held, key) in sorted(rows.items()):
        writer.append_stored(ROWS + name, held, key)
    writer.finish()


def _is_copy(sources: Sequence[tuple[Checkpoint, str, float]]) -> bool:
    return len(sources) == 1 and sources[0][2] == 1


def write_manifest(adapter: Path, manifest: Mapping[str, Any]) -> None:
    """Store the account of the extraction."""
    (adapter / FOLDER).mkdir(exist_ok=True)
    text = json.dumps(manifest, indent=1, allow_nan=False)
    (adapter / FOLDER / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(adapter: Path) -> dict[str, Any]:
    """The account of the extraction; {} for an adapter that this package did not write."""
    manifest = read_json(adapter / FOLDER / MANIFEST) if adapter.is_dir() else {}
    version = manifest.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise AdapterError(
            f"`{adapter / FOLDER / MANIFEST}` has schema version {version!r}, this release reads "
            f"{SCHEMA_VERSION}: upgrade"
        )
    rows = manifest.get("tensors", [])
    if (
        not isinstance(manifest.get("totals", {}), dict)
        or not isinstance(rows, list)
        or not all(isinstance(row, dict) and _is_row(row) for row in rows)
    ):
        raise AdapterError(
            f"`{adapter / FOLDER / MANIFEST}` is not a manifest of this package: its tensors are malformed"
        )
    return manifest


def _is_row(row: dict[str, Any]) -> bool:
    error = row.get("error_energy")
    return isinstance(row.get("name"), str) and (
        error is None or (isinstance(error, int | float) and 0 <= error < 1e300)
    )


def with_side_file(adapter: Adapter) -> Adapter:
    """The adapter and what its side file adds. Raises `AdapterError` where both replace the same tensor."""
    path = adapter.path / FOLDER / EXACT
    beside = adapter.path.parent / FOLDER / EXACT
    if adapter.path.is_file() and beside.is_file():
        said = f"`{beside}` is left out: it is applied where the directory is named instead of `{adapter.path.name}`"
        return replace(adapter, warnings=[*adapter.warnings, said])
    if not path.is_file():
        return adapter
    side = Checkpoint(path)
    replacements: dict[str, Stored] = dict(adapter.replacements)
    rows: dict[str, Stored] = dict(adapter.new_rows)
    for tensor in side.tensors():
        prefix, colon, name = tensor.name.partition(":")
        target = {WHOLE: replacements, ROWS: rows}.get(prefix + colon)
        if target is None:
            raise AdapterError(f"`{path}`: `{tensor.name}` begins with neither `{WHOLE}` nor `{ROWS}`")
        if name in target:
            raise AdapterError(f"`{path}` and the adapter beside it both store `{name}`")
        target[name] = (side, tensor.name)
    return replace(adapter, replacements=replacements, new_rows=rows)
