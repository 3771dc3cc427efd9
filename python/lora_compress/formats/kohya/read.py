"""Reading kohya's files: every tensor ends up in the adapter, or is refused by name.

A file may hold several components (a UNet and its text encoders) where the base is one of them. Which of the file's
components the base is follows from names and shapes; the others are left out with a warning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_compress._native import Checkpoint, LowRank
from lora_compress.adapter import Adapter
from lora_compress.errors import AdapterError, CheckpointError
from lora_compress.formats.kohya.names import Module, NameMap, is_key, module_at, part_of, stem_of, why_refused
from lora_compress.model import FLOATS, Model

if TYPE_CHECKING:
    from lora_compress.adapter import Compute, Float32Matrix

PEFT_CONFIG = "adapter_config.json"
# No alpha comes near this; one that does would make every weight infinite.
LARGEST_ALPHA = 1e30
# Settings of PEFT that make the scale another than lora_alpha / r, or differ between modules.
SCALING = ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora")
# Dtypes of an alpha that are not read as float32.
OTHERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "F64": "<f8"}


def file_of(path: Path) -> Path | None:
    """The file of an adapter: `path` itself, or the only safetensors file of a directory that is not PEFT's."""
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    files = sorted(path.glob("*.safetensors")) if path.is_dir() and not (path / PEFT_CONFIG).exists() else []
    return files[0] if len(files) == 1 else None


def recognises(path: Path) -> bool:
    """Whether most tensors of the file are called as kohya or ComfyUI call them."""
    file = file_of(path)
    try:
        names = [tensor.name for tensor in Checkpoint(file).tensors()] if file is not None else []
    except CheckpointError:
        # A file that is named is what is meant, and what is wrong with it is to be said.
        if path.is_file():
            raise
        return False
    return 2 * sum(map(is_key, names)) > len(names)


@dataclass(frozen=True, slots=True)
class Tucker:
    """A convolution in three factors, ΔW[i,j,k,l] = s·Σ up[i,m]·mid[m,n,k,l]·down[n,j]."""

    file: Checkpoint
    keys: Mapping[str, str]
    scale: float

    def pair(self) -> tuple[Float32Matrix, Float32Matrix]:
        """B = up (out, r) and A = mid·down (r, in·k·l), without the scale."""
        up, mid, down = (self.file.read(self.keys[part]) for part in ("up", "mid", "down"))
        for part, values in (("up", up), ("mid", mid), ("down", down)):
            if not np.isfinite(values).all():
                raise AdapterError(f"`{self.keys[part]}` in `{self.file.path}` holds NaN or an infinity")
        down = down.reshape(down.shape[:2])
        # In float64: what is stored of it, where it is stored, is then rounded once.
        product = np.einsum("mnk,nj->mjk", mid.reshape(*mid.shape[:2], -1).astype(np.float64), down.astype(np.float64))
        a = product.reshape(len(mid), -1).astype(np.float32)
        return np.ascontiguousarray(up.reshape(up.shape[:2])), np.ascontiguousarray(a)

    def second(self) -> Float32Matrix:
        """A alone."""
        return self.pair()[1]

    def __call__(self) -> tuple[Float32Matrix, Float32Matrix]:
        """The pair of the adapter's term, computed when its tensor's turn comes."""
        b, a = self.pair()
        return b * np.float32(self.scale), a


@dataclass(frozen=True, slots=True)
class Assigned:
    """A file's modules by the base's tensor they belong to."""

    file: Checkpoint
    modules: Mapping[str, Module]
    warnings: Sequence[str]


def read(path: Path, base: Model) -> Adapter:
    """Read the adapter at `path` for `base`. Raises `AdapterError`, and `CheckpointError` for broken files."""
    found = assign(path, base)
    low_rank: dict[str, list[LowRank]] = {}
    computed: dict[str, list[Compute]] = {}
    zeros = []
    for tensor, module in found.modules.items():
        alpha, keys = alpha_of(found.file, module), module.keys
        rank = found.file.info(keys["down"]).shape[0]
        scale = alpha / rank if alpha else 1.0
        if alpha == 0:
            zeros.append(keys["alpha"])
        if "mid" in keys:
            computed[tensor] = [Tucker(found.file, keys, scale)]
        else:
            low_rank[tensor] = [LowRank(found.file, keys["up"], keys["down"], scale=scale)]
    warnings = list(found.warnings)
    if zeros:
        warnings.append(
            f"`{path}`: `{zeros[0]}` is 0{f', and {len(zeros) - 1} more are' if len(zeros) > 1 else ''}: as kohya has "
            "it, that means the rank; ComfyUI multiplies by 0"
        )
    metadata = found.file.metadata[0] if found.file.metadata else {}
    return Adapter(path, low_rank=low_rank, computed=computed, metadata=metadata, warnings=warnings)


def assign(path: Path, base: Model) -> Assigned:
    """Find the base's tensor of every module of a file, by names and shapes."""
    file = file_of(path)
    if file is None:
        raise AdapterError(f"`{path}` is neither a safetensors file nor a directory with exactly one")
    checkpoint = Checkpoint(file)
    modules = _modules(checkpoint)
    _check_adapter_metadata(checkpoint, modules)
    names = NameMap(base)
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.prefix, []).append(module)
    targets = {module.stem: _target(checkpoint, names, module) for module in modules}
    problems = {
        prefix: next(filter(None, (_problem(checkpoint, base, one, targets[one.stem]) for one in group)), None)
        for prefix, group in groups.items()
    }
    fitting = [group for prefix, group in groups.items() if problems[prefix] is None]
    claimed = {targets[one.stem] for group in fitting for one in group}
    found: dict[str, Module] = {}
    warnings = []
    for prefix, group in groups.items():
        problem = problems[prefix]
        own = {targets[one.stem] for one in group} - {None}
        # Another component shares no name with the base, or only such as the base's own component has too: the text
        # encoders of SDXL are called alike and differ in shape and depth.
        if problem is not None and claimed and own <= claimed and not names.holds(prefix):
            warnings.append(
                f"`{path}`: the {len(group)} modules of `{prefix}` are of another component than `{base.path}`, or of "
                "another layout of it: they are left out"
            )
        elif problem is not None:
            raise AdapterError(problem)
        else:
            for one in group:
                target = str(targets[one.stem])
                if target in found:
                    raise AdapterError(
                        f"`{checkpoint.path}`: `{found[target].stem}` and `{one.stem}` are both `{target}` in "
                        f"`{base.path}`: keep one of the components in the file"
                    )
                found[target] = one
    return Assigned(checkpoint, dict(sorted(found.items())), warnings)


def alpha_of(file: Checkpoint, module: Module) -> float | None:
    """A module's alpha as it is stored; None where there is none. Raises `AdapterError` for what is no number."""
    key = module.keys.get("alpha")
    return None if key is None else number(file, key)


def number(file: Checkpoint, key: str) -> float:
    """The one number in a tensor."""
    info = file.info(key)
    if math.prod(info.shape) != 1 or info.dtype not in {*FLOATS, *OTHERS}:
        raise AdapterError(f"`{file.path}`: `{key}` is no number: shape {info.shape}, {info.dtype}")
    if info.dtype in OTHERS:
        value = float(np.frombuffer(file.read_bytes(key), OTHERS[info.dtype])[0])
    else:
        value = float(file.read(key).reshape(-1)[0])
    if not abs(value) < LARGEST_ALPHA:
        raise AdapterError(f"`{file.path}`: `{key}` is {value}")
    return value


def _modules(file: Checkpoint) -> list[Module]:
    """The file's modules, complete; raises `AdapterError` for any tensor of another kind."""
    modules: dict[str, Module] = {}
    for tensor in file.tensors():
        if reason := why_refused(tensor.name):
            raise AdapterError(f"`{file.path}`: the tensor `{tensor.name}` cannot be merged: {reason}")
        stem, part = stem_of(tensor.name), part_of(tensor.name)
        module = module_at(stem) if stem is not None else None
        if part is None or module is None:
            raise AdapterError(f"`{file.path}`: the tensor `{tensor.name}` is none of a LoRA of kohya's or ComfyUI's")
        keys = modules.setdefault(module.stem, module).keys
        if keys.setdefault(part, tensor.name) != tensor.name:
            raise AdapterError(f"`{file.path}`: `{keys[part]}` and `{tensor.name}` are the same factor")
    if not modules:
        raise AdapterError(f"`{file.path}` holds no tensors")
    for module in modules.values():
        for part in ("down", "up"):
            if part not in module.keys:
                raise AdapterError(f"`{file.path}` has `{min(module.keys.values())}` but no lora_{part} to it")
    return list(modules.values())


def _target(file: Checkpoint, names: NameMap, module: Module) -> str | None:
    targets = names.find(module)
    if len(targets) > 1:
        raise AdapterError(
            f"`{file.path}`: `{module.stem}` can mean `{targets[0]}` as well as `{targets[1]}`, whose names differ in "
            "dots only"
        )
    return targets[0] if targets else None


def _problem(file: Checkpoint, base: Model, module: Module, target: str | None) -> str | None:
    """Why a module cannot be the base's, in words."""
    if target is None:
        return (
            f"`{file.path}` has factors for `{module.stem}`, but no module of `{base.path}` has that name: is it an "
            "adapter of another base, or of another layout (one file against diffusers' directories)?"
        )
    shape = base.checkpoint.info(target).shape
    up, down = (file.info(module.keys[part]).shape for part in ("up", "down"))
    mid = file.info(module.keys["mid"]).shape if "mid" in module.keys else None
    if not factors_fit(shape, up, down, mid):
        between = f", `{module.keys['mid']}` {mid}" if mid is not None else ""
        return (
            f"`{file.path}`: `{module.keys['down']}` has shape {down}, `{module.keys['up']}` {up}{between}: that does "
            f"not fit `{target}` of shape {shape}"
        )
    return None


def factors_fit(shape: list[int], up: list[int], down: list[int], mid: list[int] | None) -> bool:
    """Whether factors multiply to a weight of this shape."""
    if min(len(up), len(down)) < 2 or math.prod(up[2:]) != 1 or 0 in up or 0 in down or up[0] != shape[0]:
        return False
    if mid is None:
        return up[1] == down[0] and math.prod(down[1:]) == math.prod(shape[1:])
    return mid == [up[1], down[0], *shape[2:]] and down[1] == shape[1] and math.prod(down[2:]) == 1


def _check_adapter_metadata(file: Checkpoint, modules: Sequence[Module]) -> None:
    """diffusers keeps PEFT's configuration of each component in the file's metadata (`lora_adapter_metadata`). Where
    there are no alphas, it says whether the scale is another than 1.
    """
    text = (file.metadata[0] if file.metadata else {}).get("lora_adapter_metadata")
    if text is None or all("alpha" in module.keys for module in modules):
        return
    try:
        settings = json.loads(text)
        plain = isinstance(settings, dict) and all(
            value == settings.get(name.removesuffix("lora_alpha") + "r")
            for name, value in settings.items()
            if name.endswith("lora_alpha")
        )
        patterns = plain and any(value for name, value in settings.items() if name.endswith(SCALING))
    except (ValueError, RecursionError):
        plain, patterns = False, False
    if not plain or patterns:
        raise AdapterError(
            f"`{file.path}` has no alphas, and the `lora_adapter_metadata` of its header scales the factors in a way "
            "that is not read: save it with alphas, or as PEFT's directory"
        )
