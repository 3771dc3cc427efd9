"""`merge`: a base and adapters become a merged checkpoint, W' = round(W + Σ s·B·A).

The output has the base's files: the same shards, dtypes, order and index. Tensors that no adapter touches are copied
byte for byte, and so is everything else that makes a model (configuration, tokenizer).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_compress import plugins
from lora_compress._native import Checkpoint, LowRank, Update, merge_shard
from lora_compress.adapter import Adapter, Stored
from lora_compress.errors import AdapterError
from lora_compress.model import CONFIG, Model, names, read_json
from lora_compress.verbs import output
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.extract import TOKENIZER
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.side_file import with_side_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Weights in other containers would contradict the merged ones.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What `merge` did."""

    out: Path
    changed: int
    copied: int
    nbytes: int
    seconds: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "out": str(self.out),
            "changed_tensors": self.changed,
            "copied_tensors": self.copied,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge adapters into a base model.

    Several adapters are summed in the order given. Where exactly one stores a tensor whole, its values are copied;
    where several do, each one's difference to the base is added.

    Parameters
    ----------
    base: safetensors file, or directory with `model.safetensors` or a shard index.
    adapters: adapter directories of any registered format.
    out: directory to create; with a name ending in `.safetensors` and an unsharded base, a single file.
    force: replace an existing output.
    progress: receives progress reports.

    Raises
    ------
    AdapterError, TensorError, CheckpointError, PluginError, OutputExistsError, OSError. Nothing is left behind.
    """
    started = time.perf_counter()
    if isinstance(adapters, str | Path):
        adapters = [adapters]
    if not adapters:
        raise ValueError("at least one adapter is needed")
    out, inputs = Path(out), (Path(base), *map(Path, adapters))
    output.check(out, force=force, inputs=inputs)
    model = Model.open(base)
    parts = [read_adapter(path, model) for path in adapters]
    updates = combine(parts)
    progress = progress or Silent()
    progress.begin("merging", sum(tensor.nbytes for tensor in model.checkpoint.tensors()), 0)

    as_file = out.suffix == ".safetensors"
    if as_file and len(model.checkpoint.shards) > 1:
        raise ValueError(f"`{base}` has several shards: `{out}` must be a directory")
    if as_file:
        out.parent.mkdir(parents=True, exist_ok=True)
        merge_shard(model.checkpoint, 0, updates, out, progress.advance)
    else:
        with output.new_directory(out, force=force, inputs=inputs) as folder:
            for number, shard in enumerate(model.checkpoint.shards):
                name = shard.name if model.path.is_dir() else SINGLE
                merge_shard(model.checkpoint, number, updates, folder / name, progress.advance)
            _write_companions(model, parts, folder)
    nbytes = out.stat().st_size if as_file else sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    warnings = tuple(warning for part in parts for warning in part.warnings)
    copied = len(names(model.checkpoint)) - len(updates)
    return MergeResult(out, len(updates), copied, nbytes, time.perf_counter() - started, warnings)


def read_adapter(path: str | Path, base: Model) -> Adapter:
    """Read an adapter of any registered format, with its side file.

    Raises `AdapterError` when no format recognises it, or when it has parts for tensors that `base` does not have.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "No such adapter", str(path))
    host = plugins.load()
    form = host.format_of(path)
    if form is None:
        known = ", ".join(form.name for form in host.formats)
        raise AdapterError(
            f"`{path}` is not an adapter of any known format ({known}): is there an `adapter_config.json`?"
        )
    with plugins.blame(host.formats.origin(form.name), f"failed in `read` of `{form.name}`"):
        adapter = form.read(path, base)
    adapter = with_side_file(adapter)
    unknown = sorted(adapter.tensors() - set(names(base.checkpoint)))
    if unknown:
        raise AdapterError(
            f"`{path}` changes `{unknown[0]}`, which `{base.path}` does not have: is it an adapter of another base?"
        )
    return adapter


def combine(adapters: Sequence[Adapter]) -> dict[str, Update]:
    """What several adapters together do to each tensor. Raises `AdapterError` when two append rows to the same one."""
    low_rank: dict[str, list[LowRank]] = {}
    computed: dict[str, list[Any]] = {}
    replacements: dict[str, list[Stored]] = {}
    rows: dict[str, tuple[Stored, Path]] = {}
    for adapter in adapters:
        for name, terms in adapter.low_rank.items():
            low_rank.setdefault(name, []).extend(terms)
        for name, terms_to_compute in adapter.computed.items():
            computed.setdefault(name, []).extend(terms_to_compute)
        for name, stored in adapter.replacements.items():
            replacements.setdefault(name, []).append(stored)
        for name, stored in adapter.new_rows.items():
            if name in rows:
                raise AdapterError(f"`{rows[name][1]}` and `{adapter.path}` both append rows to `{name}`")
            rows[name] = stored, adapter.path
    return {
        name: Update(
            low_rank=low_rank.get(name, []),
            computed=computed.get(name, []),
            replacements=replacements.get(name, []),
            new_rows=rows[name][0] if name in rows else None,
        )
        for name in sorted({*low_rank, *computed, *replacements, *rows})
    }


def _write_companions(base: Model, adapters: Sequence[Adapter], folder: Path) -> None:
    """Index, configuration and tokenizer of the merged model."""
    if base.path.is_dir():
        for path in sorted(base.path.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHTS):
                shutil.copy2(path, folder / path.name)
    merged = Checkpoint(folder) if not (base.path / INDEX).is_file() else None
    if merged is None:
        index = read_json(base.path / INDEX)
        shards = {shard.name: Checkpoint(folder / shard.name) for shard in base.checkpoint.shards}
        sizes = {t.name: t for shard in shards.values() for t in shard.tensors()}
        metadata = index.get("metadata")
        index["metadata"] = {
            **(metadata if isinstance(metadata, dict) else {}),
            "total_size": sum(tensor.nbytes for tensor in sizes.values()),
        }
        index["weight_map"] = {name: shard for shard, held in shards.items() for name in names(held)}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    grown = {name: stored for adapter in adapters for name, stored in adapter.new_rows.items()}
    if grown and base.config:
        _grow_vocabulary(base, grown, folder)
        for adapter in adapters:
            for pattern in TOKENIZER:
                for path in sorted(adapter.path.glob(pattern)):
                    shutil.copy2(path, folder / path.name)


def _grow_vocabulary(base: Model, grown: dict[str, Stored], folder: Path) -> None:
    """Let the configuration's `vocab_size` follow the rows of the embedding, where it said their number before."""
    size = base.config.get("vocab_size")
    for name, (checkpoint, key) in grown.items():
        rows = base.checkpoint.info(name).shape[0]
        if rows == size:
            config = {**base.config, "vocab_size": rows + checkpoint.info(key).shape[0]}
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            return
