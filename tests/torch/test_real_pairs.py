"""The whole way on real fine-tunes: extract, verify, merge, against the optimum that torch's SVD gives."""

from __future__ import annotations

from pathlib import Path

import lora_compress
import numpy as np
import pytest
import torch
from lora_compress.verbs.extract import ExtractResult
from safetensors.numpy import load_file

from tests.checkpoints import load
from tests.torch.real_weights import anarcii, fine_tuned_minilm, minilm

RANK = 16


@pytest.fixture(scope="module")
def minilm_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("minilm")
    base = minilm(folder / "base")
    tuned, first, last = fine_tuned_minilm(base, folder / "tuned")
    assert last < 0.8 * first, "the fine-tune has learnt nothing"
    return base, tuned


def check_pair(base: Path, tuned: Path, tmp_path: Path, *, skip_missing: bool = False) -> ExtractResult:
    """Extract at rank 16 in F32, verify, merge; the error of each matrix is the optimum's within the tolerance."""
    result = lora_compress.extract(base, tuned, tmp_path / "adapter", rank=RANK, dtype="F32", skip_missing=skip_missing)
    check = lora_compress.verify(base, tuned, tmp_path / "adapter")
    assert check.ok, check.problems
    assert check.error == pytest.approx(result.error, rel=1e-6)
    before, after = load(base), load(tuned)
    for account in result.tensors:
        if account.treatment != "low-rank" or account.error_energy is None:
            continue
        rows = account.shape[0]
        delta = after[account.name][:rows].astype(np.float64) - before[account.name].astype(np.float64)
        sigma = torch.linalg.svdvals(torch.from_numpy(delta)).numpy()
        optimum, norm = np.linalg.norm(sigma[RANK:]), np.linalg.norm(sigma)
        # The tolerance, and the f32 rounding of factors and delta.
        slack = 8 * 2.0**-24 * max(delta.shape) ** 0.5 * norm
        assert account.error_energy**0.5 <= optimum * (1 + 1e-4) + slack, account.name
        assert account.error_energy**0.5 >= optimum - slack, account.name
    lora_compress.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    for tensor in check.tensors:
        common = slice(before[tensor.name].shape[0] if before[tensor.name].shape else None)
        difference = merged[tensor.name][common].astype(np.float64) - after[tensor.name][common].astype(np.float64)
        assert np.square(difference).sum() == pytest.approx(tensor.merged_error_energy, rel=1e-6, abs=1e-20)
    return result


def test_antibody_to_shark(tmp_path: Path) -> None:
    base, tuned = anarcii("antibody", tmp_path / "base"), anarcii("shark", tmp_path / "tuned")
    result = check_pair(base, tuned, tmp_path)
    treatments = [account.treatment.value for account in result.tensors]
    assert treatments.count("low-rank") >= 25
    median = np.median([account.relative_delta for account in result.tensors if account.treatment == "low-rank"])
    assert 0.001 < median < 0.03


def test_antibody_to_tcr_with_one_more_token(tmp_path: Path) -> None:
    base, tuned = anarcii("antibody", tmp_path / "base"), anarcii("tcr", tmp_path / "tuned")
    result = check_pair(base, tuned, tmp_path)
    grown = {account.name: account.new_rows for account in result.tensors if account.new_rows}
    assert grown == {"decoder.fc_out.bias": 1, "decoder.fc_out.weight": 1, "decoder.tok_embedding.weight": 1}
    merged, after = load(tmp_path / "merged"), load(tuned)
    for name in grown:
        assert merged[name].shape == after[name].shape == (137, *after[name].shape[1:])
        assert (merged[name][136:] == after[name][136:]).all()


def test_minilm(minilm_pair: tuple[Path, Path], tmp_path: Path) -> None:
    # The base's file has an integer buffer, `position_ids`, that transformers no longer saves.
    result = check_pair(*minilm_pair, tmp_path, skip_missing=True)
    words = next(account for account in result.tensors if "word_embeddings" in account.name)
    assert words.shape == (30522, 384)
    assert words.rank == RANK


def test_minilm_loads_in_peft(minilm_pair: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
    from transformers import AutoModel, AutoTokenizer

    base, tuned = minilm_pair
    lora_compress.extract(base, tuned, tmp_path / "adapter", rank=RANK, dtype="F32", skip_missing=True)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path / "adapter")).eval()
    outcome = set_peft_model_state_dict(model, load_peft_weights(str(tmp_path / "adapter")))
    assert outcome.unexpected_keys == []
    assert not [key for key in outcome.missing_keys if "lora" in key]
    # PEFT applies no norms and biases: compare with a merge that has none either.
    side = tmp_path / "adapter" / "lora_compress" / "exact.safetensors"
    assert all("LayerNorm" in name or name.endswith("bias") for name in load_file(side))
    side.unlink()
    lora_compress.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged").eval()
    inputs = AutoTokenizer.from_pretrained(base)("Nothing is dropped silently.", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = merged(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        original = AutoModel.from_pretrained(base).eval()(**inputs).last_hidden_state
    moved = (ours - original).abs().max()
    assert (ours - theirs).abs().max() < 1e-3 * moved, (
        "differences are f32 rounding, a thousandth of the adapter's effect"
    )
