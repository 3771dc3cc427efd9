"""Factors as a file has them, on their way into a file of another format: the bytes are copied, only names change.

ΔW = scale·B·A, B (out, r), A (r, in); of a convolution B (out, r, 1…) and A (r, in, k…).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_compress._native import Checkpoint, Writer, check_finite
from lora_compress.adapter import Stored
from lora_compress.errors import AdapterError
from lora_compress.model import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Make = Callable[[], NDArray[np.float32]]

# Dtypes that values can be written in.
WRITTEN = frozenset({"BF16", "F16", "F32"})
# Bytes of the dtypes in the order of safetensors' `Dtype`, by which its files are sorted, the last first.
WIDTH = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
    "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write: stored in another file, or made when its turn comes."""

    key: str
    dtype: str
    shape: Sequence[int]
    source: Stored | Make

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * WIDTH[self.dtype]

    def append(self, writer: Writer) -> None:
        """Write it: byte for byte where dtype and shape are the stored ones, else its values rounded to the dtype.

        Raises `TensorError` for values that are not finite, `AdapterError` for a dtype that cannot be written.
        """
        if not isinstance(self.source, tuple):
            writer.append(self.key, self.dtype, self.source().reshape(self.shape))
            return
        file, name = self.source
        info = file.info(name)
        if info.dtype in FLOATS:
            check_finite(file, name)
        if (info.dtype, info.shape) == (self.dtype, list(self.shape)):
            writer.append_stored(self.key, file, name)
        elif self.dtype in WRITTEN:
            writer.append(self.key, self.dtype, file.read(name).reshape(self.shape))
        else:
            raise AdapterError(f"`{name}` in `{file.path}` is {info.dtype}: pass --dtype F32")


def write(path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> int:
    """Write a file and return the bytes of its tensors. They are in the order of the safetensors library, so that
    digests of a file's data, as kohya keeps them, stay true when it comes back.
    """
    order = list(WIDTH)
    ordered = sorted(tensors, key=lambda tensor: (-order.index(tensor.dtype), tensor.key))
    writer = Writer(path, [(tensor.key, tensor.dtype, tensor.shape) for tensor in ordered], metadata)
    for tensor in ordered:
        tensor.append(writer)
    writer.finish()
    return sum(tensor.nbytes for tensor in ordered)


@dataclass(frozen=True, slots=True)
class StoredPair:
    """A pair of one tensor: where it is stored, or for A a function that makes it where the file has no such factor."""

    tensor: str
    file: Checkpoint
    b: str
    a: str
    rank: int
    scale: float
    make_a: Make | None = None

    @property
    def alpha(self) -> float:
        """alpha with alpha / r = scale: of the float64 numbers that give this scale, one that float32 can hold where
        there is one, as it then is what the file said.
        """
        near = self.scale * self.rank
        for candidate in (float(np.float32(near)), near, math.nextafter(near, math.inf), math.nextafter(near, 0.0)):
            if candidate / self.rank == self.scale:
                return candidate
        return near

    def tensors(self, keys: Sequence[str], shapes: Sequence[Sequence[int]], dtype: str | None) -> list[Tensor]:
        """B and A under other keys, in their own dtypes or in `dtype`."""
        kinds = [dtype or self.file.info(name).dtype for name in (self.b, self.a)]
        if self.make_a is not None and kinds[1] not in WRITTEN:
            raise AdapterError(f"`{self.a}` in `{self.file.path}` is {kinds[1]}: pass --dtype F32")
        second: Any = (self.file, self.a) if self.make_a is None else self.make_a
        return [
            Tensor(keys[0], kinds[0], shapes[0], (self.file, self.b)),
            Tensor(keys[1], kinds[1], shapes[1], second),
        ]


def shapes(weight: Sequence[int], rank: int) -> tuple[list[int], list[int]]:
    """Shapes of B and A of a weight: a convolution's A has its kernel, its B kernels of 1."""
    return [weight[0], rank, *[1] * (len(weight) - 2)], [rank, *weight[1:]]
