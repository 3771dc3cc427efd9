"""What a merge that was killed leaves to the next: which shards are complete, and what came of their updates.

The journal lies beside the directory that is being filled (verbs/partial.py) and is replaced, whole, after every shard.
It is believed only where its key says that the same bytes would be written again, and about a file only where that has
the size and the time it was left with. Files are not flushed to the disk, which would cost more than merging; what a
killed process has written is in the system's memory all the same, but not after a crash of the machine. So nothing is
taken from before the last start of the system, or where that cannot be told.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_compress import plugins
from lora_compress._native import MergedTensor, __version__, kernel
from lora_compress.adapter import Adapter
from lora_compress.errors import CheckpointError
from lora_compress.model import CONFIG, Model, read_json
from lora_compress.verbs.companions import INDEX

JOURNAL = "journal.json"
VERSION = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Arrival(NamedTuple):
    """What rounding left of the update of one tensor: the figures of `MergedTensor`."""

    touched: int
    lost: int
    asked: float
    got: float


def arrivals(tensors: Sequence[MergedTensor]) -> list[Arrival]:
    """The figures of merged tensors."""
    return [Arrival(tensor.touched, tensor.lost, tensor.asked, tensor.got) for tensor in tensors]


def key_of(base: Model, adapters: Sequence[Adapter], weights: Sequence[float], **options: Any) -> str | None:
    """A digest of all that the bytes of a merge depend on; None where nothing could be taken up later.

    Of files it has size, times and number, and of the base a fingerprint of the values. Kernels and versions are in
    it, as they may differ in the last bit.
    """
    if boot_id() is None:
        return None
    files = [
        *base.checkpoint.shards,
        *(base.folder / name for name in (CONFIG, INDEX) if (base.folder / name).is_file()),
    ]
    facts = {
        "versions": [__version__, kernel(), np.__version__, *((p.name, p.version) for p in plugins.load().list())],
        "base": [base.fingerprint, list(_facts(files))],
        "adapters": [list(_facts(_files(adapter.path))) for adapter in adapters],
        "options": [list(weights), options],
    }
    # Numbers may be NumPy's.
    return sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()


def boot_id() -> str | None:
    """What tells one run of this system from another; None where the system does not say."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


class Journal:
    """The complete files of a directory that is being filled."""

    def __init__(self, folder: Path, key: str | None, names: Sequence[str]) -> None:
        """Read what a killed process has left in `folder`, and remove all of it that is not one of the complete files
        `names`.
        """
        self._path = folder.parent / JOURNAL
        self._head = {"version": VERSION, "key": key, "boot": boot_id()}
        self._rows: dict[str, Any] = {}
        self.done: dict[str, list[Arrival]] = {}
        for name, row in self._read(names).items():
            if _is_as_left(folder / name, row):
                self._rows[name] = row
                self.done[name] = [_arrival(each) for each in row["tensors"]]
        left = [path for path in folder.iterdir() if path.name not in self.done]
        for path in [*left, *([] if self.done else [self._path])]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def add(self, file: Path, tensors: Sequence[MergedTensor]) -> None:
        """Note that a file is complete, and what came of its tensors."""
        self.done[file.name] = arrivals(tensors)
        if self._head["key"] is None:
            return
        # As text to the last bit, infinities included, which JSON does not have.
        rows = [[each.touched, each.lost, each.asked.hex(), each.got.hex()] for each in self.done[file.name]]
        status = file.stat()
        self._rows[file.name] = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "tensors": rows}
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({**self._head, "files": self._rows}), encoding="utf-8")
        new.replace(self._path)

    def _read(self, names: Sequence[str]) -> dict[str, Any]:
        """The rows by name of file; {} for what is not, in every part, a journal of this work."""
        try:
            text = read_json(self._path) if stat.S_ISREG(self._path.lstat().st_mode) else {}
            rows = text.get("files")
            if {name: text.get(name) for name in self._head} != self._head or not isinstance(rows, dict):
                return {}
            for name, row in rows.items():
                if name not in names or not all(type(row[key]) is int for key in ("bytes", "mtime_ns")):
                    return {}
                for each in row["tensors"]:
                    _arrival(each)
        except (CheckpointError, LookupError, OSError, OverflowError, TypeError, ValueError):
            return {}
        return rows


def _arrival(row: Any) -> Arrival:
    """Raises `ValueError` or `TypeError` for what is no row."""
    touched, lost, asked, got = row
    if type(touched) is not int or type(lost) is not int or not 0 <= lost <= touched:
        raise ValueError("counts are malformed")
    return Arrival(touched, lost, float.fromhex(asked), float.fromhex(got))


def _is_as_left(path: Path, row: dict[str, Any]) -> bool:
    """Whether a file is the one that was left: no link, and of that size and time."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (row["bytes"], row["mtime_ns"])


def _files(path: Path) -> Iterator[Path]:
    """All files of an adapter. Hidden ones are none of it: the output may grow beside them."""
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _facts(files: Iterable[Path]) -> Iterator[tuple[int, ...]]:
    """What tells which file it is and whether it was written since, in the order of names."""
    for path in sorted(files):
        # A link to nowhere is no part of what was read.
        status = path.stat() if path.exists() else path.lstat()
        yield status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
