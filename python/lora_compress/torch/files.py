"""Adapters in memory as files, and back: by the formats that extraction writes, with the scale in the factors.

Both sides multiply the first factor that is a layer's own: by s when it is written, by 1 / s when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_compress import plugins
from lora_compress._native import Checkpoint, Delta, __version__, kernel, round_to
from lora_compress.adapter import Adapter as StoredAdapter
from lora_compress.adapter import AdapterPlan, GroupFactors, PlannedFactors, stores_factors
from lora_compress.decompositions.interface import Decomposition
from lora_compress.errors import SelectionError
from lora_compress.formats.factors.read import CONFIG, stored_factors
from lora_compress.model import Model, matrices, matrix_shape
from lora_compress.torch.sites import by_group
from lora_compress.verbs import output, side_file
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.decompose import residual_energy
from lora_compress.verbs.merge import read_adapter

if TYPE_CHECKING:
    from lora_compress.torch.sites import Site, Target

Factor = Any
DTYPES = {torch.float32: "F32", torch.float64: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PAIRS, FACTORS = "peft", "factors"


@dataclass(frozen=True)
class Stored:
    """An adapter on disk that factors begin from."""

    adapter: StoredAdapter
    # Contraction and factors, where the file holds those.
    raw: Mapping[str, tuple[str, list[Factor]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, base: Model) -> Stored:
        """Read an adapter for a model. Raises `AdapterError` for one that does not belong to it, `SelectionError` for
        one that gives it new rows.
        """
        adapter = read_adapter(path, base)
        if adapter.new_rows:
            raise SelectionError(
                f"`{path}` appends rows to `{min(adapter.new_rows)}`: train what `lora-compress merge` makes of it"
            )
        return cls(adapter, stored_factors(path) if (path / CONFIG).is_file() else {})

    def names(self) -> list[str]:
        """The tensors that it has a ΔW of."""
        return sorted(self.adapter.factored())

    def pair(self, tensor: str, *, transposed: bool) -> tuple[Factor, Factor] | None:
        """B and A of a tensor side by side, as float32; None where ΔW is stored otherwise."""
        found = self.adapter.terms(tensor)
        pairs = [each for each in found if isinstance(each, tuple)]
        if not pairs or len(pairs) < len(found):
            return None
        b, a = np.hstack([left for left, _ in pairs]), np.vstack([right for _, right in pairs])
        return (a.T, b.T) if transposed else (b, a)

    def dense(self, tensor: str, *, transposed: bool) -> Factor:
        """ΔW of a tensor."""
        pair = self.pair(tensor, transposed=transposed)
        if pair is not None:
            return pair[0] @ pair[1]
        made = sum(each[0] @ each[1] if isinstance(each, tuple) else each for each in self.adapter.terms(tensor))
        return np.asarray(made).T if transposed else np.asarray(made)

    def factors(
        self,
        decomposition: Decomposition,
        tensors: Sequence[tuple[str, bool]],
        rank: int | None,
        *,
        seed: int,
        most: float = math.inf,
    ) -> list[list[Factor]]:
        """Factors of layers that belong together, their ΔW with its scale: as they are stored where the file has this
        contraction, or pairs; else fitted to ΔW. `tensors` has names, and whether ΔW is the transpose of the tensor's.

        Without a rank, the file's own; a decomposition that the file is not of needs one. Raises `SelectionError` where
        it does not say, and where a fit loses more than the share `most` of a ΔW's norm.
        """
        network = decomposition.network
        if all(
            self.raw.get(name, ("",))[0] == (network.transposed if transposed else network.text)
            for name, transposed in tensors
        ):
            return [list(self.raw[name][1]) for name, _ in tensors]
        if decomposition.contraction == "out r, r in":
            (name, transposed), *_ = tensors
            pair = self.pair(name, transposed=transposed)
            if pair is not None and (rank is None or pair[0].shape[1] <= rank):
                return [list(pair)]
        if rank is None:
            raise SelectionError(
                f"`{self.adapter.path}` holds no factors of `{decomposition.name}`: say which rank they are to have"
            )
        deltas = [
            Delta.from_array(np.ascontiguousarray(self.dense(name, transposed=transposed)), name)
            for name, transposed in tensors
        ]
        layers = decomposition.factors_of(deltas, rank, seed=seed, tolerance=1e-4)
        for delta, factors in zip(deltas, layers, strict=True):
            lost = math.sqrt(residual_energy(delta, decomposition, factors) / delta.energy) if delta.energy else 0.0
            if lost > most:
                raise SelectionError(
                    f"`{decomposition.name}` at rank {rank} loses {lost:.1%} of what `{self.adapter.path}` has for "
                    f"`{delta.name}`: attach at its rank, or with it as init"
                )
        return layers


def stored_layers(
    stored: Stored,
    decomposition: Decomposition,
    targets: Sequence[Target],
    rank: int | None,
    *,
    seed: int = 0,
    most: float = math.inf,
) -> list[list[Factor]]:
    """Factors of every target of a group, as `Stored.factors` has them; of a stack, those of its matrices stacked."""
    transposed = targets[0].leader.kind.transposed
    if not targets[0].leader.stack:
        tensors = [(target.tensor, transposed) for target in targets]
        return stored.factors(decomposition, tensors, rank, seed=seed, most=most)
    matrices = [(name, transposed) for name in targets[0].matrices]
    return [stacked([stored.factors(decomposition, [each], rank, seed=seed, most=most)[0] for each in matrices])]


def stacked(layers: Sequence[Sequence[Factor]]) -> list[Factor]:
    """Factors of the matrices of a stack, with the number of the matrix as first index. Where bonds differ, the smaller
    end in zeros: ΔW is the same.
    """
    joined = []
    for factors in zip(*layers, strict=True):
        shape = np.max([factor.shape for factor in factors], axis=0)
        padded = [
            np.pad(each, [(0, most - size) for most, size in zip(shape, each.shape, strict=True)]) for each in factors
        ]
        joined.append(np.stack(padded))
    return joined


def scaled(decomposition: Decomposition, factors: Sequence[Factor], scale: float) -> list[Factor]:
    """Factors of s·ΔW: a network is linear in each, so the first that is a layer's own takes it all."""
    first = decomposition.network.own.index(True)
    return [factor * scale if number == first else factor for number, factor in enumerate(factors)]


def write(
    path: Path,
    sites: Sequence[Site],
    model: Model,
    *,
    base: Model | None,
    base_name: str,
    decomposition: Decomposition,
    form: str | None,
    dtype: str | None,
    replacements: Mapping[str, tuple[Checkpoint, str]],
    force: bool,
) -> None:
    """Write the adapters of all sites. `model` is the live one; `base` the checkpoint it was loaded from, where known.

    Raises `SelectionError` for a format that cannot carry them, `OutputExistsError`, `OSError`.
    """
    described = base or model
    names = _names_in(described, sites)
    host = plugins.load()
    form = form or _usual(host, described, sites, names)
    target = host.formats[form]
    lacking = sorted({*names.values()} - target.carries(described, list(names.values())))
    if lacking:
        raise SelectionError(f"the format `{form}` has no name for a ΔW of `{lacking[0]}`: save with format='factors'")
    dtype = dtype or max((DTYPES[site.adapter.factors()[0].dtype] for site in sites), key=["BF16", "F16", "F32"].index)
    as_factors = stores_factors(target)
    groups = _groups(decomposition, sites, names, dtype) if as_factors else []
    pairs = {key: pair for site in sites for key, pair in _pairs(site, dtype)} if not as_factors else {}
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return  # Every process has done its part of gathering; one writes.
    output.check_directory(path, force=force)
    tied = described.tied_embedding()
    plan = AdapterPlan(
        base=described,
        base_name=base_name,
        dtype=dtype,
        factors=[PlannedFactors(names[tensor], len(b), a.shape[1], b.shape[1]) for tensor, (b, a) in pairs.items()],
        groups=groups,
        tied_embedding=tied if tied in {names[tensor] for tensor in pairs} else None,
        embeddings=frozenset(names[site.tensor] for site in sites if site.kind.looks_up),
    )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "base": base_name,
        "trained": True,
        "causal_lm": described.architecture.endswith("ForCausalLM"),
        "decomposition": decomposition.name,
        "format": form,
        "dtype": dtype,
        "kernel": kernel(),
        **({"base_fingerprint": base.fingerprint} if base is not None else {}),
    }
    with (
        output.new_directory(path, force=force) as folder,
        plugins.blame(host.formats.origin(form), "failed to write an adapter"),
    ):
        writer: Any = target.writer(folder, plan)
        for group in groups:
            writer.write_group(group)
        for tensor, (b, a) in pairs.items():
            writer.write(names[tensor], b, a)
        stored = {name: [(file, key, 1.0)] for name, (file, key) in replacements.items()}
        side_file.write_stored(folder, described.checkpoint, stored, {})
        side_file.write_manifest(folder, manifest)
        writer.finish(manifest)


def _usual(host: plugins.Plugins, model: Model, sites: Sequence[Site], names: Mapping[str, str]) -> str:
    """PEFT's, where it has names for all and pairs are small."""
    small = all(site.adapter.pair_product is not None for site in sites)
    wanted = list(names.values())
    return PAIRS if small and host.formats[PAIRS].carries(model, wanted) >= {*wanted} else FACTORS


def _names_in(model: Model, sites: Sequence[Site]) -> dict[str, str]:
    """The checkpoint's name of every site's tensor. Raises `SelectionError` where it has none of that shape."""
    by_path = {model.path_of(each.name): each.name for each in model.checkpoint.tensors()}
    found: dict[str, str] = {}
    for site in sites:
        name = by_path.get(site.tensor)
        shape = (site.adapter.rows, site.adapter.cols)
        shape = shape[::-1] if site.kind.transposed else shape
        if name is not None and site.adapter.stack:
            found |= zip(site.target.matrices, matrices(name, site.adapter.stack), strict=True)
            continue
        if name is None or (matrix_shape(model.checkpoint.info(name).shape) != shape and site.is_plain):
            raise SelectionError(
                f"`{model.path}` has no tensor of shape {list(shape)} for `{site.tensor}`: transformers names or "
                "stores it otherwise; save without `base`"
            )
        found[site.tensor] = name
    return found


def _pairs(site: Site, dtype: str) -> Iterator[tuple[str, tuple[Factor, Factor]]]:
    """B (rows, r) and A (r, cols) of what the base's weight, as it is stored, gains; of every matrix of a stack."""
    decomposition = site.adapter.decomposition
    factors = [_numpy(each) for each in site.adapter.factors()]
    start = [_numpy(each) for each in site.start] if site.start is not None else None
    for number, name in enumerate(site.target.matrices):
        b, a = decomposition.lower(_of(factors, site, number))
        b = b * site.adapter.scale
        if start is not None:
            # The weight lost what the factors began with: the difference has both, side by side.
            lost, right = decomposition.lower(_of(start, site, number))
            b, a = np.hstack([b, lost * -site.adapter.scale]), np.vstack([a, right])
        if site.kind.transposed:
            b, a = a.T, b.T
        yield name, (_rounded(b, dtype), _rounded(a, dtype))


def _of(factors: Sequence[Factor], site: Site, number: int) -> list[Factor]:
    """The factors of one matrix."""
    return [factor[number] for factor in factors] if site.adapter.stack else list(factors)


def _groups(
    decomposition: Decomposition, sites: Sequence[Site], names: Mapping[str, str], dtype: str
) -> list[GroupFactors]:
    """Every group as the format `factors` takes it; what layers share is one array."""
    if shifted := [site.tensor for site in sites if site.start is not None]:
        raise SelectionError(
            f"the initialisation of `{shifted[0]}` changed its weight, so what it gained is a difference of two "
            "products: save with format='peft'"
        )
    own, made = decomposition.network.own, []
    for members in by_group(sites):
        kinds = {site.kind.transposed for site in members}
        contraction = decomposition.network.transposed if kinds == {True} else decomposition.contraction
        factors = [_numpy(each) for each in members[0].adapter.factors()]
        if members[0].adapter.stack:
            for number, name in enumerate(members[0].target.matrices):
                values = scaled(decomposition, _of(factors, members[0], number), members[0].adapter.scale)
                layer = [_rounded(each, dtype) for each in values]
                made.append(GroupFactors(decomposition.name, contraction, (names[name],), [layer], own))
            continue
        first = [_rounded(each, dtype) for each in factors]
        layers = []
        for site in members:
            values = scaled(decomposition, [_numpy(each) for each in site.adapter.factors()], site.adapter.scale)
            layers.append([_rounded(each, dtype) if own[at] else first[at] for at, each in enumerate(values)])
        tensors = tuple(names[site.tensor] for site in members)
        made.append(GroupFactors(decomposition.name, contraction, tensors, layers, own))
    return made


def _rounded(values: Factor, dtype: str) -> Factor:
    return round_to(np.ascontiguousarray(values, dtype=np.float32), dtype)


def _numpy(tensor: torch.Tensor) -> Factor:
    """Values on the CPU, float32; of a sharded tensor all of them, on every process."""
    whole: Any = tensor.detach()
    whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return whole.to(device="cpu", dtype=torch.float32).numpy()
