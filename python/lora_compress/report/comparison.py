"""Comparisons for the page: read from what `compare` wrote, checked, and made small.

The file is not trusted: all that the page shows is checked here, and what it does not show is left behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_compress.errors import CheckpointError, PlanError
from lora_compress.model import read_json

SCHEMA_VERSION = 1
# The decomposition that others are measured against, and the mixture of all of them.
REFERENCE = "ab"
BEST = "best"
# What a row may have been measured to have besides its error.
MEASURES = ("kl", "loss")
# Energies of a tensor's change are sums in other orders, or of other precisions, but no further apart than this.
AGREEMENT = 1e-3


def read(path: Path) -> dict[str, Any]:
    """Read a comparison. Raises `PlanError` when the file is not one, `OSError` when it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    try:
        return checked(read_json(path))
    except CheckpointError as error:
        # It names the file.
        raise PlanError(str(error)) from error
    except PlanError as error:
        raise PlanError(f"`{path}`: {error}") from error


def checked(data: Any) -> dict[str, Any]:
    """What the page uses of the JSON object of a comparison. Raises `PlanError` when that is malformed."""
    if not isinstance(data, Mapping):
        raise PlanError("a comparison is a JSON object")
    if "rows" not in data or "decompositions" not in data:
        raise PlanError("not a comparison: `lora-compress compare BASE TUNED -o FILE` writes one")
    if data.get("schema_version") != SCHEMA_VERSION or isinstance(data["schema_version"], bool):
        raise PlanError(f"schema version {data.get('schema_version')!r}, this release reads {SCHEMA_VERSION}")
    rows = [_within(f"row {number}", _row, row) for number, row in enumerate(_list(data, "rows"), 1)]
    _check_together(rows)
    contractions = _object(data, "decompositions")
    reference = _object(data, "reference")
    return {
        "schema_version": SCHEMA_VERSION,
        "base": _text(data, "base"),
        "tuned": _text(data, "tuned"),
        "decompositions": {_name(name): _text(contractions, name) for name in contractions},
        "reference": {_name(side): _within(f"reference `{side}`", _measured, reference[side]) for side in reference},
        "rows": rows,
    }


def match(comparison: Mapping[str, Any], base: str, tuned: str, tensors: Iterable[Mapping[str, Any]] = ()) -> None:
    """Raise `PlanError` unless a checked comparison is of the models of a plan, whose `tensors` are those of its JSON.

    Files move, and a path may be relative: only the last parts of the paths have to be equal, where there are any. The
    changes of the tensors that both know have to agree too, because many models are directories called `base`.
    """
    for side, path in (("base", base), ("tuned", tuned)):
        last, other = Path(comparison[side]).name, Path(path).name
        # A path such as `.` or `..` says nothing.
        if {last, other}.isdisjoint(("", "..")) and last != other:
            raise PlanError(f"the comparison is of another model: its {side} is `{comparison[side]}`, not `{path}`")
    known = {tensor["name"]: tensor["delta_energy"] for tensor in tensors}
    if not known:
        return
    for row in comparison["rows"]:
        for tensor in row["tensors"]:
            energy, name = tensor["delta_energy"], tensor["name"]
            if name not in known:
                raise PlanError(f"the comparison is of another model: the plan has no tensor `{name}`")
            # The plan does not measure what it excludes.
            if known[name] and abs(energy - known[name]) > AGREEMENT * known[name]:
                raise PlanError(f"the comparison is of another model: `{name}` changed otherwise in the plan")


def compact(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """A checked comparison as the page carries it: tensors are named once, rows have their errors in that order.

    Only tensors that some row has decomposed, since the others are stored as they are in all rows.
    """
    tensors: dict[str, float] = {}
    for row in comparison["rows"]:
        for tensor in row["tensors"]:
            if tensor["decomposition"]:
                tensors.setdefault(tensor["name"], tensor["delta_energy"])
    rows = []
    for row in comparison["rows"]:
        found = {tensor["name"]: tensor for tensor in row["tensors"]}
        small = {key: value for key, value in row.items() if key != "tensors"}
        # More digits than are ever shown only take room.
        small["errors"] = [float(f"{found[name]['error']:.6g}") if name in found else None for name in tensors]
        if row["decomposition"] == BEST:
            small["taken"] = [found[name]["decomposition"] if name in found else "" for name in tensors]
        rows.append(small)
    return {**comparison, "tensors": [{"name": name, "energy": tensors[name]} for name in tensors], "rows": rows}


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """The totals in lines of text, one for each size: the least error, and that of `ab`."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in comparison["rows"]):
        rows = [row for row in comparison["rows"] if row["size"] == size and row["error"] is not None]
        pair = next(row for row in rows if row["decomposition"] == REFERENCE)
        least = min(rows, key=lambda row: (row["error"], row is not pair))
        lines.append(f"Decompositions at {size}: {_total(least)}" + ("." if least is pair else f"; {_total(pair)}."))
    return lines


def _total(row: Mapping[str, Any]) -> str:
    return f"{row['decomposition']} has a relative error of {row['error']:.4f} with {row['bytes']:,} bytes"


def _row(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise PlanError("not an object")
    error = None if row.get("error", 0) is None else _number(row, "error")
    problem = "" if row.get("problem") is None else _text(row, "problem")
    if error is None and not problem:
        raise PlanError("it has neither an `error` nor a `problem`")
    tensors = [_within(f"tensor {number}", _tensor, tensor) for number, tensor in enumerate(_list(row, "tensors"), 1)]
    if len({tensor["name"] for tensor in tensors}) < len(tensors):
        raise PlanError("it names a tensor twice")
    return {
        "size": _text(row, "size"),
        "decomposition": _text(row, "decomposition"),
        "allowed_bytes": _count(row, "allowed_bytes"),
        "bytes": _count(row, "bytes"),
        "error": error,
        "seconds": _number(row, "seconds"),
        **_measured(row),
        "problem": problem or None,
        "tensors": tensors,
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    if not isinstance(tensor, Mapping):
        raise PlanError("not an object")
    return {
        "name": _text(tensor, "name"),
        "decomposition": _text(tensor, "decomposition"),
        "error": _number(tensor, "error"),
        "delta_energy": _number(tensor, "delta_energy"),
    }


def _check_together(rows: list[dict[str, Any]]) -> None:
    """Every decomposition once at a size, and what all are compared with at every size."""
    if not rows:
        raise PlanError("it has no rows")
    keys = [(row["size"], row["decomposition"]) for row in rows]
    if len(set(keys)) < len(keys):
        raise PlanError("it has a decomposition twice at one size")
    pairs = {row["size"] for row in rows if row["decomposition"] == REFERENCE and row["error"] is not None}
    for size, _ in keys:
        if size not in pairs:
            raise PlanError(f"it has no error of `{REFERENCE}` at {size!r}, which the others are compared with")


def _within(where: str, check: Any, value: Any) -> dict[str, Any]:
    """What a check returns; what it refuses is said with its place."""
    try:
        found: dict[str, Any] = check(value)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    return found


def _measured(data: Any) -> dict[str, float]:
    if not isinstance(data, Mapping):
        raise PlanError("not an object")
    # A divergence of next to nothing may be rounded to below 0.
    return {key: _number(data, key, least=-1e300) for key in MEASURES if data.get(key) is not None}


def _value(data: Mapping[str, Any], key: str) -> Any:
    if key not in data:
        raise PlanError(f"`{key}` is missing")
    return data[key]


def _text(data: Mapping[str, Any], key: str) -> str:
    value = _value(data, key)
    if not isinstance(value, str):
        raise PlanError(f"`{key}` is not text")
    return _name(value)


def _name(text: str) -> str:
    """Text that can be written: JSON has halves of characters that nothing else has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PlanError(f"{text!a} is not text") from error
    return text


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = _value(data, key)
    if not isinstance(value, list):
        raise PlanError(f"`{key}` is not a list")
    return value


def _object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = _value(data, key)
    if not isinstance(value, dict):
        raise PlanError(f"`{key}` is not an object")
    return value


def _number(data: Mapping[str, Any], key: str, *, least: float = 0.0) -> float:
    """Neither NaN nor infinite, which no comparison holds for."""
    value = _value(data, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e300:
        raise PlanError(f"`{key}` is not a number{' of 0 or more' if least == 0 else ''}")
    return float(value)


def _count(data: Mapping[str, Any], key: str) -> int:
    value = _value(data, key)
    # As far as JavaScript counts exactly.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise PlanError(f"`{key}` is not a count")
    return value
