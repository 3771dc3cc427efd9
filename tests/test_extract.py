"""Extraction: errors are those of the stored factors, every tensor is accounted for, and bytes are reproducible."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from lora_compress.errors import OutputExistsError, SelectionError, TensorError
from safetensors.numpy import load_file

from tests.checkpoints import BF16, Tensors, load, save, tiny_llama, tuned_from
from tests.conftest import Pair

PREFIX = "base_model.model."


def dense(adapter: Path, module: str) -> Any:
    factors = load_file(adapter / "adapter_model.safetensors")
    b, a = (factors[f"{PREFIX}{module}.lora_{side}.weight"].astype(np.float64) for side in "BA")
    return b @ a


def test_the_reported_error_is_that_of_the_stored_factors_and_close_to_the_optimum(pair: Pair, tmp_path: Path) -> None:
    result = lora_compress.extract(*pair, tmp_path / "out", rank=6)
    base, tuned = load(pair[0]), load(pair[1])
    checked = 0
    for account in result.tensors:
        if account.treatment != "low-rank" or "embed" in account.name:
            continue
        delta = tuned[account.name].astype(np.float64) - base[account.name].astype(np.float64)
        stored = dense(tmp_path / "out", account.name.removesuffix(".weight"))
        error = np.linalg.norm(delta - stored)
        # The core forms the residual with f32 products of r + 1 terms.
        assert account.error_energy is not None
        slack = 8 * 2.0**-24 * np.linalg.norm(delta)
        assert abs(np.sqrt(account.error_energy) - error) <= slack
        assert account.delta_energy == pytest.approx(np.square(delta).sum(), rel=1e-12)
        sigma = np.linalg.svd(delta, compute_uv=False)
        optimum = np.linalg.norm(sigma[6:])
        # Rounding both factors to BF16 adds at most 2·2⁻⁹·‖B‖·‖A‖ in norm, orthogonal to the residual to first order.
        rounding = 2 * 2.0**-8 * np.linalg.norm(sigma[:6])
        assert optimum - slack <= error <= np.hypot(optimum, rounding) + slack
        checked += 1
    assert checked == 5


def test_every_tensor_is_accounted_for(pair: Pair, tmp_path: Path) -> None:
    result = lora_compress.extract(*pair, tmp_path / "out", rank=4, exclude=["up_proj"])
    treatments = {account.name: account.treatment.value for account in result.tensors}
    assert set(treatments) == set(load(pair[0]))
    assert treatments["model.layers.1.mlp.up_proj.weight"] == "unchanged"
    assert treatments["model.layers.0.mlp.up_proj.weight"] == "excluded"
    assert treatments["model.norm.weight"] == "exact"
    assert treatments["model.embed_tokens.weight"] == "low-rank"
    excluded = next(account for account in result.tensors if account.treatment == "excluded")
    assert excluded.error_energy == excluded.delta_energy
    assert excluded.error == 1
    manifest = json.loads((tmp_path / "out" / "lora_compress" / "manifest.json").read_text())
    assert [row["name"] for row in manifest["tensors"]] == sorted(treatments)
    assert sum(row["share"] for row in manifest["totals"]["treatments"]) == pytest.approx(1)


def test_the_configuration_is_read_the_same_by_every_server(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=100, base_name="org/base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 24
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^model\.layers\.0\.self_attn\.k_proj": 12}
    assert config["base_model_name_or_path"] == "org/base"
    # Layer 1 is unchanged: suffixes would reach it, full paths do not.
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert "lm_head" in config["target_modules"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/base"\nbase_model_relation: adapter\nlibrary_name: peft\n')


def test_norms_are_stored_to_the_bit_where_servers_do_not_look(pair: Pair, tmp_path: Path) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=2)
    side = load_file(tmp_path / "out" / "lora_compress" / "exact.safetensors")
    assert set(side) == {"exact:model.norm.weight", "exact:model.layers.0.input_layernorm.weight"}
    assert (side["exact:model.norm.weight"] == load(pair[1])["model.norm.weight"]).all()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_bytes_do_not_depend_on_threads(tmp_path: Path, rng: np.random.Generator) -> None:
    base = {f"layer{i}.weight": rng.standard_normal((300, 260 + i)).astype(np.float32) for i in range(4)}
    save(tmp_path / "base", base, {})
    save(tmp_path / "tuned", tuned_from(base, rng), {})
    outputs = []
    for threads in ("1", "2", "4"):
        out = tmp_path / f"out{threads}"
        arguments = ["extract", "base", "tuned", "-o", out.name, "--rank", "8", "--threads", threads, "--quiet"]
        subprocess.run([sys.executable, "-m", "lora_compress", *arguments], cwd=tmp_path, check=True)
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix in {".safetensors"})
        outputs.append([path.read_bytes() for path in files])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_grown_vocabulary_keeps_its_new_rows_to_the_bit(tmp_path: Path, rng: np.random.Generator) -> None:
    base, config = tiny_llama(rng)
    tuned = tuned_from(base, rng)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = np.concatenate([tuned[name], rng.standard_normal((3, 24)).astype(BF16)])
    base["head.bias"], tuned["head.bias"] = (rng.standard_normal(n).astype(np.float32) for n in (40, 43))
    save(tmp_path / "base", base, config)
    save(tmp_path / "tuned", tuned, {**config, "vocab_size": 43})
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    result = lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=24)
    grown = {account.name: account.new_rows for account in result.tensors if account.new_rows}
    assert grown == {"model.embed_tokens.weight": 3, "lm_head.weight": 3, "head.bias": 3}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert lora_compress.verify(tmp_path / "base", tmp_path / "tuned", tmp_path / "out").ok
    lora_compress.merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert (merged["lm_head.weight"][40:] == tuned["lm_head.weight"][40:]).all()
    assert (merged["head.bias"] == tuned["head.bias"]).all()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 43
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_new_rows_of_an_excluded_tensor_are_left_out_too(tmp_path: Path, rng: np.random.Generator) -> None:
    base, config = tiny_llama(rng)
    tuned = tuned_from(base, rng)
    tuned["lm_head.weight"] = np.concatenate([tuned["lm_head.weight"], np.ones((2, 24), BF16)])
    save(tmp_path / "base", base, config)
    save(tmp_path / "tuned", tuned, config)
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, exclude=["lm_head"])
    lora_compress.merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    assert (load(tmp_path / "merged")["lm_head.weight"] == base["lm_head.weight"]).all()
    assert lora_compress.verify(tmp_path / "base", tmp_path / "tuned", tmp_path / "out").unchecked == (
        "lm_head.weight",
    )


def test_exact_low_rank_is_recognised(make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator) -> None:
    base = {"a.weight": rng.integers(-3, 4, (64, 48)).astype(np.float32)}
    delta = rng.integers(-2, 3, (64, 3)) @ rng.integers(-2, 3, (3, 48))
    paths = make_pair(base, {"a.weight": base["a.weight"] + delta.astype(np.float32)})
    result = lora_compress.extract(*paths, tmp_path / "out", rank=16, dtype="F32")
    (account,) = result.tensors
    assert account.rank == 3
    assert account.error < 1e-6


def test_signed_zeros_alone_are_no_delta(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    zeros, other = np.zeros((4, 4), np.float32), np.ones((4, 4), np.float32)
    paths = make_pair({"a.weight": zeros, "b.weight": other}, {"a.weight": -zeros, "b.weight": other * 2})
    result = lora_compress.extract(*paths, tmp_path / "out", rank=2)
    assert result.tensors[0].rank == 0
    assert lora_compress.verify(*paths, tmp_path / "out").ok


def test_what_does_not_fit_is_named_with_what_to_do(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    one, two = np.ones((4, 4), np.float32), 2 * np.ones((4, 4), np.float32)
    nan = two.copy()
    nan[1, 2] = np.nan
    cases: list[tuple[Tensors, Tensors, dict[str, object], type[Exception], str]] = [
        ({"a.weight": one, "b.weight": one}, {"a.weight": two}, {}, SelectionError, r"lacks `b\.weight`.*--skip"),
        ({"a.weight": one}, {"a.weight": np.ones((4, 5), np.float32)}, {}, SelectionError, "has shape.*--exclude"),
        ({"a.bias": one[0]}, {"a.bias": one[0, :3]}, {}, SelectionError, r"`a\.bias` has shape"),
        ({"a.weight": one}, {"a.weight": nan}, {}, TensorError, r"`a\.weight` in `.*tuned` holds NaN at flat index 6"),
        ({"a.weight": one}, {"a.weight": one}, {}, SelectionError, "does not differ"),
        ({"a.weight": one}, {"a.weight": two}, {"exclude": ["nothing"]}, SelectionError, "`nothing` matches no tensor"),
        ({"a.weight": one}, {"a.weight": two}, {"include": ["("]}, SelectionError, "not a regular expression"),
        (
            {"a.qweight": np.ones((4, 4), np.int32)},
            {"a.qweight": np.zeros((4, 4), np.int32)},
            {},
            SelectionError,
            r"`a\.qweight`.*dequantise",
        ),
    ]  # fmt: skip
    for base, tuned, options, kind, message in cases:
        paths = make_pair(base, tuned)
        with pytest.raises(kind, match=message):
            lora_compress.extract(*paths, tmp_path / "out", rank=2, **options)  # type: ignore[arg-type]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_missing_tensors_can_be_skipped(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    one = np.ones((4, 4), np.float32)
    paths = make_pair({"a.weight": one, "b.weight": one}, {"a.weight": one * 2, "c.weight": one})
    result = lora_compress.extract(*paths, tmp_path / "out", rank=1, skip_missing=True)
    treatments = {account.name: account.treatment.value for account in result.tensors}
    assert treatments == {"a.weight": "low-rank", "b.weight": "missing", "c.weight": "missing"}


def test_an_existing_output_and_the_inputs_are_safe(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(OutputExistsError, match="--force"):
        lora_compress.extract(*pair, out, rank=1)
    with pytest.raises(OutputExistsError, match="would replace the input"):
        lora_compress.extract(*pair, pair[0], rank=1, force=True)
    with pytest.raises(OutputExistsError, match="would replace the input"):
        lora_compress.extract(*pair, tmp_path, rank=1, force=True)
    with pytest.raises(OutputExistsError, match="neither an adapter nor a model"):
        lora_compress.extract(*pair, out, rank=1, force=True)
    assert (out / "precious").read_text() == "x"
    (out / "precious").unlink()
    lora_compress.extract(*pair, out, rank=2)
    lora_compress.extract(*pair, out, rank=1, force=True)
    assert load(out)["base_model.model.lm_head.lora_A.weight"].shape[0] == 1
    with monkeypatch.context() as patch:
        patch.chdir(out)
        with pytest.raises(OutputExistsError, match="is where you are"):
            lora_compress.extract(*pair, ".", rank=1, force=True)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "base").symlink_to(pair[0])
    (tmp_path / "links" / "x.safetensors").touch()
    with pytest.raises(OutputExistsError, match="would replace the input"):
        lora_compress.extract(tmp_path / "links" / "base", pair[1], tmp_path / "links", rank=1, force=True)
    (tmp_path / "links" / "base").unlink()
    (tmp_path / "links" / "x.safetensors").unlink()
    # An empty directory is filled where it stands.
    lora_compress.extract(*pair, tmp_path / "links", rank=1)
    shutil.rmtree(tmp_path / "links")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_integers_of_one_dimension_are_kept_exactly(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    one = np.ones((4, 4), np.float32)
    base = {"a.weight": one, "steps": np.array([3], np.int64), "scalar": np.array(7, np.int64)}
    tuned = {"a.weight": one * 2, "steps": np.array([9], np.int64), "scalar": np.array(8, np.int64)}
    paths = make_pair(base, tuned)
    lora_compress.extract(*paths, tmp_path / "out", rank=1)
    lora_compress.merge(paths[0], [tmp_path / "out"], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged["steps"] == 9
    assert merged["scalar"] == 8


def test_mixed_dtypes_are_subtracted_and_merged_into_the_base_dtype(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    base = {"a.weight": rng.standard_normal((8, 8)).astype(BF16), "norm": np.ones(8, BF16)}
    tuned = {"a.weight": base["a.weight"].astype(np.float32) * 1.1, "norm": np.full(8, 1.01, np.float64)}
    paths = make_pair(base, tuned)
    lora_compress.extract(*paths, tmp_path / "out", rank=8, dtype="F32")
    lora_compress.merge(paths[0], [tmp_path / "out"], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged["a.weight"].dtype == merged["norm"].dtype == BF16
    assert (merged["norm"] == np.full(8, 1.01).astype(BF16)).all()
    assert np.allclose(merged["a.weight"].astype(np.float32), tuned["a.weight"], rtol=2.0**-8)


def test_the_advice_to_exclude_holds(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    one = np.ones((4, 4), np.float32)
    nan = np.full((4, 4), np.nan, np.float32)
    for bad in (np.ones((4, 3), np.float32), np.ones((5, 7), np.float32), np.array(1.0, np.float32), nan):
        paths = make_pair({"a.weight": one, "z": one}, {"a.weight": one * 2, "z": bad})
        with pytest.raises(lora_compress.LoraCompressError, match="exclude"):
            lora_compress.extract(*paths, tmp_path / "out", rank=1, force=True)
        result = lora_compress.extract(*paths, tmp_path / "out", rank=1, exclude="^z$", force=True)
        assert result.tensors[1].error_energy is None


def test_new_rows_must_be_finite(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    one = np.ones((4, 4), np.float32)
    grown = np.concatenate([one * 2, np.full((1, 4), np.inf, np.float32)])
    with pytest.raises(TensorError, match="holds inf at flat index 16"):
        lora_compress.extract(*make_pair({"a.weight": one}, {"a.weight": grown}), tmp_path / "out", rank=1)
