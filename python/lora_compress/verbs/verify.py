"""`verify`: how far base + adapter is from tuned, tensor by tensor, and whether that is what extraction promised.

Nothing is written: each tensor is merged in memory, panel by panel, exactly as `merge` would write it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_compress._native import Comparison, Update, compare, same_bytes
from lora_compress.adapter import Adapter
from lora_compress.errors import SelectionError
from lora_compress.model import FLOATS, Model, is_stack, matrices
from lora_compress.verbs.account import SCHEMA_VERSION, relative
from lora_compress.verbs.align import open_pair
from lora_compress.verbs.merge import read_adapter
from lora_compress.verbs.parallel import ordered_map
from lora_compress.verbs.progress import Progress, Silent
from lora_compress.verbs.side_file import read_manifest

# Verification forms the residual from the files. Extraction may have it from a product with the packed delta: a few
# millionths away, as long as what rounding took from the delta is independent of the factors.
AGREEMENT = 1e-3


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One tensor. Energies are squared Frobenius norms over the rows of the base; `promised` is None without a
    manifest.
    """

    name: str
    delta_energy: float
    error_energy: float
    merged_error_energy: float
    largest: float
    promised_energy: float | None
    problem: str = ""

    @property
    def error(self) -> float:
        """‖ΔW − adapter‖ / ‖ΔW‖."""
        return relative(self.error_energy, self.delta_energy)

    @property
    def merged_error(self) -> float:
        """‖merged − tuned‖ / ‖ΔW‖: the same after rounding to the base's dtype."""
        return relative(self.merged_error_energy, self.delta_energy)

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "name": self.name,
            "delta_energy": self.delta_energy,
            "error_energy": self.error_energy,
            "merged_error_energy": self.merged_error_energy,
            "promised_energy": self.promised_energy,
            "error": self.error,
            "merged_error": self.merged_error,
            "largest": self.largest,
            "problem": self.problem or None,
        }


@dataclass(frozen=True, slots=True, repr=False)
class VerifyResult:
    """What `verify` found."""

    tensors: tuple[TensorCheck, ...]
    unchecked: tuple[str, ...]
    has_promise: bool
    seconds: float
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        state = "as promised" if self.ok else f"{len(self.problems)} not as promised"
        errors = f"error {self.error:.4f}, merged {self.merged_error:.4f}"
        return f"VerifyResult({len(self.tensors)} tensors, {errors}, {state})"

    @property
    def problems(self) -> list[TensorCheck]:
        """Tensors whose error differs from what extraction promised, or whose rows differ."""
        return [tensor for tensor in self.tensors if tensor.problem]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @property
    def error(self) -> float:
        """‖ΔW − adapter‖ / ‖ΔW‖ over all tensors."""
        return self._total("error_energy")

    @property
    def merged_error(self) -> float:
        """‖merged − tuned‖ / ‖ΔW‖ over all tensors."""
        return self._total("merged_error_energy")

    def _total(self, field: str) -> float:
        part = math.fsum(getattr(tensor, field) for tensor in self.tensors)
        return relative(part, math.fsum(tensor.delta_energy for tensor in self.tensors))

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "error": self.error,
            "merged_error": self.merged_error,
            "has_promise": self.has_promise,
            "seconds": self.seconds,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "unchecked": list(self.unchecked),
            "warnings": list(self.warnings),
        }


def verify(
    base: str | Path, tuned: str | Path, adapter: str | Path, *, progress: Progress | None = None
) -> VerifyResult:
    """Compare base + adapter with tuned.

    Tensors that only one model has, or that differ although their dtype has no arithmetic, are listed as unchecked.
    Raises as `merge` does.
    """
    started = time.perf_counter()
    base_model, tuned_model, renamed = open_pair(base, tuned)
    if base_model.path.resolve() == tuned_model.path.resolve():
        raise SelectionError(f"base and tuned are the same model, `{base}`")
    parts = read_adapter(adapter, base_model)
    manifest = read_manifest(parts.path)
    promised = {str(row["name"]): row for row in manifest.get("tensors", [])}
    ours, theirs = _matrices(base_model), set(_matrices(tuned_model))
    both = [name for name in ours if name in theirs]
    equal = {name for name in both if _is_equal(base_model, tuned_model, parts, name)}
    checkable = [name for name in both if name not in equal and _is_comparable(base_model, tuned_model, parts, name)]
    unchecked = sorted((set(ours) | theirs) - set(checkable) - equal - _copied_heads(base_model, tuned_model))
    if not checkable and not equal:
        raise SelectionError(f"`{base}` and `{tuned}` have no tensor in common that could be compared")
    lost = [name for name in unchecked if promised.get(name, {}).get("treatment") in {"low-rank", "exact"}]
    progress = progress or Silent()
    sizes = {name: base_model.checkpoint.info(name).nbytes for name in checkable}
    progress.begin("verifying", sum(sizes.values()), len(checkable))

    def job(name: str) -> Comparison:
        update = parts.update(name) if name in parts.tensors() else Update()
        return compare(base_model.checkpoint, tuned_model.checkpoint, name, update)

    checks = [TensorCheck(name, 0.0, 0.0, 0.0, 0.0, 0.0, "what the adapter stored for it is gone") for name in lost]
    for name, comparison in ordered_map(job, checkable, lambda name: sizes[name] // 2):
        same_dtype = base_model.checkpoint.info(name).dtype == tuned_model.checkpoint.info(name).dtype
        stored = name in parts.replacements
        checks.append(_check(name, comparison, promised.get(name), stored=stored, same_dtype=same_dtype))
        progress.advance(sizes[name], 1, name)
    warnings = renamed
    if manifest.get("tuned_fingerprint") not in {None, tuned_model.fingerprint}:
        warnings.append(
            f"`{adapter}` was extracted from another tuned model than `{tuned}` (it says `{manifest.get('tuned')}`)"
        )
    seconds = time.perf_counter() - started
    return VerifyResult(tuple(checks), tuple(unchecked), bool(promised), seconds, tuple(warnings))


def _copied_heads(base: Model, tuned: Model) -> set[str]:
    """The head that one side stores as its embedding once more and the other does not store."""
    sides = ((base, tuned), (tuned, base))
    return {
        one.copied_head[0] for one, other in sides if one.copied_head is not None and other.tied_embedding() is not None
    }


def _matrices(model: Model) -> list[str]:
    """Names of all tensors; of stacked experts, those of each expert's matrix."""
    tensors = model.checkpoint.tensors()
    return [
        name
        for tensor in tensors
        for name in (matrices(tensor.name, tensor.shape[0]) if is_stack(tensor.name, tensor.shape) else [tensor.name])
    ]


def _is_comparable(base: Model, tuned: Model, adapter: Adapter, name: str) -> bool:
    ours, theirs = base.checkpoint.info(name), tuned.checkpoint.info(name)
    shape = list(ours.shape)
    if name in adapter.new_rows and shape:
        checkpoint, key = adapter.new_rows[name]
        shape[0] += checkpoint.info(key).shape[0]
    fewer = shape[1:] == theirs.shape[1:] and len(shape) > 1 and theirs.shape[0] < shape[0]
    return {ours.dtype, theirs.dtype} <= FLOATS and (fewer or shape == list(theirs.shape))


def _is_equal(base: Model, tuned: Model, adapter: Adapter, name: str) -> bool:
    """Whether a tensor, merged, has tuned's bytes, where that can be seen without arithmetic."""
    changed = name in adapter.tensors()
    if name in adapter.new_rows or (changed and base.checkpoint.info(name).dtype in FLOATS):
        return False
    checkpoint, key = adapter.replacements.get(name, (base.checkpoint, name))
    return same_bytes(tuned.checkpoint, checkpoint, name, key)


def _check(
    name: str, comparison: Comparison, promise: dict[str, Any] | None, *, stored: bool, same_dtype: bool
) -> TensorCheck:
    expected = promise.get("error_energy") if promise else None
    problem = ""
    if not comparison.new_rows_equal:
        problem = "its new rows differ from the tuned model's"
    elif promise and promise.get("treatment") == "exact":
        if not stored or (same_dtype and comparison.merged_error_energy):
            problem = "it was stored whole, but the merge would not restore it"
    elif expected is not None and promise:
        slack = AGREEMENT * expected + 1e-12 * comparison.delta_energy
        if abs(comparison.error_energy - expected) > slack:
            promised = relative(expected, comparison.delta_energy)
            found = relative(comparison.error_energy, comparison.delta_energy)
            problem = f"its error is {found:.3g}, extraction promised {promised:.3g}"
    return TensorCheck(
        name,
        comparison.delta_energy,
        comparison.error_energy,
        comparison.merged_error_energy,
        comparison.largest,
        expected,
        problem,
    )
