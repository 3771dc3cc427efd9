"""Attacks on what a command writes, and on it while it writes: places that cannot or must not be written, full disks,
signals, inputs that change underneath.

Whatever happens: one line on stderr that names the file, the exit code that the README promises, no half-written
output, nothing left beside it, and not a byte of any input touched.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from lora_compress import cli
from safetensors.numpy import load_file

from tests.checkpoints import BF16, contents, save

COMMAND = [sys.executable, "-m", "lora_compress"]
VERBS: dict[str, list[str]] = {
    "extract": ["extract", "base", "tuned", "--rank", "32"],
    "merge": ["merge", "base", "adapter"],
    "unmerge": ["unmerge", "patched"],
    "resize": ["resize", "base", "adapter", "--rank", "16"],
    "combine": ["combine", "base", "adapter", "other", "--dtype", "F32"],
    "convert": ["convert", "base", "adapter", "--to", "kohya"],
}
# Digests of what a verb writes, and how many seconds it takes.
Undisturbed = dict[str, tuple[dict[str, str], float]]
INPUTS = ("base", "tuned", "adapter", "other", "patched")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters for all verbs: work for some tenths of a second, in several shards."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    base = {f"layers.{n}.weight": (0.02 * rng.standard_normal((384, 512))).astype(BF16) for n in range(6)}
    tuned = {name: (value + 0.002 * rng.standard_normal(value.shape)).astype(BF16) for name, value in base.items()}
    save(folder / "base", base, {"model_type": "llama"}, shards=4)
    save(folder / "tuned", tuned, {}, shards=2)
    for side in ("base", "tuned"):
        (folder / side / "tokenizer.json").write_bytes(b"{}" + b" " * 2_000_000)
    lora_compress.extract(folder / "base", folder / "tuned", folder / "adapter", rank=32)
    lora_compress.extract(folder / "base", folder / "tuned", folder / "other", rank=8)
    lora_compress.merge(folder / "base", folder / "adapter", folder / "patched", keep_base_patch=True)
    return folder


@pytest.fixture(scope="module")
def inputs(world: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(world).items() if name.split("/")[0] in INPUTS}


def start(verb: str) -> subprocess.Popen[bytes]:
    """Start a command, and wait until it is past Python's own start: it has a handler for SIGTERM then."""
    process = subprocess.Popen(
        [*COMMAND, *VERBS[verb], "-o", "out", "-q"],
        stderr=subprocess.PIPE,
        # A shell starts background jobs with SIGINT ignored, and we may be running in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    status = Path(f"/proc/{process.pid}/status")
    while status.exists() and process.poll() is None:
        caught = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.001)
    else:
        time.sleep(0.1)
    return process


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> Undisturbed:
    """What each verb writes, and how long it works."""
    made: Undisturbed = {}
    for verb in VERBS:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(world)
            with start(verb) as process:
                started = time.monotonic()
                assert process.wait(60) == 0
                made[verb] = contents(world / "out"), time.monotonic() - started
            shutil.rmtree("out")
    return made


@pytest.fixture(autouse=True)
def at_home(world: Path, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All run in the folder of the inputs, and leave it as it was."""
    monkeypatch.chdir(world)
    yield
    assert contents(world) == inputs
    assert {path.name for path in world.iterdir()} == set(INPUTS)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that has to fail; returns the line it says."""

    def call(*arguments: object) -> str:
        assert cli._run([str(argument) for argument in arguments]) == cli.EXIT_FAILED
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        return said.err

    return call


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system of its own."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root mounts file systems")
    folder = tmp_path / "mounted"

    def mount(options: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S607


# Places that cannot be written.

OUTPUTS = {
    **VERBS,
    "plan": ["plan", "base", "tuned", "--bound", "384"],
    "merge to a file": ["merge", "file", "adapter"],
}


def command_for(verb: str, out: Path) -> list[object]:
    """The command, with a base in one file where the output is one."""
    if verb != "merge to a file":
        return [*OUTPUTS[verb], "-o", out / "plan.json" if verb == "plan" else out]
    return ["merge", "base/model-00001-of-00004.safetensors", out.parent / "part", "-o", out / "merged.safetensors"]


@pytest.fixture
def part(tmp_path: Path) -> None:
    """An adapter for the first shard of the base alone."""
    base = load_file("base/model-00001-of-00004.safetensors")
    save(tmp_path / "tuned", {name: value + value for name, value in base.items()}, {})
    shard = "base/model-00001-of-00004.safetensors"
    lora_compress.extract(shard, tmp_path / "tuned", tmp_path / "part", rank=8)


@pytest.mark.parametrize("verb", OUTPUTS)
def test_a_read_only_place(
    verb: str, refused: Callable[..., str], request: pytest.FixtureRequest, part: None, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        folder = request.getfixturevalue("mounted")("ro,size=1m")
    else:
        folder = tmp_path / "mounted"
        folder.mkdir(mode=0o500)
    out = folder if verb in {"plan", "merge to a file"} else folder / "out"
    said = refused(*command_for(verb, out))
    assert str(out) in said
    assert "Read-only" in said or "Permission denied" in said


# Nothing; the beginning of the weights; for models, the weights (2.4 MB) but not the tokenizer (2 MB).
@pytest.mark.parametrize(
    ("verb", "kilobytes"), [(verb, n) for n in (0, 40) for verb in OUTPUTS] + [("merge", 3000), ("unmerge", 3000)]
)
def test_a_full_disk(
    verb: str, kilobytes: int, refused: Callable[..., str], mounted: Callable[[str], Path], part: None
) -> None:
    folder = mounted(f"size={kilobytes + 4096}k")
    free = shutil.disk_usage(folder).free
    (folder / "filling").write_bytes(bytes(free - 1024 * kilobytes))
    out = folder if verb in {"plan", "merge to a file"} else folder / "out"
    said = refused(*command_for(verb, out))
    assert str(folder) in said
    assert "No space left on device" in said
    assert [path.name for path in folder.iterdir()] == ["filling"]


def test_a_volume_is_filled_where_it_stands(
    mounted: Callable[[str], Path], undisturbed: Undisturbed, refused: Callable[..., str]
) -> None:
    out = mounted("size=30m")
    # What a killed process has left in it does not fill it.
    (out / f".{out.name}.0123456789abcdef.partial").mkdir()
    (out / f".{out.name}.0123456789abcdef.partial" / "lock").touch()
    for force in ([], ["--force"]):
        command = [*VERBS["merge"], "-o", str(out), "-q", *force]
        if force:
            assert "only a directory in it is replaced" in refused(*command)
        else:
            assert cli._run(command) == 0
        assert contents(out) == undisturbed["merge"][0]


# Places that must not be written.

PLACES = {
    "an input itself": lambda verb, world: world / VERBS[verb][-1 if verb == "unmerge" else 1],
    "in other words": lambda verb, world: world / "base" / ".." / VERBS[verb][1],
    "a file of an input": lambda verb, world: world / VERBS[verb][1] / "config.json",
    "a folder of an input": lambda verb, world: world / VERBS[verb][1] / "folder",
    "what holds the inputs": lambda verb, world: world,
    "above it": lambda verb, world: world.parent,
    "through a link": lambda verb, world: world.parent / "link" / VERBS[verb][1],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", PLACES)
def test_inputs_are_never_replaced(verb: str, place: str, refused: Callable[..., str], world: Path) -> None:
    link, folder = world.parent / "link", world / VERBS[verb][1] / "folder"
    link.symlink_to(world)
    folder.mkdir()
    (folder / "model.safetensors").touch()
    try:
        out = PLACES[place](verb, world)
        for force in ([], ["--force"]):
            said = refused(*VERBS[verb], "-o", out, *force)
            assert str(out) in said
            assert "would replace" in said
    finally:
        shutil.rmtree(folder)
        link.unlink()


@pytest.mark.parametrize("verb", VERBS)
def test_a_directory_that_is_in_use(
    verb: str, refused: Callable[..., str], undisturbed: Undisturbed, world: Path, tmp_path: Path
) -> None:
    def absolute(arguments: list[str]) -> list[str]:
        return [str(world / each) if each in INPUTS else each for each in arguments]

    # Somebody's shell is in it, or below it.
    (tmp_path / "out" / "below").mkdir(parents=True)
    for here in ("out", "out/below"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / here)
            said = refused(*absolute(VERBS[verb]), "-o", tmp_path / "out", "--force")
            assert f"`{tmp_path / 'out'}` is where you are, or above it" in said
    (tmp_path / "out" / "below").rmdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "out")
        assert cli._run([*absolute(VERBS[verb]), "-o", ".", "-q"]) == 0
        # The directory itself has stayed: the shell sees what was made.
        assert {path.name for path in Path().iterdir()} == {name.split("/")[0] for name in undisturbed[verb][0]}


# Signals.


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals_at_any_time(verb: str, number: signal.Signals, code: int, undisturbed: Undisturbed) -> None:
    # Early, and in the half in which the output is written.
    for seed, (low, high) in enumerate([(0.02, 0.5), (0.5, 1.0), (0.7, 1.0)]):
        with start(verb) as process:
            time.sleep(random.Random(f"{verb} {code} {seed}").uniform(low, high) * undisturbed[verb][1])  # noqa: S311
            process.send_signal(number)
            process.wait(60)
            assert process.stderr is not None
            said = process.stderr.read().decode()
        out = Path("out")
        if out.exists():
            # It came when all was done, or Python lost it: what a callback of an import raises is ignored.
            assert contents(out) == undisturbed[verb][0]
        else:
            # One that arrives in an `exec` of an import has Python end itself by it; a shell says 130 to both.
            assert process.returncode in {code, -number if number == signal.SIGINT else code}
            # An empty line after the terminal's ^C is click's.
            assert said.lstrip("\n") == ("interrupted, nothing was written\n" if number == signal.SIGINT else "")
        if number == signal.SIGKILL:
            # Nobody can answer that: a hidden directory may stay, and goes with the next success.
            assert all(path.is_dir() for path in Path().glob(".*"))
            shutil.rmtree(out, ignore_errors=True)
            assert cli._run([*VERBS[verb], "-o", "out", "-q"]) == 0
            assert out.exists()
        assert not list(Path().glob(".*")), "left behind"
        shutil.rmtree(out, ignore_errors=True)


# Inputs that change underneath.


class Once:
    """Does something at the first report of a stage."""

    def __init__(self, stage: str, act: Callable[[], object]) -> None:
        self.stage, self.act, self.is_due = stage, act, False

    def begin(self, what: str, nbytes: int, tensors: int) -> None:
        self.is_due = what == self.stage

    def advance(self, nbytes: int, tensors: int = 0, tensor: str = "") -> None:
        if self.is_due and (nbytes or tensors):
            self.is_due = False
            self.act()


CUT: dict[str, tuple[str, str, str]] = {
    # What is called, the stage in which it happens, and the file that is cut short.
    "extract": ("extract", "extracting", "tuned/model-00002-of-00002.safetensors"),
    "merge": ("merge", "merging", "base/model-00004-of-00004.safetensors"),
    "unmerge": ("unmerge", "unmerging", "patched/model-00004-of-00004.safetensors"),
}


@pytest.mark.parametrize("verb", CUT)
def test_an_input_that_is_cut_short_while_it_is_read(verb: str, world: Path, tmp_path: Path) -> None:
    name, stage, file = CUT[verb]
    for each in INPUTS:
        shutil.copytree(world / each, tmp_path / each)

    def cut() -> None:
        os.truncate(tmp_path / file, 4096)

    arguments: list[Any] = [tmp_path / each for each in VERBS[verb][1:] if each in INPUTS]
    options: dict[str, Any] = {"rank": 64} if verb == "extract" else {}
    # An error and not SIGBUS: nothing is mapped.
    with pytest.raises((OSError, lora_compress.LoraCompressError)) as caught:
        getattr(lora_compress, name)(*arguments, tmp_path / "out", progress=Once(stage, cut), **options)
    said = cli._explain(caught.value)
    assert said is not None
    assert file.split("/")[1] in said
    assert {path.name for path in tmp_path.iterdir()} == set(INPUTS)
