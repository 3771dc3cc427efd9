"""`extract`: base and tuned checkpoints become an adapter.

Every tensor is visited once. Equal bytes cost a comparison; a changed matrix becomes a delta, its factors are fitted by
the chosen decomposition, lowered to (B, A), rounded to the adapter's dtype, and only then is their error measured: what
is reported is the error of what is stored.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_compress import plugins
from lora_compress._native import Delta, Workspace, __version__, check_finite, energies, kernel, round_to, same_bytes
from lora_compress.adapter import AdapterPlan, Format, PlannedFactors
from lora_compress.decompositions.interface import Decomposition
from lora_compress.errors import SelectionError, TensorError
from lora_compress.model import HEAD, WEIGHT, Model
from lora_compress.verbs import output, side_file
from lora_compress.verbs.account import SCHEMA_VERSION, TensorAccount, total_error, totals_json
from lora_compress.verbs.parallel import ordered_map
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.selection import FLOATS, Pair, Selection, Treatment, matching, refuse, select

if TYPE_CHECKING:
    from lora_compress.adapter import Float32Matrix

DTYPES = ("BF16", "F16", "F32")
# Copied with the adapter when the vocabulary grew: the base's tokenizer does not know the new entries.
TOKENIZER = ("added_tokens.json", "chat_template.*", "merges.txt", "special_tokens_map.json", "tokenizer*", "vocab.*")


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What `extract` did."""

    out: Path
    rank: int
    decomposition: str
    format: str
    dtype: str
    tensors: tuple[TensorAccount, ...]
    adapter_bytes: int
    tuned_bytes: int
    seconds: float
    warnings: tuple[str, ...]

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
    rank: int,
    decomposition: str = "ab",
    format: str = "peft",  # noqa: A002 (the name of the option everywhere)
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
    base, tuned: safetensors files, or directories with `model.safetensors` or a shard index.
    out: directory to create.
    rank: rank of every matrix; smaller ones, and deltas of lower rank, get what they can use.
    decomposition, format: names of registered plugins.
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
    SelectionError, TensorError, CheckpointError, PluginError, OutputExistsError, OSError; `ValueError` for options out
    of range. Nothing is left behind.
    """
    started = time.perf_counter()
    include, exclude, embeddings = (((p,) if isinstance(p, str) else p) for p in (include, exclude, embeddings))
    if rank < 1 or dtype not in DTYPES or not 0 < tolerance < float("inf"):
        raise ValueError(f"rank ({rank}) and tolerance ({tolerance}) must be positive, dtype ({dtype}) one of {DTYPES}")
    out = Path(out)
    output.check(out, force=force, inputs=(Path(base), Path(tuned)))
    base_model, tuned_model = Model.open(base), Model.open(tuned)
    host = plugins.load()
    method, target = host.decompositions[decomposition], host.formats[format]
    selection = select(base_model, tuned_model, include=include, exclude=exclude, skip_missing=skip_missing)
    progress = progress or Silent()
    pairs = _compare(base_model, tuned_model, selection.pairs, progress)
    pairs, warnings = _assign(base_model, target, pairs)
    low_rank = [pair for pair in pairs if pair.treatment is Treatment.LOW_RANK]
    tied = base_model.tied_embedding() if tied_head else None
    if any(name.endswith(HEAD + WEIGHT) for name in selection.missing):
        tied = None  # Tuned has a head of its own: the embedding's factors are not the head's.
    plan = AdapterPlan(
        base=base_model,
        base_name=base_name or str(base),
        dtype=dtype,
        factors=[_planned(pair, rank) for pair in low_rank],
        tied_embedding=tied if any(pair.name == tied for pair in low_rank) else None,
        embeddings=frozenset(matching("--embedding", embeddings, [pair.name for pair in low_rank])),
    )
    settings = {
        "rank": rank,
        "decomposition": method.name,
        "format": target.name,
        "dtype": dtype,
        "seed": seed,
        "tolerance": tolerance,
        "kernel": kernel(),
    }
    with output.new_directory(out, force=force, inputs=(Path(base), Path(tuned))) as partial_out:
        writer = target.writer(partial_out, plan)
        accounts = []
        changed = [pair for pair in pairs if pair.treatment is not Treatment.UNCHANGED]
        progress.begin("extracting", sum(pair.tuned.nbytes for pair in changed), len(changed))
        job = partial(_decompose, base_model, tuned_model, method, host.decompositions.origin(method.name), rank, dtype)
        job = partial(job, seed=seed, tolerance=tolerance, workspace=Workspace())
        announce = partial(_announce, base_model, tuned_model)
        for pair, (account, factors) in ordered_map(job, changed, lambda pair: pair.elements, announce):
            if factors is not None:
                with plugins.blame(host.formats.origin(target.name), f"failed to write `{pair.name}`"):
                    account = replace(account, nbytes=account.nbytes + writer.write(pair.name, *factors))
            accounts.append(account)
            progress.advance(pair.tuned.nbytes, 1, pair.name)
        accounts += _untouched(base_model, tuned_model, selection, pairs)
        accounts.sort(key=lambda account: account.name)
        if not any(account.nbytes for account in accounts):
            raise SelectionError(f"`{tuned}` does not differ from `{base}` in any tensor that is not excluded")
        side_file.write_exact(partial_out, tuned_model.checkpoint, changed)
        if any(account.new_rows for account in accounts):
            _copy_tokenizer(tuned_model, partial_out)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "version": __version__,
            "base": plan.base_name,
            "tuned": str(tuned),
            "command": command or f"lora_compress.extract(rank={rank})",
            "causal_lm": base_model.architecture.endswith("ForCausalLM"),
            **settings,
            "totals": totals_json(accounts),
            "tensors": [account.to_json() for account in accounts],
        }
        side_file.write_manifest(partial_out, manifest)
        writer.finish(manifest)
        adapter_bytes = sum(path.stat().st_size for path in partial_out.rglob("*.safetensors"))
    tuned_bytes = sum(tensor.nbytes for tensor in tuned_model.checkpoint.tensors())
    seconds = time.perf_counter() - started
    return ExtractResult(
        out,
        rank,
        method.name,
        target.name,
        dtype,
        tuple(accounts),
        adapter_bytes,
        tuned_bytes,
        seconds,
        tuple(warnings),
    )


def _compare(base: Model, tuned: Model, pairs: Sequence[Pair], progress: Progress) -> list[Pair]:
    """Mark the pairs whose bytes are equal as unchanged; refuse changed ones that have no treatment."""
    progress.begin("comparing", sum(pair.tuned.nbytes for pair in pairs), len(pairs))
    compared = []

    def job(pair: Pair) -> bool:
        return same_bytes(base.checkpoint, tuned.checkpoint, pair.name)

    for pair, same in ordered_map(job, pairs, lambda _: 1):
        if same:
            compared.append(replace(pair, treatment=Treatment.UNCHANGED))
        elif pair.treatment is Treatment.UNCHANGED:
            raise refuse(pair)
        else:
            compared.append(pair)
        progress.advance(pair.tuned.nbytes, 1, pair.name)
    return compared


def _assign(base: Model, target: Format, pairs: Sequence[Pair]) -> tuple[list[Pair], list[str]]:
    """Turn low-rank into exact where the format has no name for the factors."""
    candidates = [pair.name for pair in pairs if pair.treatment is Treatment.LOW_RANK and pair.elements]
    carried = target.carries(base, candidates)
    assigned, warnings = [], []
    for pair in pairs:
        if pair.treatment is Treatment.LOW_RANK and pair.name not in carried:
            pair = replace(pair, treatment=Treatment.EXACT)
            warnings.append(f"`{pair.name}` is stored whole: the format `{target.name}` has no name for its factors")
        elif pair.treatment is Treatment.EXACT and len(pair.base.shape) > 2:
            warnings.append(f"`{pair.name}` is stored whole: {len(pair.base.shape)}-D weights are not decomposed yet")
        assigned.append(pair)
    return assigned, warnings


def _decompose(
    base: Model,
    tuned: Model,
    method: Decomposition,
    origin: str,
    rank: int,
    dtype: str,
    pair: Pair,
    *,
    seed: int,
    tolerance: float,
    workspace: Workspace,
) -> tuple[TensorAccount, tuple[Float32Matrix, Float32Matrix] | None]:
    """Account and stored factors of one changed pair. Runs in a thread."""
    account = _account(pair)
    stored = pair.tuned.nbytes if pair.treatment is Treatment.EXACT else _row_bytes(pair) * pair.new_rows
    if pair.base.dtype not in FLOATS or pair.tuned.dtype not in FLOATS:
        unknown = None if pair.treatment is not Treatment.EXACT else 0.0
        stored = stored if pair.treatment is Treatment.EXACT else 0
        return replace(account, nbytes=stored, delta_energy=None, base_energy=None, error_energy=unknown), None
    if pair.treatment is Treatment.EXCLUDED:
        return _excluded(base, tuned, pair, account), None
    if pair.new_rows:
        check_finite(tuned.checkpoint, pair.name, pair.base.shape[0])
    if pair.treatment is Treatment.EXACT:
        energy, base_energy = energies(base.checkpoint, tuned.checkpoint, pair.name)
        return replace(account, delta_energy=energy, base_energy=base_energy, nbytes=stored), None
    delta = Delta(base.checkpoint, tuned.checkpoint, pair.name, workspace)
    account = replace(account, delta_energy=delta.energy, base_energy=delta.base_energy)
    if delta.energy == 0.0:
        # Without energy but with other bytes: zeros of another sign, or new rows only. Nothing to decompose.
        return replace(account, nbytes=stored), None
    with plugins.blame(origin, f"failed in the fit of `{method.name}` for `{pair.name}`"):
        b, a = method.lower(method.fit(delta, min(rank, *delta.shape), seed=seed, tolerance=tolerance))
        b, a = round_to(b, dtype), round_to(a, dtype)
        error = delta.residual_energy(b, a)
    if not error < float("inf"):
        raise TensorError(f"`{pair.name}`: its factors overflow {dtype}; use --dtype F32")
    return replace(account, rank=b.shape[1], error_energy=error, nbytes=stored), (b, a)


def _announce(base: Model, tuned: Model, pair: Pair) -> None:
    """Let the disk read a pair while another is computed."""
    for model in (base, tuned):
        model.checkpoint.announce(pair.name)


def _excluded(base: Model, tuned: Model, pair: Pair, account: TensorAccount) -> TensorAccount:
    """What an excluded tensor leaves out; unknown where its values or shapes allow no difference."""
    try:
        energy, base_energy = energies(base.checkpoint, tuned.checkpoint, pair.name)
    except TensorError:
        return replace(account, delta_energy=None, base_energy=None, error_energy=None)
    return replace(account, delta_energy=energy, base_energy=base_energy, error_energy=energy)


def _untouched(base: Model, tuned: Model, selection: Selection, pairs: Sequence[Pair]) -> list[TensorAccount]:
    """Accounts of the tensors that were not compared, or compared equal."""
    accounts = [_account(pair) for pair in pairs if pair.treatment is Treatment.UNCHANGED]
    for treatment, names in ((Treatment.MISSING, selection.missing), (Treatment.TIED, selection.tied_copies)):
        for name in names:
            info = (base if name in base.checkpoint else tuned).checkpoint.info(name)
            accounts.append(TensorAccount(name, info.dtype, tuple(info.shape), treatment))
    return accounts


def _account(pair: Pair) -> TensorAccount:
    rows = pair.new_rows if pair.treatment in {Treatment.LOW_RANK, Treatment.EXACT} else 0
    return TensorAccount(pair.name, pair.base.dtype, tuple(pair.base.shape), pair.treatment, new_rows=rows)


def _planned(pair: Pair, rank: int) -> PlannedFactors:
    rows, cols = pair.base.shape
    return PlannedFactors(pair.name, rows, cols, min(rank, rows, cols))


def _row_bytes(pair: Pair) -> int:
    return pair.tuned.nbytes // pair.tuned.shape[0] if pair.tuned.shape and pair.tuned.shape[0] else 0


def _copy_tokenizer(tuned: Model, out: Path) -> None:
    folder = tuned.path if tuned.path.is_dir() else tuned.path.parent
    for pattern in TOKENIZER:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                shutil.copy2(path, out / path.name)
