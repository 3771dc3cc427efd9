"""Tests that need PyTorch, transformers and PEFT. They run in an environment of their own (`make test-torch`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

HERE = Path(__file__).parent


@pytest.fixture
def plugins() -> Iterator[None]:
    """First-party plugins and one thread, for `pytest.mark.usefixtures`."""
    from tests.torch.training import all_plugins

    with all_plugins():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.torch)
            # What other people's packages warn about is not ours to fail for.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without PyTorch there is nothing to import here."""
    from importlib.util import find_spec

    if collection_path.suffix == ".py" and collection_path != HERE / "conftest.py":
        return find_spec("torch") is None or None
    return None
