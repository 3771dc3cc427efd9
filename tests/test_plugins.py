"""The plugin host: built-in and foreign plugins take the same way, and whatever fails has a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from lora_compress import Decomposition, Initialisation, PluginError, Start, hookimpl, hookspecs, plugins
from lora_compress._native import Checkpoint, LowRank, Writer
from lora_compress.adapter import Adapter, AdapterPlan
from lora_compress.initialisations.interface import Group, Matrix
from lora_compress.model import Model

from tests.conftest import Pair


def fit_three(delta: Any, rank: int, *, seed: int, tolerance: float) -> Sequence[Any]:
    u, sigma, vt = delta.truncated_svd(rank, seed=seed, tolerance=tolerance)
    return u, np.diag(sigma).astype(np.float32), vt


def plugin(**hooks: Callable[..., None]) -> object:
    """An object with the given functions as hook implementations."""
    return type("Plugin", (), {name: staticmethod(hookimpl(function)) for name, function in hooks.items()})()


def registering(*items: Any) -> Callable[..., None]:
    def implementation(register: Callable[[Any], None]) -> None:
        for item in items:
            register(item)

    return implementation


def use(monkeypatch: pytest.MonkeyPatch, *extra: tuple[str, object]) -> plugins.Plugins:
    host = plugins.Plugins(installed=False, extra=extra)
    monkeypatch.setattr(plugins, "load", lambda: host)
    return host


def test_what_ships_is_registered_through_the_hooks() -> None:
    host = plugins.Plugins(installed=False)
    assert [info.name for info in host.list()] == list(plugins.BUILT_IN)
    assert host.decompositions.origin("ab") == "lora_compress.decompositions.ab"
    assert host.formats.origin("peft") == "lora_compress.formats.peft"
    assert host.initialisations.origin("pissa") == "lora_compress.initialisations.built_in"


def test_hook_register_decompositions(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = Decomposition("three", "out p, p q, q in", fit=fit_three)
    use(monkeypatch, ("mine", plugin(register_decompositions=registering(three))))
    ours = lora_compress.extract(*pair, tmp_path / "three", rank=5, decomposition="three", dtype="F32")
    built_in = lora_compress.extract(*pair, tmp_path / "ab", rank=5, dtype="F32")
    # The same subspace: lowering multiplies exactly, only the split of σ over the factors differs.
    assert ours.error == pytest.approx(built_in.error, rel=1e-5)
    assert lora_compress.verify(*pair, tmp_path / "three").ok
    manifest = json.loads((tmp_path / "three" / "lora_compress" / "manifest.json").read_text())
    assert manifest["decomposition"] == "three"


class FlatFormat:
    """Factors of each tensor as `NAME.b` and `NAME.a` in one file."""

    name = "flat"

    def recognises(self, path: Path) -> bool:
        return (path / "flat.safetensors").is_file()

    def carries(self, base: Model, tensors: Sequence[str]) -> set[str]:
        return {tensor for tensor in tensors if "lm_head" not in tensor}

    def read(self, path: Path, base: Model) -> Adapter:
        file = Checkpoint(path / "flat.safetensors")
        names = {tensor.name.rpartition(".")[0] for tensor in file.tensors()}
        return Adapter(path, low_rank={name: [LowRank(file, f"{name}.b", f"{name}.a")] for name in names})

    def writer(self, path: Path, plan: AdapterPlan) -> FlatWriter:
        return FlatWriter(path, plan)


class FlatWriter:
    def __init__(self, path: Path, plan: AdapterPlan) -> None:
        specs = [(f"{f.tensor}.b", "F32", (f.rows, f.rank)) for f in plan.factors]
        specs += [(f"{f.tensor}.a", "F32", (f.rank, f.cols)) for f in plan.factors]
        self._writer = Writer(path / "flat.safetensors", specs)

    def write(self, tensor: str, b: Any, a: Any) -> int:
        self._writer.append(f"{tensor}.b", "F32", b)
        self._writer.append(f"{tensor}.a", "F32", a)
        return int(4 * (a.size + b.size))

    def finish(self, manifest: Any) -> None:
        self._writer.finish()


def test_hook_register_formats(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ("flat", plugin(register_formats=registering(FlatFormat()))))
    result = lora_compress.extract(*pair, tmp_path / "out", rank=4, format="flat", dtype="F32")
    head = next(account for account in result.tensors if account.name == "lm_head.weight")
    assert head.treatment == "exact", "what the format cannot carry is kept, not dropped"
    assert any("lm_head" in warning for warning in result.warnings)
    check = lora_compress.verify(*pair, tmp_path / "out")
    assert check.ok
    assert check.error == pytest.approx(result.error, rel=1e-6)
    assert lora_compress.inspect(tmp_path / "out").kind == "adapter"


def last_directions(group: Group) -> Start:
    """MiLoRA's: the singular vectors of W that matter least."""
    layers = []
    for matrix in group.matrices:
        u, sigma, vt = np.linalg.svd(matrix.weight(), full_matrices=False)
        layers.append([u[:, -group.rank :] * sigma[-group.rank :], vt[-group.rank :]])
    return Start(layers, shifts=True)


def a_group(shape: tuple[int, int] = (6, 5), rank: int = 2) -> Group:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    ab = plugins.Plugins(installed=False).decompositions["ab"]
    return Group(ab, [Matrix("q.weight", *shape, lambda: weight)], rank, scale=1.0, seed=0)


def test_hook_register_initialisations(monkeypatch: pytest.MonkeyPatch) -> None:
    last = Initialisation("last", last_directions, "the last singular vectors of W")
    host = use(monkeypatch, ("mine", plugin(register_initialisations=registering(last))))
    group = a_group()
    start = host.initialisations["last"].factors_of(group)
    sigma = np.linalg.svd(group.matrices[0].weight(), compute_uv=False)
    b, a = start.layers[0]
    np.testing.assert_allclose(np.linalg.svd(b @ a, compute_uv=False)[:2], sigma[-2:], rtol=1e-5)
    assert host.initialisations.origin("last") == "mine"
    assert host.list()[-1].initialisations == ("last",)


def test_starts_that_are_none_are_refused() -> None:
    good = Start([[np.ones((6, 2), np.float32), np.ones((2, 5), np.float32)]])
    nan = Start([[good.layers[0][0] * np.float32("nan"), good.layers[0][1]]])
    for start, message in (
        (good.layers, "returns a Start, not list"),
        (Start([*good.layers, *good.layers]), "factors of 2 layers for 1"),
        (Start([good.layers[0][:1]]), "1 factors for the 2 of"),
        (Start([[good.layers[0][0].astype(np.float64), good.layers[0][1]]]), "factor 1 is float64"),
        (nan, "factor 1 holds NaN"),
        (Start([[np.ones((5, 2), np.float32), good.layers[0][1]]]), r"make a \(5, 5\) matrix"),
        (Start([[np.ones((6, 3), np.float32), np.ones((3, 5), np.float32)]]), "`r` is 3, but 2 at most"),
        (Start(good.layers, frozen=frozenset({2})), "no factor number 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Initialisation("bad", lambda group, start=start: start).factors_of(a_group())  # type: ignore[misc]
    assert Initialisation("good", lambda group: good).factors_of(a_group()) is good
    group = a_group()
    depth = Decomposition("depth", "layer out r, r in", group=lora_compress.across_depth)
    pair = Group(depth, [group.matrices[0], group.matrices[0]], 2, scale=1.0, seed=0)
    one, other = np.ones((2, 5), np.float32), np.zeros((2, 5), np.float32)
    for shared, is_good in ((one, True), (one.copy(), True), (other, False)):
        start = Start([[np.ones((6, 2), np.float32), one], [np.zeros((6, 2), np.float32), shared]])
        with nullcontext() if is_good else pytest.raises(ValueError, match="factor 2 is shared, but not the same"):
            Initialisation("mine", lambda group, start=start: start).factors_of(pair)  # type: ignore[misc]


def test_every_hook_is_documented_and_tested() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("register_")]
    assert len(hooks) == 3
    documentation = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
    for name in hooks:
        assert getattr(hookspecs, name).__doc__
        assert f"`{name}(register)`" in documentation
        assert f"test_hook_{name}" in globals()


def test_the_documented_plugin_works(tmp_path: Path) -> None:
    documentation = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
    decomposition, initialisation = (block.split("```")[0] for block in documentation.split("```python\n")[1:])
    namespace: dict[str, Any] = {}
    exec(decomposition + initialisation, namespace)  # noqa: S102
    found: list[Decomposition] = []
    namespace["register_decompositions"](found.append)
    assert found[0].parameters([(10, 20)], 3) == 10 * 3 + 3 * 3 + 3 * 20
    starts: list[Initialisation] = []
    namespace["register_initialisations"](starts.append)
    b, a = starts[0].factors_of(a_group()).layers[0]
    np.testing.assert_allclose(b.T @ b, a @ a.T, atol=1e-6)


def test_collisions_name_both_plugins() -> None:
    again = plugin(register_decompositions=registering(Decomposition("ab", "out r, r in", fit=fit_three)))
    with pytest.raises(
        PluginError, match=r"`ab` is registered by both `lora_compress\.decompositions\.ab` and `other`"
    ):
        plugins.Plugins(installed=False, extra=(("other", again),))
    flat = plugin(register_formats=registering(FlatFormat()))
    with pytest.raises(PluginError, match="`flat` is registered by both `one` and `two`"):
        plugins.Plugins(
            installed=False, extra=(("one", flat), ("two", plugin(register_formats=registering(FlatFormat()))))
        )


def test_misspelt_and_misused_hooks_fail() -> None:
    with pytest.raises(PluginError, match=r"plugin `mine`.*register_decomposition"):
        plugins.Plugins(installed=False, extra=(("mine", plugin(register_decomposition=registering())),))

    def wrong_argument(registrar: Any) -> None: ...

    with pytest.raises(PluginError, match=r"plugin `mine`.*registrar"):
        plugins.Plugins(installed=False, extra=(("mine", plugin(register_formats=wrong_argument)),))


def test_exceptions_carry_the_plugins_name(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(register: Any) -> None:
        raise KeyError("inside")

    with pytest.raises(PluginError, match=r"`mine` failed in `register_formats`: KeyError: 'inside'") as error:
        plugins.Plugins(installed=False, extra=(("mine", plugin(register_formats=broken)),))
    assert isinstance(error.value.__cause__, KeyError)

    class Unreadable(FlatFormat):
        def recognises(self, path: Path) -> bool:
            raise KeyError("boom")

    use(monkeypatch, ("mine", plugin(register_formats=registering(Unreadable()))))
    with pytest.raises(PluginError, match="`mine` failed in `recognises` of `flat`: KeyError: 'boom'"):
        lora_compress.inspect(pair[0])

    def fails(delta: Any, rank: int, *, seed: int, tolerance: float) -> Sequence[Any]:
        raise ZeroDivisionError("no")

    def misshapen(delta: Any, rank: int, *, seed: int, tolerance: float) -> Sequence[Any]:
        return np.ones((2, 3), np.float32), np.ones((4, 5), np.float32)

    for fit, message in ((fails, "ZeroDivisionError: no"), (misshapen, r"is 3 and 4 \(in factor 2\)")):
        bad = Decomposition("bad", "out r, r in", fit=fit)
        use(monkeypatch, ("mine", plugin(register_decompositions=registering(bad))))
        with pytest.raises(PluginError, match=rf"`mine` failed in the fit of `bad` for `.*weight`.*{message}"):
            lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition="bad")
        assert not (tmp_path / "out").exists()


def test_unknown_and_malformed_names_are_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="no decomposition `abc`; installed are ab"):
        lora_compress.extract(*pair, tmp_path / "out", rank=2, decomposition="abc")
    for name in ("AB", "a_b", "-a", "", "a b"):
        bad = plugin(register_decompositions=registering(Decomposition(name, "out r, r in", fit=fit_three)))
        with pytest.raises(PluginError, match="names are a-z"):
            plugins.Plugins(installed=False, extra=(("mine", bad),))


def fake_distribution(folder: Path, source: str) -> dict[str, str]:
    """A distribution with an entry point, and the environment that finds it."""
    info = folder / "fake_plugin-1.2.dist-info"
    info.mkdir()
    (folder / "fake_module.py").write_text(source)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[lora_compress]\nfake = fake_module\n")
    paths = [str(folder), str(Path(lora_compress.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def list_plugins(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_compress", "plugins", "list", "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_installed_plugins_are_found(tmp_path: Path) -> None:
    source = """
import lora_compress

@lora_compress.hookimpl
def register_decompositions(register):
    register(lora_compress.Decomposition("fake", "out r, r in", fit=lambda *a, **k: ()))
"""
    environment = fake_distribution(tmp_path, source)
    listed = json.loads(list_plugins({**environment, plugins.SWITCH: "1"}).stdout)
    assert listed["schema_version"] == 1
    # First-party plugins may be installed beside it.
    assert next(each for each in listed["plugins"] if each["distribution"] == "fake-plugin") == {
        "name": "fake-plugin:fake",
        "distribution": "fake-plugin",
        "version": "1.2",
        "decompositions": ["fake"],
        "formats": [],
        "initialisations": [],
    }
    assert "fake" not in list_plugins({**environment, plugins.SWITCH: "0"}).stdout


def test_a_plugin_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    environment = fake_distribution(tmp_path, "import nowhere_to_be_found")
    result = list_plugins({**environment, plugins.SWITCH: "1"})
    assert result.returncode == 1
    assert result.stderr.startswith(
        "error: plugin `fake-plugin (fake)` cannot be loaded (LORA_COMPRESS_PLUGINS=0 leaves"
    )
    assert "Traceback" not in result.stderr
