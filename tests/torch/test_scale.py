"""The search for a scale, on the demo pair: what it reports is what merged models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
import torch
from lora_compress import cli
from lora_compress.torch.scale import golden_section, search_scale
from lora_compress.torch.tokens import read_tokens
from transformers import AutoModelForCausalLM

DATA = Path(lora_compress.__file__).parent / "demo" / "data"
BASE, TUNED = DATA / "base", DATA / "tuned"
CONTEXT = 128


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model reads bytes: its held-out text as token ids."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.frombuffer((DATA / "heldout.txt").read_bytes(), dtype=np.uint8)[:4096])
    return path


def log_p(folder: Path, windows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(windows).logits[:, :-1].log_softmax(-1)


def test_the_reported_divergence_is_that_of_the_merged_model(calibration: Path, tmp_path: Path) -> None:
    lora_compress.extract(BASE, TUNED, tmp_path / "one", rank=8, dtype="F32")
    found = search_scale(BASE, TUNED, tmp_path / "one", calibration, context=CONTEXT)
    windows = read_tokens(calibration, TUNED, context=CONTEXT, most=8192)
    assert windows.shape == (32, CONTEXT)
    assert found.improved
    assert isinstance(found.scale, float)
    assert found.scale != 1.0
    for position, scale in ((0, 1.0), (1, found.scale)):
        out = tmp_path / f"scaled-{position}"
        lora_compress.extract(BASE, TUNED, out, rank=8, dtype="F32", scale=scale)
        lora_compress.merge(BASE, [out], tmp_path / f"merged-{position}")
        target, merged = log_p(TUNED, windows), log_p(tmp_path / f"merged-{position}", windows)
        kl = (target.exp() * (target - merged)).sum(-1).mean(-1)
        # The search leaves out the merged weights' rounding to bf16.
        assert float(kl[0::2].mean()) == pytest.approx(found.calibration[position], rel=0.03)
        assert float(kl[1::2].mean()) == pytest.approx(found.heldout[position], rel=0.03)
    assert found.heldout[1] < found.heldout[0]


def test_scales_by_module_are_no_worse_on_what_they_were_found_on(calibration: Path, tmp_path: Path) -> None:
    lora_compress.extract(BASE, TUNED, tmp_path / "out", rank=8)
    common = search_scale(BASE, TUNED, tmp_path / "out", calibration, context=CONTEXT, tokens=1024)
    each = search_scale(BASE, TUNED, tmp_path / "out", calibration, context=CONTEXT, tokens=1024, by_module=True)
    assert each.calibration[1] <= common.calibration[1]
    if not isinstance(each.scale, float):
        assert {"q_proj", "down_proj", "embed_tokens"} <= set(each.scale)
        lora_compress.extract(BASE, TUNED, tmp_path / "scaled", rank=8, scale=each.scale)
        assert lora_compress.verify(BASE, TUNED, tmp_path / "scaled").ok


def test_the_command(calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["extract", str(BASE), str(TUNED), "-o", str(tmp_path / "out"), "--rank", "8", "--scale", "search"]
    assert cli._run(asked) == cli.EXIT_USAGE
    assert "--calibration" in capsys.readouterr().err
    (tmp_path / "words.txt").write_text("a tokenizer would be needed for this")
    assert cli._run([*asked, "--calibration", str(tmp_path / "words.txt")]) == cli.EXIT_FAILED
    assert "has no tokenizer: give token ids" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli._run([*asked, "--calibration", str(calibration)]) == 0
    assert "on held-out tokens KL" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "lora_compress" / "manifest.json").read_text())
    assert 0.8 <= manifest["scale"] <= 1.6
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert lora_compress.verify(BASE, TUNED, tmp_path / "out").ok


def test_what_cannot_be_searched_is_refused(calibration: Path, tmp_path: Path) -> None:
    lora_compress.extract(BASE, TUNED, tmp_path / "scaled", rank=2, scale=1.1)
    with pytest.raises(lora_compress.SelectionError, match="already has a scale"):
        search_scale(BASE, TUNED, tmp_path / "scaled", calibration)
    lora_compress.extract(BASE, TUNED, tmp_path / "one", rank=2)
    np.save(tmp_path / "high.npy", np.arange(200, 400))
    with pytest.raises(lora_compress.SelectionError, match="from 200 to 399, the model has 256"):
        search_scale(BASE, TUNED, tmp_path / "one", tmp_path / "high.npy", context=50)
    asked = ["extract", str(BASE), str(TUNED), "-o", str(tmp_path / "x"), "--calibration", str(calibration)]
    assert cli._run(asked) == cli.EXIT_USAGE
    searched = [*asked[:4], str(tmp_path / "one"), *asked[5:], "--scale", "search"]
    assert cli._run(searched) == cli.EXIT_FAILED, "the output exists: said before any work"


@pytest.mark.parametrize("content", ["[]", '["a"]', "[1, 2, 3]", "[1.5, 2.5]", "{}", "[[1, 2], [3]]"])
def test_what_holds_no_tokens_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(lora_compress.SelectionError, match=r"ids\.json"):
        read_tokens(tmp_path / "ids.json", TUNED, context=64, most=1000)


def test_golden_section_finds_minima() -> None:
    for minimum in (0.81, 1.0, 1.234, 1.59):
        found, _ = golden_section(lambda x, minimum=minimum: (x - minimum) ** 2, 0.8, 1.6, 0.01)  # type: ignore[misc]
        assert abs(found - minimum) <= 0.02
