"""`convert`: factors keep their bytes, scales their values, and the way back gives the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_compress
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import AdapterError, SelectionError
from lora_compress.cli import cli
from lora_compress.formats.peft.layout import PREFIX

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
from tests.test_kohya_format import flat, merged


@pytest.fixture
def base(tmp_path: Path, rng: np.random.Generator) -> Path:
    return unet(tmp_path / "unet", rng)


def assert_same(one: Tensors, other: Tensors) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert tensor.tobytes() == other[name].tobytes(), name


def there_and_back(base: Path, file: Path, tmp_path: Path) -> tuple[Tensors, dict[str, str]]:
    lora_compress.convert(base, file, tmp_path / "peft", to="peft", force=True)
    lora_compress.convert(base, tmp_path / "peft", tmp_path / "back.safetensors", to="kohya", force=True)
    return read_file(tmp_path / "back.safetensors")


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def everything(rng: np.random.Generator) -> Tensors:
    return (
        module(rng, QUERY, alpha=np.float16(0.3), dtype=np.float16)
        | module(rng, OUT, alpha=None, dtype=BF16)
        | module(rng, PROJECTION, rank=2, alpha=np.int64(6))
        | module(rng, CONV1D, rank=7, alpha=BF16(1))
        | tucker(rng, CONV, dtype=np.float16)
    )


def test_to_peft_and_back_is_the_same_file(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = everything(rng)
    file = write(tmp_path / "style.safetensors", tensors)
    back, metadata = there_and_back(base, file, tmp_path)
    assert_same(tensors, back)
    assert metadata == METADATA
    # kohya's digests are of all that follows the header.
    assert data_of(file) == data_of(tmp_path / "back.safetensors")
    lora_compress.convert(base, tmp_path / "peft", tmp_path / "folder", to="kohya")
    assert_same(tensors, read_file(tmp_path / "folder" / "lora.safetensors")[0])


def test_odd_forms_and_names_come_back_too(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = module(rng, QUERY, alpha=np.float32(0)) | module(rng, PROJECTION)
    tensors = {
        key: value.reshape(*value.shape[:2], *([] if "proj_in" in key else [1, 1])) if value.ndim else value
        for key, value in tensors.items()
    }
    down, up = module(rng, OUT, alpha=None).values()
    file = write(tmp_path / "a.safetensors", tensors, {})
    back, metadata = there_and_back(base, file, tmp_path)
    assert_same(tensors, back)
    assert metadata == {}
    dotted = {f"diffusion_model.{OUT}.lora_A.weight": down, f"diffusion_model.{OUT}.lora_B.weight": up}
    file = write(tmp_path / "a.safetensors", dotted)
    assert_same(dotted, there_and_back(base, file, tmp_path)[0])


@given(data=st.data())
def test_any_ranks_and_alphas_survive_both_ways(tmp_path: Path, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    base = unet(tmp_path / "unet", rng)
    tensors: Tensors = {}
    for name in data.draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1)):
        rank = data.draw(st.integers(1, 9))
        width = data.draw(st.sampled_from([16, 32]))
        alpha: Any = data.draw(
            st.none() | st.floats(-(2.0**15), 2.0**15, width=width)  # type: ignore[arg-type]
        )
        kind: Any = {16: np.float16, 32: np.float32}[width]
        tensors |= module(rng, name, rank, None if alpha is None else kind(alpha), dtype=kind)
    file = write(tmp_path / "a.safetensors", tensors)
    back, metadata = there_and_back(base, file, tmp_path)
    assert_same(tensors, back)
    assert metadata == METADATA
    # The same scales to the bit: the merged weights are the same bytes.
    assert_same(merged(base, file, tmp_path), merged(base, tmp_path / "peft", tmp_path))


def test_factors_keep_their_bytes_and_the_configuration_says_ranks_and_alphas(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = module(rng, QUERY, 4, np.float32(2)) | module(rng, OUT, 4, np.float32(2)) | module(rng, CONV, 3, None)
    result = lora_compress.convert(
        base, write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", to="peft", base_name="org/model"
    )
    assert result.ranks == {f"{QUERY}.weight": 4, f"{OUT}.weight": 4, f"{CONV}.weight": 3}
    stored = load(tmp_path / "peft")
    for name in (QUERY, OUT, CONV):
        for side, part in (("A", "down"), ("B", "up")):
            ours, theirs = stored[f"{PREFIX}{name}.lora_{side}.weight"], tensors[f"{flat(name)}.lora_{part}.weight"]
            assert_same({"": ours}, {"": theirs})
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    pattern = "^" + CONV.replace(".", r"\.")
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {pattern: 3}
    assert config["base_model_name_or_path"] == "org/model"
    assert config["target_modules"] == ["conv1", OUT, "to_q"]


def peft_directory(path: Path, rng: np.random.Generator, tensors: Tensors | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "base_model_name_or_path": "org/model", **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    factors: Tensors = {}
    for name, rank in ((QUERY, 3), (CONV, 2)):
        shape = SHAPES[name]
        factors |= {
            f"{PREFIX}{name}.lora_A.weight": rng.standard_normal((rank, *shape[1:])).astype(np.float32),
            f"{PREFIX}{name}.lora_B.weight": rng.standard_normal((shape[0], rank, *[1] * (len(shape) - 2))).astype(
                np.float32
            ),
        }
    write(path / "adapter_model.safetensors", factors | (tensors or {}), {})
    return path


def test_from_peft_and_back_keeps_ranks_and_scales(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"conv1": 7}}
    adapter = peft_directory(tmp_path / "peft", rng, **patterns)
    lora_compress.convert(base, adapter, tmp_path / "a.safetensors", to="kohya")
    stored, metadata = read_file(tmp_path / "a.safetensors")
    assert stored[f"{flat(QUERY)}.alpha"] == 5
    assert stored[f"{flat(CONV)}.alpha"] == 7
    assert stored[f"{flat(CONV)}.lora_up.weight"].shape == (10, 2, 1, 1)
    assert metadata == {
        "ss_network_module": "networks.lora", "ss_network_dim": "3", "ss_network_alpha": "5",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "7"}', "ss_base_model_version": "sd_v1", "ss_v2": "False",
    }  # fmt: skip
    lora_compress.convert(base, tmp_path / "a.safetensors", tmp_path / "back", to="peft")
    assert_same(load(adapter), load(tmp_path / "back"))
    assert_same(merged(base, adapter, tmp_path), merged(base, tmp_path / "back", tmp_path))


def test_rslora_becomes_an_alpha(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    adapter = peft_directory(tmp_path / "peft", rng, use_rslora=True, rank_pattern={"conv1": 2})
    lora_compress.convert(base, adapter, tmp_path / "a.safetensors", to="kohya")
    stored, _ = read_file(tmp_path / "a.safetensors")
    # alpha/√r·r in float32: half a unit of its last place off.
    assert float(stored[f"{flat(QUERY)}.alpha"]) == pytest.approx(5 * 3**0.5, rel=2.0**-24)
    assert float(stored[f"{flat(CONV)}.alpha"]) == pytest.approx(5 * 2**0.5, rel=2.0**-24)


def test_a_tucker_convolution_becomes_a_pair_rounded_once(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = tucker(rng, CONV)
    file = write(tmp_path / "a.safetensors", tensors)
    result = lora_compress.convert(base, file, tmp_path / "peft", to="peft")
    assert result.computed == (f"{CONV}.weight",)
    assert any("three factors" in warning for warning in result.warnings)
    stored = load(tmp_path / "peft")
    b, a = (stored[f"{PREFIX}{CONV}.lora_{side}.weight"] for side in "BA")
    assert (b == tensors[f"{flat(CONV)}.lora_up.weight"]).all()
    assert a.shape == (4, 8, 3, 3)
    product = 1.5 / 3 * b.reshape(10, 4).astype(np.float64) @ a.reshape(4, -1).astype(np.float64)
    expected = delta(tensors, flat(CONV)).reshape(10, -1)
    # Each entry of A is off by half a unit of float32; sums of four products.
    np.testing.assert_allclose(product, expected, rtol=0, atol=2.0**-24 * 4 * np.abs(b).max() * np.abs(a).max())


def test_what_was_changed_meanwhile_is_not_taken_from_the_old_file(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = tucker(rng, CONV) | module(rng, QUERY, alpha=np.float16(2))
    lora_compress.convert(base, write(tmp_path / "a.safetensors", tensors), tmp_path / "peft", to="peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    stored, _ = read_file(path)
    stored[f"{PREFIX}{CONV}.lora_A.weight"] *= 2
    write(path, stored, {})
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config |= {"lora_alpha": 3, "alpha_pattern": {}}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    lora_compress.convert(base, tmp_path / "peft", tmp_path / "back.safetensors", to="kohya")
    back, metadata = read_file(tmp_path / "back.safetensors")
    assert f"{flat(CONV)}.lora_mid.weight" not in back
    assert back[f"{flat(QUERY)}.alpha"].dtype == np.float32
    assert back[f"{flat(QUERY)}.alpha"] == 3
    assert "sshs_model_hash" not in metadata
    assert metadata["of_my_own"] == "kept"
    first, second = merged(base, tmp_path / "peft", tmp_path), merged(base, tmp_path / "back.safetensors", tmp_path)
    assert_same(first, second)


def test_another_dtype_is_rounded_to_once(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = module(rng, QUERY) | tucker(rng, CONV)
    file = write(tmp_path / "a.safetensors", tensors)
    lora_compress.convert(base, file, tmp_path / "peft", to="peft", dtype="BF16")
    stored = load(tmp_path / "peft")
    expected = tensors[f"{flat(QUERY)}.lora_down.weight"].astype(ml_dtypes.bfloat16)
    assert (stored[f"{PREFIX}{QUERY}.lora_A.weight"] == expected).all()
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(BF16)}


def test_digests_of_what_was_left_out_or_changed_are_not_kept(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = module(rng, QUERY)
    words = {key.replace("lora_unet", "lora_te"): value for key, value in module(rng, OUT).items()}
    words = {key.replace("down_blocks", "text"): value for key, value in words.items()}
    for stored, dtype in ((tensors | words, None), (tensors, "BF16")):
        file = write(tmp_path / "a.safetensors", stored)
        lora_compress.convert(base, file, tmp_path / "peft", to="peft", dtype=dtype, force=True)
        lora_compress.convert(base, tmp_path / "peft", tmp_path / "b.safetensors", to="kohya", force=True)
        _, metadata = read_file(tmp_path / "b.safetensors")
        assert "sshs_model_hash" not in metadata
        assert metadata["of_my_own"] == "kept"


def test_a_prefix_can_be_given(tmp_path: Path, rng: np.random.Generator) -> None:
    text = unet(tmp_path / "text", rng, {"architectures": ["CLIPTextModel"]})
    adapter = peft_directory(tmp_path / "peft", rng, rank_pattern={"conv1": 2})
    for given_prefix, found in ((None, "lora_te_"), ("lora_te1", "lora_te1_")):
        lora_compress.convert(text, adapter, tmp_path / "a.safetensors", to="kohya", force=True, prefix=given_prefix)
        keys = read_file(tmp_path / "a.safetensors")[0]
        assert all(key.startswith((flat(QUERY, found), flat(CONV, found))) for key in keys)
    root = "model.diffusion_model."
    whole = unet(tmp_path / "whole", rng, {}, root)
    file = write(tmp_path / "b.safetensors", module(rng, QUERY))
    lora_compress.convert(whole, file, tmp_path / "inner", to="peft")
    assert f"{PREFIX}{root}{QUERY}.lora_A.weight" in load(tmp_path / "inner")
    assert_same(there_and_back(whole, file, tmp_path)[0], read_file(file)[0])
    with pytest.raises(SelectionError, match="several components"):
        lora_compress.convert(whole, tmp_path / "inner", tmp_path / "c.safetensors", to="kohya", prefix="lora_te")


def test_the_side_file_is_kept_or_its_loss_is_said(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = load(base)
    tuned = save(tmp_path / "tuned", tuned_from(tensors, rng, size=0.1), UNET)
    lora_compress.extract(base, tuned, tmp_path / "kohya", rank=2, format="kohya", dtype="F32")
    lora_compress.convert(base, tmp_path / "kohya", tmp_path / "peft", to="peft")
    assert lora_compress.verify(base, tuned, tmp_path / "peft").ok, "the account is kept, and holds"
    lora_compress.convert(base, tmp_path / "peft", tmp_path / "back", to="kohya")
    assert lora_compress.verify(base, tuned, tmp_path / "back").ok
    lost = lora_compress.convert(base, tmp_path / "peft", tmp_path / "back.safetensors", to="kohya")
    assert any("have no place in a file of kohya's" in warning for warning in lost.warnings)
    rounded = lora_compress.convert(base, tmp_path / "kohya", tmp_path / "half", to="peft", dtype="BF16")
    assert not rounded.warnings
    manifest = json.loads((tmp_path / "half" / "lora_compress" / "manifest.json").read_text())
    assert "tensors" not in manifest, "what was promised of unrounded factors"
    assert manifest["base_fingerprint"]
    tensors[f"{QUERY}.weight"] += 1
    other = save(tmp_path / "other", tensors, UNET)
    with pytest.raises(AdapterError, match="made for a base with other values"):
        lora_compress.convert(other, tmp_path / "half", tmp_path / "x", to="kohya")


def test_what_has_no_place_is_refused(base: Path, pair: Pair, tmp_path: Path, rng: np.random.Generator) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"conv1": 2}}
    whole = peft_directory(tmp_path / "a", rng, {f"{PREFIX}norm.weight": np.zeros(8, np.float32)}, **patterns)
    with pytest.raises(SelectionError, match=r"stores `norm\.weight` whole"):
        lora_compress.convert(base, whole, tmp_path / "out", to="kohya")
    none = peft_directory(tmp_path / "b", rng, lora_alpha=0, **patterns)
    with pytest.raises(SelectionError, match="an alpha of 0 means 1 to kohya"):
        lora_compress.convert(base, none, tmp_path / "out", to="kohya")
    lora_compress.extract(*pair, tmp_path / "llama", rank=2)
    with pytest.raises(SelectionError, match=r"no name for factors of `model\.embed_tokens\.weight`"):
        lora_compress.convert(pair[0], tmp_path / "llama", tmp_path / "out", to="kohya")
    lora_compress.extract(*pair, tmp_path / "factors", rank=2, format="factors")
    with pytest.raises(SelectionError, match="combine --format peft"):
        lora_compress.convert(pair[0], tmp_path / "factors", tmp_path / "out", to="peft")
    with pytest.raises(SelectionError, match="already"):
        lora_compress.convert(base, whole, tmp_path / "out", to="peft")
    nan = module(rng, QUERY) | {f"{flat(QUERY)}.lora_up.weight": np.full((8, 4), np.nan, np.float32)}
    with pytest.raises(lora_compress.TensorError, match="holds NaN"):
        lora_compress.convert(base, write(tmp_path / "nan.safetensors", nan), tmp_path / "out", to="peft")
    with pytest.raises(AdapterError, match="no factors to convert"):
        lora_compress.convert(base, peft_empty(tmp_path), tmp_path / "out", to="kohya")
    assert not (tmp_path / "out").exists()
    for to, prefix in (("gguf", None), ("peft", "lora_te"), ("kohya", "unet")):
        with pytest.raises(ValueError, match="prefix"):
            lora_compress.convert(base, whole, tmp_path / "out", to=to, prefix=prefix)


def test_factors_that_peft_would_name_otherwise_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {"token_embedding.weight": np.ones((8, 12), np.float32), "depthwise.weight": np.ones((8, 1, 3, 3), BF16)}
    base = save(tmp_path / "base", tensors, {})
    factors = {"down": np.ones((2, 12), np.float32), "up": np.ones((8, 2), np.float32)}
    whole = {f"lora_te_token_embedding.lora_{part}.weight": values for part, values in factors.items()}
    deep = {f"lora_te_depthwise.lora_{part}.weight": values[:, :9].copy() for part, values in factors.items()}
    for stored in (whole, deep):
        file = write(tmp_path / "a.safetensors", stored)
        lora_compress.merge(base, file, tmp_path / "merged", force=True)
        with pytest.raises(SelectionError, match="PEFT has no name"):
            lora_compress.convert(base, file, tmp_path / "out", to="peft")


def peft_empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write(tmp_path / "empty" / "adapter_model.safetensors", {})
    return tmp_path / "empty"


UP, DOWN = "x.lora_up.weight", "x.lora_down.weight"
MALFORMED: list[tuple[Any, Any]] = [
    ({"a": {"up": 1, "down": DOWN}}, {}),
    ({"a": {"up": UP}}, {}),
    ({"a": {"up": UP, "down": DOWN, "side": "x.alpha"}}, {}),
    ({"a": {"up": UP, "down": UP}}, {}),
    ({"a": {"up": DOWN, "down": UP}}, {}),
    ({"a": {"up": UP, "down": DOWN}, "b": {"up": UP, "down": DOWN}}, {}),
    ({}, {"x": [1]}),
    ({"a": {"up": UP, "down": DOWN}}, {UP: [-1, 2]}),
    ([], {}),
]


@pytest.mark.parametrize(
    "names",
    [
        "nonsense",
        "[]",
        "{}",
        "[" * 100_000,
        '{"keys": {}, "shapes": {}}',
        *(json.dumps({"keys": keys, "shapes": shapes, "digest": ""}) for keys, shapes in MALFORMED),
    ],
)
def test_a_malformed_rest_is_refused(base: Path, tmp_path: Path, rng: np.random.Generator, names: str) -> None:
    lora_compress.convert(
        base, write(tmp_path / "a.safetensors", module(rng, QUERY)), tmp_path / "peft", to="peft"
    )  # fmt: skip
    rest = tmp_path / "peft" / "lora_compress" / "kohya.safetensors"
    write(rest, {"x": np.zeros(1, np.float32)}, {"lora_compress.names": names})
    with pytest.raises(AdapterError, match="is malformed"):
        lora_compress.convert(base, tmp_path / "peft", tmp_path / "b.safetensors", to="kohya")


def test_the_command(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    file = write(tmp_path / "a.safetensors", module(rng, QUERY))
    runner = CliRunner()
    done = runner.invoke(cli, ["convert", str(base), str(file), "-o", str(tmp_path / "peft"), "--to", "peft"])
    assert done.exit_code == 0, done.output
    assert "1 tensors, rank 4" in done.output
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "converted from" in card
    out = str(tmp_path / "b.safetensors")
    done = runner.invoke(
        cli, ["convert", str(base), str(tmp_path / "peft"), "-o", out, "--to", "kohya", "--dtype", "f16", "--json"]
    )
    assert json.loads(done.output)["ranks"] == {f"{QUERY}.weight": 4}
    assert read_file(Path(out))[0][f"{flat(QUERY)}.lora_up.weight"].dtype == np.float16
    done = runner.invoke(
        cli, ["convert", str(base), str(file), "-o", out, "--to", "peft", "--prefix", "lora_te"]
    )  # fmt: skip
    assert done.exit_code == 2
