"""What a file of kohya's holds that PEFT's directory has no place for: `lora_compress/kohya.safetensors`.

Its header has the file's metadata, and under `NAMES` which keys and shapes the factors of each tensor had and a digest
of them; its tensors are the alphas as they were stored, and the three factors of Tucker convolutions. With it, the way
back gives the same tensors and metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_compress._native import Checkpoint
from lora_compress.errors import AdapterError
from lora_compress.formats.kohya.names import part_of
from lora_compress.formats.kohya.read import Assigned
from lora_compress.formats.kohya.write import HASHES
from lora_compress.formats.stored import Tensor, write

FILE = "kohya.safetensors"
NAMES = "lora_compress.names"
NAMED = {"up", "down", "mid", "alpha"}


@dataclass(frozen=True, slots=True)
class Rest:
    """The rest of a file: keys by tensor and part, shapes by key, the file's metadata."""

    file: Checkpoint
    keys: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, list[int]]
    metadata: Mapping[str, str]
    digest: str


def write_rest(path: Path, found: Assigned) -> None:
    """Keep what is left of a file whose factors were renamed."""
    file = found.file
    kept = [
        key
        for module in found.modules.values()
        for part, key in sorted(module.keys.items())
        if part == "alpha" or "mid" in module.keys
    ]
    named = {tensor: dict(sorted(module.keys.items())) for tensor, module in found.modules.items()}
    forms = {keys[part]: file.info(keys[part]).shape for keys in named.values() for part in ("down", "up")}
    metadata = file.metadata[0] if file.metadata else {}
    if {key for keys in named.values() for key in keys.values()} < {tensor.name for tensor in file.tensors()}:
        # Some components are left out: the digests were of all.
        metadata = {name: value for name, value in metadata.items() if name not in HASHES}
    pairs = [(file, keys["up"], keys["down"]) for keys in named.values() if "mid" not in keys]
    account = {"keys": named, "shapes": forms, "digest": digest(pairs)}
    header = {**metadata, NAMES: json.dumps(account, ensure_ascii=False)}
    write(path, [Tensor(key, file.info(key).dtype, file.info(key).shape, (file, key)) for key in kept], header)


def digest(pairs: Iterable[tuple[Checkpoint, str, str]]) -> str:
    """A digest of the bytes of factors, by which a change of them is seen."""
    total = sha256()
    for file, *names in pairs:
        for name in names:
            total.update(file.read_bytes(name))
    return total.hexdigest()


def read_rest(path: Path) -> Rest | None:
    """Read what was kept; None where nothing was. Raises `AdapterError` for what is malformed."""
    if not path.is_file():
        return None
    file = Checkpoint(path)
    metadata = dict(file.metadata[0] if file.metadata else {})
    try:
        named = json.loads(metadata.pop(NAMES, ""))
        keys, shapes = named["keys"], named["shapes"]
        used = [key for parts in keys.values() for key in parts.values()]
        good = all(map(_is_module, keys.values())) and all(map(_is_shape, shapes.values()))
        good = good and len(set(used)) == len(used) and set(shapes) <= set(used) and isinstance(named["digest"], str)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        good = False
    if not good:
        raise AdapterError(f"`{path}` is malformed: remove it, the names and metadata in it are lost then")
    return Rest(file, keys, shapes, metadata, named["digest"])


def _is_module(parts: Any) -> bool:
    return {"up", "down"} <= set(parts) <= NAMED and all(part_of(key) == part for part, key in parts.items())


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and 0 < size < 2**48 for size in shape)


def fits(shape: list[int], other: list[int]) -> bool:
    """Whether a factor can have a shape instead of another: the same numbers in the same order."""
    return shape[:1] == other[:1] and math.prod(shape) == math.prod(other)
