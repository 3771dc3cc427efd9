"""Reading PEFT's directory, its own files as well as ours.

Every tensor of the file ends up in the adapter or is refused by name; a configuration that means more than s·B·A is
refused too, because merging it as plain LoRA would give another model without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_compress._native import Checkpoint, LowRank, same_bytes
from lora_compress.adapter import Adapter, Stored
from lora_compress.errors import AdapterError
from lora_compress.formats.peft.layout import (
    CONFIG,
    PICKLED_WEIGHTS,
    PREFIX,
    WEIGHTS,
    targeted,
    wrapped_owner,
    wrapped_parameter,
)
from lora_compress.formats.peft.patterns import ByModule, scale_of
from lora_compress.model import HEAD, WEIGHT, Model, is_stack, matrices, read_json

FACTOR = re.compile(r"(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")

# Settings under which a module's update is not s·B·A of the base, with what they mean.
REFUSED = {
    "use_dora": "DoRA rescales the merged weight",
    "lora_bias": "the factors have biases of their own",
    "layer_replication": "layers of the base are repeated",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "the factors are block-diagonal",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and cannot be merged",
    "trainable_token_indices": "single rows of the embedding are replaced",
    "kasa_config": "KaSA changes the base weight",
    "monteclora_config": "the factors are random variables",
}
# Initialisations that subtract the factors' first value from the base: the adapter fits that changed base only.
CHANGED_BASE = re.compile(r"pissa.*|olora|corda|lora_ga|loftq|milora")


def read(path: Path, base: Model) -> Adapter:
    """Read the adapter in directory `path` for `base`.

    Raises `AdapterError` for settings and tensors that cannot be applied, `CheckpointError` for broken files.
    """
    config = read_json(path / CONFIG)
    return interpret(path, config, base, Checkpoint(weights_of(path)))


def interpret(path: Path, config: dict[str, Any], base: Model, weights: Checkpoint) -> Adapter:
    """What a configuration and weights mean for a base. Raises as `read` does."""
    _check_config(path / CONFIG, config)
    return _Reader(path, config, base, weights).read()


def weights_of(path: Path) -> Path:
    """The file of an adapter's tensors."""
    weights = next((path / name for name in (WEIGHTS, PICKLED_WEIGHTS) if (path / name).is_file()), None)
    if weights is None:
        raise AdapterError(f"`{path}` has no `{WEIGHTS}`")
    return weights


@dataclass
class _Reader:
    path: Path
    config: dict[str, Any]
    base: Model
    weights: Checkpoint
    factors: dict[tuple[str, bool], dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        path = self.path / CONFIG
        self.ranks = ByModule(path, self.config, "rank_pattern", self.config.get("r", 8))
        self.alphas = ByModule(path, self.config, "alpha_pattern", self.config.get("lora_alpha", 8))

    def read(self) -> Adapter:
        for tensor in self.weights.tensors():
            self._sort(tensor.name)
        low_rank: dict[str, list[LowRank]] = {}
        for (module, embedding), pair in sorted(self.factors.items()):
            if set(pair) != {"A", "B"}:
                raise AdapterError(f"`{self.path}`: `{module}` has lora_{min(pair)} but not the other factor")
            target = self._target(module, pair)
            if target is None:
                self._check_tied_head(module, pair)
                continue
            for name, term in self._terms(target, module, embedding, pair):
                low_rank.setdefault(name, []).append(term)
        replacements: dict[str, Stored] = {}
        for name, key in self.whole.items():
            if name not in self.base.checkpoint:
                raise AdapterError(f"`{self.path}` replaces `{name}`, which `{self.base.path}` does not have")
            # PEFT saves targeted embeddings along with their factors: a copy of the base's changes nothing.
            if not same_bytes(self.base.checkpoint, self.weights, name, key):
                replacements[name] = (self.weights, key)
        return Adapter(self.path, low_rank=low_rank, replacements=replacements, warnings=self.warnings)

    def _sort(self, key: str) -> None:
        """Put one tensor of the file where it belongs: a factor, or a whole weight."""
        if not key.startswith(PREFIX):
            raise AdapterError(f"`{self.path}`: the key `{key}` does not begin with `{PREFIX}`")
        name = key.removeprefix(PREFIX)
        if match := FACTOR.fullmatch(name):
            pair = self.factors.setdefault((match["module"], match["embedding"] is not None), {})
            if pair.setdefault(match["side"], key) != key:
                raise AdapterError(f"`{self.path}`: `{pair[match['side']]}` and `{key}` are the same factor")
        elif ".lora_" in name or ".trainable_tokens_" in name:
            raise AdapterError(f"`{self.path}`: the tensor `{key}` is of a kind that cannot be merged yet")
        elif name.startswith(HEAD + ".base_layer.") and HEAD + WEIGHT not in self.base.checkpoint:
            # PEFT saves the embedding beside its factors, and once more under the name of the tied head.
            return
        else:
            plain = self._own_name(name.replace(".base_layer.", "."))
            if self.whole.setdefault(plain, key) != key:
                raise AdapterError(f"`{self.path}`: `{self.whole[plain]}` and `{key}` are the same weight")

    def _target(self, module: str, pair: Mapping[str, str]) -> str | None:
        """The base's tensor that a module's factors belong to; None for a tied head."""
        owner, depth = wrapped_owner(module)
        parameters = self._parameters(owner)
        if not parameters and self._own_name(module + WEIGHT) in self.base.checkpoint:
            return self._own_name(module + WEIGHT)
        if parameters:
            found = wrapped_parameter(parameters, depth)
            if found is None:
                raise AdapterError(
                    f"`{self.path}`: which parameter of `{owner}` the factors `{pair['A']}` belong to cannot be told"
                )
            return found
        if module == HEAD and self.base.tied_embedding() is not None:
            return None
        raise AdapterError(
            f"`{self.path}` has factors for `{module}`, but `{self.base.path}` has no `{module}{WEIGHT}`: "
            "is it an adapter of another base?"
        )

    def _parameters(self, module: str) -> list[str]:
        """The parameters of a module that `target_parameters` names."""
        paths = targeted(module, self.config.get("target_parameters") or ())
        return [name for name in map(self._own_name, paths) if name in self.base.checkpoint]

    def _own_name(self, path: str) -> str:
        """The base's name for a path in the model that transformers builds."""
        inner = self.base.inner + "."
        return path.removeprefix(inner) if self.base.lacks_inner else path

    def _check_tied_head(self, module: str, pair: Mapping[str, str]) -> None:
        """Accept factors of a tied head when they repeat the embedding's: the shared matrix is updated once."""
        embedding = self.base.path_of(self.base.tied_embedding() or "").removesuffix(WEIGHT)
        twin = self.factors.get((embedding, True))
        if twin is None or set(twin) != {"A", "B"}:
            raise AdapterError(
                f"`{self.path}` changes `{module}` but not `{embedding}`, and the base stores one matrix for both: "
                "merging it would change both; untie the base first"
            )
        ours, theirs = ((self.weights.read(keys["A"]), self.weights.read(keys["B"])) for keys in (pair, twin))
        if not (ours[0].shape == theirs[1].T.shape and ours[1].shape == theirs[0].T.shape) or not (
            (ours[0] == theirs[1].T).all()
            and (ours[1] == theirs[0].T).all()
            and self._scale(module, len(ours[0])) == self._scale(embedding, len(ours[0]))
        ):
            raise AdapterError(
                f"`{self.path}` changes `{module}` and `{embedding}` differently, and the base stores one matrix "
                "for both: untie the base first"
            )

    def _terms(
        self, target: str, module: str, embedding: bool, pair: Mapping[str, str]
    ) -> Iterator[tuple[str, LowRank]]:
        """The term of a tensor, or of every matrix of a stack."""
        shape, weight = self.weights.info(pair["A"]).shape, self.base.checkpoint.info(target).shape
        experts = weight[0] if is_stack(target, weight) else 1
        # PEFT looks patterns up by the module's path, for parameters by theirs.
        is_parameter = target != self._own_name(module + WEIGHT) or target in self._parameters(module)
        pattern_key = self.base.path_of(target) if is_parameter else module
        rank = int(self.ranks[pattern_key])
        if rank < 1 or len(shape) < 2 or shape[0] != rank * experts:
            raise AdapterError(
                f"`{self.path}`: `{pair['A']}` has shape {shape}, but `{CONFIG}` gives `{module}` the rank {rank}"
            )
        scale = self._scale(pattern_key, rank)
        if is_stack(target, weight):
            self._check_layout_of_experts(target)
            transposed = self.base.has_transposed_experts()
            terms = LowRank.parts(self.weights, pair["B"], pair["A"], experts, scale=scale, transposed=transposed)
            yield from zip(matrices(target, experts), terms, strict=True)
            return
        transposed = embedding or self.base.is_conv1d(target) or self._fans_out(target, pair)
        yield target, LowRank(self.weights, pair["B"], pair["A"], scale=scale, transposed=transposed)

    def _check_layout_of_experts(self, target: str) -> None:
        """Raise `AdapterError` for an adapter of PEFT before 0.19, which took (experts, out, in) for (experts, in,
        out) (peft#3083): the same file means another ΔW.
        """
        version = re.match(r"(\d+)\.(\d+)", str(self.config.get("peft_version") or ""))
        if version is not None and (int(version[1]), int(version[2])) < (0, 19):
            raise AdapterError(
                f"`{self.path}` has factors of `{target}` by PEFT {self.config['peft_version']}, which laid those of "
                "stacked experts out in another way: convert it with PEFT 0.19 or later first"
            )

    def _scale(self, pattern_key: str, rank: int) -> float:
        return scale_of(self.config, float(self.alphas[pattern_key]), rank)

    def _fans_out(self, target: str, pair: Mapping[str, str]) -> bool:
        """Whether `fan_in_fan_out` holds for this tensor: PEFT ignores the setting for a Linear, whose shape then
        tells.
        """
        stored = self.base.checkpoint.info(target).shape
        if not self.config.get("fan_in_fan_out") or len(stored) != 2:
            return False
        straight = [self.weights.info(pair["B"]).shape[0], self.weights.info(pair["A"]).shape[1]]
        if stored[0] == stored[-1] and self.base.model_type:
            return False  # `is_conv1d` has answered for a known model.
        return stored != straight or stored[0] == stored[-1]


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"`{path}`: peft_type is {config.get('peft_type')!r}, only LORA adapters can be read")
    for setting, reason in REFUSED.items():
        if config.get(setting):
            raise AdapterError(f"`{path}`: `{setting}` is set and cannot be merged: {reason}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and CHANGED_BASE.fullmatch(init):
        raise AdapterError(
            f"`{path}`: init_lora_weights is {init!r}, which changes the base at the start of training; "
            "convert the adapter with PEFT first (`path_initial_model_for_weight_conversion`)"
        )
    for setting in ("r", "lora_alpha"):
        _check_number(path, setting, config.get(setting, 8), whole=setting == "r")
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(setting) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"`{path}`: {setting} does not map names to numbers")
        for name, value in pattern.items():
            _check_number(path, f"{setting} of `{name}`", value, whole=setting == "rank_pattern")
    for setting in ("target_parameters",):
        if not isinstance(config.get(setting) or [], list):
            raise AdapterError(f"`{path}`: {setting} is not a list")


def _check_number(path: Path, setting: str, value: object, *, whole: bool) -> None:
    """Ranks are positive integers; alphas may be any number that a float can hold."""
    good = (
        isinstance(value, int) and 0 < value < 2**31 if whole else isinstance(value, int | float) and abs(value) < 1e30
    )
    if isinstance(value, bool) or not good:
        raise AdapterError(f"`{path}`: {setting} is {value!r}")
