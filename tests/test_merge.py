"""Merging: one rounding, untouched bytes, the base's files, several adapters, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from lora_compress.errors import AdapterError

from tests.checkpoints import load, save, tiny_llama, tuned_from
from tests.conftest import Pair


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_merged_model_has_the_files_of_the_base(pair: Pair, tmp_path: Path) -> None:
    (pair[0] / "tokenizer.json").write_text('{"a": 1}')
    (pair[0] / "pytorch_model.bin").write_bytes(b"stale weights")
    lora_compress.extract(*pair, tmp_path / "out", rank=4)
    result = lora_compress.merge(pair[0], [tmp_path / "out"], tmp_path / "merged")
    base, merged = load(pair[0]), load(tmp_path / "merged")
    assert set(files(tmp_path / "merged")) == set(files(pair[0])) - {"pytorch_model.bin"}
    assert files(tmp_path / "merged")["tokenizer.json"] == b'{"a": 1}'
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index == json.loads((pair[0] / "model.safetensors.index.json").read_text())
    assert {name: (t.dtype, t.shape) for name, t in merged.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    untouched = [name for name in base if ".layers.1." in name]
    assert all((merged[name] == base[name]).all() for name in untouched)
    assert (result.changed, result.copied) == (len(base) - len(untouched), len(untouched))


def test_merging_equals_the_formula_with_one_rounding(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=5)
    lora_compress.merge(pair[0], [tmp_path / "out"], tmp_path / "merged")
    base, merged = load(pair[0]), load(tmp_path / "merged")
    factors = {name: tensor.astype(np.float64) for name, tensor in load(tmp_path / "out").items()}
    prefix = "base_model.model.model.layers.0.mlp.up_proj."
    exact = base["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    b, a = factors[prefix + "lora_B.weight"], factors[prefix + "lora_A.weight"]
    size = np.abs(exact) + np.abs(b) @ np.abs(a)
    exact = exact + b @ a
    got = merged["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    # ½ ulp of BF16, and γ_{r+2} of the f32 sum.
    assert (np.abs(got - exact) <= 2.0**-8 * np.abs(exact) + 7 * 2.0**-24 * size).all()


def test_a_full_rank_adapter_gives_the_tuned_model_back(tmp_path: Path, rng: np.random.Generator) -> None:
    base, config = tiny_llama(rng)
    tuned = tuned_from(base, rng)
    save(tmp_path / "base", base, config)
    save(tmp_path / "tuned", tuned, config)
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=64, dtype="F32")
    lora_compress.merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    for name, tensor in tuned.items():
        # The adapter errs by a few f32 roundings of the delta: below ¼ ulp of all but the smallest weights.
        ulp = np.abs(tensor.astype(np.float32)) * 2.0**-9
        safe = ulp > 4 * 64 * 2.0**-24 * 0.05
        assert safe.mean() > 0.9
        assert (merged[name] == tensor)[safe].all(), name


def test_several_adapters_are_summed(tmp_path: Path, rng: np.random.Generator) -> None:
    base = {"a.weight": rng.standard_normal((16, 12)).astype(np.float32), "norm": np.ones(12, np.float32)}
    first, second = tuned_from(base, rng), tuned_from(base, rng)
    for name, tensors in (("base", base), ("first", first), ("second", second)):
        save(tmp_path / name, tensors, {})
    for name in ("first", "second"):
        lora_compress.extract(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-ad", rank=12, dtype="F32")
    adapters = [tmp_path / "first-ad", tmp_path / "second-ad"]
    lora_compress.merge(tmp_path / "base", adapters, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    for name in base:
        expected = first[name].astype(np.float64) + second[name] - base[name]
        assert np.allclose(merged[name], expected, rtol=0, atol=32 * 2.0**-24)


def test_a_single_file_base_merges_into_a_single_file(tmp_path: Path, rng: np.random.Generator) -> None:
    base, config = tiny_llama(rng)
    save(tmp_path / "base", base, config)
    save(tmp_path / "tuned", tuned_from(base, rng), config)
    files_ = [tmp_path / side / "model.safetensors" for side in ("base", "tuned")]
    lora_compress.extract(files_[0], files_[1], tmp_path / "out", rank=2)
    lora_compress.merge(files_[0], [tmp_path / "out"], tmp_path / "deep" / "merged.safetensors")
    lora_compress.merge(files_[0], [tmp_path / "out"], tmp_path / "merged")
    one, two = load(tmp_path / "deep" / "merged.safetensors"), load(tmp_path / "merged")
    assert all((one[name] == two[name]).all() for name in base)


def test_an_adapter_of_another_base_is_refused(pair: Pair, tmp_path: Path, rng: np.random.Generator) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=2)
    other = {"h.weight": np.ones((4, 4), np.float32)}
    save(tmp_path / "other", other, {})
    with pytest.raises(AdapterError, match="is it an adapter of another base"):
        lora_compress.merge(tmp_path / "other", [tmp_path / "out"], tmp_path / "merged")
    smaller, config = tiny_llama(rng, hidden=12)
    save(tmp_path / "smaller", smaller, config)
    with pytest.raises(AdapterError, match="made for a base with other values"):
        lora_compress.merge(tmp_path / "smaller", [tmp_path / "out"], tmp_path / "merged")
    with pytest.raises(lora_compress.TensorError, match=r"has shape .* does not fit"):
        lora_compress.merge(tmp_path / "smaller", [tmp_path / "out"], tmp_path / "merged", any_base=True)
    assert not (tmp_path / "merged").exists()


def test_interrupting_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    class Stop:
        def begin(self, what: str, nbytes: int, tensors: int) -> None: ...

        def advance(self, nbytes: int, tensors: int = 0, tensor: str = "") -> None:
            raise KeyboardInterrupt

    lora_compress.extract(*pair, tmp_path / "out", rank=2)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        lora_compress.merge(pair[0], [tmp_path / "out"], tmp_path / "merged", progress=Stop())
    with pytest.raises(KeyboardInterrupt):
        lora_compress.extract(*pair, tmp_path / "second", rank=2, progress=Stop())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_verifying_finds_a_changed_adapter(pair: Pair, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    lora_compress.extract(*pair, tmp_path / "out", rank=3)
    before = lora_compress.verify(*pair, tmp_path / "out")
    assert before.ok
    assert 0 < before.error < 1
    assert before.unchecked == ()
    path = tmp_path / "out" / "adapter_model.safetensors"
    factors: dict[str, Any] = load_file(path)
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    factors[key] = factors[key] * factors[key].dtype.type(1.25)
    save_file(factors, path)
    after = lora_compress.verify(*pair, tmp_path / "out")
    assert [problem.name for problem in after.problems] == ["model.layers.0.mlp.down_proj.weight"]


def test_verifying_agrees_with_the_merged_files(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=3)
    result = lora_compress.verify(*pair, tmp_path / "out")
    lora_compress.merge(pair[0], [tmp_path / "out"], tmp_path / "merged")
    merged, tuned = load(tmp_path / "merged"), load(pair[1])
    for check in result.tensors:
        difference = merged[check.name].astype(np.float64) - tuned[check.name].astype(np.float64)
        assert check.merged_error_energy == pytest.approx(np.square(difference).sum(), rel=1e-9, abs=1e-30)
        assert check.largest == pytest.approx(np.abs(difference).max(), rel=1e-9)


def test_verifying_misses_the_side_file(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=3)
    (tmp_path / "out" / "lora_compress" / "exact.safetensors").unlink()
    names = {problem.name for problem in lora_compress.verify(*pair, tmp_path / "out").problems}
    assert names == {"model.norm.weight", "model.layers.0.input_layernorm.weight"}


def test_an_output_inside_an_input_that_exists_is_refused(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=1)
    for target in (pair[0] / "config.json", tmp_path / "out" / "adapter_model.safetensors"):
        with pytest.raises(lora_compress.LoraCompressError, match="would replace"):
            lora_compress.merge(pair[0], [tmp_path / "out"], target.with_name(target.name), force=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(lora_compress.LoraCompressError, match="dangling link"):
        lora_compress.merge(pair[0], tmp_path / "out", tmp_path / "link")


def test_values_that_overflow_the_base_are_refused(tmp_path: Path) -> None:
    one = np.ones((4, 4), np.float16)
    save(tmp_path / "base", {"a.weight": one, "norm": np.ones(4, np.float16)}, {})
    save(tmp_path / "tuned", {"a.weight": one * 2, "norm": np.full(4, 1e5, np.float32)}, {})
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)
    with pytest.raises(lora_compress.TensorError, match=r"`norm`: the merged value 1e5 .* overflows F16"):
        lora_compress.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")


def test_weights_scale_each_adapter(tmp_path: Path, rng: np.random.Generator) -> None:
    base = {"a.weight": rng.standard_normal((16, 12)).astype(np.float32), "norm": np.ones(12, np.float32)}
    first, second = tuned_from(base, rng), tuned_from(base, rng)
    for name, tensors in (("base", base), ("first", first), ("second", second)):
        save(tmp_path / name, tensors, {})
    for name, format_ in (("first", "peft"), ("second", "factors")):
        lora_compress.extract(
            tmp_path / "base", tmp_path / name, tmp_path / f"{name}-ad", rank=12, dtype="F32", format=format_
        )
    adapters = [tmp_path / "first-ad", tmp_path / "second-ad"]
    lora_compress.merge(tmp_path / "base", adapters, tmp_path / "merged", weights=[0.25, -2])
    merged = load(tmp_path / "merged")
    for name, values in base.items():
        exact = values.astype(np.float64)
        expected = exact + 0.25 * (first[name] - exact) - 2 * (second[name] - exact)
        assert np.allclose(merged[name], expected, rtol=0, atol=64 * 2.0**-24), name
    with pytest.raises(ValueError, match="one for each of 2 adapters"):
        lora_compress.merge(tmp_path / "base", adapters, tmp_path / "other", weights=[1.0])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_another_dtype_is_rounded_once(dtype: str, pair: Pair, tmp_path: Path) -> None:
    config = json.loads((pair[0] / "config.json").read_text()) | {"dtype": "bfloat16"}
    (pair[0] / "config.json").write_text(json.dumps(config))
    lora_compress.extract(*pair, tmp_path / "out", rank=5)
    result = lora_compress.merge(pair[0], tmp_path / "out", tmp_path / "merged", dtype=dtype)
    base, merged = load(pair[0]), load(tmp_path / "merged")
    factors = {name: tensor.astype(np.float64) for name, tensor in load(tmp_path / "out").items()}
    prefix = "base_model.model.model.layers.0.mlp.up_proj."
    exact = base["model.layers.0.mlp.up_proj.weight"].astype(np.float64)
    b, a = factors[prefix + "lora_B.weight"], factors[prefix + "lora_A.weight"]
    size = np.abs(exact) + np.abs(b) @ np.abs(a)
    got = merged["model.layers.0.mlp.up_proj.weight"]
    unit = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 0.0}[dtype]
    # Half a spacing of the dtype, of F16 below its normal numbers too, and γ of the f32 product.
    bound = unit * np.maximum(np.abs(exact + b @ a), 2.0**-14) + 7 * 2.0**-24 * size
    assert (np.abs(got.astype(np.float64) - (exact + b @ a)) <= bound).all()
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    assert str(got.dtype) == names[dtype]
    # What no adapter touches is converted too, exactly where the dtype is no narrower.
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert str(merged[untouched].dtype) == names[dtype]
    assert (merged[untouched].astype(np.float64) == base[untouched].astype(np.float64)).all() or dtype == "F16"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == names[dtype]
    assert result.gain == pytest.approx(1.0, abs=0.05 if dtype == "BF16" else 1e-2)


def test_small_updates_are_lost_to_nearest_and_kept_at_random(tmp_path: Path, rng: np.random.Generator) -> None:
    from tests.checkpoints import BF16

    base = {"a.weight": rng.standard_normal((256, 192)).astype(BF16)}
    tuned = {"a.weight": base["a.weight"].astype(np.float32) + 1e-4 * rng.standard_normal((256, 192), np.float32)}
    save(tmp_path / "base", base, {})
    save(tmp_path / "tuned", tuned, {})
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=192, dtype="F32")
    nearest = lora_compress.merge(tmp_path / "base", tmp_path / "out", tmp_path / "nearest")
    assert nearest.gain < 0.5
    assert nearest.lost > 0.5
    assert any("rounding swallows the update" in warning for warning in nearest.warnings)
    exact = lora_compress.merge(tmp_path / "base", tmp_path / "out", tmp_path / "exact", dtype="F32")
    assert exact.gain == pytest.approx(1.0, abs=1e-3)
    random = [
        lora_compress.merge(tmp_path / "base", tmp_path / "out", tmp_path / str(n), rounding="stochastic", seed=n // 2)
        for n in range(3)
    ]
    # The mean of 49152 elements whose noise is some ten times their update.
    assert random[0].gain == pytest.approx(1.0, abs=0.25)
    bytes_ = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)]
    assert bytes_[0] == bytes_[1] != bytes_[2]
    with pytest.raises(ValueError, match="rounding"):
        lora_compress.merge(tmp_path / "base", tmp_path / "out", tmp_path / "no", rounding="up")


def test_an_adapter_knows_its_base(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=2)
    with pytest.raises(AdapterError, match="made for a base with other values"):
        lora_compress.merge(pair[1], tmp_path / "out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lora_compress.merge(pair[1], tmp_path / "out", tmp_path / "merged", any_base=True)
