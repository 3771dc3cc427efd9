"""A model on disk: its checkpoint, its configuration, and what the two say about names.

Without PyTorch there is no module tree to ask, so this module holds the few conventions by which a tensor's role
follows from its name and the model's `config.json`: which weights belong to embeddings, which are stored as (in, out),
and which output head shares the embedding's matrix.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_compress._native import Checkpoint, fingerprint, same_bytes
from lora_compress.errors import CheckpointError
from lora_compress.hub import resolve

CONFIG = "config.json"
WEIGHT = ".weight"

# Last component of the module: `embed_tokens`, `word_embeddings`, GPT-2's `wte` and `wpe`, T5's `shared` and its
# position biases. GPT-NeoX's `embed_out` and the like are linear output layers.
EMBEDDING = re.compile(r"(?i)(?!.*(?:out|proj|norm|embedder|mapping)).*embed.*|wte|wpe|shared|relative_attention_bias")

# transformers' `Conv1D` stores its weight as (in, out): the layers of that type, by the model types that have it.
CONV1D_MODELS = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
CONV1D = re.compile(r"c_attn|c_fc|c_proj|q_attn")

# No kernel of a convolution is longer in any direction; the last dimensions of stacked experts are.
LONGEST_KERNEL = 64
# Weights of experts that are stored as one tensor (experts, …, …), by how their modules are called.
EXPERTS = re.compile(r"(?i)(^|[._])(experts?|moe)([._]|$)")
# Models whose stacked experts are (experts, in, out); those of all others are (experts, out, in): the decorator
# `use_experts_implementation(is_transposed=True)` of transformers, which PEFT asks.
TRANSPOSED_EXPERTS = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
MATRIX = re.compile(r"(?P<stack>.+)\[(?P<number>0|[1-9][0-9]*)\]")

# Dtypes that have arithmetic here.
FLOATS = frozenset({"BF16", "F16", "F32", "F64"})

# Output heads of models with a language-modelling head, by their usual names.
HEAD = "lm_head"
# Input embeddings, by the names that transformers gives them.
INPUT_EMBEDDINGS = frozenset({"embed_tokens", "wte", "shared", "word_embeddings", "embed_in", "tok_embeddings"})
HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# What transformers calls the headless model inside a headed one (`base_model_prefix`), by model type; "model" for most.
INNER = {
    **dict.fromkeys(
        ("bloom", "codegen", "falcon", "gpt2", "gpt_neo", "gptj", "mpt", "openai-gpt", "xlnet"), "transformer"
    ),
    **{name: name for name in ("albert", "bert", "deberta", "distilbert", "electra", "gpt_neox", "mpnet", "roberta")},
    **dict.fromkeys(("camembert", "xlm-roberta"), "roberta"),
    "deberta-v2": "deberta",
}
# Parameters of the heads themselves, which lie beside it.
HEADS = ("lm_head.", "cls.", "classifier.", "qa_outputs.", "score.")


@dataclass(frozen=True)
class Model:
    """An opened checkpoint with its configuration ({} where there is none)."""

    path: Path
    checkpoint: Checkpoint
    config: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Model:
        """Open a file of safetensors or PyTorch, a directory with one or several of them, or `ORG/NAME` of the Hub.

        Raises `FileNotFoundError` or another `OSError`, and `CheckpointError` for files that break their format.
        """
        path = resolve(path)
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        checkpoint = Checkpoint(path)
        return cls(path, checkpoint, read_json(_folder(path) / CONFIG))

    @property
    def folder(self) -> Path:
        """The directory of its files."""
        return _folder(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """A digest by which an adapter knows its base: names, dtypes, shapes and a sample of the values."""
        return fingerprint(self.checkpoint)

    @property
    def architecture(self) -> str:
        """First of the configuration's `architectures`, empty where there is none."""
        architectures = self.config.get("architectures")
        return str(architectures[0]) if isinstance(architectures, list) and architectures else ""

    @property
    def model_type(self) -> str:
        """`model_type` of the configuration, empty where there is none."""
        return str(self.config.get("model_type", ""))

    def path_of(self, tensor: str) -> str:
        """The tensor's name in the model that transformers builds: checkpoints of headless models lack how it begins
        in those with a head (the Hub's `gpt2` has `h.0…` for `transformer.h.0…`).
        """
        return f"{self.inner}.{tensor}" if self.lacks_inner and not tensor.startswith(HEADS) else tensor

    @property
    def inner(self) -> str:
        """What the headless model is called inside a headed one."""
        return INNER.get(self.model_type, "model")

    @cached_property
    def lacks_inner(self) -> bool:
        """Whether the configuration is of a model with a head and the names are of one without."""
        stored = names(self.checkpoint)
        # Of other types only those whose blocks are called as most are.
        is_known = self.model_type in INNER or any(name.startswith("layers.") for name in stored)
        is_headed = self.architecture.endswith(("ForSequenceClassification", "ForMaskedLM", *HEADED[:2]))
        return is_known and is_headed and not any(name.startswith(self.inner + ".") for name in stored)

    def has_transposed_experts(self) -> bool:
        """Whether stacked experts are stored as (experts, in, out)."""
        return self.model_type in TRANSPOSED_EXPERTS

    def is_conv1d(self, tensor: str) -> bool:
        """Whether `tensor` is the weight of a transformers `Conv1D`, stored as (in, out)."""
        return self.model_type in CONV1D_MODELS and CONV1D.fullmatch(last_component(tensor)) is not None

    def tied_embedding(self) -> str | None:
        """Name of the embedding whose matrix the output head shares, or None when the head is stored or absent.

        A causal language model whose checkpoint has no head can only take it from the embedding. That it is tied where
        a head is stored too needs no care here: both tensors then have a delta of their own.
        """
        stored = any(name.endswith(HEAD + WEIGHT) for name in names(self.checkpoint))
        return None if stored else self._embedding_of_head()

    @cached_property
    def copied_head(self) -> tuple[str, str] | None:
        """The stored output head and the embedding whose matrix it is once more, as PyTorch's files have it of tied
        models; None for any other.
        """
        embedding = self._embedding_of_head() if HEAD + WEIGHT in self.checkpoint else None
        if embedding is None or not same_bytes(self.checkpoint, self.checkpoint, HEAD + WEIGHT, embedding):
            return None
        return HEAD + WEIGHT, embedding

    def _embedding_of_head(self) -> str | None:
        """The embedding that a head would share, if this is a model with a head that may share one."""
        text = self.config.get("text_config")
        settings = text if isinstance(text, dict) and "tie_word_embeddings" in text else self.config
        if settings.get("tie_word_embeddings") is False or not self.architecture.endswith(HEADED):
            return None
        inputs = [name for name in names(self.checkpoint) if last_component(name) in INPUT_EMBEDDINGS]
        return inputs[0] if len(inputs) == 1 else None


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def names(checkpoint: Checkpoint) -> list[str]:
    """Names of all tensors, sorted."""
    return [tensor.name for tensor in checkpoint.tensors()]


def module_of(tensor: str) -> str | None:
    """Path of the module whose `weight` the tensor is; None for any other parameter."""
    return tensor.removesuffix(WEIGHT) if tensor.endswith(WEIGHT) else None


def last_component(tensor: str) -> str:
    """Last component of the module's path: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    stack = stack_of(tensor)
    name = stack[0] if stack else tensor
    return (module_of(name) or name).rpartition(".")[2]


def is_convolution(tensor: str, shape: Sequence[int]) -> bool:
    """Whether the tensor is, by name and shape, the kernel (out, in, …) of a convolution in one to three dimensions."""
    is_kernel = 3 <= len(shape) <= 5 and max(shape[2:]) <= LONGEST_KERNEL
    return is_kernel and module_of(tensor) is not None and not (len(shape) == 3 and EXPERTS.search(tensor))


def is_depthwise(shape: Sequence[int]) -> bool:
    """Whether a convolution's kernel (out, in, …) has one input channel for many outputs: then it is cut into groups,
    which a pair of factors for one product is not.
    """
    return shape[1] == 1 < shape[0]


def is_stack(tensor: str, shape: Sequence[int]) -> bool:
    """Whether the tensor is a stack of matrices, one for each expert."""
    return len(shape) == 3 and not is_convolution(tensor, shape) and EXPERTS.search(tensor) is not None


def matrices(stack: str, count: int) -> list[str]:
    """Names of the matrices of a stack, by which the core knows them."""
    return [f"{stack}[{number}]" for number in range(count)]


def stack_of(tensor: str) -> tuple[str, int] | None:
    """The stack that a matrix belongs to, and its number there; None for a tensor that is no such matrix."""
    match = MATRIX.fullmatch(tensor)
    return (match["stack"], int(match["number"])) if match else None


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight seen as a matrix: (out, in·kernel) of a convolution."""
    return shape[0], math.prod(shape[1:])


def is_embedding(tensor: str) -> bool:
    """Whether the tensor is, by its name, the weight of an embedding: rows are entries of a vocabulary."""
    return tensor.endswith(WEIGHT) and EMBEDDING.fullmatch(last_component(tensor)) is not None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when the file does not exist. Raises `CheckpointError` when it holds anything
    else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    return parse_json(content, path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `CheckpointError` for anything else."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in content:
            # JSON can escape half a character, which is in no name and in no file that is written.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` does not hold a JSON object")
    return value
