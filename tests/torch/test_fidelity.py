"""What adapters of any decomposition are measured to have, and that torch sees the contractions NumPy sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import Decomposition
from lora_compress.torch.fidelity import Fidelity

from tests.test_networks import networks
from tests.torch.test_scale import BASE, CONTEXT, TUNED, calibration, log_p

__all__ = ["calibration"]


def test_factors_and_pairs_are_measured_alike_and_as_merged_models(calibration: Path, tmp_path: Path) -> None:
    fidelity = Fidelity(BASE, TUNED, calibration, context=CONTEXT, tokens=2048)
    base, tuned = fidelity(BASE), fidelity(TUNED)
    assert tuned["kl"] == pytest.approx(0, abs=1e-6)
    assert base["loss"] > tuned["loss"]
    found = {}
    for form in ("peft", "factors"):
        out = tmp_path / form
        lora_compress.extract(BASE, TUNED, out, rank=16, dtype="F32", format=form, decomposition="ab")
        found[form] = fidelity(out)
        lora_compress.merge(BASE, out, tmp_path / f"{form}-merged", dtype="F32")
    assert found["peft"] == pytest.approx(found["factors"], rel=1e-4)
    assert 0 < found["peft"]["kl"] < base["kl"]
    windows = fidelity._target.windows
    target, merged = log_p(TUNED, windows), log_p(tmp_path / "peft-merged", windows)
    kl = float((target.exp() * (target - merged)).sum(-1).mean())
    assert found["peft"]["kl"] == pytest.approx(kl, rel=1e-3)


def test_compare_measures_every_row(calibration: Path) -> None:
    fidelity = Fidelity(BASE, TUNED, calibration, context=CONTEXT, tokens=1024)
    result = lora_compress.compare(BASE, TUNED, sizes=[4, 16], measure=fidelity)
    kl = [row.measured["kl"] for row in result.rows]
    assert kl == sorted(kl, reverse=True)
    assert result.reference["tuned"]["kl"] == pytest.approx(0, abs=1e-6)


@given(networks(), st.integers(0, 2**32 - 1))
def test_torch_and_its_autograd_agree_with_the_contraction(case: tuple[Any, list[Any]], seed: int) -> None:
    network, factors = case
    # float64 in both, so that only the order of sums differs.
    wide = [factor.astype(np.float64) for factor in factors]
    tensors = [torch.from_numpy(factor).requires_grad_() for factor in wide]
    dense = network.dense(wide)
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((3, dense.shape[1])), rng.standard_normal((3, dense.shape[0]))
    given_x = torch.from_numpy(x).requires_grad_()
    y = network.forward(given_x, tensors)
    y.backward(torch.from_numpy(dy))
    assert np.allclose(y.detach().numpy(), x @ dense.T, rtol=1e-10, atol=1e-10)
    dx, gradients = network.adjoint(x, dy, wide)
    assert given_x.grad is not None
    assert np.allclose(given_x.grad.numpy(), dx, rtol=1e-10, atol=1e-10)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert tensor.grad is not None
        assert np.allclose(tensor.grad.numpy(), gradient, rtol=1e-10, atol=1e-10)


def test_training_starts_from_the_base() -> None:
    decomposition = Decomposition("three", "out p, p q, q in")
    factors = [torch.from_numpy(f).requires_grad_() for f in decomposition.initial(6, 5, 2, seed=0)]
    y = decomposition.forward(torch.ones(4, 5), factors)
    assert not y.any()
    y.sum().backward()
    assert any(factor.grad is not None and bool(factor.grad.any()) for factor in factors)
