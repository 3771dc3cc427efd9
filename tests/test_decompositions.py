"""Layers that share factors, the format that stores any factors, and the choice of the best decomposition."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import lora_compress
import numpy as np
import pytest
from lora_compress import AdapterError, Decomposition, Delta, Layer, PluginError, SelectionError
from lora_compress.decompositions.network import ContractionError, Network
from lora_compress.testing import check_decomposition, loaded
from lora_compress.verbs.best import Candidate, chosen
from lora_compress.verbs.tasks import Task
from safetensors.numpy import load_file, save_file

from tests.checkpoints import BF16, Tensors, load, save
from tests.conftest import Pair

SHARED = Decomposition("shared", "layer out r, r in", group=lora_compress.same_input)
TUCKER = Decomposition(
    "tucker",
    "out p, layer p q, q in",
    axes=lambda rows, cols, rank: {"p": min(rank, rows), "q": min(rank, cols)},
    group=lora_compress.across_depth,
)
# Its pair is as large as the matrix.
INTERLEAVED = Decomposition(
    "interleaved",
    "o1 i1 a, a o2 i2 -> (o1 o2) (i1 i2)",
    axes=lambda rows, cols, rank: {"o1": 2, "o2": rows // 2, "i1": 2, "i2": cols // 2, "a": rank},
    ladder=lambda rows, cols: range(1, 5),
)
OURS = (SHARED, TUCKER, INTERLEAVED)


def module(*decompositions: Decomposition) -> ModuleType:
    """A plugin with these."""
    made = ModuleType("ours")

    @lora_compress.hookimpl
    def register_decompositions(register: Callable[[Decomposition], None]) -> None:
        for decomposition in decompositions:
            register(decomposition)

    made.register_decompositions = register_decompositions  # type: ignore[attr-defined]
    return made


@pytest.fixture
def ours() -> Iterator[None]:
    with loaded(module(*OURS)):
        yield


@pytest.mark.parametrize("decomposition", [SHARED, TUCKER], ids=lambda item: item.name)
def test_decompositions_that_share_conform(decomposition: Decomposition) -> None:
    check_decomposition(decomposition, monotone=0.1)


@pytest.mark.parametrize(
    ("contraction", "position", "problem"),
    [
        ("out r layer, r in", 7, "in front"),
        ("layer layer r, r in", 7, "in front"),
        ("layer, out r, r in", 1, "no index but"),
        ("layer out r, layer r in", 1, "nothing is shared"),
        ("out r, r in -> layer in", 16, "no factor has the index"),
        (", ".join(["out in"] * 17), 129, "at most 16"),
        ("out in " + " ".join(f"a{number}" for number in range(40)), 118, "at most 32 indices"),
        ("out in " + " ".join(f"a{number}" for number in range(400)), 1001, "at most 1000 characters"),
    ],
)
def test_errors_of_layers_point_at_the_character(contraction: str, position: int, problem: str) -> None:
    with pytest.raises(ContractionError, match=problem) as caught:
        Network.parse(contraction)
    assert f"character {position}:" in str(caught.value)


def test_groups_belong_to_contractions_that_share() -> None:
    with pytest.raises(ValueError, match="`group` has to say"):
        Decomposition("x", "layer out r, r in")
    with pytest.raises(ValueError, match="none of `out r, r in` says `layer`"):
        Decomposition("x", "out r, r in", group=lora_compress.same_input)


def test_shared_factors_are_counted_once() -> None:
    assert SHARED.parameters([(10, 6), (4, 6)], 3) == 3 * (10 + 4 + 6)
    assert TUCKER.parameters([(10, 6)] * 5, 3) == 3 * (10 + 6) + 5 * 9
    with pytest.raises(ValueError, match="cannot share"):
        SHARED.parameters([(10, 6), (4, 7)], 3)


def test_names_of_layers_that_belong_together() -> None:
    def of(group: Callable[[Sequence[Layer]], list[list[str]]], *names: str, cols: int = 8) -> list[list[str]]:
        return group([Layer(f"{name}.weight", 8, cols) for name in names])

    block = "model.layers.0"
    attention = [f"{block}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    mlp = [f"{block}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    found = of(lora_compress.same_input, *attention, *mlp, "model.layers.1.self_attn.q_proj")
    assert found == [[f"{name}.weight" for name in attention[:3]], [f"{name}.weight" for name in mlp[:2]]]
    # The queries of cross-attention have another input than its keys and values.
    found = of(lora_compress.same_input, *(f"decoder.0.encoder_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")))
    assert found == [["decoder.0.encoder_attn.k_proj.weight", "decoder.0.encoder_attn.v_proj.weight"]]
    found = of(lora_compress.across_depth, *attention, *(name.replace("s.0", "s.1") for name in attention[:1]), "head")
    assert found == [[f"model.layers.{number}.self_attn.q_proj.weight" for number in (0, 1)]]


@pytest.mark.parametrize("format_", ["factors", "peft"])
@pytest.mark.parametrize("decomposition", ["ab", "shared", "tucker"])
def test_both_formats_say_the_same(decomposition: str, format_: str, pair: Pair, tmp_path: Path, ours: None) -> None:
    result = lora_compress.extract(
        *pair, tmp_path / "out", rank=3, decomposition=decomposition, format=format_, dtype="F32"
    )
    check = lora_compress.verify(*pair, tmp_path / "out")
    assert check.ok
    assert check.error == pytest.approx(result.error, rel=1e-4)
    other = "peft" if format_ == "factors" else "factors"
    lora_compress.extract(*pair, tmp_path / "other", rank=3, decomposition=decomposition, format=other, dtype="F32")
    for name in ("out", "other"):
        lora_compress.merge(pair[0], [tmp_path / name], tmp_path / f"merged-{name}")
    first, second = load(tmp_path / "merged-out"), load(tmp_path / "merged-other")
    tuned = load(pair[1])
    for name in first:
        # Sums in another order: at most one unit in the last place of bf16 where they fall on two sides of a tie.
        spacing = 2.0**-7 * np.abs(tuned[name].astype(np.float64)) + 1e-3
        assert (np.abs(first[name].astype(np.float64) - second[name].astype(np.float64)) <= spacing).all(), name


def test_what_does_not_lower_to_a_small_pair_is_refused_by_pairs(pair: Pair, tmp_path: Path, ours: None) -> None:
    with pytest.raises(SelectionError, match="--format factors"):
        lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition="interleaved")
    result = lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition="interleaved", format="factors")
    assert lora_compress.verify(*pair, tmp_path / "out").ok
    merged = lora_compress.merge(pair[0], [tmp_path / "out"], tmp_path / "merged")
    assert merged.changed == len([tensor for tensor in result.tensors if tensor.nbytes])
    assert lora_compress.inspect(tmp_path / "out").kind == "adapter"


def test_shared_factors_are_stored_once_and_the_same_bytes(pair: Pair, tmp_path: Path, ours: None) -> None:
    for name in ("one", "two"):
        lora_compress.extract(*pair, tmp_path / name, rank=3, decomposition="shared", format="factors")
    files = [load_file(tmp_path / name / "adapter_factors.safetensors") for name in ("one", "two")]
    assert (tmp_path / "one" / "adapter_factors.safetensors").read_bytes() == (
        tmp_path / "two" / "adapter_factors.safetensors"
    ).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_factors.json").read_text())
    together = [group for group in config["groups"] if len(group["tensors"]) > 1]
    assert [len(group["tensors"]) for group in together] == [2]
    number = config["groups"].index(together[0])
    assert [name for name in files[0] if name.startswith("1:") and "group" in name].count(f"1:group {number}") == 1
    assert f"1:{together[0]['tensors'][0]}" not in files[0]


def test_plans_give_every_decomposition_the_same_bytes(pair: Pair, tmp_path: Path, ours: None) -> None:
    plan = lora_compress.plan(*pair, rank=4, options=lora_compress.Options(format="factors"))
    for name in ("ab", "shared", "tucker", "interleaved"):
        result = lora_compress.extract(*pair, tmp_path / name, plan=plan, decomposition=name)
        assert result.format == "factors"
        assert sum(tensor.nbytes for tensor in result.tensors) <= plan.nbytes
        if name == "ab":
            assert sum(tensor.nbytes for tensor in result.tensors) == plan.nbytes


def test_scales_and_grown_vocabularies_take_the_format_of_factors(
    make_pair: Callable[..., Pair], rng: np.random.Generator, tmp_path: Path, ours: None
) -> None:
    base: Tensors = {
        "model.embed_tokens.weight": rng.standard_normal((20, 16)).astype(BF16),
        "model.layers.0.self_attn.q_proj.weight": rng.standard_normal((16, 16)).astype(BF16),
        "model.layers.0.self_attn.k_proj.weight": rng.standard_normal((8, 16)).astype(BF16),
    }
    tuned = {name: (values.astype(np.float32) + 0.1).astype(BF16) for name, values in base.items()}
    tuned["model.embed_tokens.weight"] = np.vstack([tuned["model.embed_tokens.weight"], np.ones((3, 16), BF16)])
    paths = make_pair(base, tuned, {"vocab_size": 20})
    for scale in (1.0, {"q_proj": 0.5}):
        out = tmp_path / str(len(str(scale)))
        lora_compress.extract(*paths, out, rank=2, decomposition="shared", format="factors", scale=scale)
        check = lora_compress.verify(*paths, out)
        assert check.ok
        by_name = {tensor.name: tensor.error for tensor in check.tensors}
        assert by_name["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.5 if scale != 1.0 else 0, abs=0.1)
        lora_compress.merge(paths[0], [out], out / "merged")
        assert load(out / "merged")["model.embed_tokens.weight"].shape == (23, 16)


def test_layouts_of_pairs_are_refused_for_factors(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="uniform"):
        lora_compress.extract(*pair, tmp_path / "out", rank=2, layout="uniform", format="factors")


def broken(adapter: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    config = json.loads((adapter / "adapter_factors.json").read_text())
    tensors = load_file(adapter / "adapter_factors.safetensors")
    change(config, tensors)
    (adapter / "adapter_factors.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_factors.safetensors")


def contraction(text: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda config, _: config["groups"][0].update(contraction=text)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, _: config.update(schema_version=2), "schema version 2"),
        (lambda config, _: config.update(schema_version=True), "schema version True"),
        (lambda config, _: config["groups"][0].update(tensors=["\ud800"]), "not valid JSON"),
        (lambda config, tensors: tensors.update({f"0:{Q}": np.zeros((24, 3), np.int64)}), "is I64, no float"),
        (lambda config, _: config.update(groups=None), "no list of groups"),
        (lambda config, _: config["groups"].insert(0, 3), "group 0 is no object"),
        (lambda config, _: config["groups"][0].update(tensors=[]), "no list of tensors"),
        (lambda config, _: config["groups"][0].update(tensors=[1]), "no list of tensors"),
        (contraction("out r, r"), "contraction of group 0"),
        (contraction(None), "contraction of group 0"),
        (contraction("out r, r s, s in"), "lacks the factor"),
        (contraction("r out, r in"), "is 40 and 3"),
        (lambda config, _: config["groups"].append(config["groups"][0]), "twice"),
        (lambda config, tensors: tensors.pop(f"0:{Q}"), "lacks the factor"),
        (lambda config, tensors: tensors.update(left=np.zeros(1, np.float32)), "`left`, which no group"),
        (lambda config, tensors: tensors.update({f"0:{Q}": np.zeros((24, 4), np.float32)}), "is 4 and 3|is 3 and 4"),
        (lambda config, tensors: tensors.update({f"0:{Q}": np.zeros((25, 3), np.float32)}), "shape \\[25, 24\\]"),
        (lambda config, tensors: tensors[f"0:{Q}"].fill(math.nan), "NaN"),
    ],
)
def test_broken_adapters_of_factors_are_refused(
    change: Callable[[dict[str, Any], dict[str, Any]], None], message: str, pair: Pair, tmp_path: Path
) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=3, format="factors", dtype="F32")
    broken(tmp_path / "out", change)
    with pytest.raises(lora_compress.LoraCompressError, match=message):
        lora_compress.merge(pair[0], [tmp_path / "out"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_products_far_larger_than_the_matrix_are_refused(
    make_pair: Callable[..., Pair], tmp_path: Path, rng: np.random.Generator
) -> None:
    values = {"w.weight": rng.standard_normal((8, 8)).astype(np.float32)}
    paths = make_pair(values, {"w.weight": values["w.weight"] + 1})
    lora_compress.extract(*paths, tmp_path / "out", rank=1, format="factors", dtype="F32")

    def bomb(config: dict[str, Any], tensors: dict[str, Any]) -> None:
        config["groups"][0]["contraction"] = "out a b, a c d, b c e, d e in"
        for number, shape in enumerate([(8, 90, 90), (90, 90, 90), (90, 90, 90), (90, 90, 8)]):
            tensors[f"{number}:w.weight"] = np.zeros(shape, np.float32)

    broken(tmp_path / "out", bomb)
    with pytest.raises(AdapterError, match="would need an array of"):
        lora_compress.merge(paths[0], [tmp_path / "out"], tmp_path / "merged")


def test_an_adapter_of_another_base_is_refused(pair: Pair, tmp_path: Path, rng: np.random.Generator) -> None:
    lora_compress.extract(*pair, tmp_path / "out", rank=3, format="factors")
    tensors = {name: values for name, values in load(pair[0]).items() if name != Q}
    save(tmp_path / "less", tensors, {})
    with pytest.raises(AdapterError, match="does not have"):
        lora_compress.merge(tmp_path / "less", [tmp_path / "out"], tmp_path / "merged")


def test_best_takes_groups_that_gain(tmp_path: Path, make_pair: Callable[..., Pair], rng: np.random.Generator) -> None:
    """Queries and keys move in the same directions, the rest each in its own."""
    common = rng.standard_normal((4, 64))
    prefix = "model.layers.0.self_attn."
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    base = {f"{prefix}{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tuned = {
        name: (rng.standard_normal((values.shape[0], 4)) @ common).astype(np.float32)
        if "o_proj" not in name
        else rng.standard_normal(values.shape).astype(np.float32)
        for name, values in base.items()
    }
    paths = make_pair(base, tuned)
    with loaded(module(SHARED)):
        result = lora_compress.extract(*paths, tmp_path / "best", rank=2, decomposition="best", dtype="F32")
        pairs = lora_compress.extract(*paths, tmp_path / "ab", rank=2, dtype="F32")
    by_name = {tensor.name.rpartition(prefix)[2]: tensor for tensor in result.tensors}
    assert {name: tensor.decomposition for name, tensor in by_name.items()} == {
        "q_proj.weight": "shared",
        "k_proj.weight": "shared",
        "v_proj.weight": "shared",
        "o_proj.weight": "ab",
    }
    assert result.format == "factors"
    assert result.error < 0.9 * pairs.error
    assert sum(tensor.nbytes for tensor in result.tensors) <= sum(tensor.nbytes for tensor in pairs.tensors)
    assert lora_compress.verify(*paths, tmp_path / "best").ok
    manifest = json.loads((tmp_path / "best" / "lora_compress" / "manifest.json").read_text())
    assert manifest["decomposition"] == "best"
    assert {row["decomposition"] for row in manifest["tensors"]} == {"ab", "shared"}
    shutil.rmtree(tmp_path / "best")


def test_best_leaves_out_what_fails(pair: Pair, tmp_path: Path) -> None:
    def fit(delta: Delta, rank: int, *, seed: int, tolerance: float) -> Any:
        raise RuntimeError("out of luck")

    with loaded(module(Decomposition("unlucky", "out r, r in", fit=fit))):
        result = lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition="best")
        assert any("unlucky" in warning and "out of luck" in warning for warning in result.warnings)
        assert {tensor.decomposition for tensor in result.tensors if tensor.rank} == {"ab"}
        with pytest.raises(PluginError, match="means all"), loaded(module(Decomposition("best", "out r, r in"))):
            pass


def plain(change: Callable[[Any, Any, Any], Any]) -> Decomposition:
    """`ab`, but for what `change` does to U, σ and Vᵀ of four directions more than were asked for."""

    def fit(delta: Delta, rank: int, *, seed: int, tolerance: float) -> Any:
        return change(*delta.truncated_svd(rank + 4, seed=seed, tolerance=tolerance))

    return Decomposition("plain", "out r, r in", fit=fit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, s, vt: (u, vt), r"`r` is 6, but 2 at most at the rank 2"),
        (lambda u, s, vt: ((u * s)[:, :2], vt[:2]), "factor 1 is float64: factors are float32"),
        (lambda u, s, vt: (u[:, :2] * np.float32(np.nan), vt[:2]), "factor 1 holds NaN"),
        (lambda u, s, vt: ([[1.0]], vt[:2]), "factor 1 is list"),
        (lambda u, s, vt: None, "a fit returns a list of factors, not NoneType"),
        (lambda u, s, vt: (u[:5, :2], vt[:2]), "make a .5, "),
        (lambda u, s, vt: (u[:, :2],), "1 factors for the 2"),
    ],
)
@pytest.mark.parametrize("format_", ["peft", "factors"])
def test_fits_that_break_their_promise_are_named(
    change: Any, message: str, format_: str, pair: Pair, tmp_path: Path
) -> None:
    with loaded(module(plain(change))), pytest.raises(PluginError, match=message) as caught:
        lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition="plain", format=format_)
    assert "`ours` failed in the fit of `plain`" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_fit_without_directions_stores_none(pair: Pair, tmp_path: Path) -> None:
    nothing = plain(lambda u, s, vt: (u[:, :0], vt[:0]))
    for format_ in ("peft", "factors"):
        with loaded(module(nothing)):
            result = lora_compress.extract(*pair, tmp_path / format_, rank=2, decomposition="plain", format=format_)
            assert lora_compress.verify(*pair, tmp_path / format_).ok
        assert all(tensor.rank == 0 for tensor in result.tensors if format_ == "peft")


@pytest.mark.parametrize("fault", ["group", "axes", "overflow"])
def test_one_faulty_plugin_spoils_neither_best_nor_compare(fault: str, pair: Pair, tmp_path: Path) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    failing: Any = fails

    def large(delta: Delta, rank: int, *, seed: int, tolerance: float) -> Any:
        u, sigma, vt = delta.truncated_svd(rank, seed=seed, tolerance=tolerance)
        return u * np.float32(1e8), (sigma[:, None] * 1e-8).astype(np.float32) * vt

    faulty = {
        "group": Decomposition("faulty", "layer out r, r in", group=failing),
        "axes": Decomposition("faulty", "out r, r in", axes=failing),
        "overflow": Decomposition("faulty", "out r, r in", fit=large),
    }[fault]
    with loaded(module(faulty)):
        result = lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition="best", dtype="F16")
        assert any("`faulty` was left out" in warning for warning in result.warnings)
        rows = lora_compress.compare(*pair, sizes=[2], dtype="F16").rows
    assert next(row for row in rows if row.decomposition == "faulty").problem
    assert next(row for row in rows if row.decomposition == "best").error


def test_best_of_pairs_is_the_pair(pair: Pair, tmp_path: Path) -> None:
    again = Decomposition("again", "out r, r in", fit=lora_compress.plugins.load().decompositions["ab"].fit)
    with loaded(module(again)):
        result = lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition="best", format="peft")
        assert {tensor.decomposition for tensor in result.tensors if tensor.rank} == {"ab"}
        plan = lora_compress.plan(*pair, rank=2)
        with pytest.raises(lora_compress.PlanError, match="plan with --format factors"):
            lora_compress.extract(*pair, tmp_path / "other", plan=plan, decomposition="best")


def test_large_groups_make_their_deltas_again(
    pair: Pair, tmp_path: Path, ours: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_compress.verbs import decompose

    kept = lora_compress.extract(*pair, tmp_path / "kept", rank=3, decomposition="shared", format="factors")
    made: list[str] = []

    def counting(*given: Any) -> Delta:
        made.append(given[2])
        return Delta(*given)

    monkeypatch.setattr(decompose, "IN_FLIGHT", 0)
    monkeypatch.setattr(decompose, "Delta", counting)
    again = lora_compress.extract(*pair, tmp_path / "again", rank=3, decomposition="shared", format="factors")
    assert again.error == kept.error
    name = "adapter_factors.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()
    # One that is alone is made once, however large.
    assert made.count("lm_head.weight") == 1
    assert made.count(Q) > 1


def test_chosen_covers_every_tensor_once() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    def candidate(names: str, error: float) -> Candidate:
        return Candidate(Task(tuple(Named(name) for name in names)), error)  # type: ignore[misc]

    singles = [candidate(name, 1.0) for name in "abcd"]
    groups = [candidate("ab", 1.5), candidate("bc", 0.5), candidate("cd", 1.9), candidate("abcd", 4.0)]
    taken = {"".join(pair.name for pair in task.pairs) for task in chosen([*singles, *groups])}
    # `bc` gains most and excludes both neighbours; the group of all gains nothing.
    assert taken == {"bc", "a", "d"}
