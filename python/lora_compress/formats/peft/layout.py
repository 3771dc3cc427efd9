"""How PEFT names the factors of each weight (`peft.utils.save_and_load`, `peft.tuners.lora.layer`, version 0.21).

    module           factors                               ΔW
    Linear           M.lora_A.weight (r, in)               B·A
                     M.lora_B.weight (out, r)
    Conv1D           the same; the weight is (in, out)     (B·A)ᵀ
    Conv1d, 2d, 3d   M.lora_A.weight (r, in, kernel…)      B·A of the factors as matrices
                     M.lora_B.weight (out, r, 1…)
    Embedding        M.lora_embedding_A (r, vocabulary)    (B·A)ᵀ
                     M.lora_embedding_B (dim, r)
    a parameter      M.lora_A.weight, M.lora_B.weight      B·A, listed in `target_parameters`
    E experts        M.lora_A.weight (E·r, in)             Bₑ·Aₑ, or its transpose where the model's experts are
                     M.lora_B.weight (out, r·E)            (E, in, out); rows of A by expert, columns of B by direction

All keys begin with `base_model.model.`. Where several parameters of one module have factors, PEFT wraps the module once
for each, in the order in which they were registered: the keys of all but the last have `.base_layer` after the module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from lora_compress.model import (
    HEAD,
    WEIGHT,
    Model,
    is_convolution,
    is_depthwise,
    is_embedding,
    last_component,
    module_of,
    names,
    stack_of,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Written by PEFT with `safe_serialization=False`; only read here.
PICKLED_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"
EXPERTS = ".experts"
# Beside experts, these are no Linear but a class of their own with a parameter (transformers' `…TopKRouter`).
ROUTERS = frozenset({"gate", "router"})
# How transformers' stacked experts are registered (`use_experts_implementation`).
EXPERT_ORDER = {"gate_up_proj": 0, "gate_proj": 0, "up_proj": 1, "down_proj": 2}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the factors of one tensor go.

    `transposed`: the base stores the transpose of what PEFT's factors multiply to, so that A takes the columns of the
    transposed tensor. `kernel`: sizes of a convolution's kernel. `experts`: how many matrices have their factors there.
    """

    target: str
    a_key: str
    b_key: str
    transposed: bool
    is_parameter: bool = False
    kernel: tuple[int, ...] = ()
    experts: int = 1


class Layout:
    """Places for a given set of low-rank tensors of a base."""

    def __init__(self, base: Model, tensors: Sequence[str], embeddings: Collection[str] = ()) -> None:
        self._base = base
        self._embeddings = embeddings
        self._parameters: dict[str, set[str]] = {}
        for tensor in tensors:
            stack = stack_of(tensor)
            if stack or module_of(tensor) is None:
                name = stack[0] if stack else tensor
                self._parameters.setdefault(_owner(name), set()).add(name)
        # The modules that hold experts.
        self._mixtures = {name.partition(EXPERTS)[0] for name in names(base.checkpoint) if EXPERTS in name}

    def place(self, tensor: str) -> Place | None:
        """Where `tensor` goes; None when PEFT has no name for it."""
        stack = stack_of(tensor)
        module = module_of(tensor)
        if module is None:
            return self._parameter_place(stack[0] if stack else tensor, is_stack=stack is not None)
        path = self._base.path_of(tensor).removesuffix(WEIGHT)
        shape = self._base.checkpoint.info(tensor).shape
        if is_convolution(tensor, shape):
            return None if is_depthwise(shape) else linear_place(path, kernel=tuple(shape[2:]))
        if tensor in self._embeddings or is_embedding(tensor):
            return embedding_place(path)
        if last_component(tensor) in ROUTERS and _owner(module) in self._mixtures:
            return replace(linear_place(path), target=path + WEIGHT, is_parameter=True)
        return linear_place(path, transposed=self._base.is_conv1d(tensor))

    def _parameter_place(self, name: str, *, is_stack: bool) -> Place | None:
        owner = _owner(name)
        order = nesting(self._parameters.get(owner, {name})) if owner else None
        if order is None:
            return None
        path = self._base.path_of(name)
        place = linear_place(_owner(path) + BASE_LAYER * (len(order) - 1 - order.index(name)))
        return replace(
            place,
            target=path,
            is_parameter=True,
            transposed=is_stack and self._base.has_transposed_experts(),
            experts=self._base.checkpoint.info(name).shape[0] if is_stack else 1,
        )


def nesting(parameters: Collection[str]) -> list[str] | None:
    """Parameters of one module in the order in which PEFT wraps them, the innermost first; None where that is unknown.

    It is the order of registration, which a checkpoint does not tell; transformers registers the experts' parameters in
    the order of their use.
    """
    if len(parameters) == 1:
        return list(parameters)
    ranks = {name: EXPERT_ORDER.get(name.rpartition(".")[2]) for name in parameters}
    if None in ranks.values() or len(set(ranks.values())) != len(ranks):
        return None
    return sorted(parameters, key=lambda name: ranks[name] or 0)


def wrapped_owner(module: str) -> tuple[str, int]:
    """The module that a key's path belongs to, and how often it was wrapped after these factors."""
    owner, depth = module, 0
    while owner.endswith(BASE_LAYER):
        owner, depth = owner.removesuffix(BASE_LAYER), depth + 1
    return owner, depth


def targeted(module: str, parameters: Iterable[object]) -> list[str]:
    """Paths of the parameters of a module that `target_parameters` names, whole or by their ends."""
    found = set()
    for parameter in parameters:
        owner, _, last = str(parameter).rpartition(".")
        if module == owner or module.endswith("." + owner):
            found.add(f"{module}.{last}")
    return sorted(found)


def wrapped_parameter(parameters: Collection[str], depth: int) -> str | None:
    """Which of the parameters of a module was wrapped `depth` before the last; None where that cannot be told."""
    order = nesting(parameters)
    return order[len(order) - 1 - depth] if order is not None and depth < len(order) else None


def linear_place(module: str, *, transposed: bool = False, kernel: tuple[int, ...] = ()) -> Place:
    """Keys of a Linear, a Conv1D or a convolution."""
    a_key, b_key = f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
    return Place(module, a_key, b_key, transposed, kernel=kernel)


def embedding_place(module: str) -> Place:
    """Keys of an Embedding."""
    return Place(module, f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B", True)


def head_place() -> Place:
    """Keys of the output head that shares the embedding's matrix."""
    return linear_place(HEAD)


def _owner(tensor: str) -> str:
    """The module that a parameter belongs to."""
    return tensor.rpartition(".")[0]
