"""`lora-compress plugins new`: what it writes is installed as a user would install it, and passes its own tests."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lora_compress import Decomposition, cli, hookimpl, plugins
from lora_compress.errors import OutputExistsError, PluginError
from lora_compress.verbs import new_plugin as module
from lora_compress.verbs.new_plugin import new_plugin

from tests.test_tutorial import Environment


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_it_writes_can_be_installed_and_tested(tmp_path: Path) -> None:
    environment = Environment.make(tmp_path)
    printed = environment.run("lora-compress plugins new my-factors")
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert commands == ["pip install -e 'my-factors[test]'", "pytest my-factors"]
    environment.run(commands[0])
    listed = json.loads(environment.run("lora-compress plugins list --json"))["plugins"]
    assert {
        "name": "lora-compress-my-factors:my-factors",
        "distribution": "lora-compress-my-factors",
        "version": "0.1.0",
        "decompositions": ["my-factors"],
        "formats": [],
        "initialisations": [],
    } in listed
    assert "2 passed" in environment.run(commands[1])
    refused = environment.run("! lora-compress plugins new my-factors -o other 2>&1")
    assert (
        refused
        == "error: the decomposition `my-factors` is there already, from `lora-compress-my-factors:my-factors`\n"
    )
    assert not (tmp_path / "other").exists()


def test_the_files_and_their_sizes() -> None:
    made = new_plugin("my-factors")
    assert made.files == (
        "README.md",
        "pyproject.toml",
        "src/my_factors/__init__.py",
        "src/my_factors/py.typed",
        "tests/test_my_factors.py",
    )
    found = {path.relative_to(made.out).as_posix(): path.read_text() for path in made.out.rglob("*") if path.is_file()}
    assert sorted(found) == sorted(made.files)
    assert len(found["src/my_factors/__init__.py"].splitlines()) <= 25
    assert not any("$" in text for text in found.values())
    assert "## Install" in found["README.md"]


def test_the_templates_keep_to_the_style_of_this_house() -> None:
    made = new_plugin("my-factors")
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    rules = ["--isolated", "--line-length=120"]
    for command in (
        ["check", "--select=ARG,B,D1,E,F,I,N,RUF,UP,W", "--ignore=RUF001,RUF002,D103"],
        ["format", "--check"],
    ):
        result = subprocess.run([ruff, *command, *rules, made.out], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Factors", "`My-Factors` cannot name a plugin: names are a-z, 0-9 and inner hyphens"),
        ("my_factors", "names are a-z"),
        ("-factors", "names are a-z"),
        ("../factors", "names are a-z"),
        ("", "names are a-z"),
        ("3d", "its module `3d` would begin with a digit"),
        ("class", "its module would be the Python keyword `class`"),
        ("best", "`--decomposition best` means all of them"),
        ("json", "the module `json` exists already"),
        ("lora-compress", "the module `lora_compress` exists already"),
        ("ab", "the decomposition `ab` is there already, from `lora_compress.decompositions.ab`"),
    ],
)
def test_names_that_no_plugin_can_have(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=message):
        new_plugin(name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_names_of_installed_plugins_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def register_decompositions(register: Any) -> None:
        register(Decomposition("taken", "out r, r in"))

    plugin = type("Plugin", (), {"register_decompositions": staticmethod(register_decompositions)})()
    host = plugins.Plugins(installed=False, extra=(("theirs", plugin),))
    monkeypatch.setattr(plugins, "load", lambda: host)
    with pytest.raises(PluginError, match="the decomposition `taken` is there already, from `theirs`"):
        new_plugin("taken")


def test_a_folder_of_that_name_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factors").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert new_plugin("factors").out == Path("factors")


def test_nothing_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "factors").mkdir()
    (tmp_path / "factors" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="`factors` exists and is not empty"):
        new_plugin("factors")
    assert [path.name for path in (tmp_path / "factors").iterdir()] == ["mine.txt"]


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES", {**module.FILES, "last": "no such template"})
    with pytest.raises(FileNotFoundError):
        new_plugin("factors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("version", "wanted"), [("0.1.0", ">=0.1,<0.2"), ("1.4.0rc1", ">=1.4,<2")])
def test_the_release_that_it_was_made_with_is_required(
    version: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__version__", version)
    made = new_plugin("factors")
    assert f'"lora-compress{wanted}"' in (made.out / "pyproject.toml").read_text()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["plugins", "new", "factors", "-o", "a b/c", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema_version"] == 1
    assert (said["name"], said["module"], said["out"]) == ("factors", "factors", "a b/c")
    assert [shlex.split(line)[-1] for line in said["next"]] == ["a b/c[test]", "a b/c"]
    assert sorted(said["files"]) == said["files"]
    assert cli._run(["plugins", "new", "others", "--quiet"]) == 0
    assert cli._run(["plugins", "new", "others", "--quiet"]) == cli.EXIT_FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: `others` exists and is not empty: choose another directory with -o\n"
    assert cli._run(["plugins", "new"]) == cli.EXIT_USAGE
