"""Settings that patterns of module names may give another value: ranks and alphas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_compress._native import Patterns
from lora_compress.errors import AdapterError, LoraCompressError


def scale_of(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """The scale that PEFT gives a module: alpha / r, or alpha / √r (rsLoRA, Kalajdzievski 2023)."""
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


class ByModule:
    """A setting by PEFT's rule (`get_pattern_key`): the value of the first pattern that matches the end of a module's
    path, in the order of the file, else the default.

    Raises `AdapterError` for patterns that cannot be matched.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], setting: str, default: Any) -> None:
        patterns = config.get(setting) or {}
        self._values, self._default = list(patterns.values()), default
        try:
            self._patterns = Patterns(list(patterns))
        except LoraCompressError as error:
            raise AdapterError(f"`{path}`: {setting}: {error}") from error

    def __getitem__(self, module: str) -> Any:
        index = self._patterns.first_match(module)
        return self._default if index is None else self._values[index]
