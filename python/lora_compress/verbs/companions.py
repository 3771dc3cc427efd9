"""The files beside the weights that make a model: index, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lora_compress._native import Checkpoint
from lora_compress.adapter import Adapter, Stored
from lora_compress.hub import holder
from lora_compress.model import CONFIG, Model, names, read_json

INDEX = "model.safetensors.index.json"
# By the same rule as the core's `directory.rs`.
INDICES = (INDEX, "diffusion_pytorch_model.safetensors.index.json", "pytorch_model.bin.index.json")
# Weights in other containers would contradict the merged ones.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# Copied with the adapter when the vocabulary grew: the base's tokenizer does not know the new entries.
TOKENIZER = ("added_tokens.json", "chat_template.*", "merges.txt", "special_tokens_map.json", "tokenizer*", "vocab.*")
# As transformers' configurations call dtypes.
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def shard_names(base: Model) -> list[str]:
    """The files of a merged model: the base's own where they are safetensors of a directory, else the usual ones."""
    files = base.checkpoint.shards
    if base.path.is_dir() and all(file.suffix == ".safetensors" for file in files):
        return [file.name for file in files]
    if len(files) == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]


def write_companions(
    base: Model, adapters: Sequence[Adapter], folder: Path, shards: Sequence[str], dtype: str | None
) -> list[str]:
    """Index, configuration and tokenizer of the merged model; returns warnings of files that were not copied."""
    warnings = []
    for path in sorted(base.path.iterdir()) if base.path.is_dir() else ():
        is_weights = path.name.endswith(WEIGHTS)
        if path.is_file() and not path.name.startswith(".") and not is_weights and not copy_own(path, folder):
            warnings.append(f"`{path}` is a link out of the model's directory: it was not copied")
    _write_index(base, folder, shards)
    grown = {name: stored for adapter in adapters for name, stored in adapter.new_rows.items()}
    if base.config:
        _write_config(base, folder, _grown_vocabulary(base, grown), dtype)
    for adapter in adapters if grown and base.config else ():
        copy_tokenizer(adapter.path, folder)
    return warnings


def copy_own(path: Path, folder: Path) -> bool:
    """Copy a file of a model or adapter, unless it is a link out of its directory: a model from a stranger could
    otherwise have a private file of the user's copied into what is published.
    """
    is_own = path.resolve().is_relative_to(holder(path.parent))
    if is_own:
        shutil.copy2(path, folder / path.name)
    return is_own


def _write_config(base: Model, folder: Path, grown: dict[str, int], dtype: str | None) -> None:
    """The configuration where merging has made it another."""
    has_eight_bits = any(tensor.stored_dtype != tensor.dtype for tensor in base.checkpoint.tensors())
    config = {**base.config, **grown}
    if has_eight_bits:
        # Weights of eight bits are written as BF16, without scales.
        config.pop("quantization_config", None)
    for key in ("torch_dtype", "dtype"):
        if dtype is not None and key in config:
            config[key] = TORCH_NAMES[dtype]
    if config != base.config:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_index(base: Model, folder: Path, shards: Sequence[str]) -> None:
    """The index of the merged shards, with what else the base's says; none for a single file of a base without one."""
    indices = [name for name in INDICES if base.path.is_dir() and (base.path / name).is_file()]
    if len(shards) == 1 and not indices:
        return
    index = read_json(base.path / indices[0]) if indices else {}
    merged = {shard: Checkpoint(folder / shard) for shard in shards}
    sizes = {tensor.name: tensor.nbytes for held in merged.values() for tensor in held.tensors()}
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": sum(sizes.values())}
    index["weight_map"] = {name: shard for shard, held in merged.items() for name in names(held)}
    name = indices[0] if indices and indices[0].endswith(INDEX) else INDEX
    (folder / name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _grown_vocabulary(base: Model, grown: dict[str, Stored]) -> dict[str, int]:
    """The configuration's `vocab_size` follows the rows of the embedding, where it said their number before."""
    size = base.config.get("vocab_size")
    for name, (checkpoint, key) in grown.items():
        rows = base.checkpoint.info(name).shape[0]
        if rows == size:
            return {"vocab_size": rows + checkpoint.info(key).shape[0]}
    return {}


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy what makes the tokenizer of the model or adapter in a directory."""
    for pattern in TOKENIZER:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                copy_own(path, out)
