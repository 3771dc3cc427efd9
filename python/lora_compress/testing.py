"""The conformance kit: one function that checks any decomposition, for the tests of plugins.

    from lora_compress.testing import check_decomposition
    from my_plugin import DECOMPOSITION

    def test_it_conforms():
        check_decomposition(DECOMPOSITION)

Needs Hypothesis (`pip install hypothesis`). Everything is compared with float64 references; the bounds are those of
the roundings that can happen (Higham 2002, §3.1), not tolerances.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_compress import plugins
from lora_compress._native import Checkpoint, Delta, Writer, round_to
from lora_compress.adapter import AdapterPlan, GroupFactors
from lora_compress.decompositions.interface import Decomposition, Layer
from lora_compress.formats.factors.read import FACTORS
from lora_compress.formats.factors.write import GroupWriter
from lora_compress.model import Model
from lora_compress.verbs.merge import merge

if TYPE_CHECKING:
    from numpy.typing import NDArray


@contextmanager
def loaded(*modules: ModuleType) -> Iterator[None]:
    """While it lasts, the host has its own plugins and these: what a test extracts with is what it names."""
    host = plugins.Plugins(installed=False, extra=tuple((module.__name__, module) for module in modules))
    with mock.patch.object(plugins, "load", return_value=host):
        yield


SHAPES = ((12, 8), (8, 12), (16, 16), (9, 7), (1, 6), (6, 1), (1, 1))
# Unit roundoff and smallest positive number.
DTYPES = {"F32": (2.0**-24, 2.0**-149), "F16": (2.0**-11, 2.0**-24), "BF16": (2.0**-8, 2.0**-133)}
UNIT = DTYPES["F32"][0]
MODEL = "model.layers.{}.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Case:
    """Layers of one shape, and the factors that a decomposition finds for them at a rank."""

    deltas: list[Delta]
    values: list[NDArray[np.float32]]
    rank: int
    layers: list[list[NDArray[np.float32]]]


def check_decomposition(
    decomposition: Decomposition,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    examples: int = 20,
    monotone: float = 1e-3,
    tolerance: float = 1e-4,
) -> None:
    """Raise `AssertionError` where `decomposition` is not what the host takes it for.

    Checked on deltas of every shape of `shapes`, of full rank, of low rank, zero and badly scaled: factor shapes and
    parameter count, ΔW against einsum, forward and its gradients, exact lowering, merging in F32, F16 and BF16 against
    float64, saving and loading to the same bytes, the same factors for the same seed, and errors that never exceed ‖Δ‖
    and do not rise with the rank by more than a `monotone` part of ‖Δ‖ (an iterative fit that ends in local optima may
    need more).

    examples: how many cases Hypothesis tries.
    tolerance: as `extract`'s.
    """
    check_groups(decomposition)

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        # One fault at a time, raised as it is: several would come as an ExceptionGroup.
        report_multiple_bugs=False,
    )
    @given(deltas(decomposition, shapes), st.integers(0, 2**32 - 1) | st.integers(2**32, 2**64 - 1), st.data())
    def run(found: list[NDArray[np.float32]], seed: int, data: st.DataObject) -> None:
        handles = [Delta.from_array(values, MODEL.format(number)) for number, values in enumerate(found)]
        every = list(decomposition.ranks([values.shape for values in found]))
        rungs = sorted({*every[:3], *every[-1:]})
        assert rungs, f"there is no rank for matrices of shape {found[0].shape}"
        errors = []
        whole = math.fsum(delta.energy for delta in handles)
        for rank in rungs:
            layers = decomposition.factors_of(handles, rank, seed=seed, tolerance=tolerance)
            again = decomposition.factors_of(handles, rank, seed=seed, tolerance=tolerance)
            assert _bytes(layers) == _bytes(again), "the same delta, rank and seed give other factors"
            errors.append(check_fit(decomposition, Case(handles, found, rank, layers)))
        for before, after in pairwise(errors):
            assert after <= before + monotone * math.sqrt(whole), f"errors rise with the rank: {errors}"
        rank = data.draw(st.sampled_from(rungs))
        layers = decomposition.factors_of(handles, rank, seed=seed, tolerance=tolerance)
        case = Case(handles, found, rank, layers)
        check_contraction(decomposition, case, seed)
        check_lowering(decomposition, case)
        check_start(decomposition, case, seed)
        for dtype in DTYPES:
            check_merge(decomposition, case, dtype, seed)

    run()


@st.composite
def deltas(
    draw: st.DrawFn, decomposition: Decomposition, shapes: Sequence[tuple[int, int]] = SHAPES
) -> list[NDArray[np.float32]]:
    """Values of layers of one shape, as many as the decomposition takes together."""
    rows, cols = draw(st.sampled_from(list(shapes)))
    layers = draw(st.integers(1, 3)) if decomposition.network.is_grouped else 1
    kind = draw(st.sampled_from(["full", "low rank", "alike", "zero", "one element"]))
    scale = draw(st.sampled_from([1.0, 1e-6, 1e3]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    common = np.outer(rng.standard_normal(rows), rng.standard_normal(cols))
    found = []
    for _ in range(layers):
        values = {
            "full": rng.standard_normal((rows, cols)),
            "low rank": np.outer(rng.standard_normal(rows), rng.standard_normal(cols)),
            "alike": common + 0.1 * rng.standard_normal((rows, cols)),
            "zero": np.zeros((rows, cols)),
            "one element": np.eye(1, rows * cols, rows * cols // 2).reshape(rows, cols),
        }[kind]
        found.append((scale * values).astype(np.float32))
    return found


def check_groups(decomposition: Decomposition) -> None:
    """Every layer of a small Llama is in one group, and shared factors have one shape in each."""
    sizes = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16), "down_proj": (16, 48)}
    layers = [
        Layer(f"model.layers.{number}.block.{name}.weight", *shape)
        for number in range(3)
        for name, shape in sizes.items()
    ]
    groups = decomposition.groups(layers)
    assert sorted(layer for group in groups for layer in group) == sorted(layers), "a layer is left out"
    for group in groups:
        shapes = [(layer.rows, layer.cols) for layer in group]
        counts = [decomposition.parameters(shapes, rank) for rank in decomposition.ranks(shapes)]
        assert counts == sorted(counts), f"parameters fall while ranks rise, for {group}"
        assert all(count > 0 for count in counts), f"a rank without parameters, for {group}"


def check_fit(decomposition: Decomposition, case: Case) -> float:
    """Factors have the promised number of parameters at most, and miss no more than all of Δ; returns the error."""
    sizes = [delta.shape for delta in case.deltas]
    distinct = {id(factor): factor.size for layer in case.layers for factor in layer}
    assert sum(distinct.values()) <= decomposition.parameters(sizes, case.rank), "more parameters than promised"
    error = 0.0
    for values, factors in zip(case.values, case.layers, strict=True):
        assert all(factor.dtype == np.float32 for factor in factors), "factors are float32"
        assert all(np.isfinite(factor).all() for factor in factors), "factors are finite"
        error += float(np.square(values - reference(decomposition, factors)).sum())
    whole = math.fsum(delta.energy for delta in case.deltas)
    assert error <= whole * (1 + 1e-4), "the factors are farther from Δ than nothing is"
    return math.sqrt(error)


def check_contraction(decomposition: Decomposition, case: Case, seed: int) -> None:
    """ΔW is the einsum, forward is x·ΔWᵀ, and the gradients are those of it."""
    rng = np.random.default_rng(seed)
    for factors in case.layers:
        exact = reference(decomposition, factors)
        largest = reference(decomposition, [np.abs(factor) for factor in factors])
        count = _roundings(decomposition, factors)
        _close(decomposition.dense(factors), exact, _gamma(count) * largest, "ΔW is not the contraction")
        x = rng.standard_normal((2, 3, exact.shape[1])).astype(np.float32)
        dy = rng.standard_normal((2, 3, exact.shape[0])).astype(np.float32)
        wide, out = x.astype(np.float64), dy.astype(np.float64)
        slack = _gamma(count + exact.shape[1] + 1) * (np.abs(wide) @ largest.T)
        _close(decomposition.forward(x, factors), wide @ exact.T, slack, "forward is not x·ΔWᵀ")
        dx, gradients = decomposition.adjoint(x, dy, factors)
        slack = _gamma(count + exact.shape[0] + 1) * (np.abs(out) @ largest)
        _close(dx, out @ exact, slack, "the gradient of x is not dy·ΔW")
        outer = np.einsum("abo,abi->oi", out, wide)
        for number, (factor, gradient) in enumerate(zip(factors, gradients, strict=True)):
            assert gradient.shape == factor.shape, f"the gradient of factor {number + 1} has another shape"
            # A network is linear in each factor: the slope in any direction is the network with the direction in its
            # place.
            step = rng.standard_normal(factor.shape).astype(np.float32)
            changed = [*factors[:number], step, *factors[number + 1 :]]
            slope = float(np.sum(outer * reference(decomposition, changed)))
            bound = reference(decomposition, [np.abs(each) for each in changed])
            total = float(np.sum(np.einsum("abo,abi->oi", np.abs(out), np.abs(wide)) * bound))
            found = float(np.sum(gradient.astype(np.float64) * step))
            _close(found, slope, _gamma(count + sum(exact.shape) + 8) * total, f"gradient of factor {number + 1}")


def check_lowering(decomposition: Decomposition, case: Case) -> None:
    """B·A is ΔW, and its rank is the one that was promised at most."""
    for factors, delta in zip(case.layers, case.deltas, strict=True):
        b, a = decomposition.lower(factors)
        most = max(decomposition.lowered_rank(*delta.shape, case.rank), 1)
        assert b.shape[1] == a.shape[0] <= most, "the pair has a higher rank than promised"
        largest = reference(decomposition, [np.abs(factor) for factor in factors])
        slack = _gamma(_roundings(decomposition, factors) + b.shape[1] + 4) * largest
        product = b.astype(np.float64) @ a.astype(np.float64)
        _close(product, reference(decomposition, factors), slack, "lowering is not exact")


def check_start(decomposition: Decomposition, case: Case, seed: int) -> None:
    """Factors to train from have the shapes of the rank, a ΔW of zero, and gradients that are not all zero."""
    for delta in case.deltas:
        factors, again = (decomposition.initial(*delta.shape, case.rank, seed=seed) for _ in range(2))
        shapes = decomposition.shapes(*delta.shape, case.rank)
        assert [factor.shape for factor in factors] == shapes, f"factors to train from have other shapes than {shapes}"
        assert all(factor.dtype == np.float32 for factor in factors), "factors to train from are float32"
        assert _bytes([factors]) == _bytes([again]), "the same seed gives other factors to train from"
        assert not decomposition.dense(factors).any(), "training does not start from the base"
        rng = np.random.default_rng(seed)
        x, dy = (rng.standard_normal((1, size)).astype(np.float32) for size in delta.shape[::-1])
        _, gradients = decomposition.adjoint(x, dy, factors)
        assert any(gradient.any() for gradient in gradients), "training never starts: all gradients are zero"


def check_merge(decomposition: Decomposition, case: Case, dtype: str, seed: int) -> None:
    """Stored, loaded and merged: half a unit in the last place of W + ΔW in float64; saved again: the same bytes."""
    rng = np.random.default_rng(seed)
    unit, smallest = DTYPES[dtype]
    stored = [[round_to(factor, dtype) for factor in layer] for layer in case.layers]
    if not all(np.isfinite(factor).all() for layer in stored for factor in layer):
        return
    names = [delta.name for delta in case.deltas]
    base = [round_to(rng.standard_normal(delta.shape).astype(np.float32), dtype) for delta in case.deltas]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "base").mkdir()
        expected = [(name, dtype, values.shape) for name, values in zip(names, base, strict=True)]
        writer = Writer(root / "base" / "model.safetensors", expected)
        for name, values in zip(names, base, strict=True):
            writer.append(name, dtype, values)
        writer.finish()
        model = Model.open(root / "base")
        _save(root / "adapter", model, decomposition, names, stored, dtype)
        file = Checkpoint(root / "adapter" / FACTORS)
        loaded: list[list[Any]] = [[] for _ in names]
        for layer, name in zip(loaded, names, strict=True):
            for number, own in enumerate(decomposition.network.own):
                layer.append(file.read(f"{number}:{name}" if own else f"{number}:group 0"))
        _save(root / "again", model, decomposition, names, loaded, dtype)
        first, second = (_files(root / name) for name in ("adapter", "again"))
        assert first == second, "saving what was loaded gives other bytes"
        merge(root / "base", [root / "adapter"], root / "merged")
        merged = Checkpoint(root / "merged" / "model.safetensors")
        for name, values, factors in zip(names, base, stored, strict=True):
            exact = values.astype(np.float64) + reference(decomposition, factors)
            largest = np.abs(values) + reference(decomposition, [np.abs(factor) for factor in factors])
            slack = _gamma(_roundings(decomposition, factors) + 4) * largest
            # The sum in f32 may lie across a power of two, where the spacing doubles.
            ulp = unit * 2.0 ** np.floor(np.log2(np.maximum(np.abs(exact) + slack, smallest / unit)))
            _close(merged.read(name), exact, ulp + slack, f"merged {dtype} weights are not W + ΔW, rounded once")


def reference(decomposition: Decomposition, factors: Sequence[Any]) -> NDArray[np.float64]:
    """ΔW by NumPy's einsum in float64, from the definition."""
    network = decomposition.network
    letters = {index: chr(ord("a") + number) for number, index in enumerate(network.indices)}
    terms = ",".join("".join(letters[index] for index in term) for term in network.terms)
    output = "".join(letters[index] for index in (*network.rows, *network.cols))
    wide = [np.asarray(factor, np.float64) for factor in factors]
    product = np.einsum(f"{terms}->{output}", *wide, optimize=True)
    rows = math.prod(product.shape[: len(network.rows)])
    return np.asarray(product).reshape(rows, -1)


def _save(
    folder: Path, model: Model, decomposition: Decomposition, names: Sequence[str], layers: Sequence[Any], dtype: str
) -> None:
    folder.mkdir()
    network = decomposition.network
    group = GroupFactors(decomposition.name, decomposition.contraction, tuple(names), layers, network.own)
    writer = GroupWriter(folder, AdapterPlan(model, "base", dtype, groups=[group]))
    writer.write_group(group)
    writer.finish({})


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _bytes(layers: Sequence[Sequence[NDArray[Any]]]) -> list[bytes]:
    return [np.ascontiguousarray(factor).tobytes() for layer in layers for factor in layer]


def _roundings(decomposition: Decomposition, factors: Sequence[Any]) -> int:
    """How often a term of ΔW is rounded at most: once for each product of factors and each sum over bonds."""
    sizes = decomposition.network.sizes(factors)
    return len(factors) + math.prod(sizes[index] for index in decomposition.network.bonds)


def _gamma(count: int) -> float:
    return count * UNIT / (1 - count * UNIT)


def _close(found: Any, exact: Any, slack: Any, what: str) -> None:
    # Below the smallest normal number of f32, roundings are absolute.
    worst = float(np.max(np.abs(np.asarray(found, np.float64) - exact) - slack, initial=-math.inf))
    assert worst <= 1e-36, f"{what}: {worst:.3g} beyond what rounding explains"
