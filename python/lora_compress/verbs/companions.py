"""The files beside the weights that make a model: index, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lora_compress._native import Checkpoint
from lora_compress.adapter import Adapter, Stored
from lora_compress.model import CONFIG, Model, names, read_json

INDEX = "model.safetensors.index.json"
# Weights in other containers would contradict the merged ones.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# Copied with the adapter when the vocabulary grew: the base's tokenizer does not know the new entries.
TOKENIZER = ("added_tokens.json", "chat_template.*", "merges.txt", "special_tokens_map.json", "tokenizer*", "vocab.*")
# As transformers' configurations call dtypes.
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def write_companions(base: Model, adapters: Sequence[Adapter], folder: Path, dtype: str | None) -> None:
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
    if base.config and (grown or dtype is not None):
        config = {**base.config, **_grown_vocabulary(base, grown)}
        for key in ("torch_dtype", "dtype"):
            if dtype is not None and key in config:
                config[key] = TORCH_NAMES[dtype]
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if grown and base.config:
        for adapter in adapters:
            for pattern in TOKENIZER:
                for path in sorted(adapter.path.glob(pattern)):
                    shutil.copy2(path, folder / path.name)


def _grown_vocabulary(base: Model, grown: dict[str, Stored]) -> dict[str, int]:
    """The configuration's `vocab_size` follows the rows of the embedding, where it said their number before."""
    size = base.config.get("vocab_size")
    for name, (checkpoint, key) in grown.items():
        rows = base.checkpoint.info(name).shape[0]
        if rows == size:
            return {"vocab_size": rows + checkpoint.info(key).shape[0]}
    return {}


def copy_tokenizer(tuned: Model, out: Path) -> None:
    """Copy what makes tuned's tokenizer."""
    folder = tuned.path if tuned.path.is_dir() else tuned.path.parent
    for pattern in TOKENIZER:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                shutil.copy2(path, out / path.name)
