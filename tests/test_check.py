"""What consumers would refuse or misread, and that what `fix` writes is taken and means the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from click.testing import CliRunner
from lora_compress import AdapterError
from lora_compress.cli import cli
from lora_compress.verbs.check import CONSUMERS, check, fix
from safetensors.numpy import save_file

from tests.conftest import Pair

Q, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"


def adapter(folder: Path, ranks: dict[str, int], config: dict[str, Any] | None = None, **extra: Any) -> Path:
    folder.mkdir()
    tensors: dict[str, Any] = {}
    for module, rank in ranks.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ones((rank, 8), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ones((8, rank), np.float32)
    save_file(tensors | extra, folder / "adapter_model.safetensors")
    top = max(ranks.values())
    usual = {"peft_type": "LORA", "r": top, "lora_alpha": top, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(usual | (config or {})))
    return folder


def levels(path: Path, consumer: str) -> dict[str, str]:
    return {finding.problem: finding.level for finding in check(path, consumer).findings}


def test_a_plain_adapter_is_taken_by_all(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", {Q.format(0): 8, Q.format(1): 8})
    assert all(check(path, consumer).ok for consumer in CONSUMERS)


@pytest.mark.parametrize(
    ("ranks", "config", "expected"),
    [
        # alpha / r of the whole configuration is not what PEFT applies to the second module.
        (
            {Q.format(0): 8, Q.format(1): 4},
            {"rank_pattern": {Q.format(1): 4}},
            {"peft": None, "vllm": "misread", "sglang": "refused", "lorax": "refused", "llama.cpp": None},
        ),
        (
            {Q.format(0): 8, UP.format(0): 4},
            {"rank_pattern": {UP.format(0): 4}, "alpha_pattern": {UP.format(0): 4}},
            {"peft": None, "vllm": None, "sglang": "refused", "lorax": None, "llama.cpp": "misread"},
        ),
        ({Q.format(0): 8}, {"use_rslora": True}, {"peft": None, "vllm": None, "llama.cpp": "misread"}),
        ({Q.format(0): 8}, {"use_dora": True}, {"vllm": "refused", "sglang": "refused", "llama.cpp": "refused"}),
        ({Q.format(0): 8}, {"r": 16}, {"peft": "refused"}),
        ({Q.format(0): 600}, {}, {"peft": None, "vllm": "refused"}),
        ({Q.format(0): 8, "lm_head": 8}, {}, {"peft": None, "vllm": None, "llama.cpp": "refused"}),
        ({Q.format(0): 8, UP.format(0): 8, Q.format(1): 8}, {}, {"peft": None, "lorax": "misread"}),
        ({Q.format(0): 8}, {"lora_alpha": 0, "target_modules": []}, {"vllm": "refused"}),
        ({Q.format(0): 8}, {"bias": "all"}, {"vllm": "refused"}),
    ],
)
def test_rules(ranks: dict[str, int], config: dict[str, Any], expected: dict[str, str | None], tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", ranks, config)
    for consumer, level in expected.items():
        found = set(levels(path, consumer).values()) - {"note"}
        assert (level in found) if level else not found, (consumer, levels(path, consumer))
        assert check(path, consumer).ok == (not found)


def test_whole_weights_and_high_ranks_are_said(tmp_path: Path) -> None:
    key = "base_model.model.model.norm.weight"
    path = adapter(tmp_path / "a", {Q.format(0): 64}, None, **{key: np.ones(8, np.float32)})
    assert "refused" in levels(path, "vllm").values()
    assert any("--max-lora-rank 64" in problem for problem in levels(path, "vllm"))


@pytest.mark.parametrize("consumer", list(CONSUMERS))
def test_what_is_fixed_is_taken_and_means_the_same(consumer: str, pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "mixed", budget="16kB", dtype="F32")
    before = check(tmp_path / "mixed", consumer)
    result, after = fix(pair[0], tmp_path / "mixed", tmp_path / "fixed", consumer, dtype="F32")
    assert after.ok
    assert before.ok == (consumer in {"peft", "vllm"})
    left_out = {warning.split("`")[1] for warning in result.warnings}
    assert left_out == (set() if before.ok else {"lm_head.weight", "model.embed_tokens.weight"})
    checks = [lora_compress.verify(*pair, tmp_path / name) for name in ("mixed", "fixed")]
    errors = [{tensor.name: tensor.error for tensor in each.tensors} for each in checks]
    for name in set(errors[0]) - left_out:
        assert errors[1][name] == pytest.approx(errors[0][name], rel=1e-4), name


def test_the_command_says_what_and_exits_accordingly(pair: Pair, tmp_path: Path) -> None:
    run = CliRunner()
    path = adapter(tmp_path / "a", {Q.format(0): 8, UP.format(0): 4}, {"rank_pattern": {UP.format(0): 4}})
    done = run.invoke(cli, ["check", str(path), "--for", "sglang", "--json"], standalone_mode=False)
    assert done.return_value == 3
    assert json.loads(done.stdout)["checks"][0]["ok"] is False
    done = run.invoke(cli, ["check", str(path)], standalone_mode=False)
    assert "peft: takes it" in done.stdout
    assert "sglang: does not take it" in done.stdout
    lora_compress.extract(*pair, tmp_path / "mixed", budget="16kB")
    arguments = ["check", str(tmp_path / "mixed"), "--for", "llama.cpp", "--fix", str(tmp_path / "fixed")]
    assert "needs --base" in run.invoke(cli, arguments).output
    done = run.invoke(cli, [*arguments, "--base", str(pair[0])], standalone_mode=False)
    assert done.return_value == 0, done.output
    assert "takes it" in done.stdout
    with pytest.raises(AdapterError, match=r"no adapter of PEFT"):
        check(pair[0], "vllm")
    with pytest.raises(ValueError, match="there are no rules for `vlm`"):
        check(path, "vlm")
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "nowhere", "vllm")
