#!/usr/bin/env python3
"""Training steps of adapters on random Llamas: ours beside PEFT's and a frozen model, on one GPU or tiny on a CPU.

python benchmarks/training.py [--size tiny|1b|3b|8b]... [--quick] [--device cuda|cpu] [--json DIR]

Every arm trains the same bf16 model on the same batches with fused AdamW and runs in every round, so that what changes
on the machine changes for all. `floor` trains the last norm alone: a step less its floor (under autocast, or compiled,
as the arm is) is what the adapter costs. Blocks are compiled one by one. Tokens are drawn from a Markov chain with
Zipf's law, so that there is something to learn. Where PEFT keeps its factors in bf16, so does its optimizer; ours are
float32 everywhere. `loss equality` trains the tiny model from PEFT's factors in float32 and under autocast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import lora_compress_abc
import lora_compress_tensor_train
import peft
import torch
import transformers
from lora_compress.testing import loaded
from lora_compress.torch import attach
from measure import report
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = r"(q|k|v|o|gate|up|down)_proj$"
# The scale of all arms.
SCALE = 2.0
RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """A Llama, and its batches: windows by tokens."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: tuple[int, int]
    checkpointing: bool = False

    def config(self) -> LlamaConfig:
        """For transformers."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096, use_cache=False,
        )  # fmt: skip


SIZES = {
    "tiny": Size(256, 4, 704, 8, 4, 2_000, (2, 256)),
    "1b": Size(2048, 16, 8192, 32, 8, 32_000, (4, 2048)),
    "3b": Size(3072, 28, 8192, 24, 8, 32_000, (2, 2048)),
    "8b": Size(4096, 32, 14_336, 32, 8, 32_000, (4, 2048), checkpointing=True),
}


@dataclass(frozen=True)
class Arm:
    """How one of them trains. wrap: makes a base trainable, and returns the model and what makes it the base again."""

    name: str
    wrap: Callable[[Any, int], tuple[Any, Callable[[], Any]]]
    autocast: bool = False
    compiled: bool = False

    @property
    def floor(self) -> str:
        """The floor that it stands on."""
        return "floor" + ", autocast" * self.autocast + ", compiled" * self.compiled


def frozen(model: Any, _: int) -> tuple[Any, Callable[[], Any]]:
    """Trains the last norm alone."""
    model.requires_grad_(requires_grad=False)
    # Gradients go all the way, as the first block's adapters would need them.
    hook = model.model.embed_tokens.register_forward_hook(lambda _, __, y: y.requires_grad_())
    norm = model.model.norm.weight.requires_grad_()
    before = norm.detach().clone()

    def restore() -> None:
        hook.remove()
        norm.data.copy_(before)

    return model, restore


def ours(decomposition: str) -> Callable[[Any, int], tuple[Any, Callable[[], Any]]]:
    """Float32 factors of a decomposition."""

    def wrap(model: Any, rank: int) -> tuple[Any, Callable[[], Any]]:
        adapters = attach(model, decomposition, rank, targets=TARGETS, scale=SCALE)
        return model, adapters.detach

    return wrap


def peft_lora(*, widened: bool = True) -> Callable[[Any, int], tuple[Any, Callable[[], Any]]]:
    """PEFT's LoRA. widened: its factors are float32, as it has them when not told otherwise."""

    def wrap(model: Any, rank: int) -> tuple[Any, Callable[[], Any]]:
        config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=LINEARS)
        made = get_peft_model(model, config, autocast_adapter_dtype=widened)
        return made, made.unload

    return wrap


ARMS = (
    Arm("floor", frozen),
    Arm("floor, autocast", frozen, autocast=True),
    Arm("floor, compiled", frozen, compiled=True),
    Arm("PEFT, autocast", peft_lora(), autocast=True),
    Arm("ab, autocast", ours("ab"), autocast=True),
    Arm("PEFT", peft_lora()),
    Arm("PEFT, factors in bf16", peft_lora(widened=False)),
    Arm("ab", ours("ab")),
    Arm("abc", ours("abc")),
    Arm("tensor-train", ours("tensor-train")),
    Arm("PEFT, factors in bf16, compiled", peft_lora(widened=False), compiled=True),
    Arm("ab, compiled", ours("ab"), compiled=True),
)


def random_llama(size: Size, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The same weights for the same size and seed."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(size.config()).train()
    finally:
        torch.set_default_dtype(before)
    if size.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batches(size: Size, count: int, device: str, seed: int = 0) -> list[torch.Tensor]:
    """Three of four tokens follow from the one before; the others are drawn by Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    windows, tokens = size.batch
    chances = 1.0 / torch.arange(1, size.vocabulary + 1)
    follower = torch.randperm(size.vocabulary, generator=generator)
    made = []
    for _ in range(count):
        drawn = torch.multinomial(chances, windows * tokens, replacement=True, generator=generator)
        ids = drawn.view(windows, tokens)
        follows = torch.rand(windows, tokens, generator=generator) < 0.75
        for at in range(1, tokens):
            ids[:, at] = torch.where(follows[:, at], follower[ids[:, at - 1]], ids[:, at])
        made.append(ids.to(device))
    return made


@contextmanager
def compiled_blocks(model: Any, *, wanted: bool) -> Iterator[None]:
    """Each block compiled by itself: they share their code."""
    layers = model.model.layers
    try:
        for layer in layers if wanted else ():
            layer.compile()
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch.compiler.reset()


class Trainer:
    """Steps of one arm."""

    def __init__(self, model: Any, device: str, *, autocast: bool) -> None:
        self.model, self.device, self.autocast = model, device, autocast
        trained = [each for each in model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Forward, backward, update."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def milliseconds(self, data: list[torch.Tensor], steps: int) -> list[float]:
        """Of each step: by events on a GPU, where nothing waits between steps."""
        if self.device == "cpu":
            marks = [time.perf_counter()]
            for number in range(steps):
                self.step(data[number % len(data)])
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for number in range(steps):
            self.step(data[number % len(data)])
            events[number + 1].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    def kernels(self, ids: torch.Tensor) -> int:
        """On a GPU the kernels of a step, copies among them; on a CPU the operations that call no others, views too."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        with profile(activities=activities) as found:
            self.step(ids)
            if self.device == "cuda":
                torch.cuda.synchronize()
        events = found.events()
        if self.device == "cuda":
            on_device = [each for each in events if each.device_type == torch.autograd.DeviceType.CUDA]
            return sum(not getattr(each, "is_user_annotation", False) for each in on_device)
        return sum(each.name.startswith(("aten::", "mkldnn::")) and not each.cpu_children for each in events)


def run_arm(arm: Arm, base: Any, data: list[torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """One turn: milliseconds of steps, and what else is known of them."""
    device, found = args.device, dict[str, Any]()
    started = time.perf_counter()
    model, restore = arm.wrap(base, args.rank)
    found["attach s"] = time.perf_counter() - started
    try:
        with compiled_blocks(base, wanted=arm.compiled):
            trainer = Trainer(model, device, autocast=arm.autocast)
            started = time.perf_counter()
            for number in range(args.warm_up):
                loss = trainer.step(data[number % len(data)])
            float(loss)
            found["first steps s"] = time.perf_counter() - started
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found["milliseconds"] = trainer.milliseconds(data, args.steps)
            if device == "cuda":
                found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
                found["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
            found["loss"] = float(trainer.step(data[0]))
            # On a CPU compiled code is no operation that a profiler would count.
            if device == "cuda" or not arm.compiled:
                found["kernels"] = trainer.kernels(data[0])
    finally:
        restore()
        base.zero_grad()
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def measure(size: Size, args: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """All arms in turn, as often as there are rounds; those that time is left for."""
    base = random_llama(size, args.device, torch.bfloat16)
    data = batches(size, 4, args.device)
    turns: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in ARMS}
    for number in range(args.rounds):
        for arm in ARMS:
            if time.monotonic() > deadline:
                print(f"no time was left for `{arm.name}` in round {number + 1}", flush=True)
                continue
            try:
                turns[arm.name].append(run_arm(arm, base, data, args))
            except torch.OutOfMemoryError:
                print(f"`{arm.name}` does not fit into memory", flush=True)
            torch.manual_seed(0)
    tokens = size.batch[0] * size.batch[1]
    medians = {name: [statistics.median(turn["milliseconds"]) for turn in found] for name, found in turns.items()}
    rows = []
    for arm in ARMS:
        if not turns[arm.name]:
            continue
        last, each = turns[arm.name][-1], medians[arm.name]
        step = statistics.median(ms for turn in turns[arm.name] for ms in turn["milliseconds"])
        # Against what ran in the same round.
        over = [own - floor for own, floor in zip(each, medians[arm.floor], strict=False)]
        row = {"arm": arm.name, "tokens/s": 1e3 * tokens / step, "ms": step, "turns ms": each}
        row |= {"over the floor ms": None if arm.wrap is frozen or not over else statistics.mean(over)}
        rows.append(row | {key: value for key, value in last.items() if key != "milliseconds"})
    return rows


def from_the_same_factors(who: str, device: str, seed: int) -> tuple[Any, list[Any]]:
    """The tiny model in float32 with PEFT's factors, in PEFT or in ours: it, and what is trained."""
    base = random_llama(SIZES["tiny"], device, torch.float32, seed)
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=8 * SCALE, target_modules=LINEARS))
    if who == "ours":
        theirs = {name: each for name, each in base.named_modules() if hasattr(each, "lora_A")}
        model = model.unload()
        for site in attach(model, "ab", 8, targets=TARGETS, scale=SCALE).sites:
            layer, (b, a) = theirs[site.target.leader.path], site.adapter.factors()
            b.data.copy_(layer.lora_B["default"].weight.data)
            a.data.copy_(layer.lora_A["default"].weight.data)
    return model, [each for each in model.parameters() if each.requires_grad]


def curve(who: str, device: str, steps: int, seed: int, *, autocast: bool) -> torch.Tensor:
    """Losses from PEFT's factors of a seed, on batches of that seed."""
    data = batches(SIZES["tiny"], 8, device, seed)
    model, trained = from_the_same_factors(who, device, seed)
    # Plain steps: AdamW would make something of nothing where a gradient is only rounding. At five times this rate
    # training is chaotic, and the last bit of a sum is 0.1 % of the loss 60 steps later.
    optimizer = torch.optim.SGD(trained, lr=0.2)
    losses = []
    for ids in islice(cycle(data), steps):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def equality(device: str, steps: int, seeds: int) -> dict[str, Any]:
    """From the same factors: the largest relative difference of losses in float32, and for every seed how far the
    losses under autocast are from PEFT's in float32, on the average over the steps.
    """
    torch.set_float32_matmul_precision("highest")
    differences, learnt, distances = [], [], dict[str, list[float]]({"PEFT": [], "ours": []})
    for seed in range(seeds):
        exact = curve("PEFT", device, steps, seed, autocast=False)
        learnt.append(float(exact[0] - exact[-1]))
        mine = curve("ours", device, steps, seed, autocast=False)
        differences.append(float(((mine - exact).abs() / exact).max()))
        for who, found in distances.items():
            found.append(float((curve(who, device, steps, seed, autocast=True) - exact).abs().mean()))
    return {
        "steps": steps,
        "learnt": learnt,
        "float32, relative": max(differences),
        "ours under autocast": distances["ours"],
        "PEFT under autocast": distances["PEFT"],
        "ours to PEFT, means": statistics.mean(distances["ours"]) / statistics.mean(distances["PEFT"]),
    }


def main() -> None:
    """Measure the sizes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="timed steps of a turn")
    parser.add_argument("--warm-up", type=int)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and nothing begins after nine minutes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.steps = args.steps or (8 if args.quick else 50)
    args.warm_up = args.warm_up or (3 if args.quick else 10)
    deadline = time.monotonic() + (540 if args.quick else float("inf"))
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    facts = {"peft": peft.__version__, "transformers": transformers.__version__, "rank": args.rank, "steps": args.steps}
    with loaded(lora_compress_abc, lora_compress_tensor_train):
        equal = equality(args.device, *((30, 2) if args.quick else (100, 8)))
        for name in args.size or (["1b", "8b", "3b"] if args.device == "cuda" else ["tiny"]):
            rows = measure(SIZES[name], args, deadline)
            facts |= {"device": device, "size": name, "batch": SIZES[name].batch, "loss equality": equal}
            report(f"training-{name}-{'-'.join(device.lower().split())}", rows, args.json, **facts)


if __name__ == "__main__":
    main()
