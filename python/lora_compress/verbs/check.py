"""`check`: what a consumer of adapters would refuse or misread, by its own loading code.

The rules were read in the sources of PEFT 0.21, vLLM 0.14, SGLang, LoRAX and llama.cpp's `convert_lora_to_gguf.py`;
they look at PEFT's directory, its configuration and the names and shapes of its tensors. No base is needed to check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_compress._native import Checkpoint
from lora_compress.errors import AdapterError
from lora_compress.formats.peft.layout import CONFIG, PREFIX, WEIGHTS, targeted, wrapped_owner, wrapped_parameter
from lora_compress.formats.peft.patterns import ByModule, scale_of
from lora_compress.formats.peft.read import FACTOR, weights_of
from lora_compress.hub import resolve
from lora_compress.model import HEAD, Model, is_embedding, last_component, read_json
from lora_compress.ranks.choice import VLLM
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.combine import CombineResult, combine
from lora_compress.verbs.merge import read_adapter
from lora_compress.verbs.side_file import EXACT, FOLDER

# The largest rank that a vLLM server loads unless it was started with another `--max-lora-rank`.
VLLM_DEFAULT = 16
# An adapter whose factors are scaled otherwise than a consumer thinks is off by this much, relatively.
SAME = 1e-6


@dataclass(frozen=True, slots=True)
class Finding:
    """`level`: "refused" (it does not load), "misread" (it loads and means another ΔW), or "note"."""

    level: str
    problem: str
    where: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {"level": self.level, "problem": self.problem, "where": list(self.where)}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was found for one consumer."""

    adapter: Path
    consumer: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether it loads and means what it is meant to."""
        return all(finding.level == "note" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "adapter": str(self.adapter),
            "consumer": self.consumer,
            "ok": self.ok,
            "findings": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Facts:
    """An adapter as its files show it. `ranks` and `scales` by module: what the tensors have, what PEFT applies."""

    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    embeddings: tuple[str, ...]
    whole: tuple[str, ...]
    # Modules whose tensors have another rank than the configuration says.
    misfits: tuple[str, ...]
    has_side_file: bool
    is_pickled: bool


def check(adapter: str | Path, consumer: str) -> CheckResult:
    """Check an adapter for a consumer of `CONSUMERS`.

    Raises `AdapterError` for a directory that is no adapter of PEFT's, `CheckpointError` for broken files, `ValueError`
    for a consumer that is not known.
    """
    if consumer not in CONSUMERS:
        raise ValueError(f"there are no rules for `{consumer}`: take one of {', '.join(CONSUMERS)}")
    path = resolve(adapter)
    return CheckResult(path, consumer, tuple(CONSUMERS[consumer].rules(_facts(path))))


def _facts(path: Path) -> Facts:
    if not path.exists():
        raise FileNotFoundError(2, "No such adapter", str(path))
    if path.is_file():
        raise AdapterError(f"`{path}` is no directory of PEFT's: `convert --to peft` makes one of a file of kohya's")
    if (path / "adapter_factors.json").is_file():
        raise AdapterError(f"`{path}` stores factors, which no server reads: `combine` makes pairs of them")
    if not (path / CONFIG).is_file():
        raise AdapterError(f"`{path}` is no adapter of PEFT's: it has no `{CONFIG}`")
    config = read_json(path / CONFIG)
    told = ByModule(path / CONFIG, config, "rank_pattern", config.get("r", 8))
    ranks: dict[str, int] = {}
    embeddings, whole = [], []
    weights = weights_of(path)
    for tensor in Checkpoint(weights).tensors():
        name = tensor.name.removeprefix(PREFIX)
        match = FACTOR.fullmatch(name)
        if match is None:
            whole.append(name)
        elif match["side"] == "A" and tensor.shape:
            key, rank = _of_experts(config, told, match["module"], tensor.shape[0])
            ranks[key] = rank
            if match["embedding"] or is_embedding(match["module"] + ".weight"):
                embeddings.append(match["module"])
    alphas = ByModule(path / CONFIG, config, "alpha_pattern", config.get("lora_alpha", 8))
    scales = {module: _scale(path, config, alphas[module], rank) for module, rank in ranks.items()}
    misfits = tuple(module for module, rank in ranks.items() if rank != told[module])
    side_file = (path / FOLDER / EXACT).is_file()
    return Facts(config, ranks, scales, tuple(embeddings), tuple(whole), misfits, side_file, weights.name != WEIGHTS)


def _of_experts(config: Mapping[str, Any], told: ByModule, module: str, rows: int) -> tuple[str, int]:
    """By what the patterns know a module's factors, and their rank: of a parameter its own path, and of stacked experts
    the rows of A by expert, whose number only the base tells.
    """
    owner, depth = wrapped_owner(module)
    parameter = wrapped_parameter(targeted(owner, config.get("target_parameters") or ()), depth)
    if parameter is None:
        return module, rows
    rank = told[parameter]
    return parameter, rank if isinstance(rank, int) and rank > 0 and rows % rank == 0 else rows


def _scale(path: Path, config: Mapping[str, Any], alpha: Any, rank: int) -> float:
    """The scale that PEFT gives a module of this alpha."""
    try:
        alpha = float(alpha)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"`{path / CONFIG}`: lora_alpha or alpha_pattern is malformed: {error}") from error
    return scale_of(config, alpha, rank)


def _global_scale(facts: Facts) -> float:
    """The one scale of readers that know no patterns."""
    rank, alpha = facts.config.get("r", 8), facts.config.get("lora_alpha", 8)
    return scale_of(facts.config, float(alpha), rank)


def _off(facts: Facts, scale: Callable[[str], float]) -> tuple[str, ...]:
    """Modules whose scale a reader takes for another."""
    return tuple(module for module, own in facts.scales.items() if abs(scale(module) - own) > SAME * abs(own))


def _not_plain(facts: Facts) -> Iterator[Finding]:
    """What no server applies."""
    if facts.config.get("use_dora"):
        yield Finding("refused", "DoRA is not supported")
    if facts.config.get("bias", "none") != "none" or facts.config.get("lora_bias"):
        yield Finding("refused", "biases are not supported")
    if facts.config.get("target_parameters"):
        yield Finding("refused", "factors of parameters (target_parameters) are not supported")
    if facts.whole or facts.config.get("modules_to_save"):
        yield Finding("refused", "whole weights (modules_to_save) are not supported", facts.whole)
    if facts.is_pickled:
        yield Finding("note", "the weights are a pickle, which not every server loads")
    if facts.has_side_file:
        yield Finding("note", f"`{FOLDER}/{EXACT}` (norms, biases, new rows) is ignored; `merge` would apply it")


def _peft(facts: Facts) -> Iterator[Finding]:
    if facts.misfits:
        yield Finding("refused", "tensors have another rank than `r` and rank_pattern say", facts.misfits)
    if facts.embeddings and HEAD in facts.ranks:
        yield Finding("note", "on a tied model, PEFT's merge_and_unload applies the head's factors twice (peft#2777)")
    if facts.has_side_file:
        yield Finding("note", f"`{FOLDER}/{EXACT}` (norms, biases, new rows) is ignored; `merge` would apply it")


def _vllm(facts: Facts) -> Iterator[Finding]:
    yield from _not_plain(facts)
    missing = [key for key in ("r", "lora_alpha", "target_modules") if not facts.config.get(key)]
    if missing:
        yield Finding("refused", f"`{CONFIG}` lacks {', '.join(missing)}")
    largest = max([int(facts.config.get("r", 8)), *facts.ranks.values()])
    if largest > VLLM[-1]:
        yield Finding(
            "refused", f"the rank {largest} is above {VLLM[-1]}, the highest that a server can be started with"
        )
    elif largest > VLLM_DEFAULT:
        fits = next(rank for rank in VLLM if rank >= largest)
        yield Finding("note", f"the server has to be started with --max-lora-rank {fits}")
    scale = _global_scale(facts)
    if off := _off(facts, lambda _: scale):
        yield Finding("misread", "alpha_pattern and rank_pattern are ignored: these get another scale", off)
    if facts.embeddings or HEAD in facts.ranks:
        where = (*facts.embeddings, *([HEAD] if HEAD in facts.ranks else []))
        yield Finding("note", "factors of embeddings and heads load only where the model class lists them", where)


def _sglang(facts: Facts) -> Iterator[Finding]:
    yield from _not_plain(facts)
    yield from _uniform(facts, "refused", "ranks or alphas differ between modules")
    yield from _no_embeddings(facts)


def _lorax(facts: Facts) -> Iterator[Finding]:
    yield from _not_plain(facts)
    scale = _global_scale(facts)
    if off := _off(facts, lambda _: scale):
        yield Finding("misread", "alpha_pattern and rank_pattern are ignored: these get another scale", off)
    by_kind: dict[str, set[int]] = {}
    for module, rank in facts.ranks.items():
        by_kind.setdefault(module.rpartition(".")[2], set()).add(rank)
    mixed = tuple(kind for kind, ranks in by_kind.items() if len(ranks) > 1)
    if mixed:
        yield Finding("refused", "layers of one kind of module have different ranks", mixed)
    if gaps := _gaps(facts):
        yield Finding("misread", "a kind of module is dropped in all layers when one layer lacks it", gaps)
    yield from _no_embeddings(facts)


def _llama_cpp(facts: Facts) -> Iterator[Finding]:
    yield from _not_plain(facts)
    alpha = float(facts.config.get("lora_alpha", 8))
    if off := _off(facts, lambda module: alpha / facts.ranks[module]):
        problem = "the scale is lora_alpha by each tensor's own rank, patterns and rsLoRA are ignored: these are wrong"
        yield Finding("misread", problem, off)
    yield from _no_embeddings(facts)


def _uniform(facts: Facts, level: str, problem: str) -> Iterator[Finding]:
    ranks = {*facts.ranks.values(), *([facts.config["r"]] if "r" in facts.config else [])}
    if len(ranks) > 1 or facts.config.get("rank_pattern") or facts.config.get("alpha_pattern"):
        yield Finding(level, problem, tuple(facts.config.get("rank_pattern") or ()))


def _no_embeddings(facts: Facts) -> Iterator[Finding]:
    where = (*facts.embeddings, *([HEAD] if HEAD in facts.ranks else []))
    if where:
        yield Finding("refused", "factors of embeddings and of the output head are not supported", where)


def _gaps(facts: Facts) -> tuple[str, ...]:
    """Kinds of modules that some blocks have and others lack."""
    blocks: dict[str, set[str]] = {}
    for module in facts.ranks:
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", module)
        if found:
            blocks.setdefault(found[1] + "*" + found[3], set()).add(found[2])
    every = {number for numbers in blocks.values() for number in numbers}
    return tuple(kind for kind, numbers in blocks.items() if numbers != every)


@dataclass(frozen=True, slots=True)
class Consumer:
    """The rules of one consumer, and what `combine` has to be told to write an adapter that it takes."""

    rules: Callable[[Facts], Iterator[Finding]]
    layout: str | None = None
    excludes_embeddings: bool = False


CONSUMERS = {
    "peft": Consumer(_peft),
    "vllm": Consumer(_vllm),
    "sglang": Consumer(_sglang, "uniform", excludes_embeddings=True),
    "lorax": Consumer(_lorax, "uniform", excludes_embeddings=True),
    "llama.cpp": Consumer(_llama_cpp, "uniform", excludes_embeddings=True),
}


def fix(
    base: str | Path, adapter: str | Path, out: str | Path, consumer: str, **options: Any
) -> tuple[CombineResult, CheckResult]:
    """Write the adapter as a consumer takes it: scales in the factors, one rank where that is needed, no embeddings
    where they are not supported. What no server applies goes to the side file. Also returns what is left to say.

    options: `dtype`, `base_name`, `any_base`, `force`, `command`, `progress` of `combine`. Raises as `combine` does.
    """
    check(adapter, consumer)
    wanted, model = CONSUMERS[consumer], Model.open(base)
    part = read_adapter(adapter, model)
    names = sorted(part.factored())
    left_out = [name for name in names if is_embedding(name) or last_component(name) == HEAD]
    rank = max(_facts(resolve(adapter)).ranks.values(), default=1)
    wishes: dict[str, Any] = {"layout": wanted.layout, "rank": rank} if wanted.layout else {}
    if consumer == "vllm" and rank > VLLM[-1]:
        wishes = {"rank": VLLM[-1]}
    exclude = [f"^{re.escape(name)}$" for name in left_out] if wanted.excludes_embeddings else []
    result = combine(base, [adapter], out, exclude=exclude, **wishes, **options)
    return result, check(result.out, consumer)
