"""`merge --keep-base-patch` and `unmerge`: every file of the base comes back byte for byte, or nothing does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from click.testing import CliRunner
from lora_compress import AdapterError, CheckpointError
from lora_compress.cli import cli
from safetensors.numpy import load_file, save_file

from tests.checkpoints import BF16, Tensors, save, tiny_llama, tuned_from
from tests.conftest import Pair


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic", "seed": 3}, {"weights": [3.0]}])
def test_the_base_comes_back(options: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    (pair[0] / "tokenizer.json").write_text("{}")
    for format_ in ("peft", "factors"):
        out, merged = tmp_path / format_, tmp_path / f"{format_}-merged"
        lora_compress.extract(*pair, out, rank=6, format=format_)
        lora_compress.merge(pair[0], out, merged, keep_base_patch=True, **options)
        assert files(merged).keys() == files(pair[0]).keys()
        lora_compress.unmerge(merged, tmp_path / f"{format_}-base")
        assert files(tmp_path / f"{format_}-base") == files(pair[0])


def test_grown_vocabularies_other_dtypes_and_odd_headers_come_back(
    tmp_path: Path, rng: np.random.Generator, make_pair: Callable[..., Pair]
) -> None:
    base, config = tiny_llama(rng)
    base |= {
        "f32": rng.standard_normal((7, 5)).astype(np.float32),
        "f16": rng.standard_normal((6, 8)).astype(np.float16),
        "f64": rng.standard_normal((3, 4)),
        "ids": np.arange(5),
        "scalar": np.array(3.0, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    odd: Tensors = {"ids": np.arange(5) + 1, "scalar": np.array(4.0, np.float32)}
    tuned: Tensors = tuned_from({name: values for name, values in base.items() if name not in odd}, rng) | odd
    tuned["model.embed_tokens.weight"] = np.vstack([tuned["model.embed_tokens.weight"], np.ones((2, 24), BF16)])
    paths = make_pair(base, tuned, config)
    # A header that nobody would write: spaces, and keys in another order.
    raw = (paths[0] / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(dict(reversed(header.items())), indent=1).encode() + b"  "
    (paths[0] / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    (tmp_path / "tuned" / "tokenizer.json").write_text('{"grown": true}')
    (tmp_path / "base" / "tokenizer.json").write_text('{"grown": false}')
    lora_compress.extract(*paths, tmp_path / "out", rank=3)
    lora_compress.merge(paths[0], tmp_path / "out", tmp_path / "merged", keep_base_patch=True)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 42
    done = CliRunner().invoke(cli, ["unmerge", str(tmp_path / "merged"), "-o", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "again") == files(paths[0])


def test_small_updates_take_little_room(tmp_path: Path, rng: np.random.Generator) -> None:
    base = {"a.weight": (0.02 * rng.standard_normal((512, 512))).astype(BF16)}
    tuned = {"a.weight": (base["a.weight"].astype(np.float32) + 1e-4 * rng.standard_normal((512, 512))).astype(BF16)}
    save(tmp_path / "base", base, {})
    save(tmp_path / "tuned", tuned, {})
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=16)
    lora_compress.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged", keep_base_patch=True)
    patch = (tmp_path / "merged" / "lora_compress" / "base_patch.safetensors").stat().st_size
    assert patch < 0.3 * base["a.weight"].nbytes


def test_what_was_changed_since_is_refused(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=4)
    merged = tmp_path / "merged"
    lora_compress.merge(pair[0], tmp_path / "out", merged, keep_base_patch=True)
    path, folder = merged / "model-00001-of-00002.safetensors", merged / "lora_compress"
    good, patch, facts = path.read_bytes(), folder / "base_patch.safetensors", folder / "base_patch.json"
    whole, said = patch.read_bytes(), facts.read_text()

    def refused(match: str) -> None:
        with pytest.raises((CheckpointError, AdapterError, lora_compress.TensorError), match=match):
            lora_compress.unmerge(merged, tmp_path / "again")
        assert not (tmp_path / "again").exists()

    tensors = load_file(path)
    name = next(name for name in tensors if "layers.0" in name and tensors[name].ndim == 2)
    save_file(tensors | {name: tensors[name] * BF16(2)}, path)
    refused(f"`{name}`: what comes out is not the base")
    path.write_bytes(good)
    changes: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
        lambda held: {**held, f"codes:{name}": held[f"codes:{name}"][:-1]},
        lambda held: {**held, f"codes:{name}": held[f"codes:{name}"][:5]},
        lambda held: {**held, f"codes:{name}": np.zeros(64, np.uint8)},
        lambda held: {key: value for key, value in held.items() if key != f"codes:{name}"},
        lambda held: {key: value for key, value in held.items() if not key.startswith("header:")},
        lambda held: {**held, "header:model-00001-of-00002.safetensors": np.zeros(20, np.uint8)},
    ]
    for change in changes:
        save_file(change(load_file(patch)), patch)
        refused("base_patch|header")
        patch.write_bytes(whole)
    for text in ("[]", "{}", '{"replaced": {"../x": "aa"}}', '{"replaced": {"x": "a"}}', '{"replaced": {}}'):
        facts.write_text(text)
        refused("base_patch")
    facts.write_text(said)
    lora_compress.unmerge(merged, tmp_path / "again")
    assert files(tmp_path / "again") == files(pair[0])


def test_models_without_a_patch_and_what_has_none(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=2)
    with pytest.raises(AdapterError, match="--keep-base-patch"):
        lora_compress.unmerge(pair[0], tmp_path / "again")
    with pytest.raises(ValueError, match="patch of the base"):
        lora_compress.merge(pair[0], tmp_path / "out", tmp_path / "merged", keep_base_patch=True, dtype="F32")
