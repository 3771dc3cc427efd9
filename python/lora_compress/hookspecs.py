"""The hooks of lora_compress: what a plugin can add.

A plugin is a distribution with an entry point in the group `lora_compress`, naming a module or object whose functions
carry `@lora_compress.hookimpl`. What this package ships is registered through the same hooks (`decompositions/ab.py`,
`formats/peft/__init__.py`).

    # my_plugin.py                                   # pyproject.toml
    import lora_compress                             [project.entry-points.lora_compress]
                                                     my-plugin = "my_plugin"
    @lora_compress.hookimpl
    def register_decompositions(register):
        register(lora_compress.Decomposition(...))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from lora_compress.adapter import Format
    from lora_compress.decompositions.interface import Decomposition
    from lora_compress.initialisations.interface import Initialisation

PROJECT = "lora_compress"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_decompositions(register: Callable[[Decomposition], None]) -> None:
    """Call `register(decomposition)` for every decomposition the plugin adds."""


@hookspec
def register_formats(register: Callable[[Format], None]) -> None:
    """Call `register(format)` for every adapter format the plugin adds."""


@hookspec
def register_initialisations(register: Callable[[Initialisation], None]) -> None:
    """Call `register(initialisation)` for every initialisation of factors that the plugin adds."""
