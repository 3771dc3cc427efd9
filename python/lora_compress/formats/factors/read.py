"""Reading factors: all is checked by names and shapes at once, values are read when a tensor is merged."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_compress._native import Checkpoint
from lora_compress.adapter import Adapter
from lora_compress.decompositions.network import Network
from lora_compress.errors import AdapterError
from lora_compress.model import FLOATS, Model, matrix_shape, read_json

if TYPE_CHECKING:
    from lora_compress.adapter import Compute, Float32Matrix

CONFIG = "adapter_factors.json"
FACTORS = "adapter_factors.safetensors"
SCHEMA_VERSION = 1
# A file can ask for products far larger than the matrix they end in; no decomposition needs more than this.
LARGEST_PRODUCT = 16
SMALL = 1 << 22


def read(path: Path, base: Model) -> Adapter:
    """Read an adapter of factors for `base`.

    Raises `AdapterError` for a description that is malformed, factors that are missing or do not fit, and tensors of
    the file that nothing names.
    """
    config = read_json(path / CONFIG)
    if type(config.get("schema_version")) is not int or config["schema_version"] != SCHEMA_VERSION:
        raise AdapterError(
            f"`{path / CONFIG}` has schema version {config.get('schema_version')!r}, this release reads "
            f"{SCHEMA_VERSION}"
        )
    file = Checkpoint(path / FACTORS)
    groups = config.get("groups")
    if not isinstance(groups, list):
        raise AdapterError(f"`{path / CONFIG}` has no list of groups")
    warnings = [] if groups else [f"`{path / CONFIG}` has no groups: there are no factors in it"]
    computed: dict[str, list[Compute]] = {}
    used: set[str] = set()
    for number, group in enumerate(groups):
        network, tensors = _group(path / CONFIG, number, group)
        for tensor in tensors:
            if tensor in computed:
                raise AdapterError(f"`{path / CONFIG}` has factors for `{tensor}` twice")
            names = [stored_name(at, tensor if own else None, number) for at, own in enumerate(network.own)]
            _check(file, network, names, tensor, base)
            used.update(names)
            computed[tensor] = [partial(_values, file, network, names)]
    left = sorted({tensor.name for tensor in file.tensors()} - used)
    if left:
        raise AdapterError(f"`{path / FACTORS}` holds `{left[0]}`, which no group of `{path / CONFIG}` names")
    return Adapter(path, computed=computed, warnings=warnings)


def stored_factors(path: Path) -> dict[str, tuple[str, list[Float32Matrix]]]:
    """The contraction and the factors of every tensor, for those who go on with them; of files that `read` accepts."""
    file, found = Checkpoint(path / FACTORS), {}
    for number, group in enumerate(read_json(path / CONFIG)["groups"]):
        network, tensors = _group(path / CONFIG, number, group)
        for tensor in tensors:
            names = [stored_name(at, tensor if own else None, number) for at, own in enumerate(network.own)]
            found[tensor] = network.text, [file.read(name) for name in names]
    return found


def stored_name(factor: int, tensor: str | None, group: int) -> str:
    """Name of a factor in the file: of one tensor, or shared by a group."""
    return f"{factor}:{tensor}" if tensor is not None else f"{factor}:group {group}"


def _group(path: Path, number: int, group: Any) -> tuple[Network, list[str]]:
    if not isinstance(group, dict):
        raise AdapterError(f"`{path}`: group {number} is no object")
    tensors, contraction = group.get("tensors"), group.get("contraction")
    if not isinstance(tensors, list) or not tensors or not all(isinstance(name, str) for name in tensors):
        raise AdapterError(f"`{path}`: group {number} has no list of tensors")
    try:
        return Network.parse(str(contraction)), tensors
    except ValueError as error:
        raise AdapterError(f"`{path}`: the contraction of group {number} cannot be read: {error}") from error


def _check(file: Checkpoint, network: Network, names: list[str], tensor: str, base: Model) -> None:
    """Raise `AdapterError` unless the factors are there and make a matrix of the tensor's shape."""
    missing = [name for name in names if name not in file]
    if missing:
        raise AdapterError(f"`{file.path}` lacks the factor `{missing[0]}`")
    odd = [name for name in names if file.info(name).dtype not in FLOATS]
    if odd:
        raise AdapterError(f"`{file.path}`: the factor `{odd[0]}` is {file.info(odd[0]).dtype}, no float")
    try:
        sizes = network.sizes([SimpleNamespace(shape=tuple(file.info(name).shape)) for name in names])
        largest = network.largest_product(sizes)
    except ValueError as error:
        raise AdapterError(f"`{file.path}`, factors of `{tensor}`: {error}") from error
    shape = tuple(math.prod(sizes[index] for index in side) for side in (network.rows, network.cols))
    # A tensor that the base lacks is told by whoever applies the adapter.
    weight = base.checkpoint.info(tensor).shape if tensor in base.checkpoint else list(shape)
    if len(weight) < 2 or matrix_shape(weight) != shape:
        raise AdapterError(
            f"`{file.path}`: the factors of `{tensor}` make a matrix of shape {list(shape)}, the base's has {weight}"
        )
    if largest > max(LARGEST_PRODUCT * math.prod(shape), SMALL):
        raise AdapterError(f"`{file.path}`: multiplying the factors of `{tensor}` would need an array of {largest:,}")


def _values(
    file: Checkpoint, network: Network, names: list[str]
) -> tuple[Float32Matrix, Float32Matrix] | Float32Matrix:
    """A pair where that is smaller than the matrix, else the matrix. Raises `ValueError` for what is not finite."""
    factors = [file.read(name) for name in names]
    for name, factor in zip(names, factors, strict=True):
        if not np.isfinite(factor).all():
            raise ValueError(f"the factor `{name}` of `{file.path}` holds NaN or an infinity")
    if network.lowers_small(network.sizes(factors)):
        b, a = network.lower(factors)
        return np.ascontiguousarray(b), np.ascontiguousarray(a)
    return np.ascontiguousarray(network.dense(factors))
