"""`attach`: give a model adapters to train, of any decomposition."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_compress import plugins
from lora_compress.decompositions.interface import Decomposition
from lora_compress.decompositions.interface import Layer as Shape
from lora_compress.errors import SelectionError
from lora_compress.initialisations.interface import Group, Initialisation, Matrix, Start
from lora_compress.ranks.plan import Plan
from lora_compress.torch.adapter import Adapter
from lora_compress.torch.adapter_set import AdapterSet
from lora_compress.torch.files import Stored, scaled, stacked, stored_layers
from lora_compress.torch.layers import swap_in
from lora_compress.torch.live import live_model
from lora_compress.torch.sites import ALL_LINEAR, WEIGHT, Site, Target, Targets, find_targets
from lora_compress.verbs.stacks import whole

RANK, ALPHA = 16, 16.0
Ranks = Plan | str | PathLike[str] | Mapping[str, int]
Init = str | PathLike[str] | Initialisation | Callable[[Group], Start]


def attach(
    model: nn.Module,
    decomposition: str | Decomposition = "ab",
    rank: int | None = None,
    *,
    ranks: Ranks | None = None,
    targets: Targets | None = None,
    scale: str | float = "rslora",
    alpha: float | None = None,
    init: Init = "zero",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    dropout: float = 0.0,
    name: str = "default",
) -> AdapterSet:
    """Give layers of a model factors to train: their output becomes W·x + s·ΔW·x, and nothing else of them changes.

    The base is frozen, its state dict's keys and the layers' types stay; the factors are parameters of the model under
    `<layer>.adapter.<name>`. Any training loop works: what requires gradients is the factors.

    Parameters
    ----------
    decomposition: the name of a registered one, or one itself.
    rank: of the decomposition, for every layer; smaller ones get what they can use. 16, or that of the file in `init`.
    ranks: instead, a rank for each tensor or layer by its name: a mapping, a plan, or the file of one. What it does not
        name is not trained. For a decomposition other than pairs, as many parameters as pairs of these ranks have.
    targets: "all-linear" (all but the output head; the default, unless `ranks` or `init` names tensors), a regular
        expression that is searched in the paths of layers, or a function of path and layer. Tied weights have one ΔW.
    scale: "rslora" (alpha / √rank, Kalajdzievski 2023), "lora" (alpha / rank), or s itself.
    alpha: of the scale; 16 when absent.
    init: a registered initialisation (`lora-compress plugins list`), a function like those, or the directory of an
        adapter to go on from, whatever it is decomposed by; tensors that it stores whole are put into the base.
    dtype: of the factors. With float32, autocast or the layer's input says what products are computed in.
    seed: of random factors; the same seed gives the same factors.
    dropout: probability that an adapter's input is 0 while training.
    name: of these adapters; a model can have several.

    Raises
    ------
    SelectionError when no layer is found, or a layer cannot begin as asked; `PluginError` for unknown decompositions;
    AdapterError, PlanError, OSError for files; `ValueError` for options out of range. The model is then as it was.
    """
    if rank is not None and (rank < 1 or ranks is not None):
        raise ValueError(f"rank ({rank}) is at least 1, and not given together with ranks")
    if not 0 <= dropout < 1 or not dtype.is_floating_point or not is_word(name):
        raise ValueError(f"dropout ({dropout}) is in [0, 1), dtype ({dtype}) a float, name ({name!r}) without dots")
    method = plugins.load().decompositions[decomposition] if isinstance(decomposition, str) else decomposition
    start = _start(init, model)
    stored = start if isinstance(start, Stored) else None
    found = find_targets(model, targets if targets is not None else _everything(ranks, stored))
    by_tensor = _own_ranks(model, found, ranks) if ranks is not None else None
    if by_tensor is not None:
        found = [target for target in found if by_tensor.get(target.tensor, 0)]
    elif stored is not None:
        names = {whole(name) for name in stored.names()}
        found = [target for target in found if target.tensor in names]
    if not found:
        raise SelectionError("none of the layers that were asked for has a rank")
    if dropout and (experts := [target.tensor for target in found if target.leader.stack]):
        raise SelectionError(f"`{experts[0]}` has no input of its own that dropout could act on")
    if taken := [target.tensor for target in found if name in _adapters_of(target)]:
        raise SelectionError(f"`{taken[0]}` has adapters of the name `{name}` already")
    groups = _groups(method, found)
    planned = [_rank(method, group, rank, by_tensor, stored) for group in groups]
    prepared = [
        _prepare(method, group, size, scale, alpha, start, dtype=dtype, seed=seed)
        for group, size in zip(groups, planned, strict=True)
    ]
    sites = [
        site
        for group, made in zip(groups, prepared, strict=True)
        for site in _install(method, group, made, name, dropout)
    ]
    order = {target.tensor: number for number, target in enumerate(found)}
    sites.sort(key=lambda site: order[site.tensor])
    made = AdapterSet(model, name, method, sites)
    try:
        made.replace(stored.adapter.replacements if stored is not None else {})
    except SelectionError:
        made.detach()
        raise
    return made


def is_word(name: str) -> bool:
    """Whether a word can be a part of a parameter's name."""
    return bool(name) and "." not in name and not hasattr(nn.ModuleDict, name)


def _start(init: Init, model: nn.Module) -> Stored | Initialisation:
    """What the factors come from."""
    if isinstance(init, Initialisation):
        return init
    if callable(init):
        return Initialisation(getattr(init, "__name__", "init"), init)
    known = plugins.load().initialisations
    if isinstance(init, str) and init in known:
        return known[init]
    if not Path(fspath(init)).exists():
        names = ", ".join(each.name for each in known)
        raise SelectionError(f"there is no initialisation `{fspath(init)}` and no such adapter; known are {names}")
    return Stored.open(Path(fspath(init)), live_model(model))


def _everything(ranks: Ranks | None, stored: Stored | None) -> Targets:
    return ALL_LINEAR if ranks is None and stored is None else ""


def _adapters_of(target: Target) -> Any:
    return target.leader.container() or ()


def _own_ranks(model: nn.Module, found: Sequence[Target], ranks: Ranks) -> dict[str, int]:
    """A rank by tensor of the live model. Raises `SelectionError` for names that it does not have."""
    if isinstance(ranks, str | PathLike):
        ranks = Plan.load(fspath(ranks))
    named = ranks.stored_ranks if isinstance(ranks, Plan) else dict(ranks)
    # Checkpoints of headless models lack how names begin in those with a head.
    inner = str(getattr(model, "base_model_prefix", "")) + "."
    paths: dict[str, str] = {}
    for target in found:
        for layer in target.layers:
            whole_path = layer.tensor.removesuffix(WEIGHT)
            for path in (whole_path, whole_path.removeprefix(inner)):
                paths |= {path: target.tensor, path + WEIGHT: target.tensor}
    unknown = sorted(name for name, rank in named.items() if rank and name not in paths)
    everything = {**paths, **dict.fromkeys(name for name, _ in model.named_parameters())}
    if strangers := [
        name for name in unknown if name not in everything and name.removesuffix(WEIGHT) not in everything
    ]:
        raise SelectionError(f"the model has no layer for `{strangers[0]}`, which has the rank {named[strangers[0]]}")
    return {paths[name]: rank for name, rank in named.items() if name in paths}


def _groups(method: Decomposition, found: Sequence[Target]) -> list[list[Target]]:
    by_tensor = {target.tensor: target for target in found}
    single = [target for target in found if not target.leader.stack]
    groups = method.groups([Shape(target.tensor, *target.shape) for target in single])
    return [
        *([by_tensor[layer.name] for layer in group] for group in groups),
        *([target] for target in found if target.leader.stack),
    ]


def _rank(
    method: Decomposition,
    group: Sequence[Target],
    rank: int | None,
    by_tensor: Mapping[str, int] | None,
    stored: Stored | None,
) -> int | None:
    """The decomposition's rank for a group: the largest rung that is asked for, or that takes no more than pairs of the
    given ranks; None for the file's own.
    """
    shapes = [target.shape for target in group]
    rungs = method.ranks(shapes)
    if by_tensor is None:
        if rank is None and stored is not None:
            return None
        return rungs[max(bisect_right(rungs, rank or RANK) - 1, 0)]
    room = sum(by_tensor[target.tensor] * sum(target.shape) for target in group)
    fitting = bisect_right(rungs, room, key=lambda rung: method.parameters(shapes, rung))
    return rungs[max(fitting - 1, 0)]


def scale_of(scale: str | float, alpha: float | None, rank: int) -> float:
    """s. Raises `ValueError` for an unknown rule, and for an alpha beside a number."""
    if isinstance(scale, str):
        powers = {"lora": 1.0, "rslora": 0.5}
        if scale not in powers:
            raise ValueError(f"scale is {scale!r}: `rslora`, `lora` or a number")
        return (ALPHA if alpha is None else alpha) / float(rank ** powers[scale])
    if alpha is not None or not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale ({scale}) is finite and not 0, and needs no alpha ({alpha})")
    return float(scale)


class _Prepared:
    """Tensors of a group's factors, before anything of the model has changed."""

    def __init__(self, rank: int, scale: float, start: Start, dtype: torch.dtype) -> None:
        self.rank, self.scale, self.shifts, self.frozen = rank, scale, start.shifts, start.frozen
        self.layers = [
            [torch.from_numpy(np.array(factor, dtype=np.float32)).to(dtype) for factor in layer]
            for layer in start.layers
        ]


def _prepare(
    method: Decomposition,
    group: Sequence[Target],
    rank: int | None,
    scale: str | float,
    alpha: float | None,
    start: Stored | Initialisation,
    *,
    dtype: torch.dtype,
    seed: int,
) -> _Prepared:
    stack = group[0].leader.stack
    if isinstance(start, Stored):
        layers = stored_layers(start, method, group, rank, seed=seed)
        found = rank or _rank_of(method, group[0], [factor[0] if stack else factor for factor in layers[0]])
        own = scale_of(scale, alpha, found)
        return _Prepared(found, own, Start([scaled(method, layer, 1 / own) for layer in layers]), dtype)
    assert rank is not None  # noqa: S101 (only files have ranks of their own)
    own = scale_of(scale, alpha, rank)
    matrices = [
        Matrix(name, *target.shape, partial(_values, target, number))
        for target in group
        for number, name in enumerate(target.matrices)
    ]
    known = plugins.load().initialisations
    origin = known.origin(start.name) if start.name in known else start.name
    with plugins.blame(origin, f"failed to start factors of `{method.name}` for `{group[0].tensor}`"):
        if not stack:
            return _Prepared(rank, own, start.factors_of(Group(method, matrices, rank, own, seed)), dtype)
        starts = [start.factors_of(Group(method, [matrix], rank, own, seed)) for matrix in matrices]
        if len({(each.frozen, each.shifts) for each in starts}) > 1:
            raise ValueError("what is frozen, and what the base loses, is the same for all experts of a stack")
    layer = stacked([each.layers[0] for each in starts])
    return _Prepared(rank, own, Start([layer], starts[0].frozen, starts[0].shifts), dtype)


def _values(target: Target, number: int) -> Any:
    return target.matrix(number).to(device="cpu", dtype=torch.float32).numpy()


def _rank_of(method: Decomposition, target: Target, factors: Sequence[Any]) -> int:
    """The smallest rank whose factors are at least as large as these."""
    count = sum(factor.size for factor in factors)
    rungs = method.ranks([target.shape])
    at = next((rung for rung in rungs if sum(map(math.prod, method.shapes(*target.shape, rung))) >= count), rungs[-1])
    return int(at)


def _shift(adapter: Adapter, start: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a weight loses to the factors that began with a part of it."""
    return -adapter.scale * adapter.dense_of(start)


def _install(method: Decomposition, group: Sequence[Target], made: _Prepared, name: str, dropout: float) -> list[Site]:
    """Put the factors of a group where they are used. What layers share belongs to the first."""
    network, sites = method.network, list[Site]()
    for target, factors in zip(group, made.layers, strict=True):
        device, stack = target.leader.weight.device, target.leader.stack
        placed = [factor.to(device) for factor in factors]
        lent = {number: sites[0].adapter for number, own in enumerate(network.own) if not own} if sites else {}
        options: Any = {"rank": made.rank, "scale": made.scale, "dropout": dropout, "stack": stack}
        adapter = Adapter(method, placed, lent=lent, frozen=made.frozen, **options)
        borrowed = [
            Adapter(method, placed, lent=dict.fromkeys(range(len(placed)), adapter), **options)
            for _ in target.layers[1:]
        ]
        start = [factor.clone() for factor in placed] if made.shifts else None
        site = Site(target, adapter, group[0].tensor, start, borrowed)
        for layer in target.layers:
            swap_in(layer.module, layer.kind)
        for container, each in zip(site.containers(), site.adapters, strict=True):
            container[name] = each.train(target.leader.module.training)
        sites.append(site)
        if start is not None:
            container = next(site.containers())
            container.shifts[name] = partial(_shift, adapter, start)
            site.refresh()
    return sites
