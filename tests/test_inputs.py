"""Checkpoints as people have them: kernels, stacked experts, eight bits, other names, other vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora_compress
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import AdapterError, Checkpoint, CheckpointError, SelectionError
from lora_compress.verbs.align import renaming
from safetensors.numpy import load_file, save_file

from tests.checkpoints import BF16, Tensors, load, save, tiny_llama, tuned_from
from tests.conftest import Pair

F32 = np.float32
E4M3: Any = ml_dtypes.float8_e4m3fn
E5M2: Any = ml_dtypes.float8_e5m2


def low_rank(rng: np.random.Generator, rows: int, cols: int, rank: int) -> Any:
    return (rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols))).astype(F32)


def all_the_way(paths: Pair, tmp_path: Path, **wishes: Any) -> tuple[Any, Tensors]:
    """Extract, verify and merge; the result of extraction, and the merged tensors."""
    result = lora_compress.extract(*paths, tmp_path / "adapter", force=True, **wishes)
    checked = lora_compress.verify(*paths, tmp_path / "adapter")
    assert checked.ok, checked.problems
    lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged", force=True)
    return result, load(tmp_path / "merged")


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 3, 3), (1, 1)])
@pytest.mark.parametrize("format_", ["peft", "factors"])
def test_kernels_are_matrices(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator, kernel: tuple[int, ...], format_: str
) -> None:
    shape = (12, 8, *kernel)
    base = rng.standard_normal(shape).astype(F32)
    delta = low_rank(rng, 12, 8 * int(np.prod(kernel)), 3).reshape(shape)
    paths = make_pair({"conv.weight": base}, {"conv.weight": base + delta})
    result, merged = all_the_way(paths, tmp_path, rank=3, dtype="F32", format=format_)
    assert result.tensors[0].rank == 3
    assert np.allclose(merged["conv.weight"], base + delta, atol=1e-5)
    if format_ == "peft":
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        shapes = {key.split(".")[-2]: tensor.shape for key, tensor in stored.items()}
        assert shapes == {"lora_A": (3, 8, *kernel), "lora_B": (12, 3, *[1] * len(kernel))}


def test_depthwise_kernels_and_odd_weights_are_stored_whole(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    """A kernel that is cut into groups has other factors in PEFT; positions are no kernel."""
    base = {
        name: rng.standard_normal(shape).astype(F32)
        for name, shape in {
            "depthwise.weight": (16, 1, 3, 3),
            "positions": (1, 9, 8),
            "mixer.weight": (4, 100, 100),
            "linear.weight": (8, 8),
        }.items()
    }
    paths = make_pair(base, {name: tensor * F32(1.5) for name, tensor in base.items()})
    result, merged = all_the_way(paths, tmp_path, rank=8, dtype="F32")
    treatments = {tensor.name: tensor.treatment.value for tensor in result.tensors}
    assert treatments == {name: "low-rank" if name == "linear.weight" else "exact" for name in base}
    assert sum("stored whole" in warning for warning in result.warnings) == 3
    for name, tensor in base.items():
        assert np.allclose(merged[name], tensor * F32(1.5), atol=1e-5), name


def experts(rng: np.random.Generator, *, layers: int = 1) -> tuple[Tensors, Tensors]:
    """Stacked experts, and a fine-tune of rank 2 in all but the second expert."""
    base, tuned = {}, {}
    for layer in range(layers):
        for name, shape in {"gate_up_proj": (4, 12, 8), "down_proj": (4, 8, 6)}.items():
            key = f"model.layers.{layer}.mlp.experts.{name}"
            base[key] = rng.standard_normal(shape).astype(F32)
            delta = np.stack([low_rank(rng, *shape[1:], 2) * (expert != 1) for expert in range(4)])
            tuned[key] = base[key] + delta.astype(F32)
    return base, tuned


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("wishes", [{"rank": 2}, {"rank": "energy=0.999999"}, {"error": 1e-4}, {"budget": 100_000}])
def test_every_expert_has_factors_of_its_own(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator, model_type: str, wishes: Any
) -> None:
    base, tuned = experts(rng, layers=2)
    paths = make_pair(base, tuned, {"model_type": model_type})
    result, merged = all_the_way(paths, tmp_path, dtype="F32", **wishes)
    for name, tensor in tuned.items():
        assert np.allclose(merged[name], tensor, atol=2e-4), name
    ranks = {tensor.name: tensor.rank for tensor in result.tensors}
    assert ranks["model.layers.0.mlp.experts.gate_up_proj[0]"] == 2
    assert ranks["model.layers.0.mlp.experts.gate_up_proj[1]"] == 0
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1.mlp.experts"
    # The parameter that is used last is wrapped last, and has the shorter key.
    into, out_of = (8, 12) if model_type == "qwen2_moe" else (12, 8)
    assert stored[f"{layer}.base_layer.lora_A.weight"].shape == (4 * 2, into)
    assert stored[f"{layer}.base_layer.lora_B.weight"].shape == (out_of, 2 * 4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == sorted(base)
    assert config["target_modules"] == []


def test_a_plan_sees_a_stack_as_one_tensor(make_pair: Callable[..., Pair], rng: np.random.Generator) -> None:
    base, tuned = experts(rng)
    plan = lora_compress.plan(*make_pair(base, tuned), rank=2)
    assert [(tensor.name, tensor.shape, tensor.unit) for tensor in plan.low_rank] == [
        ("model.layers.0.mlp.experts.down_proj", (4, 8, 6), 4 * 14 * 2),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 12, 8), 4 * 20 * 2),
    ]
    for tensor in plan.low_rank:
        deltas = (tuned[tensor.name] - base[tensor.name]).astype(np.float64)
        sigma = np.sqrt(np.sum(np.linalg.svd(deltas, compute_uv=False) ** 2, axis=0))
        assert tensor.spectrum is not None
        assert np.allclose(tensor.spectrum.sigma[:2], sigma[:2], rtol=1e-3)
        assert tensor.delta_energy == pytest.approx(float(np.sum(deltas**2)), rel=1e-5)


def test_a_plan_of_experts_is_followed(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    paths = make_pair(*experts(rng))
    lora_compress.plan(*paths, rank="energy=0.9").save(tmp_path / "plan.json")
    plan = lora_compress.Plan.load(tmp_path / "plan.json")
    result = lora_compress.extract(*paths, tmp_path / "followed", plan=plan)
    found = {tensor.name: tensor.rank for tensor in result.tensors if tensor.rank}
    assert {name.partition("[")[0]: rank for name, rank in found.items()} == plan.ranks
    smaller = lora_compress.resize(paths[0], tmp_path / "followed", tmp_path / "smaller", rank=1)
    assert max(after for _, after in smaller.ranks.values()) == 1
    assert lora_compress.merge(paths[0], [tmp_path / "smaller"], tmp_path / "merged").changed == 2


def test_a_plan_notices_an_expert_that_changed(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    base, tuned = experts(rng)
    plan = lora_compress.plan(*make_pair(base, tuned), rank=2)
    # Between the places that a fingerprint looks at.
    tuned["model.layers.0.mlp.experts.gate_up_proj"][2, 1, 3] += 5
    changed = make_pair(base, tuned)
    small = replace(plan, fingerprints=lora_compress.plan(*changed, rank=2).fingerprints)
    with pytest.raises(lora_compress.PlanError, match=r"`model\.layers\.0\.mlp\.experts\.gate_up_proj` has changed"):
        lora_compress.extract(*changed, tmp_path / "out", plan=small)


@pytest.mark.parametrize("consumer", ["peft", "vllm"])
def test_checks_know_the_ranks_of_experts(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator, consumer: str
) -> None:
    paths = make_pair(*experts(rng))
    lora_compress.extract(*paths, tmp_path / "adapter", rank="energy=0.9")
    found = lora_compress.check(tmp_path / "adapter", consumer)
    assert found.ok is (consumer == "peft"), found
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 7, "rank_pattern": {}}))
    assert not lora_compress.check(tmp_path / "adapter", "peft").ok


def test_a_stack_and_its_matrix_cannot_both_be_named(tmp_path: Path) -> None:
    stack = np.zeros((2, 3, 4), F32)
    save_file({"x.experts.w": stack, "x.experts.w[0]": stack[0]}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"two tensors of .* would be called `x\.experts\.w\[0\]`"):
        Checkpoint(tmp_path / "m.safetensors")


def test_adapters_of_old_peft_are_told_apart(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    paths = make_pair(*experts(rng))
    lora_compress.extract(*paths, tmp_path / "adapter", rank=2)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "peft_version": "0.18.1"}))
    with pytest.raises(AdapterError, match=r"PEFT 0\.18\.1, which laid those of stacked experts out in another way"):
        lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged")
    path.write_text(json.dumps({**config, "target_parameters": [], "target_modules": ["experts"]}))
    with pytest.raises(AdapterError, match="is it an adapter of another base"):
        lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged")
    path.write_text(json.dumps({**config, "r": 3, "lora_alpha": 3}))
    with pytest.raises(AdapterError, match="the rank 3"):
        lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged")


def test_merged_experts_lead_back_to_the_base(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    base, tuned = experts(rng)
    base, tuned = ({name: tensor.astype(BF16) for name, tensor in side.items()} for side in (base, tuned))
    paths = make_pair(base, tuned)
    lora_compress.extract(*paths, tmp_path / "adapter", rank=2)
    lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged", keep_base_patch=True)
    lora_compress.unmerge(tmp_path / "merged", tmp_path / "again")
    for path in paths[0].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def fewer(rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    base = {"model.embed_tokens.weight": rng.standard_normal((20, 8)).astype(F32)}
    delta = low_rank(rng, 17, 8, 2)
    return base, {name: tensor[:17] + delta for name, tensor in base.items()}


def test_a_smaller_vocabulary_leaves_the_other_rows_alone(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    base, tuned = fewer(rng)
    paths = make_pair(base, tuned)
    result, merged = all_the_way(paths, tmp_path, rank=2, dtype="F32")
    assert any("3 rows fewer" in warning for warning in result.warnings)
    (name,) = base
    assert np.allclose(merged[name][:17], tuned[name], atol=1e-5)
    assert np.array_equal(merged[name][17:], base[name][17:])
    plan = lora_compress.plan(*paths, budget=10_000)
    assert lora_compress.extract(*paths, tmp_path / "planned", plan=plan).error < 0.01


@pytest.mark.parametrize("wishes", [{"format": "factors"}, {"decomposition": "best"}, {"format": "kohya"}])
def test_a_format_that_cannot_carry_a_smaller_vocabulary_says_so(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator, wishes: Any
) -> None:
    paths = make_pair(*fewer(rng))
    with pytest.raises(SelectionError, match=r"3 rows fewer in `model\.embed_tokens\.weight`.*--exclude"):
        lora_compress.extract(*paths, tmp_path / "adapter", rank=2, **wishes)
    assert not (tmp_path / "adapter").exists()


# Each maps tuned's names to what base calls the same.
RENAMINGS: dict[str, Callable[[str], str]] = {
    "prefix less": lambda name: name.removeprefix("model."),
    "prefix more": lambda name: f"base.{name}",
    "another": lambda name: name.replace("model.", "model.language_model."),
    "wrapped": lambda name: f"_orig_mod.module.{name}",
}


@pytest.mark.parametrize("how", RENAMINGS)
@pytest.mark.parametrize("of_base", [False, True])
def test_names_may_begin_otherwise(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator, how: str, of_base: bool
) -> None:
    base, config = tiny_llama(rng)
    if how != "wrapped":
        base.pop("lm_head.weight")
    tuned = tuned_from(base, rng)
    renamed = [{RENAMINGS[how](name): tensor for name, tensor in side.items()} for side in (base, tuned)]
    paths = make_pair(renamed[0], tuned, config) if of_base else make_pair(base, renamed[1], config)
    result, merged = all_the_way(paths, tmp_path, rank=24, dtype="F32")
    assert any("are taken by the base's names" in warning for warning in result.warnings)
    expected = renamed[1] if of_base else tuned
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert np.allclose(tensor.astype(F32), expected[name].astype(F32), rtol=2**-7, atol=1e-6), name


def test_a_head_beside_renamed_tensors_is_told(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    base, config = tiny_llama(rng)
    tuned = {f"x.{name}": tensor for name, tensor in tuned_from(base, rng).items()} | {
        "score.weight": np.ones((2, 24), F32)
    }
    paths = make_pair(base, tuned, config)
    with pytest.raises(SelectionError, match=r"lacks `score\.weight`"):
        lora_compress.extract(*paths, tmp_path / "out", rank=2)
    assert lora_compress.extract(*paths, tmp_path / "out", rank=2, skip_missing=True).rank == 2


def test_other_layers_and_towers_are_not_taken_for_renamed_ones() -> None:
    def layers(*numbers: int, root: str = "model.layers") -> dict[str, tuple[int, ...]]:
        return {f"{root}.{number}.{kind}.weight": (4, 4) for number in numbers for kind in ("q", "k", "v")}

    assert renaming(layers(0, 1, 2, 3), layers(0, 1, 2, 7)) is None
    assert renaming(layers(0, 1, root="text_model.encoder"), layers(0, 1, root="vision_model.encoder")) is None
    assert renaming(layers(0, 1), layers(0, 1) | {"a.x.weight": (4, 4)}) is None
    assert renaming(layers(0, 1), layers(0, 1, root="base.layers")) is None
    assert renaming(layers(0, 1), layers(0, 1, root="base.model.layers")) is not None


def test_other_models_are_not_renamed() -> None:
    ours = {f"h.{layer}.attn.weight": (4, 4) for layer in range(9)} | {"wte.weight": (9, 4)}
    theirs = {f"layers.{layer}.mlp.weight": (4, 4) for layer in range(9)} | {"embed.weight": (7, 4)}
    assert renaming(ours, theirs) is None
    assert renaming(ours, ours) is None


@given(data=st.data())
def test_renaming_finds_what_was_added(data: st.DataObject) -> None:
    part = st.sampled_from(["model", "layers", "0", "1", "attn", "q", "weight", "bias", "norm"])
    names = data.draw(st.sets(st.lists(part, min_size=2, max_size=5).map(".".join), min_size=1, max_size=12))
    ours = {name: (number, 2) for number, name in enumerate(sorted(names))}
    prefix = data.draw(st.sampled_from(["", "z.", "z.y."]))
    found = renaming(ours, {prefix + name: shape for name, shape in ours.items()})
    if prefix:
        assert found is not None
        assert {new: old for old, new in found[1].items()} == {name: prefix + name for name in ours}
    else:
        assert found is None


def quantised(values: Any, dtype: Any, block: tuple[int, int] | None) -> tuple[Any, Any, Any]:
    """fp8 weights, their scales, and what both stand for."""
    rows, cols = values.shape[-2:]
    bm, bn = block or (rows, cols)
    grid = (-(-rows // bm), -(-cols // bn))
    scales = np.empty((*values.shape[:-2], *grid), F32)
    spread = np.empty(values.shape, F32)
    for i, j in np.ndindex(*grid):
        at = (..., slice(i * bm, (i + 1) * bm), slice(j * bn, (j + 1) * bn))
        largest = np.abs(values[at]).max(axis=(-2, -1), keepdims=True)
        scales[..., i, j] = largest[..., 0, 0] / F32(ml_dtypes.finfo(dtype).max)
        spread[at] = scales[..., i, j][..., None, None]
    stored = (values / spread).astype(dtype)
    return stored, scales, stored.astype(F32) * spread


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    ("shape", "block", "key"),
    [
        ((300, 200), (128, 128), "w.weight_scale_inv"),
        ((130, 64), (1, 64), "w.weight_scale"),
        ((40, 24), None, "w.weight_scale"),
        ((40, 24), None, "w.scale_weight"),
        ((3, 140, 130), (128, 128), "w.weight_scale_inv"),
    ],
)
def test_eight_bits_are_read_as_what_they_stand_for(
    tmp_path: Path, rng: np.random.Generator, dtype: Any, shape: tuple[int, ...], block: Any, key: str
) -> None:
    stored, scales, values = quantised(rng.standard_normal(shape).astype(F32), dtype, block)
    save_file({"w.weight": stored, key: scales if block else scales.reshape(())}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path / "m.safetensors")
    (tensor,) = checkpoint.tensors()
    name = "F8_E4M3" if dtype is E4M3 else "F8_E5M2"
    assert (tensor.dtype, tensor.stored_dtype, tensor.nbytes) == ("F32", name, 4 * values.size)
    assert np.array_equal(checkpoint.read("w.weight"), values)
    whole = values.tobytes()
    for begin, length in [(0, 1), (3, 6), (len(whole) - 5, 5), (517, 1030), (len(whole), 0)]:
        assert checkpoint.read_bytes("w.weight", begin, length) == whole[begin : begin + length]
    if len(shape) == 3:
        assert np.array_equal(checkpoint.read("w.weight[2]"), values[2])


def test_eight_bits_without_scales_are_bf16(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8)
    for dtype in (E4M3, E5M2):
        save_file({"w": every.view(dtype)}, tmp_path / "m.safetensors")
        checkpoint = Checkpoint(tmp_path / "m.safetensors")
        assert checkpoint.info("w").dtype == "BF16"
        assert np.array_equal(checkpoint.read("w"), every.view(dtype).astype(F32), equal_nan=True)
        assert checkpoint.read_bytes("w", 3, 4) == every.view(dtype).astype(BF16).tobytes()[3:7]


def test_scales_of_four_bit_weights_stay_as_they_are(tmp_path: Path) -> None:
    """NVFP4 and the like: packed weights, whose scales are themselves in eight bits."""
    scales = np.arange(64, dtype=np.uint8).reshape(8, 8).view(E4M3)
    packed = {"q.weight": np.ones((8, 64), np.uint8), "q.weight_scale": scales, "v.weight": np.ones((8, 8), BF16)}
    config = {"quantization_config": {"quant_method": "modelopt"}}
    save(tmp_path / "base", packed, config)
    save(tmp_path / "tuned", {**packed, "v.weight": np.full((8, 8), 2, BF16)}, config)
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=1)
    lora_compress.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    assert merged.info("q.weight_scale").stored_dtype == "F8_E4M3"
    assert merged.read_bytes("q.weight_scale") == scales.tobytes()
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for scales in (np.ones((2, 2), F32), np.ones((7,), F32), np.ones((1, 1), np.int32)):
        save_file({"w": np.zeros((300, 200), E4M3), "w_scale_inv": scales}, tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError, match=r"`w_scale_inv` in .* fits no grid of scales over `w`"):
            Checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("tuned_too", [False, True])
def test_an_eight_bit_base_goes_all_the_way(tmp_path: Path, rng: np.random.Generator, tuned_too: bool) -> None:
    """As DeepSeek stores it; the tuned model in BF16 or in eight bits as well."""
    values = rng.standard_normal((256, 192)).astype(F32)
    stored, scales, base = quantised(values, E4M3, (128, 128))
    quantisation = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "model_type": "x"}
    other = {"norm.weight": np.ones(8, BF16)}
    save(tmp_path / "base", {"w.weight": stored, "w.weight_scale_inv": scales, **other}, quantisation)
    delta = 0.5 * low_rank(rng, 256, 192, 4)
    if tuned_too:
        stored, scales, tuned = quantised(base + delta, E4M3, (128, 128))
        save(tmp_path / "tuned", {"w.weight": stored, "w.weight_scale_inv": scales, **other}, quantisation)
    else:
        tuned = (base + delta).astype(BF16).astype(F32)
        save(tmp_path / "tuned", {"w.weight": tuned.astype(BF16), **other}, {"model_type": "x"})
    paths = tmp_path / "base", tmp_path / "tuned"
    result, merged = all_the_way(paths, tmp_path, rank=4, dtype="F32")
    again = lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged", force=True)
    assert "1 weights of eight bits are written as BF16, each rounded once more" in again.warnings[0]
    assert [tensor.treatment.value for tensor in result.tensors] == ["unchanged", "low-rank"]
    assert merged.keys() == {"w.weight", "norm.weight"}
    assert merged["w.weight"].dtype == BF16
    # The best pair of rank 4, and one rounding.
    exact = np.linalg.svd((tuned - base).astype(np.float64))
    best = (exact[0][:, :4] * exact[1][:4]) @ exact[2][:4]
    assert np.allclose(merged["w.weight"].astype(F32), base + best, rtol=2**-8, atol=2e-3)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == {"model_type": "x"}
    with pytest.raises(lora_compress.LoraCompressError, match="without eight-bit weights"):
        lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "kept", keep_base_patch=True)
    assert not (tmp_path / "kept").exists()
    assert lora_compress.inspect(paths[0]).dtypes["F8_E4M3"]


def test_noise_of_eight_bits_is_counted(tmp_path: Path, rng: np.random.Generator) -> None:
    """Rounding to three bits is most of a small ΔW: spacing²/12 of every element says so."""
    values = rng.standard_normal((256, 256)).astype(F32)
    save_file({"w": values}, tmp_path / "base.safetensors")
    stored, scales, tuned = quantised(values + F32(1e-4) * low_rank(rng, 256, 256, 2), E4M3, (128, 128))
    save_file({"w": stored, "w_scale_inv": scales}, tmp_path / "tuned.safetensors")
    delta = lora_compress.Delta(
        Checkpoint(tmp_path / "base.safetensors"), Checkpoint(tmp_path / "tuned.safetensors"), "w"
    )
    # Scales are no powers of two, so that the spacing is known to a factor of two, its energy to four.
    assert 0.25 < delta.rounding_energy / float(np.sum((tuned - values) ** 2)) < 4


def test_other_quantised_weights_are_named(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    paths = make_pair({"w.qweight": np.ones((4, 4), np.int32)}, {"w.qweight": np.zeros((4, 4), np.int32)})
    with pytest.raises(SelectionError, match=r"`w\.qweight`.*looks quantised"):
        lora_compress.extract(*paths, tmp_path / "out", rank=1)


@pytest.mark.parametrize(
    "names",
    [
        ("diffusion_pytorch_model.safetensors",),
        ("model.fp16.safetensors",),
        ("unet-00001-of-00002.safetensors", "unet-00002-of-00002.safetensors"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"),
    ],
)
def test_directories_with_other_names(
    tmp_path: Path, rng: np.random.Generator, make_pair: Callable[..., Pair], names: tuple[str, ...]
) -> None:
    base = {f"{number}.weight": rng.standard_normal((8, 8)).astype(F32) for number in range(2)}
    paths = make_pair({}, {name: tensor + F32(1) for name, tensor in base.items()})
    (paths[0] / "model.safetensors").unlink()
    parts = [dict(list(base.items())[number :: len(names)]) for number in range(len(names))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, paths[0] / name)
    if len(names) > 1:
        stem = names[0].partition("-0")[0]
        index = {"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
        (paths[0] / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    _, merged = all_the_way(paths, tmp_path, rank=1, dtype="F32")
    assert np.allclose(merged["1.weight"], base["1.weight"] + 1, atol=1e-5)
    assert Checkpoint(tmp_path / "merged").shards
