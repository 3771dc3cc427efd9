"""`resize` and `combine`: adapters become an adapter.

A sum of adapters stays in the space of their factors: no ΔW is formed, no weight is read. TIES and DARE act on every
element of ΔW, so each is formed in its turn. Either way σ are found before factors are, so the ranks of the result are
planned as those of an extraction are, and every choice of ranks works the same.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lora_compress import plugins
from lora_compress._native import Spectrum, __version__
from lora_compress.adapter import Adapter, AdapterPlan, PlannedFactors, Stored, stores_factors
from lora_compress.errors import SelectionError, TensorError
from lora_compress.model import Model, is_convolution, is_stack, last_component, matrix_shape
from lora_compress.ranks.choice import RankChoice, choose
from lora_compress.ranks.plan import Plan, TensorPlan
from lora_compress.verbs import output, side_file, stacks
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.changes import DTYPES, Options
from lora_compress.verbs.combined_tensors import Combined, Consensus, Sum
from lora_compress.verbs.decompose import padded
from lora_compress.verbs.merge import appended_rows, check_made_for, one_weight_each, read_adapter
from lora_compress.verbs.methods import LINEAR, Method, choose_method
from lora_compress.verbs.parallel import ordered_map
from lora_compress.verbs.plan import first_bound
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.selection import matching

if TYPE_CHECKING:
    from lora_compress.adapter import AdapterWriter

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, repr=False)
class CombineResult:
    """What `resize` or `combine` did. `error`: ‖ΔW − stored‖ / ‖ΔW‖ over the low-rank tensors, those that were left out
    included, ΔW being what the method makes of the adapters given, their sum if it is linear. `ranks`: (before, after)
    by tensor; before is what the sum has, or for other methods the largest rank in any adapter.
    """

    out: Path
    method: str
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
            "method": self.method,
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
    method: str = LINEAR,
    density: float | Sequence[float] | None = None,
    seed: int = 0,
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
    """Make one adapter of several of one base: their weighted sum, or what TIES or DARE make of them.

    "linear" adds. Without any wish for ranks the sum is exact but for the rounding of its factors: its rank is what all
    directions need, at most the sum of the ranks.

    "ties", "dare_linear" and "dare_ties" take each adapter's ΔW = s·B·A of a tensor, set most elements to 0 (TIES those
    of small magnitude, DARE random ones, dividing the others by the density), multiply by the weight, and add, or elect
    a sign for each element and average those that have it (`lora_compress.verbs.task_vectors` has the formulas). Little
    of that is low-rank: it is cut to its best pair, without a wish of the largest rank that the tensor has in any
    adapter, and `error` says what that leaves. PEFT has this as `ties_svd`, `dare_linear_svd` and `dare_ties_svd`, with
    the difference that there TIES' votes are not weighted; its `ties` trims the factors B and A each by itself.

    Tensors that an adapter stores whole (norms, biases) are stored whole, and added whatever the method: a copy where
    one of weight 1 has it, else base + Σ w·(theirs − base). Appended rows are kept.

    Parameters
    ----------
    base: the model that the adapters were made for. Its names and shapes are needed, and the values of tensors that
        are stored whole by several adapters.
    adapters: directories of any registered format.
    out: directory to create.
    weights: one for each adapter; 1 for all when absent.
    method: "linear", "ties", "dare_linear" or "dare_ties".
    density: the share of each ΔW's elements that is kept, above 0 and up to 1: one for all adapters, or one for each.
        All methods but "linear" need it.
    seed: of what is dropped, and of the search for singular vectors; "linear" needs none.
    exclude: regular expressions; tensors in whose names one is found keep the base's values.
    rank, budget, error, ranks_allowed, max_rank, layout: as for `extract`; errors are relative to what the method
        makes. Of that, σ beyond a bound are only found where a wish depends on them, as `plan` does.
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
    how = choose_method(method, density, seed, len(adapters))
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype}) must be one of {tuple(DTYPES)}")
    wishes = {"rank": rank, "budget": budget, "error": error, "weights": rank_weights, "ranks_allowed": ranks_allowed}
    asked = any(wish is not None for wish in (*wishes.values(), max_rank, layout))
    choice = choose(**wishes, max_rank=max_rank, layout=layout)  # type: ignore[arg-type]
    out, inputs = Path(out), (Path(base), *map(Path, adapters))
    output.check_directory(out, force=force, inputs=inputs)
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
    factored = {name for part in parts for name in part.factored()}
    names = sorted(factored - left_out)
    if choice.layout == "uniform":
        names = sorted([*names, *_same_kind(model, names, left_out)])
    shapes = {name: _shape(model, name) for name in {*names, *factored}}
    combined: Combined = Sum(parts, weights, shapes) if how.is_sum else Consensus(parts, weights, shapes, how)
    exact = _whole(parts, weights, left_out), appended_rows(parts, left_out)
    progress = progress or Silent()
    before = _by_name("reading adapters", combined.usual_rank, names, combined, progress)
    ranks = _ranks(model, combined, names, exact, choice, dtype, tied, progress) if asked else before
    carried = target.carries(model, [name for name in names if ranks[name]])
    if nameless := [name for name in names if ranks[name] and name not in carried]:
        raise SelectionError(
            f"the format `{format}` has no name for factors of `{nameless[0]}`: leave it out with --exclude "
            f"'^{re.escape(nameless[0])}$'"
        )
    plan = AdapterPlan(
        base=model,
        base_name=base_name or str(base),
        dtype=dtype,
        factors=[PlannedFactors(name, *shapes[name], ranks[name]) for name in names if ranks[name]],
        tied_embedding=tied if ranks.get(tied or "") else None,
        metadata=parts[0].metadata if len(parts) == 1 else {},
    )
    after: dict[str, int] = {}
    stored: dict[str, int] = {}
    lost, whole = [], []
    origin = host.formats.origin(target.name)
    with output.new_directory(out, force=force, inputs=inputs) as folder:
        with plugins.blame(origin, "failed to begin an adapter"):
            writer = cast("AdapterWriter", target.writer(folder, plan))
        progress.begin("combining", 0, len(names))
        for name, made in ordered_map(lambda name: combined.factors(name, ranks[name], dtype), names, combined.cost):
            if not made.lost < math.inf:
                raise TensorError(f"`{name}`: its factors overflow {dtype}; use --dtype F32")
            after[name] = made.b.shape[1]
            lost.append(made.lost)
            whole.append(made.energy)
            # Zeros are stored where the layout wants them, elsewhere a tensor without a direction has no factors.
            pads = asked and choice.pads and (after[name] or choice.layout == "uniform")
            b, a = padded(made.b, made.a, ranks[name]) if pads else (made.b, made.a)
            stored[name] = b.shape[1]
            if stored[name]:
                with plugins.blame(origin, f"failed to write `{name}`"):
                    writer.write(name, b, a)
            progress.advance(0, 1, name)
        for energy in _by_name("measuring", combined.energy, sorted(left_out & factored), combined, progress).values():
            lost.append(energy)
            whole.append(energy)
        side_file.write_stored(folder, model.checkpoint, *exact)
        total = math.fsum(whole)
        combined_error = math.sqrt(math.fsum(lost) / total) if total else 0.0
        manifest = _manifest(model, plan, parts, weights, how, command, stored, combined_error)
        side_file.write_manifest(folder, manifest)
        with plugins.blame(origin, "failed to finish an adapter"):
            writer.finish(manifest)
        adapter_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return CombineResult(
        out,
        how.name,
        {name: (before[name], after[name]) for name in names},
        combined_error,
        adapter_bytes,
        time.perf_counter() - started,
        (
            *(warning for part in parts for warning in part.warnings),
            *(f"`{name}` is left out: it keeps the base's values" for name in sorted(left_out)),
        ),
    )


def _shape(model: Model, name: str) -> tuple[int, int]:
    """Rows and columns of a weight of the base, seen as a matrix."""
    return matrix_shape(model.checkpoint.info(name).shape)


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
        if last_component(tensor.name) in kinds
        and 0 not in tensor.shape
        and (len(tensor.shape) == 2 or is_convolution(tensor.name, tensor.shape))
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
    combined: Combined,
    names: Sequence[str],
    exact: tuple[Whole, Mapping[str, Stored]],
    choice: RankChoice,
    dtype: str,
    tied: str | None,
    progress: Progress,
) -> dict[str, int]:
    """A rank for every tensor as a plan of their spectra has it; with more σ of those whose rank turns out to need
    them.
    """
    shapes = {name: _shape(model, name) for name in names}
    if choice.fixed is not None and not combined.is_cheap:
        return choice.fixed_ranks({name: min(shape) for name, shape in shapes.items()})
    spectra: dict[str, Spectrum | None] = {}
    counts = {name: first_bound(choice, shape) for name, shape in shapes.items()}
    while True:
        spectra |= _by_name("reading spectra", partial(_spectrum, combined, counts), [*counts], combined, progress)
        plan = _plan(model, spectra, exact, choice, dtype, tied)
        if not plan.unsettled:
            return dict.fromkeys(names, 0) | stacks.spread_ranks(plan.stored_ranks, names)
        known = {tensor.name: len(tensor.spectrum.sigma) for tensor in plan.low_rank if tensor.spectrum is not None}
        counts = {name: 2 * known[stacks.whole(name)] for name in names if stacks.whole(name) in plan.unsettled}


def _spectrum(combined: Combined, counts: Mapping[str, int], name: str) -> Spectrum | None:
    """Runs in a thread."""
    return combined.spectrum(name, counts[name])


def _by_name(
    what: str, job: Callable[[str], Result], names: Sequence[str], combined: Combined, progress: Progress
) -> dict[str, Result]:
    """What `job` says of every tensor, found in threads."""
    progress.begin(what, 0, len(names))
    found: dict[str, Result] = {}
    for name, result in ordered_map(job, names, combined.cost):
        found[name] = result
        progress.advance(0, 1, name)
    return found


def _plan(
    model: Model,
    spectra: Mapping[str, Spectrum | None],
    exact: tuple[Whole, Mapping[str, Stored]],
    choice: RankChoice,
    dtype: str,
    tied: str | None,
) -> Plan:
    """The plan of an adapter of these spectra, and of what is stored whatever the ranks."""
    sizes = {name: model.checkpoint.info(name).nbytes for name in exact[0]}
    sizes |= {name: sizes.get(name, 0) + held.info(key).nbytes for name, (held, key) in exact[1].items()}
    sizes, joined = stacks.join_sizes(sizes), stacks.join_spectra(spectra)
    tensors = []
    for name in sorted({*joined, *sizes}):
        info, spectrum = model.checkpoint.info(name), joined.get(name)
        is_stored = spectrum is not None or (name in joined and choice.layout == "uniform")
        # One more rank of a stack is one of each of its experts.
        experts, shape = (info.shape[0], info.shape[1:]) if is_stack(name, info.shape) else (1, info.shape)
        tensors.append(
            TensorPlan(
                name,
                info.dtype,
                tuple(info.shape),
                "low-rank" if name in joined else "exact",
                (spectrum.energy if spectrum is not None else 0.0) if is_stored else None,
                None,
                fixed=sizes.get(name, 0),
                unit=experts * sum(matrix_shape(shape)) * DTYPES[dtype] * (1 + (name == tied)) if is_stored else 0,
                spectrum=spectrum,
            )
        )
    options = Options(dtype=dtype).to_json()
    return Plan(str(model.path), "adapters", {}, options, choice, tuple(tensors), 0).choose(choice)


def _manifest(
    model: Model,
    plan: AdapterPlan,
    parts: Sequence[Adapter],
    weights: Sequence[float],
    how: Method,
    command: str | None,
    ranks: Mapping[str, int],
    combined_error: float,
) -> dict[str, Any]:
    """What is known of the result."""
    return {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "base": plan.base_name,
        "base_fingerprint": model.fingerprint,
        "made_from": [str(part.path) for part in parts],
        "weights": list(weights),
        **how.to_json(),
        "command": command or "lora_compress.combine",
        "causal_lm": model.architecture.endswith("ForCausalLM"),
        "dtype": plan.dtype,
        "combined_error": combined_error,
        "ranks": dict(ranks),
    }
