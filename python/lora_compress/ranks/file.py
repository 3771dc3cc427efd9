"""Plans as JSON: what was measured and what was asked; ranks and totals follow and are written for readers.

Reading trusts nothing that can be computed: ranks of the recorded choice are chosen again.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_compress._native import LoraCompressError, Spectrum, __version__
from lora_compress.errors import PlanError
from lora_compress.model import read_json
from lora_compress.ranks.choice import LAYOUTS, RULES, RankChoice, choose
from lora_compress.ranks.plan import Plan, TensorPlan
from lora_compress.ranks.recognise import recognise

KIND = "lora-compress plan"
SCHEMA_VERSION = 1
# Points of the size–error curve that are written.
POINTS = 200
TREATMENTS = ("low-rank", "exact", "unchanged", "excluded", "missing", "tied")


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object (schema: docs/plan.schema.json)."""
    weights = plan.weights()
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "base": plan.base,
        "tuned": plan.tuned,
        "fingerprints": dict(plan.fingerprints),
        "options": dict(plan.options),
        "choice": plan.choice.to_json(),
        "tuned_bytes": plan.tuned_bytes,
        "seconds": plan.seconds,
        "totals": {
            "bytes": plan.nbytes,
            "least_bytes": plan.least_bytes,
            "error": plan.error,
            "delta_energy": plan.delta_energy,
        },
        "curve": [list(point) for point in thinned(plan.curve())],
        "warnings": [*plan.notes, *recognise(plan).warnings],
        "unsettled": list(plan.unsettled),
        "tensors": [_tensor_json(tensor, weights.get(tensor.name, 0.0)) for tensor in plan.tensors],
    }


def _tensor_json(tensor: TensorPlan, weight: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "treatment": tensor.treatment,
        "delta_energy": tensor.delta_energy,
        "base_energy": tensor.base_energy,
        "new_rows": tensor.new_rows,
        "fixed": tensor.fixed,
        "bytes": tensor.nbytes,
    }
    spectrum = tensor.spectrum
    if tensor.unit:
        row |= {"unit": tensor.unit, "rank": tensor.rank}
    if spectrum is not None:
        row |= {
            "weight": weight,
            "error": spectrum.error(tensor.rank),
            "rounding_energy": spectrum.rounding_energy,
            "noise_edge": spectrum.noise_edge,
            "low_rank": spectrum.low_rank,
            "stable_rank": spectrum.stable_rank,
            "effective_rank": spectrum.effective_rank,
            # To the last bit: whether anything is left beyond them is a difference of large numbers.
            "sigma": spectrum.sigma.tolist(),
        }
        if spectrum.shape != tensor.shape:
            row["matrix"] = list(spectrum.shape)
    return row


def write(plan: Plan, path: Path) -> None:
    """Write the plan, whole or not at all."""
    write_whole(path, json.dumps(to_json(plan), allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        # Of a full disk Python names no file, and nobody knows the hidden one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Plan:
    """Read a plan. Raises `PlanError` when the file is not one, `OSError` when it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    data = read_json(path)
    if data.get("kind") != KIND:
        raise PlanError(f"`{path}` is not a plan of lora-compress")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise PlanError(
            f"`{path}` has schema version {data.get('schema_version')!r}, this release reads {SCHEMA_VERSION}"
        )
    try:
        tensors = tuple(_tensor(row) for row in _list(data, "tensors"))
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise PlanError("it names a tensor twice")
        plan = Plan(
            base=_text(data, "base"),
            tuned=_text(data, "tuned"),
            fingerprints={side: _text(data["fingerprints"], side) for side in ("base", "tuned")},
            options=_object(data, "options"),
            choice=_choice(_object(data, "choice")),
            tensors=tensors,
            tuned_bytes=_count(data, "tuned_bytes"),
            seconds=_number(data, "seconds"),
        )
        # What was noted is no opinion; what is recognised from the spectra is recognised again.
        said = {*recognise(plan).warnings}
        notes = tuple(note for note in _list(data, "warnings") if note not in said)
        if not all(isinstance(note, str) for note in notes):
            raise PlanError("`warnings` is not a list of texts")
        return replace(plan.choose(plan.choice), notes=notes)
    except PlanError as error:
        raise PlanError(f"`{path}`: {error}") from error
    except (KeyError, TypeError, ValueError, LoraCompressError) as error:
        raise PlanError(f"`{path}` is not a plan of lora-compress: {error}") from error


def _tensor(row: Any) -> TensorPlan:
    name = _text(row, "name")
    try:
        shape = tuple(_integer(size) for size in row["shape"])
        if math.prod(shape) >= 2**62 or row["treatment"] not in TREATMENTS:
            raise PlanError("its shape or treatment is none")
        energy, base_energy = (
            None if row[key] is None else _number(row, key) for key in ("delta_energy", "base_energy")
        )
        spectrum = None
        if "sigma" in row:
            matrix = tuple(_integer(size) for size in row.get("matrix", shape))
            if len(matrix) != 2 or math.prod(matrix) > math.prod(shape) or energy is None:
                raise PlanError("a spectrum needs a matrix and its energy")
            spectrum = Spectrum(
                (matrix[0], matrix[1]),
                [float(value) for value in row["sigma"]],
                energy,
                base_energy=base_energy or 0.0,
                rounding_energy=_number(row, "rounding_energy"),
            )
        return TensorPlan(
            name,
            _text(row, "dtype"),
            shape,
            _text(row, "treatment"),
            energy,
            base_energy,
            new_rows=_count(row, "new_rows"),
            fixed=_count(row, "fixed"),
            unit=_count(row, "unit") if "unit" in row else 0,
            spectrum=spectrum,
            rank=0,
        )
    except (KeyError, TypeError, ValueError, LoraCompressError) as error:
        raise PlanError(f"tensor `{name}`: {error}") from error


def _choice(data: Mapping[str, Any]) -> RankChoice:
    """Checked as what a user says is checked."""
    rule, value, max_rank = _text(data, "rule"), _number(data, "value"), data["max_rank"]
    allowed, multiple = data["ranks_allowed"], _count(data, "multiple")
    if data["layout"] not in LAYOUTS or not isinstance(allowed, list):
        raise PlanError("its choice is malformed")
    asked: dict[str, Any] = {"rank": rule}
    if rule == "budget":
        asked = {"budget": int(value)}
    elif rule == "total-error":
        asked = {"error": value}
    elif RULES.get(rule) is not None:
        asked = {"rank": f"{rule}={value!r}"}
    ranks = f"{multiple}x" if multiple > 1 else [_integer(rank) for rank in allowed] or None
    cap = None if max_rank is None else _integer(max_rank)
    return choose(**asked, weights=_text(data, "weights"), ranks_allowed=ranks, max_rank=cap, layout=data["layout"])


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` of a curve, evenly spread over the logarithm of the size, first and last included."""
    if len(curve) <= POINTS:
        return curve
    kept, step = [curve[0]], math.log(max(curve[-1][0], 1) / max(curve[0][0], curve[1][0], 1)) / (POINTS - 2)
    for point in curve[1:-1]:
        if math.log(point[0] / max(kept[-1][0], 1) or 1.0) >= step:
            kept.append(point)
    return [*kept, curve[-1]]


def _text(data: Any, key: str) -> str:
    value = data[key]
    if not isinstance(value, str):
        raise PlanError(f"`{key}` is not text")
    return value


def _list(data: Any, key: str) -> list[Any]:
    value = data[key]
    if not isinstance(value, list):
        raise PlanError(f"`{key}` is not a list")
    return value


def _object(data: Any, key: str) -> dict[str, Any]:
    value = data[key]
    if not isinstance(value, dict):
        raise PlanError(f"`{key}` is not an object")
    return value


def _number(data: Any, key: str) -> float:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
        raise PlanError(f"`{key}` is not a number of 0 or more")
    return float(value)


def _count(data: Any, key: str) -> int:
    return _integer(data[key])


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise PlanError(f"{value!r} is not a count")
    return value
