"""The factors of any decomposition as they are: `adapter_factors.json` and `adapter_factors.safetensors`.

For decompositions whose factors are shared, or whose pair (B, A) would be larger than they are. The JSON says for every
group of layers which contraction its factors belong to, so that reading needs no plugin:

    {"schema_version": 1, "base_model_name_or_path": …, "groups": [
        {"decomposition": "abc", "contraction": "out p, p q, q in", "tensors": ["model.layers.0…weight"]}]}

Factor k of a layer's own is stored as `k:TENSOR`, one that the layers of group g share as `k:group g`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_compress.adapter import Adapter, AdapterPlan, FactorsWriter, Format
from lora_compress.formats.factors.read import CONFIG, read
from lora_compress.formats.factors.write import GroupWriter
from lora_compress.hookspecs import hookimpl
from lora_compress.model import Model


class FactorsFormat:
    """The format's entry in the registry."""

    name = "factors"
    stores_factors = True

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a directory with an `adapter_factors.json`."""
        return (path / CONFIG).is_file()

    def read(self, path: Path, base: Model) -> Adapter:
        """Read the factors of every group; what they multiply to is formed when a tensor is merged."""
        return read(path, base)

    def carries(self, base: Model, tensors: Sequence[str]) -> set[str]:
        """All of them: factors are stored by the tensor's own name."""
        return set(tensors)

    def writer(self, path: Path, plan: AdapterPlan) -> FactorsWriter:
        """Begin an adapter in `path`."""
        return GroupWriter(path, plan)


@hookimpl
def register_formats(register: Callable[[Format], None]) -> None:
    """Register `factors`."""
    register(FactorsFormat())
