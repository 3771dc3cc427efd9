"""Writing PEFT's directory: factors streamed as they come, the configuration when all ranks are known."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_compress._native import Writer
from lora_compress.formats.peft.card import model_card
from lora_compress.formats.peft.layout import CONFIG, WEIGHTS, Layout, Place, head_place
from lora_compress.formats.stored import WIDTH
from lora_compress.model import CONV1D_MODELS, Model, names, stack_of

if TYPE_CHECKING:
    from lora_compress.adapter import AdapterPlan, Float32Matrix

# The PEFT release whose files these are. Readers use it to tell older layouts of expert parameters apart.
PEFT_VERSION = "0.21.2"


class PeftWriter:
    """An adapter being written."""

    def __init__(self, path: Path, plan: AdapterPlan) -> None:
        self._path = path
        self._plan = plan
        self._layout = Layout(plan.base, [item.tensor for item in plan.factors], plan.embeddings)
        self._ranks: dict[str, int] = {}
        self._parameters: list[str] = []
        # Factors of stacks that are not complete, by expert.
        self._stacks: dict[str, tuple[Place, dict[int, tuple[Float32Matrix, Float32Matrix]]]] = {}
        # The experts of a stack share their keys: the largest of them is what is announced.
        expected: dict[str, tuple[str, str, list[int]]] = {}
        for item in plan.factors:
            for place in self._places(item.tensor):
                for spec in _specs(place, plan.dtype, item.rows, item.cols, item.rank):
                    known = expected.get(spec[0], spec)
                    expected[spec[0]] = max(known, spec, key=lambda spec: math.prod(spec[2]))
        self._writer = Writer(path / WEIGHTS, list(expected.values()), {"format": "pt"})

    def write(self, tensor: str, b: Float32Matrix, a: Float32Matrix) -> int:
        """Append B (rows, r) and A (r, cols) of a tensor, for the tied head too where there is one. Those of experts
        are kept until their stack is complete.
        """
        size = 0
        stack = stack_of(tensor)
        for place in self._places(tensor):
            left, right = (a.T, b.T) if place.transposed else (b, a)
            size += (a.size + b.size) * WIDTH[self._plan.dtype]
            if stack is None:
                self._append(place, left, right)
                continue
            _, held = self._stacks.setdefault(place.target, (place, {}))
            held[stack[1]] = left, right
            if len(held) == place.experts:
                self._append_stack(place.target)
        return size

    def _append(self, place: Place, left: Float32Matrix, right: Float32Matrix) -> None:
        # PEFT's A is the factor next to the input, its B the one next to the output, whichever way W is stored.
        rank = left.shape[1] // place.experts
        self._writer.append(place.a_key, self._plan.dtype, right.reshape(rank * place.experts, -1, *place.kernel))
        self._writer.append(place.b_key, self._plan.dtype, left.reshape(*left.shape, *[1] * len(place.kernel)))
        self._ranks[place.target] = rank
        if place.is_parameter:
            self._parameters.append(place.target)

    def _append_stack(self, target: str) -> None:
        """Write the factors of all experts of a tensor, those without any as zeros: PEFT gives them one rank."""
        place, held = self._stacks.pop(target)
        rank = max(left.shape[1] for left, _ in held.values())
        some_left, some_right = next(iter(held.values()))
        left = np.zeros((len(some_left), rank, place.experts), np.float32)
        right = np.zeros((place.experts, rank, some_right.shape[1]), np.float32)
        for expert, (b, a) in held.items():
            left[:, : b.shape[1], expert] = b
            right[expert, : len(a)] = a
        self._append(place, left.reshape(len(left), -1), right.reshape(-1, right.shape[2]))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Complete the weights, then write configuration and model card."""
        for target in list(self._stacks):
            self._append_stack(target)
        self._writer.finish()
        text = json.dumps(self._config(), indent=2, sort_keys=True)
        (self._path / CONFIG).write_text(text + "\n", encoding="utf-8")
        (self._path / "README.md").write_text(model_card(manifest), encoding="utf-8")

    def _places(self, tensor: str) -> Iterator[Place]:
        place = self._layout.place(tensor)
        if place is None:
            raise ValueError(f"PEFT has no name for a low-rank delta of `{tensor}`")
        yield place
        if tensor == self._plan.tied_embedding:
            yield head_place()

    def _config(self) -> dict[str, Any]:
        # alpha = r for every module, with and without the patterns: the scale is 1 for every reader.
        rank = max(self._ranks.values(), default=1)
        config = configuration(
            self._plan.base, self._plan.base_name, self._ranks, self._ranks, rank, rank, self._parameters
        )
        # Keys of recent releases are left out where they say nothing: older ones refuse what they do not know.
        if self._parameters:
            config["target_parameters"] = sorted(self._parameters)
        if self._plan.tied_embedding is not None:
            config["ensure_weight_tying"] = True
        return config


def configuration(
    base: Model,
    base_name: str,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    rank: int,
    alpha: float,
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """`adapter_config.json`, with patterns for the modules whose rank or alpha is another than `rank` or `alpha`."""
    modules = [name for name in ranks if name not in parameters]
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "base_model_name_or_path": base_name,
        "revision": None,
        "task_type": "CAUSAL_LM" if base.architecture.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {"^" + re.escape(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {"^" + re.escape(name): own for name, own in alphas.items() if own != alpha},
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": base.model_type in CONV1D_MODELS,
        "target_modules": short_targets(modules, [base.path_of(name) for name in names(base.checkpoint)]),
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def short_targets(modules: list[str], tensors: list[str]) -> list[str]:
    """`target_modules` for exactly these modules: last components where all of that name are meant, else full paths.

    PEFT takes an entry as a whole path or as a suffix that begins at a dot, so that `q_proj` also means a vision
    tower's.
    """
    # Containers too: `0` would find `to_out.0` and `blocks.0`, which PEFT refuses to adapt.
    owners = {tensor[:at] for tensor in tensors for at in range(len(tensor)) if tensor[at] == "."}
    wanted = set(modules)
    targets = set()
    for module in modules:
        last = module.rpartition(".")[2]
        same_name = {owner for owner in owners if owner == last or owner.endswith("." + last)}
        targets.add(last if same_name <= wanted else module)
    return sorted(targets)


def _specs(place: Place, dtype: str, rows: int, cols: int, rank: int) -> list[tuple[str, str, list[int]]]:
    out_size, in_size = (cols, rows) if place.transposed else (rows, cols)
    a_shape = [place.experts * rank, in_size // math.prod(place.kernel), *place.kernel]
    b_shape = [out_size, rank * place.experts, *[1] * len(place.kernel)]
    return [(place.a_key, dtype, a_shape), (place.b_key, dtype, b_shape)]
