#!/usr/bin/env python3
"""Whether ranks that `suggest` finds before training help: pairs of equally many parameters, trained alike.

python benchmarks/suggesting.py --cache DIR [--json DIR] [--task NAME] [--steps N] [--seeds N] [--rates R …]

| task | base, trained on | held-out |
|---|---|---|
| `smollm2` | SmolLM2-135M-Instruct, windows of the Jargon File | loss of its last part, nats per token |
| `minilm` | all-MiniLM-L6-v2 and a classifier, docstrings by module | loss of other docstrings |

Arms: the same rank everywhere; the suggested ranks, with both weights; and the suggested ranks given to the wrong
matrices, shuffled among those of one shape, so that bytes stay the same. Every arm has the same batches and the
learning rate that is best for the first. MiniLM's classifier has ten steps on the base's features before, and goes on
with the adapter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lora_compress import Plan
from lora_compress.torch import attach, suggest
from measure import report
from safetensors.torch import load_file
from torch import nn

sys.path.append(str(Path(__file__).with_name("ranks")))
from fine_tunes import HELDOUT_TOKENS, MODULES, docstrings, jargon_tokens, pair

RANK = 8
# What gradients are taken from: as many batches as the eighth of a short training.
BATCHES = 8
HELDOUT_WINDOWS = 4


@dataclass(frozen=True)
class Task:
    """A model, what it is trained on, and how good it is. `also` is trained beside the adapters."""

    model: nn.Module
    batches: Sequence[Any]
    heldout: Sequence[Any]
    also: nn.Module

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """Of one batch, nats per prediction."""
        raise NotImplementedError

    def heldout_loss(self) -> float:
        """Over all batches that are not trained on."""
        with torch.inference_mode():
            return statistics.fmean(float(self.loss(self.model, batch)) for batch in self.heldout)


class Language(Task):
    """Next tokens."""

    def loss(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """Of a batch of token ids."""
        with torch.autocast("cpu", torch.bfloat16):
            result: torch.Tensor = model(batch, labels=batch).loss
        return result


class Docstrings(Task):
    """Classes of docstrings, from the mean of the last hidden states."""

    def loss(self, model: Any, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Of token ids, mask and classes."""
        return nn.functional.cross_entropy(self.also(pooled(model, *batch[:2])), batch[2])


def pooled(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the last hidden states (n, dim)."""
    hidden: torch.Tensor = model(ids, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def language(cache: Path, steps: int, context: int = 256) -> Task:
    """SmolLM2 on windows of one length at random places."""
    from transformers import AutoModelForCausalLM

    folder = pair(cache, "smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    training = jargon_tokens(cache)[:-HELDOUT_TOKENS]
    places = torch.randint(len(training) - context, (BATCHES + steps,), generator=torch.Generator().manual_seed(1))
    batches = [training[None, place : place + context] for place in places]
    heldout = load_file(folder / "heldout.safetensors")["ids"][:HELDOUT_WINDOWS]
    return Language(model, batches, heldout.split(1), nn.Module())


def classes(cache: Path, steps: int, size: int = 16) -> Task:
    """MiniLM on docstrings, a quarter of which is held out."""
    from transformers import AutoModel, AutoTokenizer

    base = pair(cache, "minilm") / "base"
    model, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    texts = list(docstrings())
    texts = [texts[at] for at in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    encoded = tokenizer([text for text, _ in texts], padding="max_length", truncation=True, max_length=48)
    labels = torch.tensor([label for _, label in texts])
    every = [torch.tensor(encoded.input_ids), torch.tensor(encoded.attention_mask), labels]
    kept = len(texts) // 4
    rows = [kept + (step * size + torch.arange(size)) % (len(texts) - kept) for step in range(BATCHES + steps)]
    torch.manual_seed(0)
    head = nn.Linear(model.config.hidden_size, len(MODULES))
    with torch.no_grad():
        pieces = zip(*(each[kept:].split(64) for each in every[:2]), strict=True)
        features = torch.cat([pooled(model, ids, mask) for ids, mask in pieces])
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels[kept:]).backward()
        optimizer.step()
    parts = [tuple(each[some] for each in every) for some in rows]
    return Docstrings(model, parts, list(zip(*(each[:kept].split(64) for each in every), strict=True)), head)


TASKS = {"smollm2": language, "minilm": classes}


def train(task: Task, ranks: Plan | Mapping[str, int] | None, rate: float, seed: int) -> dict[str, Any]:
    """Held-out loss after all batches but those that gradients were taken from, in another order for every seed."""
    started = time.perf_counter()
    adapters = attach(task.model, rank=RANK if ranks is None else None, ranks=ranks, seed=seed)
    before = {name: each.clone() for name, each in task.also.state_dict().items()}
    groups = [*adapters.param_groups(rate), {"params": [*task.also.parameters()], "lr": 1e-3}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    steps = len(task.batches) - BATCHES
    tops = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=tops, total_steps=steps, pct_start=0.1)
    order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed)).tolist()
    for step in order:
        task.loss(task.model, task.batches[BATCHES + step]).backward()
        nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    row = {
        "parameters": sum(each.numel() for each in adapters.parameters()),
        "heldout": task.heldout_loss(),
        "seconds": time.perf_counter() - started,
    }
    adapters.detach()
    task.also.load_state_dict(before)
    return row


def shuffled(plan: Plan, seed: int) -> dict[str, int]:
    """The plan's ranks, given to other matrices of the same shape."""
    ranks: dict[str, int] = {}
    generator = torch.Generator().manual_seed(seed)
    for shape in dict.fromkeys(tensor.shape for tensor in plan.tensors):
        alike = [tensor for tensor in plan.tensors if tensor.shape == shape]
        order = torch.randperm(len(alike), generator=generator)
        ranks |= {tensor.name: alike[at].rank for tensor, at in zip(alike, order, strict=True)}
    return ranks


def by_kind(plan: Plan) -> dict[str, float]:
    """The mean rank of the matrices of each name."""
    kinds: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        kinds.setdefault(tensor.name.removesuffix(".weight").rpartition(".")[2], []).append(tensor.rank)
    return {kind: round(statistics.fmean(ranks), 1) for kind, ranks in kinds.items()}


def main() -> None:
    """Suggest, then train every arm, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", choices=TASKS, default="smollm2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3])
    args = parser.parse_args()
    task: Task = TASKS[args.task](args.cache, args.steps)
    rows: list[dict[str, Any]] = [{"arm": "base", "heldout": task.heldout_loss()}]
    started = time.perf_counter()
    plan = suggest(task.model, task.batches[:BATCHES], rank=RANK, loss=task.loss)
    facts: dict[str, Any] = {
        "task": args.task,
        "steps": args.steps,
        "suggest_seconds": round(time.perf_counter() - started, 1),
        "cosine": plan.notes[1],
        "rank_by_kind": by_kind(plan),
        "ranks": f"{min(tensor.rank for tensor in plan.tensors)} to {max(plan.ranks.values())}",
    }

    def add(arm: str, ranks: Any, rate: float, seed: int) -> float:
        rows.append({"arm": arm, "seed": seed, "rate": rate, **train(task, ranks, rate, seed)})
        report(f"suggesting-{args.task}", rows, args.json, **facts)
        found: float = rows[-1]["heldout"]
        return found

    losses = {rate: add("same rank", None, rate, 0) for rate in args.rates}
    best = min(losses, key=lambda rate: losses[rate])
    for seed in range(args.seeds):
        if seed:
            add("same rank", None, best, seed)
        add("suggested", plan, best, seed)
        add("shuffled", shuffled(plan, seed), best, seed)
        add("suggested, delta", plan.replan(weights="delta"), best, seed)


if __name__ == "__main__":
    main()
