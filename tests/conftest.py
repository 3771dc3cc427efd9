"""Shared fixtures. Installed plugins are left out, so that what is on the machine cannot change a result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests.checkpoints import Tensors, save, tiny_llama, tuned_from

os.environ.setdefault("LORA_COMPRESS_PLUGINS", "0")
# Nothing is asked of the network, whatever is installed.
os.environ["HF_HUB_OFFLINE"] = "1"

# `HYPOTHESIS_PROFILE=slow make test-python` searches longer.
quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("fast", max_examples=25, deadline=None, suppress_health_check=quiet)
settings.register_profile("slow", max_examples=1000, deadline=None, suppress_health_check=quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

Pair = tuple[Path, Path]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def pair(tmp_path: Path, rng: np.random.Generator) -> Pair:
    """A tiny Llama-shaped BF16 model in two shards, and a full fine-tune of all but its second layer."""
    base, config = tiny_llama(rng)
    unchanged = {name for name in base if ".layers.1." in name}
    save(tmp_path / "base", base, config, shards=2)
    save(tmp_path / "tuned", tuned_from(base, rng, keep=unchanged), config, shards=2)
    return tmp_path / "base", tmp_path / "tuned"


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., Pair]:
    """Write two given sets of tensors as base and tuned."""

    def make(base: Tensors, tuned: Tensors, config: dict[str, object] | None = None) -> Pair:
        save(tmp_path / "base", base, config or {})
        save(tmp_path / "tuned", tuned, config or {})
        return tmp_path / "base", tmp_path / "tuned"

    return make
