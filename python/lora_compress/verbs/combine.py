"""`resize` and `combine`: adapters become an adapter, in the space of their factors: no ΔW is formed, no weight is
read.

The sum of adapters is one pair of factors side by side. Its singular values follow from their Gram matrices, so the
ranks of the result are planned as those of an extraction are, and every choice of ranks works the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lora_compress import plugins
from lora_compress._native import Spectrum, __version__, fingerprint, round_to
from lora_compress.adapter import Adapter, AdapterPlan, PlannedFactors, stores_factors
from lora_compress.errors import SelectionError
from lora_compress.model import Model, last_component
from lora_compress.ranks.choice import RankChoice, choose
from lora_compress.ranks.plan import Plan, TensorPlan
from lora_compress.ranks.recompress import Product, decompose, distance
from lora_compress.verbs import output, side_file
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.changes import DTYPES, Options
from lora_compress.verbs.decompose import empty, padded
from lora_compress.verbs.merge import appended_rows, check_made_for, one_weight_each, read_adapter
from lora_compress.verbs.parallel import ordered_map
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.selection import matching

if TYPE_CHECKING:
    from lora_compress.adapter import AdapterWriter, Float32Matrix


@dataclass(frozen=True, slots=True, repr=False)
class CombineResult:
    """What `resize` or `combine` did. `ranks`: (before, after) by tensor; `error`: ‖ΔW − stored‖ / ‖ΔW‖ over the
    low-rank tensors, those that were left out included, ΔW being the sum of the adapters given.
    """

    out: Path
    ranks: Mapping[str, tuple[int, int]]
    error: float
    adapter_bytes: int
    seconds: float
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return f"CombineResult({str(self.out)!r}: {len(self.ranks)} tensors, error {self.error:.4f})"

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "out": str(self.out),
            "error": self.error,
            "adapter_bytes": self.adapter_bytes,
            "seconds": self.seconds,
            "ranks": {name: {"before": before, "after": after} for name, (before, after) in self.ranks.items()},
            "warnings": list(self.warnings),
        }


def resize(base: str | Path, adapter: str | Path, out: str | Path, **wishes: Any) -> CombineResult:
    """Give an adapter other ranks: `combine` of one."""
    return combine(base, [adapter], out, **wishes)


def combine(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] = (),
    exclude: Sequence[str] = (),
    rank: int | str | None = None,
    budget: int | str | None = None,
    error: float | None = None,
    rank_weights: str | None = None,
    ranks_allowed: str | Sequence[int] | None = None,
    max_rank: int | None = None,
    layout: str | None = None,
    dtype: str = "BF16",
    format: str = "peft",  # noqa: A002 (the name of the option everywhere)
    tied_head: bool = True,
    base_name: str | None = None,
    any_base: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> CombineResult:
    """Add adapters of one base, each times its weight, into one.

    Without any wish for ranks the sum is exact but for the rounding of its factors: its rank is what all directions
    need, at most the sum of the ranks. Tensors that an adapter stores whole are stored whole: a copy where one of
    weight 1 has it, else base + Σ w·(theirs − base).

    Parameters
    ----------
    base: the model that the adapters were made for. Its names and shapes are needed, and the values of tensors that
        are stored whole by several adapters.
    adapters: directories of any registered format.
    out: directory to create.
    weights: one for each adapter; 1 for all when absent.
    exclude: regular expressions; tensors in whose names one is found keep the base's values.
    rank, budget, error, ranks_allowed, max_rank, layout: as for `extract`; errors are relative to the sum.
    rank_weights: as `weights` of `extract`.
    dtype, format: of the result; a format of pairs.
    tied_head: as for `extract`.
    base_name: what the adapter calls its base.
    any_base: go on although an adapter was made for a base with other values.
    force: replace an existing output.
    command: the command line to record.
    progress: receives progress reports.

    Raises as `merge` and `extract` do. Nothing is left behind.
    """
    started = time.perf_counter()
    if not adapters:
        raise ValueError("at least one adapter is needed")
    weights = one_weight_each(adapters, weights)
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype}) must be one of {tuple(DTYPES)}")
    wishes = {"rank": rank, "budget": budget, "error": error, "weights": rank_weights, "ranks_allowed": ranks_allowed}
    asked = any(wish is not None for wish in (*wishes.values(), max_rank, layout))
    choice = choose(**wishes, max_rank=max_rank, layout=layout)  # type: ignore[arg-type]
    out, inputs = Path(out), (Path(base), *map(Path, adapters))
    output.check(out, force=force, inputs=inputs)
    host = plugins.load()
    target = host.formats[format]
    if stores_factors(target):
        raise SelectionError(f"the format `{format}` stores factors of decompositions: give one of pairs, such as peft")
    model = Model.open(base)
    parts = [read_adapter(path, model) for path in adapters]
    if not any_base:
        check_made_for(model, parts)
    tied = model.tied_embedding() if tied_head else None
    left_out = matching("--exclude", exclude, sorted({name for part in parts for name in part.tensors()}))
    factored = {name for part in parts for name in (*part.low_rank, *part.computed)}
    names = sorted(factored - left_out)
    zeros = _same_kind(model, names, left_out) if choice.layout == "uniform" else []
    progress = progress or Silent()
    progress.begin("decomposing", 0, len(names))
    products: dict[str, Product] = {}
    for name, product in ordered_map(lambda name: decompose(*_summed(parts, weights, name)), names, lambda _: 1 << 20):
        products[name] = product
        progress.advance(0, 1, name)
    for name in zeros:
        products[name] = decompose(*empty(*model.checkpoint.info(name).shape))
    names = sorted(products)
    exact = _whole(parts, weights, left_out), appended_rows(parts, left_out)
    ranks = _ranks(model, products, exact, choice if asked else None, dtype, tied, str(base))
    plan = AdapterPlan(
        base=model,
        base_name=base_name or str(base),
        dtype=dtype,
        factors=[
            PlannedFactors(
                name, model.checkpoint.info(name).shape[0], model.checkpoint.info(name).shape[1], ranks[name]
            )
            for name in names
            if ranks[name]
        ],
        tied_embedding=tied if ranks.get(tied or "") else None,
    )
    lost, whole = [], []
    with output.new_directory(out, force=force, inputs=inputs) as folder:
        with plugins.blame(host.formats.origin(target.name), "failed to write an adapter"):
            writer = cast("AdapterWriter", target.writer(folder, plan))
            after: dict[str, int] = {}
            for name in names:
                b, a = (round_to(factor, dtype) for factor in products[name].truncated(ranks[name]))
                after[name] = b.shape[1]
                lost.append(distance((products[name].b, products[name].a), (b, a)))
                whole.append(float(np.sum(products[name].sigma ** 2)))
                if ranks[name]:
                    writer.write(name, *(padded(b, a, ranks[name]) if asked and choice.pads else (b, a)))
            for name in sorted(left_out & factored):
                energy = float(np.sum(decompose(*_summed(parts, weights, name)).sigma ** 2))
                lost.append(energy)
                whole.append(energy)
            side_file.write_stored(folder, model.checkpoint, *exact)
            total = math.fsum(whole)
            combined_error = math.sqrt(math.fsum(lost) / total) if total else 0.0
            manifest = _manifest(model, plan, parts, weights, command, ranks, combined_error)
            side_file.write_manifest(folder, manifest)
            writer.finish(manifest)
        adapter_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    before = {name: products[name].sigma.size for name in names}
    return CombineResult(
        out,
        {name: (before[name], after[name]) for name in names},
        combined_error,
        adapter_bytes,
        time.perf_counter() - started,
        (
            *(warning for part in parts for warning in part.warnings),
            *(f"`{name}` is left out: it keeps the base's values" for name in sorted(left_out)),
        ),
    )


def _summed(parts: Sequence[Adapter], weights: Sequence[float], name: str) -> tuple[Float32Matrix, Float32Matrix]:
    """All adapters' factors of one tensor side by side, weights in the left ones."""
    left, right = [], []
    for part, weight in zip(parts, weights, strict=True):
        pairs: list[Any] = [term.factors() for term in part.low_rank.get(name, ())]
        pairs += [compute() for compute in part.computed.get(name, ())]
        for pair in pairs:
            if not isinstance(pair, tuple):
                # A decomposition without a small pair: ΔW itself beside an identity, the smaller way round.
                identity = np.eye(min(pair.shape), dtype=np.float32)
                pair = (identity, pair) if pair.shape[0] <= pair.shape[1] else (pair, identity)
            left.append(pair[0] * np.float32(weight))
            right.append(pair[1])
    return np.hstack(left), np.vstack(right)


Whole = dict[str, list[tuple[Any, str, float]]]


def _same_kind(model: Model, names: Sequence[str], left_out: set[str]) -> list[str]:
    """The base's matrices that are called as those of an adapter but have no factors: a uniform layout gives them
    zeros, as some servers drop a whole kind of module when one layer lacks it.
    """
    kinds = {last_component(name) for name in names}
    others = (tensor for tensor in model.checkpoint.tensors() if tensor.name not in {*names, *left_out})
    return [
        tensor.name
        for tensor in others
        if len(tensor.shape) == 2 and 0 not in tensor.shape and last_component(tensor.name) in kinds
    ]


def _whole(parts: Sequence[Adapter], weights: Sequence[float], left_out: set[str]) -> Whole:
    """What adapters store whole, by tensor, with weights."""
    replaced: Whole = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, (checkpoint, key) in part.replacements.items():
            if name not in left_out:
                replaced.setdefault(name, []).append((checkpoint, key, weight))
    return replaced


def _ranks(
    model: Model,
    products: Mapping[str, Product],
    exact: tuple[Whole, Mapping[str, tuple[Any, str]]],
    choice: RankChoice | None,
    dtype: str,
    tied: str | None,
    base: str,
) -> dict[str, int]:
    """A rank for every product: all directions where nothing was asked for, else as a plan of these spectra has it."""
    if choice is None:
        return {name: len(product.sigma) for name, product in products.items()}
    sizes = {name: model.checkpoint.info(name).nbytes for name in exact[0]}
    sizes |= {name: sizes.get(name, 0) + held.info(key).nbytes for name, (held, key) in exact[1].items()}
    tensors = []
    for name in sorted({*products, *sizes}):
        info, fixed = model.checkpoint.info(name), sizes.get(name, 0)
        shape, energy, unit, spectrum = tuple(info.shape), None, 0, None
        if name in products and (products[name].sigma.size or choice.layout == "uniform"):
            sigma = np.zeros(min(shape))
            sigma[: products[name].sigma.size] = products[name].sigma
            energy = float(np.sum(sigma**2))
            unit = sum(shape) * DTYPES[dtype] * (2 if name == tied else 1)
            spectrum = Spectrum((shape[0], shape[1]), sigma.tolist(), energy) if energy else None
        treatment = "low-rank" if name in products else "exact"
        tensors.append(
            TensorPlan(name, info.dtype, shape, treatment, energy, None, fixed=fixed, unit=unit, spectrum=spectrum)
        )
    plan = Plan(base, "adapters", {}, Options(dtype=dtype).to_json(), choice, tuple(tensors), 0).choose(choice)
    return dict.fromkeys(products, 0) | plan.stored_ranks


def _manifest(
    model: Model,
    plan: AdapterPlan,
    parts: Sequence[Adapter],
    weights: Sequence[float],
    command: str | None,
    ranks: Mapping[str, int],
    combined_error: float,
) -> dict[str, Any]:
    """What is known of the result."""
    return {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "base": plan.base_name,
        "base_fingerprint": fingerprint(model.checkpoint),
        "made_from": [str(part.path) for part in parts],
        "weights": list(weights),
        "command": command or "lora_compress.combine",
        "causal_lm": model.architecture.endswith("ForCausalLM"),
        "dtype": plan.dtype,
        "combined_error": combined_error,
        "ranks": dict(ranks),
    }
