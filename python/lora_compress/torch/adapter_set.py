"""The adapters of a model under one name: what is trained, stored, merged and taken away together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lora_compress._native import Checkpoint
from lora_compress.decompositions.interface import Decomposition
from lora_compress.errors import SelectionError
from lora_compress.model import Model
from lora_compress.torch import files
from lora_compress.torch.layers import CHILD, swap_out
from lora_compress.torch.live import live_model, name_of
from lora_compress.torch.sites import Site, by_group

ROLES = ("in", "core", "out")
# A fit that loses less of a ΔW is of the same ΔW.
SAME = 1e-3
# What the base's parameters asked for before the first adapters came, and how many sets there are.
_frozen: WeakKeyDictionary[nn.Module, tuple[list[nn.Parameter], int]] = WeakKeyDictionary()


class AdapterSet:
    """What `attach` returns. `lora_compress.torch.attach` makes one; it is not made otherwise.

    model, name, decomposition: as they were given to `attach`.
    sites: one for each weight that is adapted.
    """

    def __init__(self, model: nn.Module, name: str, decomposition: Decomposition, sites: Sequence[Site]) -> None:
        self.model, self.name, self.decomposition, self.sites = model, name, decomposition, tuple(sites)
        self._replacements: dict[str, tuple[Checkpoint, str]] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        _freeze(model)

    def __repr__(self) -> str:
        trained = sum(each.numel() for each in self.parameters() if each.requires_grad)
        return (
            f"AdapterSet({self.name!r}: {self.decomposition.name}, {len(self.sites)} weights, {trained:,} parameters)"
        )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Factors by their names in the model, frozen ones too; each once."""
        for site in self.sites:
            for number, factor in site.adapter.own_factors().items():
                yield f"{site.target.leader.place}.{self.name}.factor{number}", factor

    def parameters(self) -> Iterator[nn.Parameter]:
        """All factors."""
        return (factor for _, factor in self.named_parameters())

    def param_groups(self, lr: float, ratios: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """Groups for an optimizer by the factors' role: next to the input ("in"), next to the output ("out"), or
        between ("core"), each with lr times its ratio (1 where none is given). LoRA+ (Hayou et al. 2024) is
        {"out": 16}.
        """
        ratios = dict(ratios or {})
        if strangers := {*ratios} - {*ROLES}:
            raise ValueError(f"`{min(strangers)}` is no role of a factor: they are {', '.join(ROLES)}")
        groups: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
        for site in self.sites:
            for number, factor in site.adapter.own_factors().items():
                if factor.requires_grad:
                    groups[self._role(site, number)].append(factor)
        return [
            {"params": factors, "lr": lr * ratios.get(role, 1.0), "role": role}
            for role, factors in groups.items()
            if factors
        ]

    def _role(self, site: Site, number: int) -> str:
        network = self.decomposition.network
        term = {*network.terms[number]}
        rows, cols = bool(term & {*network.rows}), bool(term & {*network.cols})
        if rows == cols:
            return "core"
        # The rows of an embedding are looked up: they are its input.
        return "out" if rows != site.kind.looks_up else "in"

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without these adapters while the block runs, merged ones too: the base, to the bit."""
        before = [site.adapter.enabled for site in self.sites]
        self._enable([False] * len(self.sites))
        try:
            yield
        finally:
            self._enable(before)

    def _enable(self, states: Sequence[bool]) -> None:
        for site, state in zip(self.sites, states, strict=True):
            for adapter in site.adapters:
                adapter.enabled = state
            site.refresh()

    def merge(self) -> None:
        """Put s·ΔW into the weights: summed in float32, rounded once to the weight's dtype. The base's are kept.

        Raises `SelectionError` for quantised or sharded weights; nothing is merged then.
        """
        self._set_merged(merged=True)

    def unmerge(self) -> None:
        """Take it out again: the weights are what they were, to the bit."""
        self._set_merged(merged=False)

    def _set_merged(self, *, merged: bool) -> None:
        if merged and (odd := [site.tensor for site in self.sites if not site.can_change()]):
            raise SelectionError(f"`{odd[0]}` is quantised or sharded: nothing is merged into it")
        for site in self.sites:
            for container in site.containers():
                rest = tuple(name for name in container.merged if name != self.name)
                container.merged = (*rest, self.name) if merged else rest
            site.refresh()

    def detach(self) -> nn.Module:
        """Take the adapters away: classes, weights and `requires_grad` of the model are what they were. Returns it."""
        for site in self.sites:
            containers = list(site.containers())
            for container in containers:
                container.merged = tuple(name for name in container.merged if name != self.name)
                container.shifts.pop(self.name, None)
            site.refresh()
            for container in containers:
                del container[self.name]
        for site in self.sites:
            for layer in site.target.layers:
                swap_out(layer.module)
        parameters = dict(self.model.named_parameters())
        for name, values in self._replaced.items():
            parameters[name].data = values
        _thaw(self.model)
        return self.model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The factors alone, by their names in the model; a checkpoint for `load_state_dict`."""
        return {name: factor.detach() for name, factor in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take factors up again. Raises `SelectionError` for other names or shapes; nothing is taken then."""
        own = dict(self.named_parameters())
        if odd := sorted(own.keys() ^ state.keys()):
            raise SelectionError(f"`{odd[0]}` is in {'the adapters' if odd[0] in own else 'the state'} only")
        for name, factor in own.items():
            if factor.shape != state[name].shape:
                raise SelectionError(f"`{name}` is {list(state[name].shape)}, not {list(factor.shape)}")
        with torch.no_grad():
            for name, factor in own.items():
                factor.copy_(state[name])

    def save(
        self,
        path: str | Path,
        *,
        base: str | Path | None = None,
        format: str | None = None,  # noqa: A002 (the name of the option everywhere)
        dtype: str | None = None,
        base_name: str | None = None,
        force: bool = False,
    ) -> None:
        """Write the adapters as extraction writes them, with the scale in the factors.

        Parameters
        ----------
        path: directory to create.
        base: the checkpoint that the model was loaded from, to take tensors' names and a fingerprint from; `merge` then
            refuses other bases. Without it names are those of the model.
        format: "peft" (pairs, exact) or "factors" (the factors themselves) or another registered one; "peft" where it
            has names for all layers and the pairs are small.
        dtype: "F32", "BF16" or "F16"; the factors' own when absent.
        base_name: what the adapter calls its base; what the model was loaded by when absent.
        force: replace an existing adapter.

        Of sharded factors all processes have to call it; the first one writes.

        Raises
        ------
        SelectionError for layers that the format has no names for, or an initialisation that it cannot store;
        OutputExistsError, OSError. Nothing is left behind.
        """
        checkpoint = Model.open(base) if base is not None else None
        files.write(
            Path(path),
            self.sites,
            live_model(self.model),
            base=checkpoint,
            base_name=base_name or (str(base) if base is not None else name_of(self.model)),
            decomposition=self.decomposition,
            form=format,
            dtype=dtype,
            replacements=self._replacements,
            force=force,
        )

    def load(self, path: str | Path) -> None:
        """Take up factors that were saved, or extracted, at the same ranks. What the file has in another decomposition
        is fitted, where that loses nothing to speak of.

        Raises `SelectionError` for other tensors or ranks, and for adapters whose initialisation changed the base;
        nothing is taken then.
        """
        stored = files.Stored.open(Path(path), live_model(self.model))
        if odd := sorted({name for site in self.sites for name in site.target.matrices} ^ {*stored.names()}):
            raise SelectionError(f"`{odd[0]}` is in one of `{path}` and the adapters only")
        if shifted := [site.tensor for site in self.sites if site.start is not None]:
            raise SelectionError(
                f"`{shifted[0]}` began with a part of the base, which files say nothing of: use state_dict, or attach "
                f"with init={str(path)!r}"
            )
        state = {}
        for members in by_group(self.sites):
            targets = [site.target for site in members]
            layers = files.stored_layers(stored, self.decomposition, targets, members[0].adapter.rank, most=SAME)
            for site, factors in zip(members, layers, strict=True):
                prefix = f"{site.target.leader.place}.{self.name}.factor"
                values = files.scaled(self.decomposition, factors, 1 / site.adapter.scale)
                for number in site.adapter.own_factors():
                    state[f"{prefix}{number}"] = torch.tensor(values[number])
        self.load_state_dict(state)
        self.replace(stored.adapter.replacements)

    def replace(self, replacements: Mapping[str, tuple[Checkpoint, str]]) -> None:
        """Give the base tensors that an adapter stores whole (norms, biases); `detach` gives its own back, and `save`
        stores them again.
        """
        parameters = dict(self.model.named_parameters())
        if missing := sorted({*replacements} - {*parameters}):
            raise SelectionError(f"the model has no parameter `{missing[0]}`")
        for name, (file, key) in replacements.items():
            values = torch.from_numpy(file.read(key)).to(parameters[name])
            if values.shape != parameters[name].shape:
                raise SelectionError(f"`{name}` is {list(values.shape)}, not {list(parameters[name].shape)}")
            self._replaced.setdefault(name, parameters[name].data)
            parameters[name].data = values
        self._replacements = {**self._replacements, **replacements}


def _freeze(model: nn.Module) -> None:
    inside = f".{CHILD}."
    held, count = _frozen.get(model, ([], 0))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and inside not in f".{name}":
            parameter.requires_grad_(requires_grad=False)
            held.append(parameter)
    _frozen[model] = held, count + 1


def _thaw(model: nn.Module) -> None:
    held, count = _frozen[model]
    if count > 1:
        _frozen[model] = held, count - 1
        return
    del _frozen[model]
    for parameter in held:
        parameter.requires_grad_(requires_grad=True)
