"""Merges that are killed and started again, that meet each other, and what killed processes leave behind."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from lora_compress import cli
from lora_compress.errors import OutputExistsError
from lora_compress.verbs import journal
from lora_compress.verbs.partial import LOCK, MADE, REPLACED

from tests.checkpoints import save, tiny_llama, tuned_from
from tests.conftest import Pair

SHARDS = 8
# Waits before every shard is complete, and is killed in the end of one, where it is told which.
PATIENT = """
import os, signal, sys, time
import lora_compress

class Patient:
    done = 0

    def begin(self, what, nbytes, tensors): pass

    def advance(self, nbytes, tensors=0, tensor=""):
        self.done += nbytes > 0
        if self.done == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(patience))

base, adapter, out, patience, kill_at = sys.argv[1:]
lora_compress.merge(base, adapter, out, progress=Patient())
"""


class Model:
    """A base in several shards, an adapter, and what an undisturbed merge makes of them."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        base, config = tiny_llama(rng, layers=4)
        self.base, self.adapter = folder / "base", folder / "adapter"
        save(self.base, base, config, shards=SHARDS)
        save(folder / "tuned", tuned_from(base, rng), config)
        lora_compress.extract(self.base, folder / "tuned", self.adapter, rank=3)
        self.result = lora_compress.merge(self.base, self.adapter, folder / "undisturbed")
        self.files = contents(folder / "undisturbed")
        self.digest = digest(folder)

    def start(self, out: Path, patience: float = 0.0, kill_at: int = -1) -> subprocess.Popen[bytes]:
        arguments = [self.base, self.adapter, out, patience, kill_at]
        return subprocess.Popen([sys.executable, "-c", PATIENT, *map(str, arguments)])

    def merge(self, out: Path, **options: Any) -> int:
        """Merge, and check that nothing tells it from an undisturbed merge; returns how many shards were there."""
        result = lora_compress.merge(self.base, self.adapter, out, **options)
        assert contents(out) == self.files
        assert replace(result, out=self.result.out, resumed=0, seconds=self.result.seconds) == self.result
        assert result.to_json()["resumed_shards"] == result.resumed
        return result.resumed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digest(folder: Path) -> str:
    return sha256(repr(sorted(contents(folder).items())).encode()).hexdigest()


def hidden(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f".{out.name}.*"))


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def left(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a merge leaves that was killed when four shards were complete and the fifth nearly."""
    out = tmp_path_factory.mktemp("left") / "out"
    assert model.start(out, kill_at=5).wait() == -signal.SIGKILL
    return hidden(out)[0]


@pytest.fixture
def killed(left: Path, tmp_path: Path) -> Path:
    """The same for `tmp_path / "out"`."""
    return Path(shutil.copytree(left, tmp_path / left.name))


def test_merges_killed_anywhere_are_finished_by_the_same_command(model: Model, tmp_path: Path) -> None:
    resumed = []
    for seed in range(24):
        out = tmp_path / str(seed) / "out"
        out.parent.mkdir()
        process = model.start(out, patience=0.01)
        while not hidden(out) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0, 0.011 * SHARDS))  # noqa: S311
        process.kill()
        if process.wait() == 0:
            assert contents(out) == model.files
            continue
        assert not out.exists()
        (folder,) = hidden(out)
        noted = folder / "journal.json"
        names = json.loads(noted.read_text())["files"] if noted.exists() else []
        complete = {name: identity(folder / MADE / name) for name in names}
        resumed.append(model.merge(out))
        assert resumed[-1] == len(complete)
        assert {name: identity(out / name) for name in complete} == complete, "written again"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len(set(resumed)) > 3, "killed at points that do not differ"
    assert digest(model.base.parent) == model.digest


def test_the_command_says_what_was_there(
    model: Model, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._run(["merge", str(model.base), str(model.adapter), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == f"resumed: 4 of {SHARDS} shards were there\n"


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """A change of the journal's JSON."""

    def apply(folder: Path) -> None:
        text = json.loads((folder / "journal.json").read_text())
        (folder / "journal.json").write_text(json.dumps(change(text)))

    return apply


def first(text: dict[str, Any]) -> Any:
    return next(iter(text["files"].values()))


def with_first(**values: Any) -> Callable[[Path], object]:
    return edit(lambda text: (first(text).update(values), text)[1])


def with_row(*row: Any) -> Callable[[Path], object]:
    return edit(lambda text: (first(text)["tensors"].append(list(row)), text)[1])


def replaced_by_directory(path: Path) -> None:
    path.unlink()
    (path / "x").mkdir(parents=True)


def replaced_by_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


JOURNALS: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: (folder / "journal.json").unlink(),
    "empty": lambda folder: (folder / "journal.json").write_bytes(b""),
    "cut": lambda folder: (folder / "journal.json").write_bytes((folder / "journal.json").read_bytes()[:-40]),
    "bytes": lambda folder: (folder / "journal.json").write_bytes(bytes(range(256))),
    "deep": lambda folder: (folder / "journal.json").write_text("[" * 100_000),
    "a directory": lambda folder: replaced_by_directory(folder / "journal.json"),
    "a link": lambda folder: replaced_by_link(folder / "journal.json"),
    "a list": edit(lambda text: [text]),
    "another version": edit(lambda text: text | {"version": 2}),
    "another key": edit(lambda text: text | {"key": "0" * 64}),
    "another start": edit(lambda text: text | {"boot": "0"}),
    "no files": edit(lambda text: text | {"files": None}),
    "a list of files": edit(lambda text: text | {"files": list(text["files"])}),
    "rows of text": edit(lambda text: text | {"files": dict.fromkeys(text["files"], "x")}),
    "a stranger's file": edit(lambda text: text | {"files": text["files"] | {"../x": first(text)}}),
    "no size": with_first(bytes=None),
    "a size of text": with_first(bytes="5"),
    "no tensors": with_first(tensors=5),
    "short rows": with_row(1, 1),
    "negative": with_row(-1, -1, "0x0p+0", "0x0p+0"),
    "more lost than touched": with_row(1, 2, "0x0p+0", "0x0p+0"),
    "no number": with_row(1, 1, "much", "0x0p+0"),
    "too large": with_row(1, 1, "0x1p+9999", "0x0p+0"),
}


@pytest.mark.parametrize("name", JOURNALS)
def test_a_damaged_or_strangers_journal_is_not_believed(name: str, model: Model, killed: Path, tmp_path: Path) -> None:
    JOURNALS[name](killed)
    assert model.merge(tmp_path / "out") == 0
    assert not hidden(tmp_path / "out")


FILES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "written since": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
    "a directory": replaced_by_directory,
    "a link": replaced_by_link,
}


@pytest.mark.parametrize("name", FILES)
def test_a_shard_that_is_not_as_it_was_left_is_written_again(
    name: str, model: Model, killed: Path, tmp_path: Path
) -> None:
    FILES[name](killed / MADE / "model-00002-of-00008.safetensors")
    (killed / MADE / "stray").mkdir()
    assert model.merge(tmp_path / "out") == 3
    assert not hidden(tmp_path / "out")


def test_another_start_of_the_system_starts_over(
    model: Model, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(journal, "BOOT_ID", tmp_path / "boot")
    assert model.merge(tmp_path / "out") == 0
    monkeypatch.setattr(journal, "BOOT_ID", tmp_path / "nowhere")
    assert model.merge(tmp_path / "unknown") == 0


def test_other_work_starts_over_and_removes_what_was_left(model: Model, left: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(model.adapter, tmp_path / "adapter"))
    options: list[dict[str, Any]] = [
        {"weights": [0.5]},
        {"dtype": "F32"},
        {"rounding": "stochastic", "seed": 1},
        {"keep_base_patch": True},
    ]
    for number, given in enumerate([{}, *options]):
        shutil.copytree(left, tmp_path / left.name)
        source = model.adapter if given else adapter
        result = lora_compress.merge(model.base, source, tmp_path / "out", force=number > 0, **given)
        assert result.resumed == 0, given
        assert not hidden(tmp_path / "out"), given


def test_two_with_the_same_command_do_not_meet(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = model.start(out, patience=0.1)
    while not list(out.parent.glob(f".out.*/{LOCK}")):
        time.sleep(0.001)
    time.sleep(0.05)
    assert cli._run(["merge", str(model.base), str(model.adapter), "-o", str(out)]) == 1
    assert capsys.readouterr().err == f"error: `{out}`: another process is writing it\n"
    assert process.wait() == 0
    assert contents(out) == model.files


class Meanwhile:
    """Does something else while a merge or an extraction is at work on its output."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act: Callable[[], object] | None = act
        self.writes = False

    def begin(self, what: str, nbytes: int, tensors: int) -> None:
        self.writes = what in {"merging", "extracting"}

    def advance(self, nbytes: int, tensors: int = 0, tensor: str = "") -> None:
        if self.writes and nbytes and self.act is not None:
            act, self.act = self.act, None
            act()


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_the_slower_of_two_replaces_nothing(name: str, model: Model, tmp_path: Path) -> None:
    base, out = (model.base if name == "out" else model.base / "model-00001-of-00008.safetensors"), tmp_path / name

    def merge(weight: float, act: Callable[[], object], **options: Any) -> None:
        pair = base, adapter
        lora_compress.merge(*pair, out, weights=[weight], progress=Meanwhile(act), **options)

    adapter = model.adapter
    if name != "out":  # an adapter of what this file has
        tuned = {key: value + value for key, value in tensors(base).items()}
        save(tmp_path / "tuned", tuned, {})
        adapter = tmp_path / "adapter"
        lora_compress.extract(base, tmp_path / "tuned", adapter, rank=1)
    with pytest.raises(OutputExistsError, match="exists"):
        merge(1.0, lambda: merge(0.5, lambda: None))
    halves = digest(out) if out.is_dir() else out.read_bytes()
    assert not hidden(out)
    merge(1.0, lambda: merge(0.5, lambda: None, force=True), force=True)
    assert (digest(out) if out.is_dir() else out.read_bytes()) != halves
    assert not hidden(out)


def tensors(path: Path) -> dict[str, Any]:
    from tests.checkpoints import load

    return load(path)


def test_what_killed_processes_left_is_removed_and_nothing_else(
    model: Model, left: Path, killed: Path, pair: Pair, tmp_path: Path
) -> None:
    out, key = tmp_path / "out", "0123456789abcde"
    dead = [shutil.copytree(left, tmp_path / f".out.{key}{digit}.partial") for digit in "ab"]
    (tmp_path / f".out.{key}c.partial").mkdir()
    strangers = [tmp_path / f".out.{key}{digit}.partial" for digit in "0123"]
    strangers[0].write_text("a file")
    strangers[1].symlink_to(pair[0])
    strangers[2].mkdir()
    (strangers[2] / "precious").touch()
    (strangers[3] / LOCK).mkdir(parents=True)
    strangers += [tmp_path / f".other.{key}a.partial", tmp_path / ".out.saved.partial", tmp_path / f".out.{key}a"]
    for path in strangers[4:]:
        shutil.copytree(left, path)
    before = contents(pair[0])

    def check_that_living_ones_stay() -> None:
        (alive,) = set(hidden(out)) - {*dead, *strangers, killed, tmp_path / f".out.{key}c.partial"}
        model.merge(out)
        assert alive.exists()
        assert set(hidden(out)) == {alive, *strangers} - {strangers[4]}
        shutil.rmtree(out)

    # Another verb, at work all the while.
    lora_compress.extract(*pair, out, rank=2, progress=Meanwhile(check_that_living_ones_stay))
    assert set(hidden(out)) == {*strangers} - {strangers[4]}
    assert strangers[4].exists()
    assert contents(pair[0]) == before


def test_numbers_of_numpy_and_links_to_nowhere_are_no_obstacle(model: Model, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(model.adapter, tmp_path / "adapter"))
    (adapter / "link").symlink_to(tmp_path / "nowhere")
    weights = [np.float32(1)]
    lora_compress.merge(model.base, adapter, tmp_path / "out", weights=weights)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == model.files


def test_a_failure_removes_what_was_resumed(model: Model, killed: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_compress.merge(model.base, model.adapter, tmp_path / "out", progress=Meanwhile(fail))
    assert not list(tmp_path.iterdir())


def test_a_name_that_somebody_has_taken_is_left_to_him(model: Model, left: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / left.name).symlink_to(tmp_path / "elsewhere")
    assert model.merge(tmp_path / "out") == 0
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / left.name).unlink()
    (tmp_path / left.name).write_text("a file")
    assert model.merge(tmp_path / "out", force=True) == 0
    assert (tmp_path / left.name).read_text() == "a file"


def test_what_was_to_be_replaced_comes_back(model: Model, killed: Path, tmp_path: Path) -> None:
    (killed / REPLACED).mkdir()
    (killed / REPLACED / "adapter_config.json").write_text("old")
    with pytest.raises(OutputExistsError, match="not empty"):
        lora_compress.merge(model.base, model.adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == {"adapter_config.json": b"old"}
    assert not hidden(tmp_path / "out")
    assert model.merge(tmp_path / "out", force=True) == 0


@pytest.mark.parametrize("as_file", [False, True])
def test_what_was_replaced_is_no_obstacle_to_the_next(
    model: Model, killed: Path, tmp_path: Path, as_file: bool
) -> None:
    """Killed when the output stood, and what it had replaced was still to be removed."""
    if as_file:
        (killed / REPLACED).write_text("old")
    else:
        (killed / REPLACED).mkdir()
        (killed / REPLACED / "adapter_config.json").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("new")
    assert model.merge(tmp_path / "out", force=True) > 0
    assert not hidden(tmp_path / "out")
