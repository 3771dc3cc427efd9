"""`suggest`: ranks before training, from the spectra of the gradient over a few batches.

The first step of a full fine-tune by gradient descent is ΔW = −η·G. Of all ΔW of rank r its best approximation is G's
truncated SVD (Eckart–Young), and what that keeps of ‖G‖² is what the loss falls by, to first order. LoRA-GA (Wang et
al. 2024, arXiv 2407.05000) and LoRA-One (Zhang et al. 2025, arXiv 2502.01235) start factors from it; here it says where
directions are worth their bytes, as EVA (Paischer et al. 2024, arXiv 2410.07170) does from activations: the solver that
shares a budget out among the directions of a ΔW shares it out among those of G.

What is noise is not counted: σ² of a direction is what it is worth in batches that it was not found in
(`lora_compress.torch.gradients.Halves`). The first step is not the last one; docs/ranks.md has what following these
ranks was worth on real data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_compress._native import Spectrum
from lora_compress.errors import SelectionError
from lora_compress.ranks.choice import RankChoice, choose, parse_size
from lora_compress.ranks.plan import GRADIENTS, NO_CHECKPOINT, Plan, TensorPlan
from lora_compress.ranks.text import some
from lora_compress.torch.gradients import Halves, Loss, measure
from lora_compress.torch.install import ALPHA, RANK
from lora_compress.torch.live import name_of
from lora_compress.torch.sites import ALL_LINEAR, Target, Targets, find_targets

# Ranks may be this many times the average, and at least the second number.
GROWTH, LEAST = 4, 8
# How many columns more than the σ that are asked for span a subspace: Halko et al. take 5 to 10, for spectra that fall
# faster.
OVERSAMPLING = 16
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def suggest(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: int | str | None = None,
    rank: int | None = None,
    targets: Targets = ALL_LINEAR,
    loss: Loss | None = None,
    weights: str | None = None,
    max_batches: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Plan:
    """Ranks for `attach(model, ranks=plan)`, from the gradient of the loss at the model as it is.

    Each batch is visited three times, forward and backward; no weight gets a gradient. Beside that, about
    12·(r + 4)·(rows + cols) floats of each matrix are held, r being the average rank: three times what Adam holds to
    train factors of that rank. The model stays in its mode: transformers checkpoints activations in training mode
    only, where dropout is seeded by batch, and batch normalisation would go on averaging. The plan is of no ΔW:
    extraction refuses it.

    Parameters
    ----------
    batches: what the loss takes; mappings of keyword arguments with labels, when it is the model's own. Their order
        matters: every other one judges the rest, so at least two are needed.
    budget: bytes, or a size such as "20MB", of the adapter's files.
    rank: instead, as many bytes as this rank takes everywhere; 16 when neither is given.
    targets: as for `attach`. A layer that is not worth its bytes, or that the loss does not reach, gets rank 0.
    loss: of model and batch, a scalar; `model(**batch).loss` when absent.
    weights: what a unit of each matrix's energy is worth, as for `lora_compress.plan`. "delta" is the fall of the loss
        by gradient descent; "balanced", the default, looks less at how large a gradient is, as Adam does.
    max_batches: how many are taken, at most.
    dtype: of the factors, for their size.
    seed: of sketches and dropout. The same seed gives the same plan on the same machine.

    Raises
    ------
    SelectionError when no layer is found or reached, stacked experts are asked for, a gradient is not finite, or the
    budget is too small; `ValueError` for options out of range.
    """
    if rank is not None and (rank < 1 or budget is not None):
        raise ValueError(f"rank ({rank}) is at least 1, and not given together with a budget")
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype}) is one of {', '.join(map(str, DTYPES))}")
    taken = list(islice(batches, max_batches))
    if len(taken) < 2:
        raise SelectionError(f"{len(taken)} of batches: at least two are needed, of which one judges the other")
    started = time.perf_counter()
    found = find_targets(model, targets)
    if stacks := [target.tensor for target in found if target.leader.stack]:
        raise SelectionError(
            f"`{stacks[0]}` is a stack of experts, whose inputs nobody sees: leave it out of `targets`"
        )
    units = {target.tensor: sum(target.shape) * dtype.itemsize for target in found}
    even = rank or (RANK if budget is None else math.ceil(parse_size(budget) / sum(units.values())))
    most = min(max(GROWTH * even, LEAST), max(min(target.shape) for target in found))
    measured = measure(model, found, taken, loss or _own_loss, width=most + OVERSAMPLING, seed=seed)
    tensors = [_tensor(target, units[target.tensor], measured.get(target.tensor), most) for target in found]
    if not any(tensor.spectrum for tensor in tensors):
        raise SelectionError("no gradient is the same in both halves of the batches: give more or larger ones")
    plan = Plan(
        base=name_of(model),
        tuned=f"gradients of {len(taken)} batches",
        fingerprints={"base": NO_CHECKPOINT, "tuned": NO_CHECKPOINT},
        options={"spectra": GRADIENTS, "batches": len(taken), "seed": seed, "scale": "rslora", "alpha": ALPHA},
        choice=RankChoice(),
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)),
        tuned_bytes=sum(each.numel() * each.element_size() for each in model.parameters()),
        seconds=time.perf_counter() - started,
    )
    even_bytes = sum(units[target.tensor] * min(even, *target.shape) for target in found)
    size = parse_size(budget) if budget is not None else plan.least_bytes + even_bytes
    plan = plan.choose(choose(budget=size, weights=weights, max_rank=most))
    return replace(plan, notes=_notes(plan, measured))


def _own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise SelectionError(f"a batch is a {type(batch).__name__}, no mapping of the model's arguments: give a `loss`")
    value = getattr(model(**batch), "loss", None)
    if not isinstance(value, torch.Tensor):
        raise SelectionError("the model gives no loss for these batches: put labels into them, or give a `loss`")
    return value


def _tensor(target: Target, unit: int, halves: Halves | None, most: int) -> TensorPlan:
    """A tensor's σ, squared: what its directions are worth in other batches. Its energy has the noise, as the gradients
    that an optimizer divides by have: a matrix of much noise and little else is worth little by any weights.
    """
    weight = target.leader.weight
    shape = tuple(weight.shape) if target.is_plain else target.shape
    plain: dict[str, Any] = {
        "dtype": DTYPES.get(weight.dtype, "U8"),
        "shape": shape,
        "treatment": "low-rank",
        "base_energy": None,
    }
    worth = np.zeros(0) if halves is None else descending(halves.agreement[:most].numpy())
    if halves is None or not worth.any():
        return TensorPlan(target.tensor, delta_energy=0.0, **plain)
    energy = max(halves.energy, float(worth.sum()))
    spectrum = Spectrum(target.shape, np.sqrt(worth).tolist(), energy)
    return TensorPlan(target.tensor, delta_energy=energy, unit=unit, spectrum=spectrum, **plain)


def descending(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The closest sequence that descends and is nowhere negative, by least squares: neighbours that do not are pooled
    (Ayer et al. 1955). So noise is averaged out, and beyond the best total there is nothing.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] <= mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return np.concatenate([np.full(count, max(mean, 0.0)) for mean, count in pools]) if pools else np.zeros(0)


def _notes(plan: Plan, measured: Mapping[str, Halves]) -> tuple[str, ...]:
    inner = math.fsum(halves.inner for halves in measured.values())
    energy = math.fsum(halves.energy for halves in measured.values())
    notes = [
        f"the spectra are of {plan.tuned}, not of a ΔW: ranks to train with, and no error of an adapter",
        f"the gradients of both halves of the batches have a cosine of {inner / energy:.2f}; what they do not share is "
        "not counted",
        "scale `rslora`: under Adam a step moves W by about lr·s·√rank, however large the gradient is, so s = alpha / "
        "√rank lets matrices of unequal ranks learn at one pace; which alpha, gradients do not say: it acts as the "
        "learning rate does",
    ]
    ranks = plan.stored_ranks
    silent = [tensor.name for tensor in plan.tensors if tensor.name not in measured]
    noisy = [tensor.name for tensor in plan.tensors if tensor.name in measured and tensor.spectrum is None]
    poor = [tensor.name for tensor in plan.low_rank if tensor.name not in ranks]
    for names, reason in (
        (silent, "the loss does not reach them"),
        (noisy, "nothing of their gradient is the same in both halves"),
        (poor, "no direction is worth its bytes"),
    ):
        if names:
            notes.append(f"rank 0 for {some(names)}: {reason}")
    return tuple(notes)
