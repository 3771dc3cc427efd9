"""`merge --keep-base-patch` and `unmerge`: a merged model that holds what leads back to its base, to the bit.

`lora_compress/base_patch.safetensors` in the merged model has the differences of all changed weights and the headers of
the base's shards; `base_patch.json` the base's fingerprint and those of its small files that merging replaced.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_compress._native import Checkpoint, Patch, fingerprint, unmerge_shard
from lora_compress.errors import AdapterError, CheckpointError
from lora_compress.model import Model, read_json
from lora_compress.verbs import output
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.companions import copy_own
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.side_file import FOLDER

PATCH = "base_patch.safetensors"
FACTS = "base_patch.json"


@dataclass(frozen=True, slots=True)
class UnmergeResult:
    """What `unmerge` did."""

    out: Path
    nbytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "out": str(self.out),
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


def begin(folder: Path, base: Model, changed: list[str]) -> Patch:
    """A patch in the directory of a merged model that is being written."""
    (folder / FOLDER).mkdir(exist_ok=True)
    return Patch(folder / FOLDER / PATCH, base.checkpoint, changed)


def finish(patch: Patch, folder: Path, base: Model) -> None:
    """Complete the patch, with what merging has made of the small files."""
    patch.finish()
    replaced: dict[str, str | None] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(".safetensors"):
            own = base.path / path.name
            before = own.read_bytes() if base.path.is_dir() and own.is_file() else None
            if before != path.read_bytes():
                replaced[path.name] = None if before is None else base64.b64encode(before).decode()
    facts = {
        "schema_version": SCHEMA_VERSION,
        "base_fingerprint": base.fingerprint,
        # None: the base had no such file.
        "replaced": replaced,
    }
    (folder / FOLDER / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def unmerge(
    merged: str | Path, out: str | Path, *, force: bool = False, progress: Progress | None = None
) -> UnmergeResult:
    """Restore the base of a model that was merged with `keep_base_patch`: every file of weights byte for byte, and the
    small files beside them.

    Raises `AdapterError` for a model without a patch, `CheckpointError` for a patch that is damaged or of another model
    than this, and as `merge` does. Nothing is left behind.
    """
    started = time.perf_counter()
    merged, out = Path(merged), Path(out)
    output.check(out, force=force, inputs=(merged,))
    if not (merged / FOLDER / PATCH).is_file() or not (merged / FOLDER / FACTS).is_file():
        raise AdapterError(f"`{merged}` has no `{FOLDER}/{PATCH}`: merge with --keep-base-patch to be able to unmerge")
    facts = read_json(merged / FOLDER / FACTS)
    replaced = facts.get("replaced")
    if not isinstance(replaced, dict) or not all(map(_is_plain, replaced)):
        raise CheckpointError(f"`{merged / FOLDER / FACTS}` is malformed")
    model, patch = Model.open(merged), Checkpoint(merged / FOLDER / PATCH)
    progress = progress or Silent()
    progress.begin("unmerging", sum(tensor.nbytes for tensor in model.checkpoint.tensors()), 0)
    with output.new_directory(out, force=force, inputs=(merged,)) as folder:
        for number, shard in enumerate(model.checkpoint.shards):
            unmerge_shard(model.checkpoint, patch, number, folder / shard.name, progress.advance)
        for path in sorted(merged.iterdir()):
            if path.is_file() and not path.name.endswith(".safetensors") and path.name not in replaced:
                copy_own(path, folder)
        for name, stored in replaced.items():
            if stored is not None:
                (folder / name).write_bytes(_decoded(merged, stored))
        if fingerprint(Checkpoint(folder)) != facts.get("base_fingerprint"):
            raise CheckpointError(f"what `{merged / FOLDER / PATCH}` makes is not the base that it says it is")
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return UnmergeResult(out, nbytes, time.perf_counter() - started)


def _is_plain(name: object) -> bool:
    """Whether a name stays in its directory."""
    return isinstance(name, str) and bool(name) and Path(name).name == name and name not in {".", ".."}


def _decoded(merged: Path, stored: object) -> bytes:
    try:
        return base64.b64decode(str(stored), validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"`{merged / FOLDER / FACTS}` is malformed: {error}") from error
