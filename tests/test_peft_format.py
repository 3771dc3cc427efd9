"""The PEFT format without PEFT: names, targets, tied heads, and everything that has to be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from lora_compress.errors import AdapterError
from lora_compress.formats.peft.write import short_targets
from lora_compress.model import Model, is_embedding
from safetensors.numpy import load_file, save_file

from tests.checkpoints import Tensors, load, save, tiny_llama, tuned_from

PREFIX = "base_model.model."


def write_adapter(path: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    return path


def factors(rng: np.random.Generator, module: str, rows: int, cols: int, rank: int = 2) -> Tensors:
    return {
        f"{module}.lora_A.weight": rng.standard_normal((rank, cols)).astype(np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((rows, rank)).astype(np.float32),
    }


@pytest.fixture
def base(tmp_path: Path, rng: np.random.Generator) -> Path:
    tensors = {
        "enc.layer.1.q.weight": rng.standard_normal((6, 5)).astype(np.float32),
        "enc.layer.11.q.weight": rng.standard_normal((6, 5)).astype(np.float32),
        "enc.square.weight": rng.standard_normal((5, 5)).astype(np.float32),
        "enc.words.embedding.weight": rng.standard_normal((9, 5)).astype(np.float32),
        "enc.in_proj": rng.standard_normal((6, 5)).astype(np.float32),
        "head.weight": rng.standard_normal((4, 5)).astype(np.float32),
        "head.bias": np.zeros(4, np.float32),
    }
    return save(tmp_path / "base", tensors, {})


def merged(base: Path, adapter: Path, tmp_path: Path) -> Tensors:
    lora_compress.merge(base, [adapter], tmp_path / "merged", force=True)
    return load(tmp_path / "merged")


def assert_close(got: Any, expected: Any) -> None:
    # f32 products of rank ≤ 4 and one rounding; entries are below 32.
    np.testing.assert_allclose(got, expected, rtol=0, atol=32 * 8 * 2.0**-24)


def test_scale_is_alpha_over_r_with_patterns_that_are_regexes(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = factors(rng, "enc.layer.1.q", 6, 5, 3) | factors(rng, "enc.layer.11.q", 6, 5)
    # `layer.1` also matches nothing of layer 11 at the end of a path; the first match in the file's order wins.
    pattern: dict[str, Any] = {"rank_pattern": {r"layer\.1\.q": 3}, "alpha_pattern": {r".*\.1\.q": 12, "q": 8}}
    adapter = write_adapter(tmp_path / "a", tensors, **pattern)
    before, after = load(base), merged(base, adapter, tmp_path)
    for module, scale in (("enc.layer.1.q", 12 / 3), ("enc.layer.11.q", 8 / 2)):
        delta = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + scale * delta)


def test_rslora_scales_by_the_root_of_the_rank(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = factors(rng, "head", 4, 5, 4)
    adapter = write_adapter(tmp_path / "a", tensors, r=4, lora_alpha=6, use_rslora=True)
    delta = tensors["head.lora_B.weight"] @ tensors["head.lora_A.weight"]
    assert_close(merged(base, adapter, tmp_path)["head.weight"], load(base)["head.weight"] + 3 * delta)


def test_fan_in_fan_out_and_embeddings_are_transposed(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = factors(rng, "enc.layer.1.q", 5, 6) | factors(rng, "enc.square", 5, 5)
    tensors["enc.words.embedding.lora_embedding_A"] = rng.standard_normal((2, 9)).astype(np.float32)
    tensors["enc.words.embedding.lora_embedding_B"] = rng.standard_normal((5, 2)).astype(np.float32)
    adapter = write_adapter(tmp_path / "a", tensors, fan_in_fan_out=True)
    before, after = load(base), merged(base, adapter, tmp_path)
    for module in ("enc.layer.1.q", "enc.square"):
        delta = 2 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + delta.T)
    embedding = "enc.words.embedding"
    delta = 2 * tensors[f"{embedding}.lora_embedding_B"] @ tensors[f"{embedding}.lora_embedding_A"]
    assert_close(after[f"{embedding}.weight"], before[f"{embedding}.weight"] + delta.T)


def test_whole_weights_replace_the_base_and_copies_of_it_do_nothing(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    before = load(base)
    head = rng.standard_normal((4, 5)).astype(np.float32)
    tensors = factors(rng, "enc.square", 5, 5) | {
        "head.weight": head,
        "head.bias": np.full(4, 2, np.float32),
        "enc.words.embedding.base_layer.weight": before["enc.words.embedding.weight"],
    }
    after = merged(base, write_adapter(tmp_path / "a", tensors, modules_to_save=["head"]), tmp_path)
    assert (after["head.weight"] == head).all()
    assert (after["head.bias"] == 2).all()
    assert (after["enc.words.embedding.weight"] == before["enc.words.embedding.weight"]).all()


def test_target_parameters_name_the_parameter(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = factors(rng, "enc", 6, 5)
    adapter = write_adapter(tmp_path / "a", tensors, target_parameters=["enc.in_proj"])
    delta = 2 * tensors["enc.lora_B.weight"] @ tensors["enc.lora_A.weight"]
    assert_close(merged(base, adapter, tmp_path)["enc.in_proj"], load(base)["enc.in_proj"] + delta)


def test_parameters_are_written_as_peft_names_them(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tuned = tuned_from(load(base), rng, size=0.1)
    save(tmp_path / "tuned", tuned, {})
    lora_compress.extract(base, tmp_path / "tuned", tmp_path / "out", rank=9, dtype="F32")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["enc.in_proj"]
    assert "base_model.model.enc.lora_A.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert lora_compress.verify(base, tmp_path / "tuned", tmp_path / "out").error < 1e-6


def test_a_module_with_two_such_parameters_is_stored_whole(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {f"rnn.weight_{kind}": rng.standard_normal((8, 4)).astype(np.float32) for kind in ("hh", "ih")}
    save(tmp_path / "base", tensors, {})
    save(tmp_path / "tuned", tuned_from(tensors, rng), {})
    result = lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2)
    assert {account.treatment.value for account in result.tensors} == {"exact"}
    assert len(result.warnings) == 2
    assert lora_compress.verify(tmp_path / "base", tmp_path / "tuned", tmp_path / "out").merged_error == 0


def test_what_cannot_be_merged_is_refused(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    head = factors(rng, "head", 4, 5)
    nan = {**head, "head.lora_A.weight": np.full((2, 5), np.nan, np.float32)}
    cases: list[tuple[Tensors, dict[str, Any], str]] = [
        (head, {"peft_type": "LOHA"}, "only LORA"),
        (head, {"use_dora": True}, "DoRA"),
        (head, {"lora_bias": True}, "biases"),
        (head, {"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        (head, {"r": 3}, "gives `head` the rank 3"),
        (head, {"r": 0}, "r is 0"),
        (head, {"lora_alpha": "8"}, "lora_alpha is '8'"),
        (head, {"rank_pattern": {"(": 2}}, "is not a regular expression"),
        (head, {"rank_pattern": ["head"]}, "rank_pattern does not map"),
        ({"head.lora_A.weight": head["head.lora_A.weight"]}, {}, "but not the other factor"),
        (factors(rng, "ghost", 4, 5), {}, "no `ghost.weight`"),
        ({**head, "ghost.bias": np.zeros(1, np.float32)}, {}, "replaces `ghost.bias`"),
        ({**head, "head.lora_magnitude_vector": np.zeros(4, np.float32)}, {}, "cannot be merged yet"),
        (factors(rng, "head", 5, 4), {}, r"has shape \[4, 5\], which does not fit"),
        (nan, {}, r"`base_model.model.head.lora_A.weight` in `.*` holds NaN"),
    ]
    for tensors, config, message in cases:
        adapter = write_adapter(tmp_path / "a", tensors, **config)
        with pytest.raises(lora_compress.LoraCompressError, match=message):
            lora_compress.merge(base, [adapter], tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_files_that_are_no_adapter_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterError, match="not an adapter of any known format"):
        lora_compress.merge(base, [tmp_path / "a"], tmp_path / "merged")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match=r"has no `adapter_model\.safetensors`"):
        lora_compress.merge(base, [tmp_path / "a"], tmp_path / "merged")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"\x80\x02}.")
    with pytest.raises(lora_compress.CheckpointError, match=r"adapter_model\.bin.*bare pickle"):
        lora_compress.merge(base, [tmp_path / "a"], tmp_path / "merged")
    (tmp_path / "a" / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(lora_compress.CheckpointError, match="not valid JSON"):
        lora_compress.merge(base, [tmp_path / "a"], tmp_path / "merged")


def tied_pair(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    tensors, config = tiny_llama(rng, tied=True)
    save(tmp_path / "base", tensors, config)
    save(tmp_path / "tuned", tuned_from(tensors, rng), config)
    return tmp_path / "base", tmp_path / "tuned"


def test_a_tied_embedding_is_written_for_the_head_too_and_merged_once(tmp_path: Path, rng: np.random.Generator) -> None:
    base, tuned = tied_pair(tmp_path, rng)
    assert Model.open(base).tied_embedding() == "model.embed_tokens.weight"
    lora_compress.extract(base, tuned, tmp_path / "out", rank=24, dtype="F32")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    embedding, head = PREFIX + "model.embed_tokens.lora_embedding_", PREFIX + "lm_head.lora_"
    assert (stored[head + "A.weight"] == stored[embedding + "B"].T).all()
    assert (stored[head + "B.weight"] == stored[embedding + "A"].T).all()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True
    assert {"embed_tokens", "lm_head"} <= set(config["target_modules"])
    check = lora_compress.verify(base, tuned, tmp_path / "out")
    assert check.ok
    assert check.error < 1e-5, "merged twice or not at all, the error would be 1"


def test_the_heads_copy_can_be_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    base, tuned = tied_pair(tmp_path, rng)
    lora_compress.extract(base, tuned, tmp_path / "out", rank=24, dtype="F32", tied_head=False)
    assert not any("lm_head" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert lora_compress.verify(base, tuned, tmp_path / "out").error < 1e-5


def test_a_head_trained_apart_from_its_embedding_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = tied_pair(tmp_path, rng)
    head = factors(rng, "lm_head", 40, 24)
    with pytest.raises(AdapterError, match=r"changes `lm_head` but not `model\.embed_tokens`"):
        lora_compress.merge(base, [write_adapter(tmp_path / "a", head)], tmp_path / "merged")
    head["model.embed_tokens.lora_embedding_A"] = rng.standard_normal((2, 40)).astype(np.float32)
    head["model.embed_tokens.lora_embedding_B"] = rng.standard_normal((24, 2)).astype(np.float32)
    with pytest.raises(AdapterError, match="differently"):
        lora_compress.merge(base, [write_adapter(tmp_path / "a", head)], tmp_path / "merged")


def test_a_head_that_one_side_stores_although_it_is_tied_is_no_loss(tmp_path: Path, rng: np.random.Generator) -> None:
    base, tuned = tied_pair(tmp_path, rng)
    tensors = load(tuned)
    save(tuned, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, {})
    result = lora_compress.extract(base, tuned, tmp_path / "out", rank=4)
    assert {account.name: account.treatment.value for account in result.tensors}["lm_head.weight"] == "tied"
    save(tuned, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, {})
    with pytest.raises(lora_compress.SelectionError, match=r"lacks `lm_head\.weight`"):
        lora_compress.extract(base, tuned, tmp_path / "out2", rank=4)


def test_targets_are_short_where_that_is_exact() -> None:
    tensors = ["m.0.q.weight", "m.0.v.weight", "m.1.q.weight", "m.1.v.weight", "vision.q.norm.weight"]
    assert short_targets(["m.0.v", "m.1.v"], tensors) == ["v"]
    assert short_targets(["m.0.q", "m.1.q", "m.0.v"], tensors[:4]) == ["m.0.v", "q"]
    assert short_targets(["m.0.q", "m.1.q"], [*tensors, "vision.q.weight"]) == ["m.0.q", "m.1.q"]
    # A container of that name is no module that PEFT can adapt.
    assert short_targets(["m.0.q", "m.1.q"], tensors) == ["m.0.q", "m.1.q"]
    assert short_targets(["m.0.out.0"], ["m.0.out.0.weight"]) == ["m.0.out.0"]


def test_embeddings_are_recognised_by_name() -> None:
    for module in (
        "model.embed_tokens",
        "bert.embeddings.word_embeddings",
        "wte",
        "transformer.wpe",
        "shared",
        "tok_embedding",
    ):
        assert is_embedding(module + ".weight"), module
    for module in (
        "embeddings.LayerNorm",
        "embed_out",
        "x_embedder",
        "model.embed_proj",
        "patch_embeddings.projection",
        "q_proj",
    ):
        assert not is_embedding(module + ".weight"), module
    assert not is_embedding("model.position_embedding")


def test_other_embeddings_can_be_named(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = {"lookup.weight": rng.standard_normal((9, 4)).astype(np.float32)}
    save(tmp_path / "base", tensors, {})
    save(tmp_path / "tuned", tuned_from(tensors, rng), {})
    lora_compress.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, embeddings=["^lookup"])
    assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == {
        PREFIX + "lookup.lora_embedding_A",
        PREFIX + "lookup.lora_embedding_B",
    }


def test_a_base_that_stores_another_head_is_refused_when_tuned_stores_none(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Its embedding once more is no other: tests/test_torch_files.py."""
    base, tuned = tied_pair(tmp_path, rng)
    tensors = load(base)
    save(base, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, {})
    # Merging could not change the stored head, and would leave the two apart.
    with pytest.raises(lora_compress.SelectionError, match=r"lacks `lm_head\.weight`"):
        lora_compress.extract(base, tuned, tmp_path / "out", rank=4)


def test_an_untied_or_foreign_head_gets_no_copy_of_the_embeddings_factors(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, config = tiny_llama(rng, tied=True)
    cases = [
        ({**config, "tie_word_embeddings": False}, tensors),
        (config, {**tensors, "language_model.lm_head.weight": tensors["model.embed_tokens.weight"]}),
    ]
    for number, (settings, stored) in enumerate(cases):
        folder = save(tmp_path / str(number), stored, settings)
        assert Model.open(folder).tied_embedding() is None


def test_doubled_factors_and_numbers_that_are_none_are_refused(
    base: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    head = factors(rng, "head", 4, 5)
    doubled = {**head, "head.lora_B.default.weight": head["head.lora_B.weight"]}
    with pytest.raises(AdapterError, match="are the same factor"):
        lora_compress.merge(base, write_adapter(tmp_path / "a", doubled), tmp_path / "merged")
    with pytest.raises(lora_compress.CheckpointError, match="NaN is no JSON number"):
        lora_compress.merge(base, write_adapter(tmp_path / "a", head, lora_alpha=float("nan")), tmp_path / "merged")
