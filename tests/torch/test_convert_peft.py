"""PEFT loads what `convert` writes, and its ΔW is what kohya's formula gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.checkpoints import load
from tests.kohya_files import CONV, CONV1D, OUT, PROJECTION, QUERY, SHAPES, UNET, delta, module, tucker, write
from tests.kohya_files import read as read_file
from tests.test_kohya_format import flat


class Unet(torch.nn.Module):
    """Modules at the paths of the tiny UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        for name, shape in SHAPES.items():
            kinds: dict[int, Any] = {2: torch.nn.Linear, 3: torch.nn.Conv1d, 4: torch.nn.Conv2d}
            layer = kinds[len(shape)](shape[1], shape[0], *shape[2:3], bias=False)
            owner: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.add_module(last, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Never called: deltas are asked for."""
        return x


@pytest.fixture
def base(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file(Unet().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(UNET))
    return folder


def loaded_deltas(base: Path, adapter: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    model = Unet()
    model.load_state_dict(load_file(base / "model.safetensors"))
    loaded = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    layers = dict(loaded.base_model.model.named_modules())
    return {name: layers[name].get_delta_weight("default").detach().double().numpy() for name in SHAPES}


def test_peft_applies_what_kohyas_file_says(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = (
        module(rng, QUERY, 4, np.float32(2))
        | module(rng, OUT, 3, None)
        | module(rng, PROJECTION, 2, np.float32(8))
        | module(rng, CONV1D, 2, np.float32(1))
        | tucker(rng, CONV)
    )
    lora_compress.convert(base, write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", to="peft")
    for name, found in loaded_deltas(base, tmp_path / "peft").items():
        # f32 products of rank ≤ 4 with entries below 32.
        np.testing.assert_allclose(found, delta(tensors, flat(name)), rtol=0, atol=32 * 8 * 2.0**-24, err_msg=name)


def test_a_convolution_is_what_kohyas_merging_makes_of_it() -> None:
    tensors = module(np.random.default_rng(0), CONV, 3, np.float32(2))
    up, down = (torch.from_numpy(tensors[f"{flat(CONV)}.lora_{part}.weight"]).double() for part in ("up", "down"))
    # `networks/lora.py` convolves the one kernel with the other.
    merged = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3) * (2 / 3)
    np.testing.assert_allclose(delta(tensors, flat(CONV)), merged.numpy(), rtol=1e-12, atol=1e-12)


def test_what_peft_saves_becomes_a_file_of_the_same_deltas(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=3, target_modules=list(SHAPES), rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 5},
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(1)
    get_peft_model(Unet(), config).save_pretrained(tmp_path / "peft")
    lora_compress.convert(base, tmp_path / "peft", tmp_path / "a.safetensors", to="kohya")
    stored, _ = read_file(tmp_path / "a.safetensors")
    deltas = loaded_deltas(base, tmp_path / "peft")
    lora_compress.convert(base, tmp_path / "a.safetensors", tmp_path / "back", to="peft")
    again = loaded_deltas(base, tmp_path / "back")
    for name, found in deltas.items():
        # alpha is rounded to float32, products of entries below 1 are summed in it.
        np.testing.assert_allclose(delta(stored, flat(name)), found, rtol=0, atol=8 * 2.0**-24, err_msg=name)
        np.testing.assert_allclose(again[name], found, rtol=0, atol=8 * 2.0**-24, err_msg=name)
    lora_compress.merge(base, tmp_path / "a.safetensors", tmp_path / "merged")
    before, after = load(base), load(tmp_path / "merged")
    for name, found in deltas.items():
        np.testing.assert_allclose(after[f"{name}.weight"] - before[f"{name}.weight"], found, rtol=0, atol=2.0**-20)
