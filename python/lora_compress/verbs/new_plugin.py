"""A new plugin: a package with one working decomposition, its tests and its README, to change from there.

The files are templates in `scaffold/`; `$name`, `$module` and `$requirement` are what differs between plugins.
"""

from __future__ import annotations

import keyword
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from lora_compress import plugins
from lora_compress._native import __version__
from lora_compress.errors import OutputExistsError, PluginError
from lora_compress.verbs import output

# Where each template goes. None is an empty file.
FILES = {
    "README.md": "README.md.template",
    "pyproject.toml": "pyproject.toml.template",
    "src/{module}/__init__.py": "module.py.template",
    "src/{module}/py.typed": None,
    "tests/test_{module}.py": "test_module.py.template",
}


@dataclass(frozen=True, slots=True)
class NewPlugin:
    """A package that was written: its directory, and its files relative to that."""

    name: str
    module: str
    out: Path
    files: tuple[str, ...]


def new_plugin(name: str, out: Path | None = None) -> NewPlugin:
    """Write a package with a decomposition `name` to the directory `out`, which is `name` unless given.

    Raises `PluginError` for a name that no plugin can have, or that an installed one has already, and
    `OutputExistsError` when `out` exists and is not empty: what a person has written is never replaced.
    """
    module = _module_of(name)
    out = Path(name) if out is None else out
    values = {"name": name, "module": module, "requirement": _requirement()}
    templates = files("lora_compress") / "scaffold"
    written = []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"`{out}` exists and is not empty: choose another directory with -o")
    with output.new_directory(out, force=False) as folder:
        for place, template in FILES.items():
            relative = place.format(module=module)
            text = "" if template is None else (templates / template).read_text(encoding="utf-8")
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            (folder / relative).write_text(Template(text).substitute(values), encoding="utf-8")
            written.append(relative)
    return NewPlugin(name, module, out, tuple(written))


def _module_of(name: str) -> str:
    """The module of a plugin that is called `name`. Raises `PluginError` where there can be none."""
    if plugins.NAME.fullmatch(name) is None:
        raise PluginError(f"`{name}` cannot name a plugin: names are a-z, 0-9 and inner hyphens")
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise PluginError(f"`{name}` cannot name a plugin: its module `{module}` would begin with a digit")
    if keyword.iskeyword(module):
        raise PluginError(f"`{name}` cannot name a plugin: its module would be the Python keyword `{module}`")
    if name == plugins.BEST:
        raise PluginError(f"`{name}` cannot name a plugin: `--decomposition {name}` means all of them")
    registered = plugins.load().decompositions
    if name in {item.name for item in registered}:
        raise PluginError(f"the decomposition `{name}` is there already, from `{registered.origin(name)}`")
    found = find_spec(module)
    # A mere folder of that name, such as an earlier plugin's in the working directory, hides nothing.
    if found is not None and found.origin is not None:
        raise PluginError(f"`{name}` cannot name a plugin: the module `{module}` exists already, choose another name")
    return module


def _requirement() -> str:
    """This release and those that are compatible with it."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    above = f"0.{minor + 1}" if major == 0 else f"{major + 1}"
    return f"lora-compress>={major}.{minor},<{above}"
