"""PEFT's LoRA directory: `adapter_config.json`, `adapter_model.safetensors`, and a model card.

Written so that PEFT, vLLM and LoRAX read the same ΔW: the scale is folded into the factors, `r` = `lora_alpha` = the
largest rank, and `alpha_pattern` equals `rank_pattern`, so that alpha / r is 1 for readers that know the patterns and
for those that ignore them. (PEFT's own readers: `peft.tuners.lora`; vLLM's: `vllm/lora/peft_helper.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_compress.adapter import Adapter, AdapterPlan, AdapterWriter, Format
from lora_compress.formats.peft import read
from lora_compress.formats.peft.layout import CONFIG, Layout
from lora_compress.formats.peft.write import PeftWriter
from lora_compress.hookspecs import hookimpl
from lora_compress.model import Model


class PeftFormat:
    """The format's entry in the registry."""

    name = "peft"

    def recognises(self, path: Path) -> bool:
        """Whether `path` is a directory with an `adapter_config.json`."""
        return (path / CONFIG).is_file()

    def read(self, path: Path, base: Model) -> Adapter:
        """Read a LoRA adapter written by PEFT or by this package."""
        return read.read(path, base)

    def carries(self, base: Model, tensors: Sequence[str]) -> set[str]:
        """All weights of modules; other parameters where they are the only one of their module."""
        layout = Layout(base, tensors)
        return {tensor for tensor in tensors if layout.place(tensor) is not None}

    def writer(self, path: Path, plan: AdapterPlan) -> AdapterWriter:
        """Begin an adapter in `path`."""
        return PeftWriter(path, plan)


@hookimpl
def register_formats(register: Callable[[Format], None]) -> None:
    """Register `peft`."""
    register(PeftFormat())
