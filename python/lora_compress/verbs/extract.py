"""`extract`: base and tuned checkpoints become an adapter.

Ranks are known before factors are found: given as one number, or planned from the spectra of all tensors. Then a
changed matrix becomes a delta, its factors are fitted by the chosen decomposition, lowered to (B, A), scaled, rounded
to the adapter's dtype, and only then is their error measured: what is reported is the error of what is stored.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_compress import plugins
from lora_compress._native import Workspace, __version__, kernel
from lora_compress.adapter import AdapterPlan, stores_factors
from lora_compress.errors import PlanError, SelectionError
from lora_compress.model import last_component, matrix_shape
from lora_compress.ranks.choice import ERROR, RankChoice, choose
from lora_compress.ranks.file import read
from lora_compress.ranks.plan import Plan
from lora_compress.ranks.recognise import recognise
from lora_compress.ranks.text import size
from lora_compress.verbs import output, side_file
from lora_compress.verbs.account import SCHEMA_VERSION, TensorAccount, total_error, totals_json
from lora_compress.verbs.best import BEST, PAIR, best_tasks
from lora_compress.verbs.changes import Changes, Options, find_changes, nothing_changed, untouched
from lora_compress.verbs.companions import copy_tokenizer
from lora_compress.verbs.decompose import Decomposed, Storing, decompose, empty, padded
from lora_compress.verbs.parallel import ordered_map
from lora_compress.verbs.plan import check_energies, check_made_for, plan_changes
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.selection import Treatment
from lora_compress.verbs.stacks import spread_ranks
from lora_compress.verbs.tasks import check_some_fit, planned_groups, planned_pairs, tasks, zeros

if TYPE_CHECKING:
    from lora_compress.adapter import AdapterWriter, FactorsWriter, Format

# An error that was asked for may be missed by this, relatively, without a word.
WITHIN = 1e-3
# The format of "best": pairs alone would make `ab` the best of all everywhere.
FACTORS = "factors"


@dataclass(frozen=True, slots=True, repr=False)
class ExtractResult:
    """What `extract` did."""

    out: Path
    choice: RankChoice
    scale: float | Mapping[str, float]
    decomposition: str
    format: str
    dtype: str
    tensors: tuple[TensorAccount, ...]
    adapter_bytes: int
    tuned_bytes: int
    seconds: float
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"ExtractResult({str(self.out)!r}: {self.choice.describe()}, {size(self.adapter_bytes)}, ranks up to "
            f"{self.rank}, error {self.error:.4f})"
        )

    @property
    def rank(self) -> int:
        """The largest rank of any tensor."""
        return max((tensor.rank for tensor in self.tensors), default=0)

    @property
    def error(self) -> float:
        """‖ΔW − stored‖ / ‖ΔW‖ over all tensors."""
        return total_error(self.tensors)

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "out": str(self.out),
            "rank": self.rank,
            "choice": self.choice.to_json(),
            "scale": dict(self.scale) if isinstance(self.scale, Mapping) else self.scale,
            "decomposition": self.decomposition,
            "format": self.format,
            "dtype": self.dtype,
            "adapter_bytes": self.adapter_bytes,
            "tuned_bytes": self.tuned_bytes,
            "seconds": self.seconds,
            "totals": totals_json(self.tensors),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "warnings": list(self.warnings),
        }


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | str | None = None,
    budget: int | str | None = None,
    error: float | None = None,
    plan: str | Path | Plan | None = None,
    weights: str | None = None,
    ranks_allowed: str | Sequence[int] | None = None,
    max_rank: int | None = None,
    layout: str | None = None,
    scale: float | Mapping[str, float] = 1.0,
    decomposition: str = "ab",
    format: str | None = None,  # noqa: A002 (the name of the option everywhere)
    dtype: str = "BF16",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    skip_missing: bool = False,
    tied_head: bool = True,
    base_name: str | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> ExtractResult:
    """Extract an adapter from a full fine-tune.

    Parameters
    ----------
    base, tuned: files of safetensors or PyTorch, directories of them, or names on the Hub.
    out: directory to create.
    rank: a number for every matrix (smaller ones, and deltas of lower rank, get what they can use); "auto", the
        default; or a rule for each matrix such as "energy=0.9" (`lora_compress.ranks.choice` lists them).
    budget: size of the whole adapter instead, in bytes or as "50MB".
    error: ‖ΔW − stored‖ / ‖ΔW‖ over all tensors instead.
    plan: a plan, or the file of one, to follow instead; it also says which tensors and what dtype.
    weights: what a tensor's error is worth to a budget, an error or "auto" (`lora_compress.ranks.weights`).
    ranks_allowed: the ranks that may be used: numbers, "8,16,32", "vllm", or "8x" for multiples of 8.
    max_rank: no rank above this; alone, it is the rank.
    layout: "peft" (a rank for every tensor), or "uniform" (all padded to one, for servers that know no other).
    scale: the adapter's ΔW is multiplied by this, in its factors; or a number for each kind of module (`q_proj`, …), 1
        for those that are not named. `lora_compress.torch.scale` finds good ones.
    decomposition: the name of a registered one, or "best": of all, for every layer or group of layers the one that
        leaves the least error at the size that pairs of the chosen ranks have.
    format: the name of a registered one; "peft", or "factors" for "best", when absent.
    dtype: element type of the stored factors, "BF16", "F16" or "F32".
    include, exclude: regular expressions searched in tensor names; excluded tensors keep the base's values.
    embeddings: regular expressions for embeddings that their names do not give away.
    skip_missing: go on when one side lacks tensors.
    tied_head: store a tied embedding's factors for the output head too, so that PEFT's forward applies them to both.
    base_name: what the adapter calls its base, a Hub id for instance; the path as given when absent.
    seed: seed of the randomised decomposition; the same inputs and seed give the same bytes.
    tolerance: how far above the best error of its rank each matrix may be, relatively.
    force: replace an existing output.
    command: the command line to record in the model card.
    progress: receives progress reports.

    Raises
    ------
    SelectionError, TensorError, CheckpointError, PlanError, PluginError, OutputExistsError, OSError; `ValueError` for
    options out of range. Nothing is left behind.
    """
    started = time.perf_counter()
    scales = [*scale.values()] if isinstance(scale, Mapping) else [scale]
    if not 0 < tolerance < float("inf") or not all(0 < abs(each) < float("inf") for each in scales):
        raise ValueError(f"tolerance ({tolerance}) must be positive, scale ({scale}) must not be 0")
    asked = {"rank": rank, "budget": budget, "error": error, "weights": weights, "ranks_allowed": ranks_allowed}
    choice = choose(**asked, max_rank=max_rank, layout=layout)  # type: ignore[arg-type]
    usual = FACTORS if decomposition == BEST and plan is None else Options().format
    options = Options(include, exclude, embeddings, skip_missing, tied_head, format or usual, dtype, seed)
    if plan is not None:
        if choice != RankChoice() or options != Options():
            raise PlanError("a plan already says which tensors, ranks, format and dtype: plan again to change them")
        plan = plan if isinstance(plan, Plan) else read(Path(plan))
        choice, options = plan.choice, Options.from_json(plan.options)
    out = Path(out)
    output.check_directory(out, force=force, inputs=(Path(base), Path(tuned)))
    host = plugins.load()
    method = host.decompositions[decomposition] if decomposition != BEST else None
    target = host.formats[options.format]
    progress = progress or Silent()
    changes = find_changes(base, tuned, target, options, progress)
    if plan is not None:
        check_made_for(plan, changes, options)
    elif choice.fixed is None:
        plan = plan_changes(changes, choice, options, base=str(base), tuned=str(tuned), progress=progress)
    ranks = _ranks(changes, plan, choice)
    as_factors = stores_factors(target)
    _check_wishes(changes, scale, choice, target, is_best=method is None and format is None)
    pads = ranks if choice.pads and not as_factors else {}
    storing = Storing(as_factors, options.dtype, scale, pads, fills=choice.layout == "uniform")
    failed: list[str] = []
    if method is None:
        work, failed = best_tasks(changes, storing, ranks, progress, seed=options.seed, tolerance=tolerance)
    else:
        is_own = plan is None and choice == RankChoice("rank", choice.value, choice.weights)
        work = tasks(changes, method, ranks, int(choice.value) if is_own else None, as_factors=as_factors)
    if method is not None:
        check_some_fit(work, method, ranks, as_factors=as_factors)
    adapter_plan = AdapterPlan(
        base=changes.base,
        base_name=base_name or str(base),
        dtype=options.dtype,
        factors=[*planned_pairs(work, pads), *zeros(changes, pads)] if not as_factors else [],
        groups=planned_groups(work) if as_factors else [],
        tied_embedding=changes.tied_embedding if ranks.get(changes.tied_embedding or "") else None,
        embeddings=changes.embeddings,
    )
    energies = {tensor.name: tensor.delta_energy for tensor in plan.low_rank} if plan is not None else {}
    job = partial(decompose, changes, storing, seed=options.seed, tolerance=tolerance, workspace=Workspace())
    with output.new_directory(out, force=force, inputs=(Path(base), Path(tuned))) as partial_out:
        with plugins.blame(host.formats.origin(target.name), "failed to begin an adapter"):
            writer = target.writer(partial_out, adapter_plan)
        accounts = []
        progress.begin("extracting", sum(task.nbytes for task in work), len(work))
        for task, done in ordered_map(
            job, work, lambda task: task.elements, lambda task: changes.announce(task.pairs[0])
        ):
            with plugins.blame(host.formats.origin(target.name), f"failed to write `{task.name}`"):
                sizes = _write(writer, done)
            accounts += [replace(each, nbytes=each.nbytes + sizes.get(each.name, 0)) for each in done.accounts]
            progress.advance(task.nbytes, 1, task.name)
        check_energies(energies, accounts)
        accounts += _pad_unchanged(writer, changes, pads)
        accounts.sort(key=lambda account: account.name)
        if not any(account.nbytes for account in accounts):
            raise SelectionError(_nothing(changes, accounts))
        side_file.write_exact(partial_out, changes.tuned.checkpoint, changes.changed)
        if any(account.new_rows for account in accounts):
            copy_tokenizer(changes.tuned.folder, partial_out)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "version": __version__,
            "base": adapter_plan.base_name,
            "base_fingerprint": changes.base.fingerprint,
            "tuned_fingerprint": changes.tuned.fingerprint,
            "tuned": str(tuned),
            "command": command or f"lora_compress.extract({choice.describe()})",
            "causal_lm": changes.base.architecture.endswith("ForCausalLM"),
            "rank": max(account.rank for account in accounts),
            "choice": choice.to_json(),
            "scale": dict(scale) if isinstance(scale, Mapping) else scale,
            "decomposition": decomposition,
            "format": target.name,
            "dtype": options.dtype,
            "seed": options.seed,
            "tolerance": tolerance,
            "kernel": kernel(),
            "totals": totals_json(accounts),
            "tensors": [account.to_json() for account in accounts],
        }
        side_file.write_manifest(partial_out, manifest)
        writer.finish(manifest)
        adapter_bytes = sum(path.stat().st_size for path in partial_out.rglob("*.safetensors"))
    tuned_bytes = sum(tensor.stored_nbytes for tensor in changes.tuned.checkpoint.tensors())
    return ExtractResult(
        out,
        choice,
        scale,
        decomposition,
        target.name,
        options.dtype,
        tuple(accounts),
        adapter_bytes,
        tuned_bytes,
        time.perf_counter() - started,
        (
            *changes.warnings,
            *failed,
            *(recognise(plan).warnings if plan is not None else ()),
            *_broken_wishes(choice, accounts, decomposition, tuned_bytes),
        ),
    )


def _check_wishes(
    changes: Changes, scale: float | Mapping[str, float], choice: RankChoice, target: Format, *, is_best: bool
) -> None:
    """Raise `SelectionError` or `PlanError` for wishes that contradict each other or the models."""
    kinds = {last_component(pair.name) for pair in changes.low_rank}
    if isinstance(scale, Mapping) and (strangers := set(scale) - kinds):
        raise SelectionError(f"there is no kind of module `{min(strangers)}` to scale")
    if is_best and not stores_factors(target):
        raise PlanError(
            f"the plan is for the format `{target.name}`, and of pairs `{PAIR}` is the best of all: plan with "
            f"--format {FACTORS}"
        )
    if stores_factors(target) and choice.layout == "uniform":
        raise SelectionError(f"the layout `uniform` is one of pairs: the format `{target.name}` stores none")


def _broken_wishes(
    choice: RankChoice, accounts: Sequence[TensorAccount], decomposition: str, tuned_bytes: int
) -> list[str]:
    """Warnings where what is stored is not what was asked for."""
    warnings = []
    error = total_error(accounts)
    if choice.rule == ERROR and error > choice.value * (1 + WITHIN):
        why = (
            "their rounding (--dtype F32 has less) and a scale other than 1 are not planned for"
            if decomposition == PAIR
            else f"sizes are planned for `{PAIR}`, at which `{decomposition}` may leave more"
        )
        warnings.append(
            f"the stored factors leave a relative error of {error:.4g}, above the {choice.value:g} asked for: {why}"
        )
    stored = sum(account.nbytes for account in accounts)
    if stored > tuned_bytes:
        warnings.append(f"the adapter takes {stored / max(tuned_bytes, 1):.0%} of the tuned model's bytes")
    if error > 1:
        warnings.append(
            f"base + adapter is farther from tuned than base alone (relative error {error:.3g}): mind the scale"
        )
    matrices = [account for account in accounts if account.treatment is Treatment.LOW_RANK and account.delta_energy]
    if matrices and not any(account.rank for account in matrices):
        warnings.append(
            "no direction of any matrix is worth storing under this choice: the adapter holds exact tensors only"
        )
    return warnings


def _ranks(changes: Changes, plan: Plan | None, choice: RankChoice) -> dict[str, int]:
    """The rank of every matrix that will have factors; in the uniform layout also of those that get zeros."""
    if plan is not None:
        return spread_ranks(plan.stored_ranks, (pair.name for pair in changes.pairs))
    ranks = choice.fixed_ranks({pair.name: min(pair.matrix) for pair in changes.low_rank if pair.elements})
    zeros = changes.zeros if choice.layout == "uniform" else []
    return ranks | {pair.name: max(ranks.values(), default=0) for pair in zeros}


def _write(writer: AdapterWriter | FactorsWriter, done: Decomposed) -> dict[str, int]:
    """Hand what a task gave to the format; bytes by tensor."""
    sizes = {name: cast("AdapterWriter", writer).write(name, *pair) for name, pair in done.pairs.items()}
    if done.group is not None:
        written = cast("FactorsWriter", writer).write_group(done.group)
        sizes |= dict(zip(done.group.tensors, written, strict=True))
    return sizes


def _pad_unchanged(
    writer: AdapterWriter | FactorsWriter, changes: Changes, pads: Mapping[str, int]
) -> list[TensorAccount]:
    """Accounts of the tensors that did not change; those that have a rank get factors of zeros."""
    accounts = []
    for account in untouched(changes):
        if pads.get(account.name) and account.treatment is Treatment.UNCHANGED:
            rank = pads[account.name]
            size = cast("AdapterWriter", writer).write(
                account.name, *padded(*empty(*matrix_shape(account.shape)), rank)
            )
            account = replace(account, rank=rank, nbytes=size)
        accounts.append(account)
    return accounts


def _nothing(changes: Changes, accounts: Sequence[TensorAccount]) -> str:
    """Why there is nothing to store."""
    if any(account.delta_energy for account in accounts if account.treatment is Treatment.LOW_RANK):
        return "no direction of any ΔW is worth storing under this choice of ranks: allow more, or give --rank a number"
    return nothing_changed(changes)
