"""How PEFT names the factors of each weight (`peft.utils.save_and_load`, `peft.tuners.lora.layer`, version 0.21).

    module           factors                               ΔW
    Linear           M.lora_A.weight (r, in)               B·A
                     M.lora_B.weight (out, r)
    Conv1D           the same; the weight is (in, out)     (B·A)ᵀ
    Embedding        M.lora_embedding_A (r, vocabulary)    (B·A)ᵀ
                     M.lora_embedding_B (dim, r)
    a parameter      M.lora_A.weight, M.lora_B.weight      B·A, listed in `target_parameters`

All keys begin with `base_model.model.`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lora_compress.model import HEAD, Model, is_embedding, module_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Place:
    """Where the factors of one tensor go.

    `transposed`: the base stores the transpose of what PEFT's factors multiply to, so that A takes the columns of the
    transposed tensor.
    """

    target: str
    a_key: str
    b_key: str
    transposed: bool
    is_parameter: bool = False


class Layout:
    """Places for a given set of low-rank tensors of a base."""

    def __init__(self, base: Model, tensors: Sequence[str], embeddings: Collection[str] = ()) -> None:
        self._base = base
        self._embeddings = embeddings
        # PEFT nests several adapters on one module in the order in which the module's parameters were registered, which
        # a checkpoint does not tell: only a module's single parameter has a known key.
        self._per_module = Counter(_owner(tensor) for tensor in tensors)

    def place(self, tensor: str) -> Place | None:
        """Where `tensor` goes; None when PEFT has no name for it."""
        module = module_of(tensor)
        if module is None:
            owner = _owner(tensor)
            if not owner or self._per_module[owner] > 1:
                return None
            return Place(tensor, f"{PREFIX}{owner}.lora_A.weight", f"{PREFIX}{owner}.lora_B.weight", False, True)
        if tensor in self._embeddings or is_embedding(tensor):
            return embedding_place(module)
        return linear_place(module, transposed=self._base.is_conv1d(tensor))


def linear_place(module: str, *, transposed: bool = False) -> Place:
    """Keys of a Linear or Conv1D."""
    return Place(module, f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight", transposed)


def embedding_place(module: str) -> Place:
    """Keys of an Embedding."""
    return Place(module, f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B", True)


def head_place() -> Place:
    """Keys of the output head that shares the embedding's matrix."""
    return linear_place(HEAD)


def _owner(tensor: str) -> str:
    """The module that a parameter belongs to."""
    return tensor.rpartition(".")[0]
