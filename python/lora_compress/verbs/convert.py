"""`convert`: an adapter under the names of another format, PEFT's directory or kohya's file.

Names are found in the base's. Factors are copied as they are stored; ranks and scales stay, an alpha for every module.
Two things are computed: a Tucker convolution becomes a pair, for which PEFT has names, and alphas that float32 cannot
hold are rounded to it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_compress import plugins
from lora_compress._native import Checkpoint, __version__
from lora_compress.adapter import Adapter
from lora_compress.errors import AdapterError, SelectionError
from lora_compress.formats.kohya import read as kohya
from lora_compress.formats.kohya import rest, stored
from lora_compress.formats.kohya.names import PREFIX
from lora_compress.formats.kohya.write import FILE, no_name
from lora_compress.formats.peft.card import model_card
from lora_compress.formats.peft.read import weights_of
from lora_compress.formats.peft.stored import write_stored
from lora_compress.formats.stored import WRITTEN, StoredPair
from lora_compress.hub import resolve
from lora_compress.model import Model
from lora_compress.verbs import output, side_file
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.companions import copy_tokenizer
from lora_compress.verbs.merge import check_made_for, read_adapter

PEFT, KOHYA = FORMATS = ("peft", "kohya")


@dataclass(frozen=True, slots=True, repr=False)
class ConvertResult:
    """What `convert` did. `ranks` by tensor; `computed`: tensors whose three factors became two."""

    out: Path
    format: str
    ranks: Mapping[str, int]
    computed: tuple[str, ...]
    adapter_bytes: int
    seconds: float
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        return f"ConvertResult({str(self.out)!r}: {len(self.ranks)} tensors in the format {self.format})"

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "out": str(self.out),
            "format": self.format,
            "ranks": dict(self.ranks),
            "computed": list(self.computed),
            "adapter_bytes": self.adapter_bytes,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


def convert(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    to: str,
    prefix: str | None = None,
    dtype: str | None = None,
    base_name: str | None = None,
    any_base: bool = False,
    force: bool = False,
    command: str | None = None,
) -> ConvertResult:
    """Write an adapter in another format.

    Parameters
    ----------
    base: the model that the adapter was made for. Its names and shapes are needed, none of its weights.
    adapter: a directory of PEFT's, or a file of kohya's or ComfyUI's (or a directory with one).
    out: directory to create; for kohya's format also a file, with a name that ends in `.safetensors`.
    to: "peft" or "kohya".
    prefix: of kohya's keys, where the base is one component: `lora_unet`, `lora_te`, `lora_te1`, …; from the base's
        configuration when absent. SDXL's first text encoder is `lora_te1`, which nothing in its files tells.
    dtype: "BF16", "F16" or "F32" for all factors, rounded once; each one's own when absent.
    base_name: what the adapter calls its base.
    any_base: go on although the adapter was made for a base with other values.
    force: replace an existing output.
    command: the command line to record.

    Raises
    ------
    AdapterError, SelectionError, TensorError, CheckpointError, OutputExistsError, OSError; `ValueError` for options out
    of range. Nothing is left behind.
    """
    started = time.perf_counter()
    if to not in FORMATS or dtype not in {None, *WRITTEN} or (prefix is not None and not PREFIX.fullmatch(prefix)):
        raise ValueError(
            f"to ({to}) is one of {FORMATS}, dtype ({dtype}) of {sorted(WRITTEN)}, prefix ({prefix}) lora_…"
        )
    if prefix is not None and to != KOHYA:
        raise ValueError("a prefix is part of kohya's keys: PEFT's have none")
    path, out = resolve(adapter), Path(out)
    as_file = to == KOHYA and out.suffix == ".safetensors"
    (output.check_file if as_file else output.check_directory)(out, force=force, inputs=(Path(base), path))
    model = Model.open(base)
    part = read_adapter(path, model)
    _check_formats(path, to)
    if not any_base:
        check_made_for(model, [part])
    pairs = _pairs(path, part, to)
    left = _left_over(part)
    warnings = [*part.warnings, *(_what_is_lost(part, left) if as_file else [])]
    computed = tuple(pair.tensor for pair in pairs if pair.make_a is not None)
    if computed:
        warnings.append(
            f"{len(computed)} convolutions of three factors (`{computed[0]}`) become pairs, for which PEFT has names: "
            "their products are rounded once"
        )
    if as_file:
        with output.new_file(out, force=force, inputs=(Path(base), path)) as file:
            size = stored.write_stored(file, model, pairs, _rest_of(path), prefix, dtype)
    else:
        with output.new_directory(out, force=force, inputs=(Path(base), path)) as folder:
            _copy_beside(path, folder, part, left)
            manifest = _manifest(model, path, to, command, dtype, computed)
            manifest["base"] = base_name or str(manifest.get("base", base))
            if to == KOHYA:
                size = stored.write_stored(folder / FILE, model, pairs, _rest_of(path), prefix, dtype)
            else:
                size = write_stored(folder, model, manifest["base"], pairs, dtype)
                (folder / side_file.FOLDER).mkdir(exist_ok=True)
                rest.write_rest(folder / side_file.FOLDER / rest.FILE, kohya.assign(path, model))
                (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
            side_file.write_manifest(folder, manifest)
    ranks = {pair.tensor: pair.rank for pair in pairs}
    return ConvertResult(out, to, ranks, computed, size, time.perf_counter() - started, tuple(warnings))


def _check_formats(path: Path, to: str) -> None:
    form = plugins.load().format_of(path)
    name = form.name if form is not None else ""
    if name == to:
        raise SelectionError(f"`{path}` is in the format `{to}` already")
    if name not in FORMATS:
        raise SelectionError(f"`{path}` is in the format `{name}`: `combine --format {to}` makes pairs of its factors")


def _pairs(path: Path, part: Adapter, to: str) -> list[StoredPair]:
    """The adapter's pairs where they are stored. Raises `SelectionError` for what `to` has no place for."""
    whole = sorted(name for name, held in part.replacements.items() if held[0].path != _side(part))
    if to == KOHYA and whole:
        raise SelectionError(
            f"`{path}` stores `{whole[0]}` whole, which the format `kohya` has no place for: leave it out with "
            "`resize` or `combine` (--exclude REGEX)"
        )
    file = Checkpoint(kohya.file_of(path) or weights_of(path))
    pairs = []
    for name in sorted(part.factored()):
        stored_terms, made = part.low_rank.get(name, ()), part.computed.get(name, ())
        if len(stored_terms) + len(made) > 1:
            raise SelectionError(f"`{path}` has several pairs of factors for `{name}`: `combine` makes one of them")
        for term in stored_terms:
            if term.transposed:
                raise SelectionError(no_name(name))
            b, a = term.keys
            pairs.append(StoredPair(name, file, b, a, file.info(a).shape[0], term.scale))
        for tucker in made:
            if not isinstance(tucker, kohya.Tucker):
                raise SelectionError(no_name(name))
            up, down = tucker.keys["up"], tucker.keys["down"]
            pairs.append(StoredPair(name, file, up, down, file.info(up).shape[1], tucker.scale, tucker.second))
    if not pairs:
        raise AdapterError(f"`{path}` has no factors to convert")
    return pairs


def _side(part: Adapter) -> Path:
    return part.path / side_file.FOLDER / side_file.EXACT


def _left_over(part: Adapter) -> list[str]:
    """Names of the tensors in the side file."""
    held = [(name, where) for name, where in (*part.replacements.items(), *part.new_rows.items())]
    return sorted({name for name, (file, _) in held if file.path == _side(part)})


def _what_is_lost(part: Adapter, left: Sequence[str]) -> list[str]:
    if not left:
        return []
    return [
        f"{len(left)} tensors that `{part.path}` stores whole (`{left[0]}`) have no place in a file of kohya's: give a "
        "directory as output to keep them beside it"
    ]


def _rest_of(path: Path) -> rest.Rest | None:
    return rest.read_rest(path / side_file.FOLDER / rest.FILE)


def _copy_beside(path: Path, folder: Path, part: Adapter, left: Sequence[str]) -> None:
    """Copy the side file, and the tokenizer of a grown vocabulary."""
    if left:
        (folder / side_file.FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(_side(part), folder / side_file.FOLDER / side_file.EXACT)
    if part.new_rows:
        copy_tokenizer(path, folder)


def _manifest(
    model: Model,
    path: Path,
    to: str,
    command: str | None,
    dtype: str | None,
    computed: Sequence[str],
) -> dict[str, Any]:
    """The account that the adapter came with, as long as it still holds: errors change when factors are rounded."""
    before = side_file.read_manifest(path)
    known = before if dtype is None and not computed else {}
    return {
        **known,
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "base_fingerprint": before.get("base_fingerprint") or model.fingerprint,
        "converted_from": str(path),
        "format": to,
        "command": command or "lora_compress.convert",
        "causal_lm": model.architecture.endswith("ForCausalLM"),
    }
