"""`merge`: a base and adapters become a merged checkpoint, W' = round(W + Σ w·s·B·A).

The output has the base's files: the same shards, order, index and, unless told otherwise, dtypes. Tensors that no
adapter touches are copied byte for byte, and so is everything else that makes a model (configuration, tokenizer). What
comes from PyTorch's files is written as safetensors, weights of eight bits as BF16.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_compress import plugins
from lora_compress._native import (
    Checkpoint,
    LowRank,
    MergedTensor,
    Patch,
    Update,
    merge_shard,
    same_bytes,
)
from lora_compress.adapter import Adapter, Stored
from lora_compress.errors import AdapterError
from lora_compress.hub import resolve
from lora_compress.model import FLOATS, Model, names
from lora_compress.verbs import base_patch, output
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.companions import shard_names, write_companions
from lora_compress.verbs.journal import Arrival, Journal, arrivals, key_of
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.side_file import read_manifest, with_side_file
from lora_compress.verbs.stacks import whole

NEAREST, STOCHASTIC = ROUNDINGS = ("nearest", "stochastic")
# An update of which less than this arrives is worth a warning.
ENOUGH = 0.95


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What `merge` did.

    lost: the share of the elements with an update that rounding left as they were.
    gain: ⟨W' − W, D⟩ / ⟨D, D⟩ over all updates D: how much of them arrived; 1 where there is none.
    resumed: how many of the shards were there already, from a merge that was killed.
    """

    out: Path
    changed: int
    copied: int
    nbytes: int
    lost: float
    gain: float
    shards: int
    resumed: int
    seconds: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "out": str(self.out),
            "changed_tensors": self.changed,
            "copied_tensors": self.copied,
            "bytes": self.nbytes,
            "lost_fraction": self.lost,
            "effective_gain": self.gain,
            "shards": self.shards,
            "resumed_shards": self.resumed,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


def merge(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] = (),
    dtype: str | None = None,
    rounding: str = NEAREST,
    seed: int = 0,
    any_base: bool = False,
    keep_base_patch: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge adapters into a base model.

    Several adapters are summed in the order given, in one pass. Where exactly one of weight 1 stores a tensor whole,
    its values are copied; else each one's weighted difference to the base is added.

    A process that is killed leaves its finished shards in a hidden directory; the same merge takes them up and gives
    the same bytes. It starts over for a single file and with `keep_base_patch`, whose patch is one file over all
    shards; where a file, an option or this package has changed since; and after a restart of the machine.

    Parameters
    ----------
    base: a file of safetensors or PyTorch, a directory of them, or a name on the Hub.
    adapters: adapter directories of any registered format.
    out: directory to create; with a name ending in `.safetensors` and an unsharded base, a single file.
    weights: one for each adapter; 1 for all when absent.
    dtype: "BF16", "F16", "F32" or "F64" for all float tensors; each one's own when absent.
    rounding: "nearest", or "stochastic": up or down at random, so that small updates survive on average (BF16, F16).
    seed: of stochastic rounding; the same seed gives the same bytes.
    keep_base_patch: keep what leads back to the base in `lora_compress/` of the output: `unmerge` restores it to the
        bit. Not with a `dtype`, nor for a single file.
    any_base: merge although an adapter was made for a base with other values.
    force: replace an existing output.
    progress: receives progress reports.

    Raises
    ------
    AdapterError, TensorError, CheckpointError, PluginError, OutputExistsError, OSError; `ValueError` for options out of
    range. Nothing is left behind.
    """
    started = time.perf_counter()
    if isinstance(adapters, str | Path):
        adapters = [adapters]
    if not adapters:
        raise ValueError("at least one adapter is needed")
    weights = one_weight_each(adapters, weights)
    if rounding not in ROUNDINGS or not 0 <= seed < 2**64 or dtype not in {None, *FLOATS}:
        raise ValueError(f"rounding ({rounding}) is one of {ROUNDINGS}, dtype ({dtype}) a float type, seed of 64 bits")
    out, inputs = Path(out), (Path(base), *map(Path, adapters))
    as_file = out.suffix == ".safetensors"
    if keep_base_patch and (as_file or dtype is not None):
        raise ValueError("a patch of the base needs a directory as output, and the base's dtypes")
    (output.check_file if as_file else output.check)(out, force=force, inputs=inputs)
    model = Model.open(base)
    parts = [read_adapter(path, model) for path in adapters]
    if not any_base:
        check_made_for(model, parts)
    updates, followed = _with_copied_head(model, combine(parts, weights))
    kept: Patch | None = None
    stochastic = seed if rounding == STOCHASTIC else None
    report = progress or Silent()

    def write(number: int, path: Path) -> list[MergedTensor]:
        return merge_shard(
            model.checkpoint, number, updates, path, report.advance, dtype=dtype, stochastic=stochastic, patch=kept
        )[1]

    report.begin("merging", sum(tensor.nbytes for tensor in model.checkpoint.tensors()), 0)

    if as_file and len(model.checkpoint.shards) > 1:
        raise ValueError(f"`{base}` has several shards: `{out}` must be a directory")
    shards, resumed, skipped = shard_names(model), 0, list[str]()
    if as_file:
        with output.new_file(out, force=force, inputs=inputs) as path:
            merged = arrivals(write(0, path))
    else:
        key = key_of(model, parts, weights, dtype=dtype, stochastic=stochastic) if not keep_base_patch else None
        with output.new_directory(out, force=force, inputs=inputs, key=key) as folder:
            journal = Journal(folder, key, shards)
            resumed = len(journal.done)
            taken_up = {
                file.name for file, name in zip(model.checkpoint.shards, shards, strict=True) if name in journal.done
            }
            report.advance(sum(tensor.nbytes for tensor in model.checkpoint.tensors() if tensor.shard in taken_up))
            if keep_base_patch:
                kept = base_patch.begin(folder, model, sorted(updates))
            merged = _missing_too(journal, folder, shards, write)
            skipped = write_companions(model, parts, folder, shards, dtype)
            if kept is not None:
                base_patch.finish(kept, folder, model)
    nbytes = out.stat().st_size if as_file else sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    lost, gain, said = _arrived(merged)
    notes = [*model.checkpoint.notes, *followed, *_widened(model, dtype)]
    warnings = [*notes, *(warning for part in parts for warning in part.warnings), *skipped, *said]
    changed = len({whole(name) for name in updates})
    copied = len(names(model.checkpoint)) - changed
    seconds = time.perf_counter() - started
    return MergeResult(out, changed, copied, nbytes, lost, gain, len(shards), resumed, seconds, tuple(warnings))


def _with_copied_head(base: Model, updates: dict[str, Update]) -> tuple[dict[str, Update], list[str]]:
    """A head that is stored as the embedding's matrix once more follows it, or merging would untie the two."""
    head, embedding = base.copied_head or ("", "")
    if embedding not in updates or head in updates:
        return updates, []
    return updates | {head: updates[embedding]}, [f"`{head}` is `{embedding}` once more, and gets its update too"]


def _widened(base: Model, dtype: str | None) -> list[str]:
    """A warning of eight-bit weights that merging rounds."""
    count = sum(tensor.dtype == "F32" != tensor.stored_dtype for tensor in base.checkpoint.tensors())
    if not count or dtype in {"F32", "F64"}:
        return []
    return [
        f"{count} weights of eight bits are written as {dtype or 'BF16'}, each rounded once more (--dtype F32 is exact)"
    ]


def _missing_too(
    journal: Journal, folder: Path, shards: Sequence[str], write: Callable[[int, Path], list[MergedTensor]]
) -> list[Arrival]:
    """Write the shards that the journal lacks; returns what became of the updates of all, in the order of shards."""
    for number, name in enumerate(shards):
        if name not in journal.done:
            journal.add(folder / name, write(number, folder / name))
    return [arrival for name in shards for arrival in journal.done[name]]


def _arrived(merged: Sequence[Arrival]) -> tuple[float, float, list[str]]:
    """The share of elements whose update was lost, that of the update that arrived, and warnings of either."""
    touched, asked = sum(tensor.touched for tensor in merged), math.fsum(tensor.asked for tensor in merged)
    lost = sum(tensor.lost for tensor in merged) / touched if touched else 0.0
    gain = math.fsum(tensor.got for tensor in merged) / asked if 0 < asked < math.inf else 1.0
    warnings = []
    if not math.isfinite(asked):
        warnings.append("the updates are so large that how much of them arrived cannot be measured: mind the weights")
    if gain < ENOUGH:
        warnings.append(
            f"rounding swallows the update: {gain:.0%} of it arrives, {lost:.0%} of the elements stay as they were. "
            "Store more digits (--dtype F32), round at random (--rounding stochastic), or serve base and adapter apart"
        )
    return lost, gain, warnings


def one_weight_each(adapters: Sequence[str | Path], weights: Sequence[float]) -> tuple[float, ...]:
    """The weights given, or 1 for all where there are none. Raises `ValueError` for others than one for each."""
    weights = tuple(weights) or (1.0,) * len(adapters)
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"weights ({list(weights)}) have to be finite numbers, one for each of {len(adapters)} adapters"
        )
    return weights


def check_made_for(base: Model, adapters: Sequence[Adapter]) -> None:
    """Raise `AdapterError` for an adapter that says it was made for a base with other values."""
    for adapter in adapters:
        theirs = read_manifest(adapter.path).get("base_fingerprint") if adapter.path.is_dir() else None
        if theirs is not None and theirs != base.fingerprint:
            raise AdapterError(
                f"`{adapter.path}` was made for a base with other values than `{base.path}` has: pass --any-base to go "
                "on all the same"
            )


def read_adapter(path: str | Path, base: Model) -> Adapter:
    """Read an adapter of any registered format, with its side file.

    Raises `AdapterError` when no format recognises it, or when it has parts for tensors that `base` does not have.
    """
    path = resolve(path)
    if not path.exists():
        raise FileNotFoundError(2, "No such adapter", str(path))
    host = plugins.load()
    form = host.format_of(path)
    if form is None:
        known = ", ".join(form.name for form in host.formats)
        raise AdapterError(
            f"`{path}` is not an adapter of any known format ({known}): is there an `adapter_config.json`, or an "
            "`adapter_factors.json`?"
        )
    with plugins.blame(host.formats.origin(form.name), f"failed in `read` of `{form.name}`"):
        adapter = form.read(path, base)
    adapter = with_side_file(adapter)
    unknown = sorted(name for name in adapter.tensors() if name not in base.checkpoint)
    if unknown:
        raise AdapterError(
            f"`{path}` changes `{unknown[0]}`, which `{base.path}` does not have: is it an adapter of another base?"
        )
    return adapter


def combine(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Update]:
    """What several weighted adapters together do to each tensor. Raises `AdapterError` when two append rows to one."""
    low_rank: dict[str, list[LowRank]] = {}
    computed: dict[str, list[Any]] = {}
    replacements: dict[str, list[tuple[Checkpoint, str, float]]] = {}
    rows = appended_rows(adapters)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, terms in adapter.low_rank.items():
            low_rank.setdefault(name, []).extend(term if weight == 1 else term.scaled(weight) for term in terms)
        for name, made in adapter.computed.items():
            computed.setdefault(name, []).extend(
                make if weight == 1 else partial(_scaled, make, weight) for make in made
            )
        for name, stored in adapter.replacements.items():
            if weight != 1 and stored[0].info(stored[1]).dtype not in FLOATS:
                raise AdapterError(
                    f"`{adapter.path}` stores `{name}` whole, in whole numbers, which no weight can be given: extract "
                    f"it with --exclude '^{re.escape(name)}$', or merge it with weight 1"
                )
            replacements.setdefault(name, []).append((*stored, float(weight)))
    return {
        name: Update(
            low_rank=low_rank.get(name, []),
            computed=computed.get(name, []),
            replacements=replacements.get(name, []),
            new_rows=rows.get(name),
        )
        for name in sorted({*low_rank, *computed, *replacements, *rows})
    }


def appended_rows(adapters: Sequence[Adapter], left_out: Collection[str] = ()) -> dict[str, Stored]:
    """The rows that adapters append, by tensor. Raises `AdapterError` where two append different ones."""
    rows: dict[str, tuple[Stored, Path]] = {}
    for adapter in adapters:
        for name, stored in adapter.new_rows.items():
            if name in left_out:
                continue
            if name in rows and not same_bytes(rows[name][0][0], stored[0], rows[name][0][1], stored[1]):
                raise AdapterError(f"`{rows[name][1]}` and `{adapter.path}` append different rows to `{name}`")
            rows[name] = stored, adapter.path
    return {name: stored for name, (stored, _) in rows.items()}


def _scaled(make: Any, weight: float) -> Any:
    """A pair or a whole difference, `weight` times."""
    made = make()
    return (made[0] * np.float32(weight), made[1]) if isinstance(made, tuple) else made * np.float32(weight)
