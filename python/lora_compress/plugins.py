"""The plugin host: finds plugins, asks them for what they add, and keeps the registries.

Built-in and foreign plugins take the same way. Two plugins that register the same name are an error that names both, a
misspelt hook is an error, and an exception inside a plugin is raised as `PluginError` with the plugin's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pluggy

from lora_compress import hookspecs
from lora_compress.adapter import Format
from lora_compress.decompositions.interface import Decomposition
from lora_compress.errors import LoraCompressError, PluginError
from lora_compress.initialisations.interface import Initialisation

# Named, not imported: the host depends on no plugin, and a built-in one has no way that a stranger's lacks.
BUILT_IN = (
    "lora_compress.decompositions.ab",
    "lora_compress.formats.peft",
    "lora_compress.formats.factors",
    "lora_compress.formats.kohya",
    "lora_compress.initialisations.built_in",
)
# "0" leaves installed plugins out: for tests, and to find out whether a plugin is at fault.
SWITCH = "LORA_COMPRESS_PLUGINS"

# What `--decomposition` takes besides names.
BEST = "best"

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The name it is registered under."""
        ...


Item = TypeVar("Item", bound=Named)


class Registry(Generic[Item]):
    """Things of one kind by name, each with the plugin it came from."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._items: dict[str, tuple[Item, str]] = {}

    def add(self, item: Item, origin: str) -> None:
        """Add `item`; raise `PluginError` when its name is malformed or taken."""
        name = item.name
        if NAME.fullmatch(name) is None:
            raise PluginError(
                f"plugin `{origin}` registers the {self._kind} `{name}`: names are a-z, 0-9 and inner hyphens"
            )
        if name == BEST:
            raise PluginError(f"plugin `{origin}` registers the {self._kind} `{name}`, a word that means all of them")
        if name in self._items:
            other = self._items[name][1]
            raise PluginError(
                f"the {self._kind} `{name}` is registered by both `{other}` and `{origin}`: uninstall one"
            )
        self._items[name] = (item, origin)

    def __getitem__(self, name: str) -> Item:
        if name not in self._items:
            known = ", ".join(sorted(self._items))
            raise PluginError(f"there is no {self._kind} `{name}`; installed are {known}")
        return self._items[name][0]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[Item]:
        return (self._items[name][0] for name in sorted(self._items))

    def origin(self, name: str) -> str:
        """The plugin that registered `name`."""
        self[name]
        return self._items[name][1]


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A loaded plugin: its name, its distribution and version, and what it registered."""

    name: str
    distribution: str
    version: str
    decompositions: tuple[str, ...]
    formats: tuple[str, ...]
    initialisations: tuple[str, ...]


class Plugins:
    """All plugins, loaded once, and the registries they filled."""

    def __init__(self, *, installed: bool = True, extra: tuple[tuple[str, object], ...] = ()) -> None:
        self.decompositions: Registry[Decomposition] = Registry("decomposition")
        self.formats: Registry[Format] = Registry("format")
        self.initialisations: Registry[Initialisation] = Registry("initialisation")
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._distributions: dict[str, tuple[str, str]] = {}
        for module in BUILT_IN:
            self._add(module, import_module(module), "lora-compress", "built-in")
        for entry in _entry_points() if installed else ():
            distribution = entry.dist.name if entry.dist else entry.value
            out = f"cannot be loaded ({SWITCH}=0 leaves installed plugins out)"
            with _blame(f"{distribution} ({entry.name})", out):
                plugin = entry.load()
            self._add(f"{distribution}:{entry.name}", plugin, distribution, entry.dist.version if entry.dist else "")
        for name, plugin in extra:
            self._add(name, plugin, name, "")
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin `{_name_of(self._manager, error.plugin)}`: {_one_line(error)}") from error
        self._collect("register_decompositions", self.decompositions.add)
        self._collect("register_formats", self.formats.add)
        self._collect("register_initialisations", self.initialisations.add)

    def format_of(self, path: Path) -> Format | None:
        """The format that recognises the adapter at `path`, if any."""
        for form in self.formats:
            with _blame(self.formats.origin(form.name), f"failed in `recognises` of `{form.name}`"):
                if form.recognises(path):
                    return form
        return None

    def list(self) -> list[PluginInfo]:
        """All plugins in the order of loading."""

        def of(registry: Registry[Any], origin: str) -> tuple[str, ...]:
            return tuple(item.name for item in registry if registry.origin(item.name) == origin)

        registries: tuple[Registry[Any], ...] = (self.decompositions, self.formats, self.initialisations)
        return [
            PluginInfo(name, *self._distributions[name], *(of(registry, name) for registry in registries))
            for name in self._distributions
        ]

    def _add(self, name: str, plugin: object, distribution: str, version: str) -> None:
        try:
            self._manager.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin `{name}`: {_one_line(error)}") from error
        self._distributions[name] = (distribution, version)

    def _collect(self, hook: str, add: Callable[[Any, str], None]) -> None:
        # One plugin at a time, so that what is registered, and what fails, has a name. (pluggy calls the last one
        # first.)
        for name in self._distributions:
            plugin = self._manager.get_plugin(name)
            others = [other for other in self._manager.get_plugins() if other is not plugin]
            caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
            with _blame(name, f"failed in `{hook}`"):
                caller(register=lambda item, name=name: add(item, name))


class _blame:  # noqa: N801 (a context manager used like a function)
    """Turns any exception inside into a `PluginError` that names the plugin."""

    def __init__(self, plugin: str, what: str) -> None:
        self._plugin, self._what = plugin, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What names its own cause (a broken file, a full disk) is not the plugin's failure.
        if isinstance(error, Exception) and not isinstance(error, LoraCompressError | OSError):
            raise PluginError(f"plugin `{self._plugin}` {self._what}: {type(error).__name__}: {error}") from error


def blame(plugin: str, what: str) -> _blame:
    """`with blame("my-plugin", "failed in fit"): …` raises what happens inside as `PluginError`."""
    return _blame(plugin, what)


@cache
def load() -> Plugins:
    """The plugins of this process, loaded at the first call."""
    return Plugins(installed=os.environ.get(SWITCH) != "0")


def _entry_points() -> list[metadata.EntryPoint]:
    found = metadata.entry_points(group=hookspecs.PROJECT)
    return sorted(found, key=lambda entry: (entry.dist.name if entry.dist else "", entry.name))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _name_of(manager: pluggy.PluginManager, plugin: object) -> str:
    return manager.get_name(plugin) or repr(plugin)
