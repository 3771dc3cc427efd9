"""The scripts of examples/, run as they stand, and what they leave on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lora_compress
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
Main = Callable[[list[str]], list[float]]


@pytest.fixture
def main_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], Main]]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def find(name: str) -> Main:
        if name == "lightning_callback" and find_spec("lightning") is None:
            pytest.skip("lightning is not installed")
        monkeypatch.delitem(sys.modules, name, raising=False)
        found: Main = import_module(name).main
        return found

    # It is one for each process, and holds the precision that whoever trained last has asked for: an example, or
    # the Trainer of another file.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield find
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_learnt(losses: list[float], adapter: Path) -> None:
    # Of 2.2 nats a byte that the base has; one batch of 512 bytes differs from the next by less than that.
    assert sum(losses[-10:]) / 10 < sum(losses[:2]) / 2 - 0.3
    assert len(lora_compress.inspect(adapter).to_json()["tensors"]) == 2 * 28


NAMES = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "inputs"]


def test_there_are_examples_and_they_are_short() -> None:
    assert NAMES == ["accelerate_loop", "hf_trainer", "lightning_callback", "plain_loop"]
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_and_saves(name: str, main_of: Callable[[str], Main], tmp_path: Path) -> None:
    assert_learnt(main_of(name)(["--output", "adapter"]), tmp_path / "adapter")


def names_in(path: Path) -> set[str]:
    if path.suffix == ".safetensors":
        return {*load_file(path)}
    state: Any = torch.load(path, weights_only=True)
    return {*(state["adapters"] if "adapters" in state else state["state_dict"])}


def test_the_trainer_goes_on_from_adapters_alone(main_of: Callable[[str], Main], tmp_path: Path) -> None:
    main = main_of("hf_trainer")
    whole = main(["--output", "whole", "--checkpoints", "one"])
    assert all(".adapter." in name for name in names_in(tmp_path / "one/checkpoint-10/model.safetensors"))
    # What a run that was killed after its first checkpoint leaves.
    for path in (tmp_path / "one/checkpoint-20").rglob("*"):
        path.unlink()
    (tmp_path / "one/checkpoint-20").rmdir()
    assert main(["--output", "resumed", "--checkpoints", "one", "--resume"]) == whole
    assert (tmp_path / "resumed/adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole/adapter_model.safetensors"
    ).read_bytes()


def test_accelerate_goes_on_from_adapters_alone(main_of: Callable[[str], Main], tmp_path: Path) -> None:
    main = main_of("accelerate_loop")
    whole = main(["--output", "whole"])
    first = main(["--output", "first", "--steps", "10", "--checkpoint", "state.pt"])
    assert all(".adapter." in name for name in names_in(tmp_path / "state.pt"))
    assert first + main(["--output", "second", "--checkpoint", "state.pt"]) == whole


def test_lightning_goes_on_from_adapters_alone(main_of: Callable[[str], Main], tmp_path: Path) -> None:
    main = main_of("lightning_callback")
    # Eleven batches an epoch, at whose end Lightning saves: within one it would begin again with the first batch.
    steps = ["--steps", "22", "--context", "128"]
    whole = main(["--output", "whole", "--checkpoints", "one", *steps])
    checkpoint = tmp_path / "one" / "epoch=0-step=11.ckpt"
    assert all(".adapter." in name for name in names_in(checkpoint))
    assert main(["--output", "resumed", "--checkpoints", "two", "--resume", str(checkpoint), *steps]) == whole[11:]
