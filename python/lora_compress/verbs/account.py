"""The account of an extraction: what became of every tensor, and how much of ‖ΔW‖² each treatment carries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_compress.verbs.selection import Treatment

# Grows when a field changes its meaning or goes; new fields do not change it.
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorAccount:
    """What became of one tensor. Energies are squared Frobenius norms; None where a dtype has no arithmetic."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    treatment: Treatment
    rank: int = 0
    new_rows: int = 0
    delta_energy: float | None = 0.0
    base_energy: float | None = 0.0
    error_energy: float | None = 0.0
    nbytes: int = 0
    decomposition: str = ""

    @property
    def error(self) -> float:
        """‖ΔW − stored‖ / ‖ΔW‖, 0 where nothing changed."""
        return relative(self.error_energy, self.delta_energy)

    @property
    def relative_delta(self) -> float:
        """‖ΔW‖ / ‖W_base‖."""
        return relative(self.delta_energy, self.base_energy)

    def to_json(self) -> dict[str, Any]:
        """As stored in the manifest."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "treatment": self.treatment.value,
            "rank": self.rank,
            "new_rows": self.new_rows,
            "delta_energy": self.delta_energy,
            "base_energy": self.base_energy,
            "error_energy": self.error_energy,
            "error": self.error,
            "bytes": self.nbytes,
            "decomposition": self.decomposition or None,
        }


@dataclass(frozen=True, slots=True)
class TreatmentTotal:
    """Sums over the tensors of one treatment."""

    treatment: Treatment
    tensors: int
    delta_energy: float
    error_energy: float
    nbytes: int


def totals(tensors: Sequence[TensorAccount]) -> list[TreatmentTotal]:
    """Sums by treatment, in the order of `Treatment`, empty ones left out."""
    rows = []
    for treatment in Treatment:
        group = [tensor for tensor in tensors if tensor.treatment is treatment]
        if group:
            rows.append(
                TreatmentTotal(
                    treatment,
                    len(group),
                    math.fsum(tensor.delta_energy or 0.0 for tensor in group),
                    math.fsum(tensor.error_energy or 0.0 for tensor in group),
                    sum(tensor.nbytes for tensor in group),
                )
            )
    return rows


def total_error(tensors: Sequence[TensorAccount]) -> float:
    """‖ΔW − stored‖ / ‖ΔW‖ over all tensors."""
    error = math.fsum(tensor.error_energy or 0.0 for tensor in tensors)
    return relative(error, math.fsum(tensor.delta_energy or 0.0 for tensor in tensors))


def totals_json(tensors: Sequence[TensorAccount]) -> dict[str, Any]:
    """Totals as stored in the manifest."""
    rows = totals(tensors)
    whole = math.fsum(row.delta_energy for row in rows)
    return {
        "error": total_error(tensors),
        "side_file": any(row.treatment is Treatment.EXACT for row in rows) or any(t.new_rows for t in tensors),
        "treatments": [
            {
                "treatment": row.treatment.value,
                "tensors": row.tensors,
                "share": row.delta_energy / whole if whole else 0.0,
                "delta_energy": row.delta_energy,
                "error_energy": row.error_energy,
                "bytes": row.nbytes,
            }
            for row in rows
        ],
    }


def relative(part: float | None, whole: float | None) -> float:
    """√(part / whole), 0 where the whole is 0 or unknown."""
    return math.sqrt(part / whole) if part and whole else 0.0
