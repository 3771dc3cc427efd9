"""The package as a whole: what importing it costs, what it exports, how large its files are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lora_compress
import pytest

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_importing_loads_neither_frameworks_nor_plugins() -> None:
    loaded = modules_after("import lora_compress")
    assert not loaded & {"torch", "numpy", "pluggy", "click", "rich", "lora_compress.plugins", "lora_compress._native"}


def test_help_loads_neither_the_core_nor_numpy() -> None:
    loaded = modules_after("import lora_compress.cli")
    assert not loaded & {"numpy", "rich", "pluggy", "lora_compress._native", "lora_compress.plugins"}


def test_verbs_load_no_framework() -> None:
    loaded = modules_after(
        "from lora_compress import extract, merge, verify, inspect; import lora_compress.plugins as p; p.load()"
    )
    assert not loaded & {"torch", "transformers", "peft", "safetensors", "click", "rich"}


def test_every_public_name_resolves_and_is_documented() -> None:
    assert dir(lora_compress) == lora_compress.__all__ == sorted(lora_compress.__all__)
    for name in lora_compress.__all__:
        item = getattr(lora_compress, name)
        if name not in {"__version__", "hookimpl"}:
            assert item.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lora_compress.nonsense  # noqa: B018


def test_files_stay_small_enough_to_be_read() -> None:
    limits = {
        "python": ("*.py", 400),
        "python/lora_compress/cli": ("*.py", 150),
        "rust/core/src": ("*.rs", 400),
        "rust/py/src": ("*.rs", 250),
    }
    checked = 0
    for folder, (pattern, limit) in limits.items():
        for path in (ROOT / folder).rglob(pattern):
            lines = len(path.read_text().splitlines())
            assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines"
            checked += 1
    assert checked > 50


def test_the_repository_names_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    places = ["/" + place + "/" for place in ("home", "root", "work", "Users")]
    for name in filter(None, listed.stdout.split("\0")):
        content = (ROOT / name).read_bytes()
        for place in places:
            assert f" {place}".encode() not in content, name
            assert f'"{place}'.encode() not in content, name
