"""kohya's LoRA file, as sd-scripts writes it and ComfyUI, A1111 and diffusers read it.

One safetensors file with flattened names, an alpha for every module, and metadata. `names` has the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_compress.adapter import Adapter, AdapterPlan, AdapterWriter, Format
from lora_compress.formats.kohya import read
from lora_compress.formats.kohya.names import NameMap
from lora_compress.formats.kohya.write import KohyaWriter
from lora_compress.hookspecs import hookimpl
from lora_compress.model import Model


class KohyaFormat:
    """The format's entry in the registry."""

    name = "kohya"

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a file, or a directory with one, most of whose tensors are called so."""
        return read.recognises(path)

    def read(self, path: Path, base: Model) -> Adapter:
        """Read the components of a file that are the base's."""
        return read.read(path, base)

    def carries(self, base: Model, tensors: Sequence[str]) -> set[str]:
        """Weights of modules that are no embeddings, in the components that have a prefix."""
        names = NameMap(base)
        return {tensor for tensor in tensors if names.stem(tensor) is not None}

    def writer(self, path: Path, plan: AdapterPlan) -> AdapterWriter:
        """Begin `lora.safetensors` in `path`."""
        return KohyaWriter(path, plan)


@hookimpl
def register_formats(register: Callable[[Format], None]) -> None:
    """Register `kohya`."""
    register(KohyaFormat())
