"""The format `kohya`: names, scales, convolutions, components, and everything that has to be refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lora_compress.cli import cli
from lora_compress.errors import AdapterError, OutputExistsError
from lora_compress.formats.kohya.names import NameMap, component
from lora_compress.formats.kohya.read import recognises
from lora_compress.model import Model

from tests.checkpoints import BF16, Tensors, load, save, tuned_from
from tests.conftest import Pair
from tests.kohya_files import (
    CONV,
    CONV1D,
    METADATA,
    OUT,
    PROJECTION,
    QUERY,
    SHAPES,
    UNET,
    delta,
    module,
    tucker,
    unet,
    write,
)
from tests.kohya_files import read as read_file


@pytest.fixture
def base(tmp_path: Path, rng: np.random.Generator) -> Path:
    return unet(tmp_path / "unet", rng)


def flat(name: str, prefix: str = "lora_unet_") -> str:
    return prefix + name.replace(".", "_")


def merged(base: Path, adapter: Path, tmp_path: Path, **options: Any) -> Tensors:
    lora_compress.merge(base, [adapter], tmp_path / "merged", force=True, **options)
    return load(tmp_path / "merged")


def assert_merged(base: Path, adapter: Path, tmp_path: Path, deltas: dict[str, Any]) -> None:
    """The base plus ΔW, in the tensors named, and the base elsewhere."""
    before, after = load(base), merged(base, adapter, tmp_path)
    assert set(before) == set(after)
    for name, weight in before.items():
        expected = weight + deltas[name] if name in deltas else weight
        # f32 products of rank ≤ 4 with entries below 32, rounded once.
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=32 * 8 * 2.0**-24, err_msg=name)
    assert any((after[name] != before[name]).any() for name in deltas)


def test_linear_conv_and_tucker_modules_are_merged_by_kohyas_formula(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = (
        module(rng, QUERY, alpha=np.float32(1))
        | module(rng, OUT, alpha=None, dtype=np.float16)
        | module(rng, PROJECTION, rank=2, alpha=np.int64(6))
        | module(rng, CONV1D, alpha=np.float64(0.3))
        | tucker(rng, CONV)
    )
    file = write(tmp_path / "style.safetensors", tensors)
    assert_merged(base, file, tmp_path, {f"{name}.weight": delta(tensors, flat(name)) for name in SHAPES})
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "any_name.safetensors", tensors)
    assert_merged(base, folder, tmp_path, {f"{name}.weight": delta(tensors, flat(name)) for name in SHAPES})


def test_factors_may_have_a_linear_form_for_kernels_of_one_and_the_other_way_round(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = module(rng, QUERY) | module(rng, PROJECTION)
    for key in list(tensors):
        if key.endswith(".weight"):
            shape = tensors[key].shape[:2]
            tensors[key] = tensors[key].reshape(shape if "proj_in" in key else (*shape, 1, 1))
    file = write(tmp_path / "a.safetensors", tensors)
    deltas = {
        f"{name}.weight": delta(tensors, flat(name)).reshape(SHAPES[name]) for name in (QUERY, PROJECTION)
    }  # fmt: skip
    assert_merged(base, file, tmp_path, deltas)


def test_an_alpha_of_zero_is_the_rank_and_said(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = module(rng, QUERY, alpha=np.float32(0))
    file = write(tmp_path / "a.safetensors", tensors)
    result = lora_compress.merge(base, file, tmp_path / "merged")
    assert any("ComfyUI multiplies by 0" in warning for warning in result.warnings)
    assert_merged(base, file, tmp_path, {f"{QUERY}.weight": delta(tensors, flat(QUERY))})


@pytest.mark.parametrize("prefix", ["diffusion_model", "transformer", "unet"])
@pytest.mark.parametrize("ends", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
def test_paths_with_dots_are_read(
    base: Path, tmp_path: Path, rng: np.random.Generator, prefix: str, ends: tuple[str, str]
) -> None:
    tensors = module(rng, QUERY, alpha=None)
    down, up = tensors.values()
    dotted = {f"{prefix}.{QUERY}.{ends[0]}.weight": down, f"{prefix}.{QUERY}.{ends[1]}.weight": up}
    file = write(tmp_path / "a.safetensors", dotted, {})
    assert_merged(base, file, tmp_path, {f"{QUERY}.weight": delta(tensors, flat(QUERY))})


def test_a_scale_that_only_diffusers_metadata_has_is_refused(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    down, up = module(rng, QUERY, alpha=None).values()
    tensors = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    for settings, good in [
        ({"unet.r": 4, "unet.lora_alpha": 4}, True),
        ({"unet.r": 4, "unet.lora_alpha": 8}, False),
        ({"unet.r": 4, "unet.lora_alpha": 4, "unet.use_rslora": True}, False),
        ({"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 1}}, False),
        ([], False),
    ]:
        file = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
        if good:
            merged(base, file, tmp_path)
            continue
        with pytest.raises(AdapterError, match="lora_adapter_metadata"):
            merged(base, file, tmp_path)


def test_components_of_one_file_go_to_the_base_they_fit(tmp_path: Path, rng: np.random.Generator) -> None:
    names = [f"text_model.encoder.layers.{layer}.mlp.fc1" for layer in range(3)]
    small = save(
        tmp_path / "one", {f"{name}.weight": np.ones((4, 6), np.float32) for name in names[:2]},
        {"architectures": ["CLIPTextModel"]},
    )  # fmt: skip
    large = save(
        tmp_path / "two", {f"{name}.weight": np.ones((5, 7), np.float32) for name in names},
        {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280},
    )  # fmt: skip
    tensors: Tensors = module(rng, QUERY)
    for prefix, shape, layers in (("lora_te1_", (4, 6), 2), ("lora_te2_", (5, 7), 3)):
        for name in names[:layers]:
            stem = flat(name, prefix)
            tensors |= {
                f"{stem}.lora_down.weight": rng.standard_normal((2, shape[1])).astype(np.float32),
                f"{stem}.lora_up.weight": rng.standard_normal((shape[0], 2)).astype(np.float32),
            }
    file = write(tmp_path / "sdxl.safetensors", tensors)
    unet(tmp_path / "unet", rng)
    for folder, prefix, layers in ((small, "lora_te1_", 2), (large, "lora_te2_", 3)):
        deltas = {f"{name}.weight": delta(tensors, flat(name, prefix)) for name in names[:layers]}
        assert_merged(folder, file, tmp_path, deltas)
        result = lora_compress.merge(folder, file, tmp_path / "merged", force=True)
        assert len(result.warnings) == 2
        assert all("are of another component" in warning for warning in result.warnings)
    assert_merged(tmp_path / "unet", file, tmp_path, {f"{QUERY}.weight": delta(tensors, flat(QUERY))})
    assert [component(Model.open(path)) for path in (small, large, tmp_path / "unet")] == [
        "lora_te", "lora_te2", "lora_unet",
    ]  # fmt: skip


def test_roots_of_a_checkpoint_of_a_whole_pipeline_are_known(tmp_path: Path, rng: np.random.Generator) -> None:
    root, text = "model.diffusion_model.", "conditioner.embedders.0.transformer."
    base = save(
        tmp_path / "base",
        {
            f"{root}{QUERY}.weight": np.ones((8, 12), np.float32),
            f"{text}fc1.weight": np.ones((8, 12), np.float32),
            "first_stage_model.fc1.weight": np.ones((8, 12), np.float32),
        },
        {},
    )
    names = NameMap(Model.open(base))
    assert names.stem(f"{root}{QUERY}.weight") == flat(QUERY)
    assert names.stem(f"{text}fc1.weight") == "lora_te1_fc1"
    assert names.stem("first_stage_model.fc1.weight") is None
    unet_part = module(rng, QUERY)
    text_part = {key.replace(flat(QUERY), "lora_te1_fc1"): value for key, value in module(rng, QUERY).items()}
    file = write(tmp_path / "a.safetensors", unet_part | text_part)
    expected = {
        f"{root}{QUERY}.weight": delta(unet_part, flat(QUERY)),
        f"{text}fc1.weight": delta(text_part, "lora_te1_fc1"),
    }
    assert_merged(base, file, tmp_path, expected)
    # The base has a UNet: that its names are others must not pass for another component.
    other = {key.replace("down_blocks", "input_blocks"): value for key, value in unet_part.items()}
    file = write(tmp_path / "a.safetensors", other | text_part)
    with pytest.raises(AdapterError, match="another layout"):
        merged(base, file, tmp_path)
    second = {key.replace("lora_te1", "lora_te2"): value for key, value in text_part.items()}
    file = write(tmp_path / "a.safetensors", unet_part | second)
    assert_merged(base, file, tmp_path, {name: change for name, change in expected.items() if "embedders" not in name})


def test_names_that_flatten_alike_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {f"{name}.weight": np.ones((8, 12), np.float32) for name in ("a.b_c", "a_b.c", "a.d")}
    base = save(tmp_path / "base", tensors, UNET)
    assert [NameMap(Model.open(base)).stem(name) for name in tensors] == [None, None, "lora_unet_a_d"]
    file = write(
        tmp_path / "a.safetensors",
        {key.replace(flat(QUERY), "lora_unet_a_b_c"): value for key, value in module(rng, QUERY).items()},
    )
    with pytest.raises(AdapterError, match=r"can mean `a\.b_c\.weight` as well as `a_b\.c\.weight`"):
        merged(base, file, tmp_path)


def test_what_cannot_be_merged_is_refused_by_name(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    good, stem = module(rng, QUERY), flat(QUERY)
    down, up, alpha = (f"{stem}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    nan = np.full((4, 12), np.nan, np.float32)
    mid = tucker(rng, CONV)
    cases: list[tuple[Tensors, str]] = [
        *(
            ({**good, f"{stem}.{end}": np.ones(8, np.float32)}, f"`{stem}.{end}` cannot be merged: {reason}")
            for end, reason in [
                ("dora_scale", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("diff", "a whole difference"),
                ("diff_b", "a whole difference"), ("w_norm", "the difference of a norm"), ("oft_blocks", "OFT"),
                ("on_input", "IA³"), ("a1.weight", "GLoRA"), ("reshape_weight", "the base.s weight is padded"),
            ]
        ),
        *(
            ({**good, alpha: np.array(value, np.float32)}, f"`{alpha}` is {shown}")
            for value, shown in [(np.nan, "nan"), (np.inf, "inf"), (1e31, "9[.]99"), (-np.inf, "-inf")]
        ),
        ({**good, alpha: np.ones(2, np.float32)}, "is no number"),
        ({**good, alpha: np.array(True)}, "is no number"),
        ({key: value for key, value in good.items() if key != down}, "but no lora_down to it"),
        ({key: value for key, value in good.items() if key != up}, "but no lora_up to it"),
        ({**good, "lora_unet_nothing.alpha": good[alpha]}, "but no lora_down to it"),
        ({**good, down: good[down][:, :-1].copy()}, "does not fit"),
        ({**good, down: good[down][:-1].copy()}, "does not fit"),
        ({**good, down: nan}, f"`{down}` in `.*` holds NaN"),
        ({**good, "unknown.thing": nan}, r"`unknown\.thing` is none of a LoRA"),
        ({**good, f"{stem}.lora_left.weight": nan}, r"lora_left\.weight` is none of a LoRA"),
        ({**good, **{key.replace("to_q", "to_z"): v for key, v in good.items()}}, "no module of .* has that name"),
        ({**good, **{key.replace("lora_unet", "lora_te"): v for key, v in good.items()}}, "are both"),
        ({**good, f"{stem}.lora_A.weight": good[down]}, "are the same factor"),
        ({**mid, f"{flat(CONV)}.lora_mid.weight": np.ones((4, 3, 3, 2), np.float32)}, "lora_mid.* does not fit"),
        ({**mid, f"{flat(CONV)}.lora_mid.weight": np.full((4, 3, 3, 3), np.inf, np.float32)}, "holds NaN"),
    ]  # fmt: skip
    for tensors, message in cases:
        file = write(tmp_path / "a.safetensors", tensors)
        with pytest.raises(lora_compress.LoraCompressError, match=message):
            lora_compress.merge(base, file, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_other_files_are_not_taken_for_it(base: Path, pair: Pair, tmp_path: Path) -> None:
    assert not recognises(base)
    assert not recognises(base / "model.safetensors")
    assert not recognises(pair[0])
    assert not recognises(tmp_path / "nothing")
    assert lora_compress.inspect(base / "model.safetensors").kind == "checkpoint"
    gpt2 = {"transformer.h.0.attn.c_attn.weight": np.ones((2, 2), np.float32)}
    assert not recognises(save(tmp_path / "gpt2", gpt2, {}))


def test_a_kohya_file_is_inspected_resized_combined_and_verified(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = module(rng, QUERY) | module(rng, OUT, rank=6) | module(rng, CONV) | tucker(rng, CONV1D)
    file = write(tmp_path / "style.safetensors", tensors)
    found = lora_compress.inspect(file)
    assert (found.kind, found.config["ss_tag_frequency"]) == ("adapter", METADATA["ss_tag_frequency"])
    shown = CliRunner().invoke(cli, ["inspect", str(file)]).output
    assert "3 to 6" in shown
    assert "sd_v1" in shown

    exact = lora_compress.resize(base, file, tmp_path / "same", max_rank=100, format="kohya", dtype="F32")
    # Gram matrices lose directions below 1e-7 of the largest, f32 rounds at 6e-8.
    assert exact.error < 1e-5
    stored, metadata = read_file(tmp_path / "same" / "lora.safetensors")
    assert stored[f"{flat(CONV)}.lora_down.weight"].shape[1:] == (8, 3, 3)
    assert stored[f"{flat(CONV)}.lora_up.weight"].shape[2:] == (1, 1)
    assert stored[f"{flat(CONV1D)}.lora_up.weight"].shape[2:] == (1,)
    assert stored[f"{flat(OUT)}.alpha"] == 6
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    arguments = json.loads(metadata["ss_network_args"])
    assert (arguments["conv_dim"], arguments["mine"]) == ("4", 1)
    assert metadata["of_my_own"] == "kept"
    assert "sshs_model_hash" not in metadata, "of tensors that have changed"
    before, after = merged(base, file, tmp_path), merged(base, tmp_path / "same", tmp_path)
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, rtol=0, atol=1e-4)

    small = lora_compress.resize(base, file, tmp_path / "small", rank=2, format="kohya")
    assert max(after for _, after in small.ranks.values()) == 2
    _, metadata = read_file(tmp_path / "small" / "lora.safetensors")
    assert metadata["ss_network_dim"] == "2"
    both = lora_compress.combine(base, [file, tmp_path / "small"], tmp_path / "both", format="kohya")
    assert both.error < 1e-2, "bf16 factors"
    lora_compress.merge(base, file, tmp_path / "tuned")
    check = lora_compress.verify(base, tmp_path / "tuned", file)
    assert check.error < 1e-5
    assert not check.has_promise


def test_extraction_writes_it_and_the_rest_goes_to_the_side_file(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = {name: tensor.astype(BF16) for name, tensor in load(base).items()}
    save(base, tensors, UNET)
    tuned = save(tmp_path / "tuned", tuned_from(tensors, rng), UNET)
    result = lora_compress.extract(base, tuned, tmp_path / "out", rank=3, format="kohya")
    stored, metadata = read_file(tmp_path / "out" / "lora.safetensors")
    assert stored[f"{flat(QUERY)}.lora_down.weight"].shape == (3, 12)
    assert stored[f"{flat(QUERY)}.alpha"] == 3
    assert stored[f"{flat(CONV)}.lora_down.weight"].shape == (3, 8, 3, 3)
    assert stored[f"{flat(CONV)}.lora_up.weight"].shape == (10, 3, 1, 1)
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "3"}
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert lora_compress.verify(base, tuned, tmp_path / "out").ok
    accounts = {account.name: account for account in result.tensors}
    assert accounts["norm.weight"].treatment == "exact"
    beside = lora_compress.merge(base, tmp_path / "out" / "lora.safetensors", tmp_path / "merged")
    assert any("is applied where the directory is named" in warning for warning in beside.warnings)


def test_a_directory_is_not_called_like_a_file(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    file = write(tmp_path / "a.safetensors", module(rng, QUERY))
    for verb in (lora_compress.resize, lora_compress.extract):
        with pytest.raises(OutputExistsError, match="would be a directory"):
            verb(base, file, tmp_path / "small.safetensors", rank=1, format="kohya")


def test_planned_ranks_that_come_out_smaller_are_described_as_they_are(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = load(base)
    low = np.outer(rng.standard_normal(8), rng.standard_normal(12)).astype(np.float32)
    tuned = save(tmp_path / "tuned", {**tensors, f"{QUERY}.weight": tensors[f"{QUERY}.weight"] + low}, UNET)
    lora_compress.extract(base, tuned, tmp_path / "out", rank=8, format="kohya", dtype="F32")
    stored, metadata = read_file(tmp_path / "out" / "lora.safetensors")
    assert metadata["ss_network_dim"] == str(len(stored[f"{flat(QUERY)}.lora_down.weight"]))


def test_embeddings_are_stored_whole_or_refused(pair: Pair, tmp_path: Path) -> None:
    result = lora_compress.extract(*pair, tmp_path / "peft", rank=2)
    assert {account.name: account.treatment.value for account in result.tensors}["lm_head.weight"] == "low-rank"
    with pytest.raises(lora_compress.SelectionError, match=r"no name for factors of `model\.embed_tokens\.weight`"):
        lora_compress.combine(pair[0], [tmp_path / "peft"], tmp_path / "out", format="kohya")
    command = ["resize", str(pair[0]), str(tmp_path / "peft"), "-o", str(tmp_path / "out"), "--format", "kohya"]
    done = CliRunner().invoke(cli, [*command, "--max-rank", "9", "--exclude", "embed_tokens"])
    assert done.exit_code == 0, done.output
    lora_compress.extract(*pair, tmp_path / "whole", rank=2, format="kohya")
    assert lora_compress.verify(*pair, tmp_path / "whole").ok


STEMS = [flat(QUERY), flat(CONV), flat(OUT, "lora_te_"), "lora_unet_nowhere", f"transformer.{QUERY}", "unet", "x"]
ENDS = [
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "lora_A.weight", "lora_B.weight",
    "lora.up.weight", "diff", "weight", "",
]  # fmt: skip
FORMS = [(), (0,), (1,), (2, 12), (8, 2), (2, 8, 3, 3), (10, 2, 1, 1), (2, 2, 3, 3), (2, 8, 1, 1), (0, 12), (1, 1, 1)]


@given(
    chosen=st.lists(
        st.tuples(
            st.sampled_from(STEMS),
            st.sampled_from(ENDS),
            st.sampled_from(FORMS),
            st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.uint8, np.bool_]),
            st.sampled_from([0, 1, 2, np.inf, np.nan]),
        ),
        max_size=3,
    ),
    dropped=st.sets(st.integers(0, 6), max_size=2),
)
def test_any_tensors_are_merged_and_converted_or_refused(tmp_path: Path, chosen: list[Any], dropped: set[int]) -> None:
    rng = np.random.default_rng(0)
    base = unet(tmp_path / "unet", rng)
    good = module(rng, QUERY, 2) | tucker(rng, CONV, 2)
    tensors = {key: value for number, (key, value) in enumerate(good.items()) if number not in dropped}
    for stem, end, shape, dtype, value in chosen:
        finite = value if np.issubdtype(dtype, np.floating) or np.isfinite(value) else 1
        tensors[f"{stem}.{end}"] = np.full(shape, finite).astype(dtype)
    file = write(tmp_path / "a.safetensors", tensors)
    for act in (
        lambda: lora_compress.merge(base, file, tmp_path / "merged", force=True),
        lambda: lora_compress.convert(base, file, tmp_path / "peft", to="peft", force=True),
        lambda: lora_compress.resize(base, file, tmp_path / "small", rank=1, format="kohya", force=True),
        lambda: lora_compress.inspect(file),
    ):
        with contextlib.suppress(lora_compress.LoraCompressError):
            act()
