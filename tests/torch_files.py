"""PyTorch's zip format for tests that run without PyTorch: what `torch.save` writes (`torch/serialization.py`)."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import BF16

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(BF16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.bool_): "BoolStorage",
}


@dataclass
class View:
    """A tensor whose elements are those of `storage`, in elements from `first` on."""

    storage: NDArray[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int = 0


def _rebuild_tensor_v2(*_: Any) -> None: ...


def _rebuild_parameter(*_: Any) -> None: ...


@contextmanager
def _pretended_torch() -> Iterator[ModuleType]:
    """Modules whose names `pickle` writes down."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    for function in (_rebuild_tensor_v2, _rebuild_parameter):
        function.__module__ = "torch._utils"
        setattr(utils, function.__name__, function)
    with mock.patch.dict("sys.modules", {"torch": torch, "torch._utils": utils}):
        yield torch


class _Storage:
    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, torch: ModuleType) -> None:
        super().__init__(file, protocol=2)
        self.torch, self.storages = torch, dict[int, tuple[str, NDArray[Any]]]()

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        key, _ = self.storages.setdefault(id(value.values), (str(len(self.storages)), value.values))
        return "storage", getattr(self.torch, STORAGES[value.values.dtype]), key, "cpu", value.values.size

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, View):
            arguments: Any = (_Storage(value.storage), value.first, value.shape, value.strides, False, OrderedDict())
            return _rebuild_tensor_v2, arguments
        if isinstance(value, np.ndarray):
            flat = np.ascontiguousarray(value).reshape(-1)
            # `id` has to stay that of one array as long as the pickler lives.
            self.kept = [*getattr(self, "kept", []), flat]
            strides = tuple(np.cumprod([1, *value.shape[:0:-1]])[::-1].tolist()) if value.ndim else ()
            return _rebuild_tensor_v2, (_Storage(flat), 0, value.shape, strides, False, OrderedDict())
        return NotImplemented


def save_torch(
    path: Path,
    tensors: Any,
    *,
    root: str = "archive",
    compression: int = zipfile.ZIP_STORED,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `tensors`, a dictionary of arrays and `View`s by name or what holds one."""
    pickled = io.BytesIO()
    with _pretended_torch() as torch:
        pickler = _Pickler(pickled, torch)
        pickler.dump(tensors)
    entries = {"data.pkl": pickled.getvalue(), "byteorder": b"little", **(extra or {})}
    entries |= {f"data/{key}": values.tobytes() for key, values in pickler.storages.values()}
    return write_zip(path, entries, root=root, compression=compression)


def write_zip(
    path: Path, entries: Mapping[str, bytes], *, root: str = "archive", compression: int = zipfile.ZIP_STORED
) -> Path:
    """Write an archive of these entries."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
    return path
