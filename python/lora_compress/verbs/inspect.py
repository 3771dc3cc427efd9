"""`inspect`: what a checkpoint or an adapter is, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_compress import plugins
from lora_compress._native import Checkpoint, TensorInfo
from lora_compress.hub import resolve
from lora_compress.model import Model, read_json
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.side_file import read_manifest


@dataclass(frozen=True, slots=True)
class InspectResult:
    """What a path holds."""

    path: Path
    kind: str
    files: tuple[Path, ...]
    tensors: tuple[TensorInfo, ...]
    config: dict[str, Any]
    manifest: dict[str, Any]
    architecture: str = ""
    tied_embedding: str | None = None

    @property
    def parameters(self) -> int:
        """Elements over all tensors."""
        return sum(_elements(tensor) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes over all tensors."""
        return sum(tensor.stored_nbytes for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes by dtype, largest first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.stored_dtype] += tensor.stored_nbytes
        return dict(counts.most_common())

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "path": str(self.path),
            "kind": self.kind,
            "files": [file.name for file in self.files],
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "tied_embedding": self.tied_embedding,
            "config": self.config,
            "tensors": [
                {"name": t.name, "dtype": t.stored_dtype, "shape": t.shape, "bytes": t.stored_nbytes, "file": t.shard}
                for t in self.tensors
            ],
        }


def inspect(path: str | Path) -> InspectResult:
    """Describe a checkpoint or an adapter directory. Reads headers and configuration only; raises as `Model.open`
    does.
    """
    path = resolve(path)
    if plugins.load().format_of(path) is not None:
        files = [path] if path.is_file() else _files(path)
        tensors = [tensor for file in files for tensor in Checkpoint(file).tensors()]
        manifest = read_manifest(path)
        config = _config(path, files)
        return InspectResult(path, "adapter", tuple(files), tuple(tensors), config, manifest)
    model = Model.open(path)
    shards, stored = tuple(model.checkpoint.shards), tuple(model.checkpoint.tensors())
    return InspectResult(
        path, "checkpoint", shards, stored, model.config, {}, model.architecture, model.tied_embedding()
    )


def _files(folder: Path) -> list[Path]:
    """The files of an adapter's tensors: by PEFT's names, or of any name where there are none such."""
    usual = sorted(file for file in folder.glob("adapter*") if file.suffix in {".safetensors", ".bin"})
    return usual or sorted(folder.glob("*.safetensors"))


def _config(path: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What an adapter's files say of it: a configuration, else the metadata of its only file."""
    config = {}
    if path.is_dir():
        config = read_json(path / "adapter_config.json") or read_json(path / "adapter_factors.json")
    metadata = Checkpoint(files[0]).metadata if not config and len(files) == 1 else []
    return config or dict(metadata[0] if metadata else {})


def _elements(tensor: TensorInfo) -> int:
    product = 1
    for dim in tensor.shape:
        product *= dim
    return product
