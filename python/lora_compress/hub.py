"""Models and adapters by their names on the Hub: `ORG/NAME`, or `ORG/NAME@REVISION`.

What the local cache has is found without any library, by its layout (huggingface_hub's guide "Understand caching"):
`models--ORG--NAME/refs/REVISION` names a commit, `snapshots/COMMIT` holds its files. Downloading takes the extra `hub`.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from lora_compress.errors import LoraCompressError

MAIN = "main"
ID = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
# What makes a model or an adapter, in its top directory: not the same weights once more in another format.
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "README.md")
SAFETENSORS, PICKLES = "*.safetensors", "*.bin"


def resolve(path: str | Path) -> Path:
    """A path that exists as it is; a Hub id as the directory of its files in the local cache.

    Raises `FileNotFoundError` for a path that does not exist and an id that cannot be had.
    """
    path = Path(path)
    match = ID.fullmatch(path.as_posix())
    if path.exists() or match is None or path.parent.exists():
        return path
    name, revision = match["name"], match["revision"] or MAIN
    problem = "it is not in the local cache"
    if _is_offline():
        problem += ", and HF_HUB_OFFLINE forbids to download it"
    elif find_spec("huggingface_hub") is None:
        problem += ": `hf download` it, or `pip install 'lora-compress[hub]'`"
    else:
        try:
            return _download(name, revision)
        except Exception as error:  # Whatever the library and what lies below it raise.
            problem = f"it cannot be downloaded: {type(error).__name__}: {str(error).splitlines()[0]}"
    found = cached(name, revision)
    if found is None:
        raise FileNotFoundError(2, f"No such file or directory, and as a Hub id {problem}", str(path))
    return found


def local(path: Path) -> Path:
    """As `resolve`, of what is there: nothing is downloaded, and a path that leads nowhere is returned as it is."""
    match = ID.fullmatch(path.as_posix())
    found = None if match is None or path.exists() else cached(match["name"], match["revision"] or MAIN)
    return found or path


def cached(name: str, revision: str = MAIN) -> Path | None:
    """The directory of a model's files in the local cache; None where it is not there."""
    repository = cache() / f"models--{name.replace('/', '--')}"
    commit = revision
    reference = repository / "refs" / revision
    if not COMMIT.fullmatch(commit) and reference.is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
    folder = repository / "snapshots" / commit
    # A commit is a plain name: nothing in the cache leads out of it.
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    above = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return (Path(os.environ.get("HF_HOME") or above) / "hub").expanduser()


def holder(folder: Path) -> Path:
    """The directory that all files of a model lie in: of a snapshot its repository, as its files are links to there."""
    resolved = folder.resolve()
    return resolved.parent.parent if resolved.parent.name == "snapshots" else resolved


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download

    files = [file for file in list_repo_files(name, revision=revision) if "/" not in file]
    weights = SAFETENSORS if any(file.endswith(".safetensors") for file in files) else PICKLES
    if not any(Path(file).match(weights) for file in files):
        raise LoraCompressError(f"`{name}` holds no weights")
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*SMALL, weights], ignore_patterns=["*/*"]))
