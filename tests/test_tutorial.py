"""The tutorial in `docs/writing-a-plugin.md`, followed to the letter in an environment of its own.

A file's name in backquotes and a colon above a block make it that file; `sh` blocks are run, in the order of the page;
the other `python` blocks are one session, which comes last. `text` and tables are for reading.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import lora_compress
import pytest
from lora_compress import plugins

TUTORIAL = (Path(__file__).parents[1] / "docs" / "writing-a-plugin.md").read_text()
BLOCK = re.compile(r"(?:^`(?P<file>[\w./-]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
MODULE = "hadamard/src/lora_compress_hadamard/__init__.py"


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment in `folder` that sees the packages of this one."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Environment:
        """Make one. Nothing is downloaded: a `.pth` file leads to the packages here, editable ones included."""
        made = cls(folder)
        venv.create(folder / "venv", symlinks=True)
        asked = made.run("python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'")
        outer = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        Path(asked.strip()).joinpath("outer.pth").write_text(outer)
        # The scripts here would start the interpreter here, which knows nothing of the fresh environment.
        python = shlex.quote(str(folder / "venv" / "bin" / "python"))
        for name, arguments in {
            "lora-compress": '-m lora_compress "$@"',
            "pytest": '-m pytest -p no:cacheprovider "$@"',
            "pip": '-m pip "$1" --quiet --no-index --no-build-isolation --no-deps "${@:2}"',
        }.items():
            script = folder / "venv" / "bin" / name
            script.write_text(f"#!/usr/bin/env bash\nexec {python} {arguments}\n")
            script.chmod(0o755)
        return made

    def run(self, script: str) -> str:
        """Run a shell script in the folder; its output. Fails where a command of it does."""
        path = os.pathsep.join([str(self.folder / "venv" / "bin"), os.environ["PATH"]])
        inherited = {name: value for name, value in os.environ.items() if name not in {plugins.SWITCH, "PYTHONPATH"}}
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],  # noqa: S607
            cwd=self.folder,
            env={**inherited, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{script}\n{result.stdout}\n{result.stderr}"
        return result.stdout


@dataclass(frozen=True)
class Followed:
    """The tutorial after its last shell block, and what each of those has printed."""

    environment: Environment
    outputs: dict[str, str]

    def output(self, command: str) -> str:
        """What the one block with a command has printed."""
        (found,) = (output for script, output in self.outputs.items() if command in script)
        return found


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    environment = Environment.make(tmp_path_factory.mktemp("tutorial"))
    outputs: dict[str, str] = {}
    for block in BLOCK.finditer(TUTORIAL):
        if block["file"]:
            path = environment.folder / block["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"])
            if block["file"] == MODULE:
                assert len(block["text"].splitlines()) <= 25
        elif block["kind"] == "sh":
            outputs[block["text"]] = environment.run(block["text"])
    return Followed(environment, outputs)


def test_every_block_is_a_file_or_runs() -> None:
    kinds = [(bool(block["file"]), block["kind"]) for block in BLOCK.finditer(TUTORIAL)]
    assert TUTORIAL.count("```") == 2 * len(kinds)
    assert {kind for is_file, kind in kinds if not is_file} == {"python", "sh", "text"}
    assert sum(is_file for is_file, _ in kinds) == 4


def test_the_plugin_is_listed(followed: Followed) -> None:
    assert re.search(r"hadamard .*out r, r in, out s, s in .*lora-compress-hadamard", followed.output("plugins list"))


def test_the_errors_are_those_of_the_page(followed: Followed) -> None:
    claimed = [float(error) for error in re.findall(r"^\| Lo.* \| (0\.\d+) \|$", TUTORIAL, re.MULTILINE)]
    folders = [followed.environment.folder / name / "lora_compress" / "manifest.json" for name in ("first", "adapter")]
    found = [json.loads(manifest.read_text())["totals"]["error"] for manifest in folders]
    compared = dict(re.findall(r"rank 8 +(\S+) +\S+ \S+ +(0\.\d+)", followed.output("compare")))
    assert all(0 < error < 1 for error in found)
    assert [*found, float(compared["ab"])] == pytest.approx(claimed, abs=2e-3)
    assert float(compared["hadamard"]) == pytest.approx(found[1], abs=2e-3)


def test_adapters_verify_and_merge(followed: Followed) -> None:
    folder = followed.environment.folder
    for adapter in ("first", "pairs", "adapter"):
        assert "as promised by extraction" in followed.output(f"verify base/ tuned/ {adapter}/")
    assert (folder / "merged" / "model.safetensors").read_bytes() != (
        folder / "base" / "model.safetensors"
    ).read_bytes()
    # Neither form needs the plugin, which is not installed here.
    assert lora_compress.verify(folder / "base", folder / "tuned", folder / "adapter").ok
    assert lora_compress.inspect(folder / "pairs").kind == "adapter"


def test_the_conformance_test_passes(followed: Followed) -> None:
    assert "2 passed" in followed.output("pytest hadamard")


def test_the_wheel_can_be_published(followed: Followed) -> None:
    assert [path.name for path in (followed.environment.folder / "dist").iterdir()] == [
        "lora_compress_hadamard-0.1.0-py3-none-any.whl"
    ]


def test_the_session_runs(followed: Followed) -> None:
    blocks = [block["text"] for block in BLOCK.finditer(TUTORIAL) if block["kind"] == "python" and not block["file"]]
    (followed.environment.folder / "session.py").write_text("\n".join(blocks))
    followed.environment.run("python session.py")
