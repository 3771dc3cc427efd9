"""Names on the Hub: what the local cache has, and what is downloaded where that is possible."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lora_compress
import numpy as np
import pytest
from lora_compress import hub
from lora_compress.model import Model

from tests.checkpoints import load, tiny_llama, tuned_from
from tests.conftest import Pair

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def store(cache: Path, name: str, folder: Path, revision: str = "main") -> Path:
    """Put a directory into the cache as huggingface_hub does: blobs, and links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_model_of_the_cache_goes_all_the_way(cache: Path, pair: Pair, tmp_path: Path) -> None:
    snapshot = store(cache, "org/base", pair[0])
    assert Model.open("org/base").path == snapshot
    lora_compress.extract("org/base", pair[1], tmp_path / "made", rank=4)
    assert json.loads((tmp_path / "made" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert lora_compress.verify("org/base", pair[1], tmp_path / "made").error < 1
    lora_compress.merge("org/base", ["made"], "merged")
    assert (tmp_path / "merged" / "config.json").is_file()
    assert len(load(tmp_path / "merged")) == len(Model.open("org/base").checkpoint)
    assert lora_compress.inspect("org/base@main").architecture == "LlamaForCausalLM"
    assert Model.open(f"org/base@{COMMIT}").path == snapshot


def test_a_snapshot_is_not_replaced_by_what_is_made_from_it(cache: Path, pair: Pair, tmp_path: Path) -> None:
    snapshot = store(cache, "org/base", pair[0])
    lora_compress.extract("org/base", pair[1], tmp_path / "made", rank=4)
    for out in (snapshot, snapshot.parent, cache / "models--org--base"):
        with pytest.raises(lora_compress.LoraCompressError, match="would replace the input `org/base`"):
            lora_compress.merge("org/base", ["made"], out, force=True)
        with pytest.raises(lora_compress.LoraCompressError, match="would replace the input `org/base`"):
            lora_compress.extract("org/base", pair[1], out, rank=4, force=True)
    assert all(path.is_symlink() for path in snapshot.iterdir())


def test_an_adapter_of_the_cache_is_merged(cache: Path, pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "made", rank=4, exclude=["norm"])
    (tmp_path / "made" / "lora_compress" / "manifest.json").unlink()
    (tmp_path / "made" / "lora_compress").rmdir()
    store(cache, "someone/adapter", tmp_path / "made")
    assert lora_compress.merge(pair[0], "someone/adapter", tmp_path / "merged").changed
    assert lora_compress.inspect("someone/adapter").kind == "adapter"
    assert lora_compress.check("someone/adapter", "peft").ok


def test_a_path_that_exists_comes_first(cache: Path, pair: Pair, tmp_path: Path) -> None:
    store(cache, "org/base", pair[0])
    (tmp_path / "org").mkdir()
    with pytest.raises(FileNotFoundError, match="No such file"):
        Model.open("org/base")


@pytest.mark.parametrize("name", ["org/none", "org/base@other", "org/base@../../x", "org/../base"])
def test_what_is_not_there_is_said(cache: Path, pair: Pair, name: str) -> None:
    store(cache, "org/base", pair[0])
    with pytest.raises(FileNotFoundError, match="No such file"):
        Model.open(name)


def test_a_reference_leads_nowhere_else(cache: Path, pair: Pair, tmp_path: Path) -> None:
    store(cache, "org/base", pair[0])
    (cache / "models--org--base" / "refs" / "main").write_text("../../../tuned")
    assert hub.cached("org/base") is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {
        "HOME": tmp_path / ".cache" / "huggingface" / "hub",
        "XDG_CACHE_HOME": tmp_path / "xdg" / "huggingface" / "hub",
        "HF_HOME": tmp_path / "home" / "hub",
        "HF_HUB_CACHE": tmp_path / "cache",
    }
    values = {"XDG_CACHE_HOME": "xdg", "HF_HOME": "home", "HF_HUB_CACHE": "cache"}
    for variable, path in expected.items():
        if variable in values:
            monkeypatch.setenv(variable, str(tmp_path / values[variable]))
        assert hub.cache() == path


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A huggingface_hub that gives what a test says and keeps what it was asked."""
    said: dict[str, Any] = {"files": [], "asked": []}
    module = ModuleType("huggingface_hub")
    module.__spec__ = type("Spec", (), {"name": "huggingface_hub"})()

    def snapshot_download(name: str, **options: Any) -> str:
        said["asked"].append((name, options))
        if isinstance(said["folder"], Exception):
            raise said["folder"]
        return str(said["folder"])

    module.list_repo_files = lambda name, revision: said["files"]  # type: ignore[attr-defined]
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return said


@pytest.mark.parametrize(
    ("files", "weights"),
    [(["model.safetensors", "pytorch_model.bin"], "*.safetensors"), (["pytorch_model.bin"], "*.bin")],
)
def test_the_library_downloads_one_kind_of_weights(
    cache: Path, library: dict[str, Any], pair: Pair, files: list[str], weights: str
) -> None:
    library |= {"files": [*files, "onnx/model.onnx"], "folder": pair[0]}
    assert Model.open("org/base@v2").path == pair[0]
    [(name, options)] = library["asked"]
    assert (name, options["revision"]) == ("org/base", "v2")
    assert weights in options["allow_patterns"]
    assert {"*.safetensors", "*.bin"} - {weights} - set(options["allow_patterns"]) != set()


def test_without_a_network_the_cache_serves(cache: Path, library: dict[str, Any], pair: Pair) -> None:
    library |= {"files": ["model.safetensors"], "folder": OSError("no route to host\nand more")}
    with pytest.raises(FileNotFoundError, match="cannot be downloaded: OSError: no route to host"):
        Model.open("org/base")
    snapshot = store(cache, "org/base", pair[0])
    assert Model.open("org/base").path == snapshot


def test_offline_is_honoured(cache: Path, library: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE forbids"):
        Model.open("org/base")
    assert library["asked"] == []


def test_links_out_of_a_model_are_not_copied(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    """A model from a stranger must not have a private file published with what is merged from it."""
    base, config = tiny_llama(rng)
    paths = make_pair(base, tuned_from(base, rng), config)
    (tmp_path / "private").write_text("secret")
    (paths[0] / "tokenizer.json").symlink_to(tmp_path / "private")
    (paths[0] / "vocab.json").write_text("{}")
    (paths[0] / "merges.txt").symlink_to("vocab.json")
    lora_compress.extract(*paths, tmp_path / "adapter", rank=2)
    result = lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged")
    assert [warning for warning in result.warnings if "tokenizer.json` is a link out of" in warning]
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
