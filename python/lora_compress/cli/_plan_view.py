"""How a plan looks in a terminal: ranks, what other sizes would keep, and the curve between."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace

import click

from lora_compress.cli._console import print_table, size
from lora_compress.errors import SelectionError
from lora_compress.model import module_of
from lora_compress.ranks.choice import BUDGET
from lora_compress.ranks.plan import Plan, TensorPlan
from lora_compress.ranks.predict import memory, seconds
from lora_compress.ranks.recognise import recognise

# Sizes that people ask for, in bytes.
COMMON = [mantissa * 10**power for power in range(4, 11) for mantissa in (1, 2, 5)]
WIDTH, HEIGHT = 60, 10


def show(plan: Plan, *, tensors: bool) -> None:
    """Print all of it on stdout."""
    first = "tensor " if tensors else "module "
    columns = [first, "tensors", "shape", "‖ΔW‖/‖W‖", "noise", "rank (median)", "bytes", "error"]
    groups = [[tensor] for tensor in plan.low_rank] if tensors else list(_kinds(plan.low_rank).values())
    print_table(columns, [_row(group, by_name=tensors) for group in groups])
    others = [tensor for tensor in plan.tensors if tensor.spectrum is None and tensor.fixed]
    if others:
        share = math.fsum(tensor.delta_energy or 0.0 for tensor in others) / (plan.delta_energy or 1.0)
        click.echo(f"{len(others)} more tensors are stored whole: {size(plan.fixed)}, {share:.2%} of ‖ΔW‖²")
    curve = plan.curve()
    if len(curve) > 2:
        click.echo()
        headers = plan.file_bytes - plan.nbytes
        click.echo(_chart([(nbytes + headers, error) for nbytes, error in curve], (plan.file_bytes, plan.error)))
        print_table(["budget", "error", "ranks (median)", "of tuned"], _budgets(plan, curve))
    merged = recognise(plan).merged_rank
    if merged is not None:
        click.echo(f"ΔW of every tensor is low-rank but for rounding: a merged LoRA of rank {merged}")
    highest = max(plan.ranks.values(), default=0)
    share = plan.file_bytes / max(plan.tuned_bytes, 1)
    click.echo(
        f"{plan.choice.describe()}: {size(plan.file_bytes)} ({share:.2%} of the tuned model), ranks up to {highest}, "
        f"relative error {plan.error:.4f}{_cost(plan)}"
    )


def _cost(plan: Plan) -> str:
    """What extraction takes, where there is something to extract."""
    if plan.is_of_gradients:
        return "; ranks to train with"
    return f"; extraction takes about {seconds(plan):.1f} s, {size(memory(plan))} of memory"


def _kinds(tensors: Sequence[TensorPlan]) -> dict[tuple[str, tuple[int, ...]], list[TensorPlan]]:
    """Tensors of the same module name and shape, over all layers."""
    kinds: dict[tuple[str, tuple[int, ...]], list[TensorPlan]] = {}
    for tensor in tensors:
        kinds.setdefault((_kind(tensor.name), tensor.shape), []).append(tensor)
    return kinds


def _kind(name: str) -> str:
    """The module without the number of its layer: `model.layers.*.self_attn.q_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module_of(name) or name)


def _row(group: Sequence[TensorPlan], *, by_name: bool) -> list[str]:
    spectra = [tensor.spectrum for tensor in group if tensor.spectrum is not None]
    energy = math.fsum(spectrum.energy for spectrum in spectra)
    base_energy = math.fsum(spectrum.base_energy for spectrum in spectra)
    noise = math.fsum(spectrum.noise_share * spectrum.energy for spectrum in spectra)
    rest = math.fsum(tensor.error_energy for tensor in group)
    return [
        group[0].name if by_name else _kind(group[0].name),
        f"{len(group)}",
        "×".join(map(str, group[0].shape)),
        f"{math.sqrt(energy / base_energy):.4f}" if base_energy else "",
        f"{noise / energy:.1%}" if energy else "",
        _span([tensor.rank for tensor in group]),
        size(sum(tensor.nbytes for tensor in group)),
        f"{math.sqrt(rest / energy):.3f}" if energy else "",
    ]


def _span(ranks: Sequence[int]) -> str:
    """`8–20 (12)`: least, most and median; one number where all are equal."""
    if min(ranks) == max(ranks):
        return f"{ranks[0]}"
    return f"{min(ranks)}–{max(ranks)} ({statistics.median_low(ranks)})"


def _budgets(plan: Plan, curve: Sequence[tuple[int, float]]) -> list[list[str]]:
    rows = []
    for budget in COMMON:
        if not max(plan.least_bytes, curve[-1][0] // 500) < budget < curve[-1][0]:
            continue
        try:
            other = plan.choose(replace(plan.choice, rule=BUDGET, value=float(budget)))
        except SelectionError:
            continue  # Too little for one direction of every tensor.
        share = f"{budget / max(plan.tuned_bytes, 1):.1%}"
        rows.append([size(budget), f"{other.error:.4f}", _span([*other.ranks.values()]), share])
    return rows


def _chart(curve: Sequence[tuple[int, float]], chosen: tuple[int, float]) -> str:
    """Error over the logarithm of the size, in characters, with the choice marked."""
    points = [(math.log(nbytes), error) for nbytes, error in curve if nbytes > 0]
    left, right = points[0][0], points[-1][0]
    low, high = min(error for _, error in points), max(error for _, error in points)
    span = max(right - left, 1e-9)
    cells = [[" "] * WIDTH for _ in range(HEIGHT)]

    def row_of(error: float) -> int:
        return min(max(int((high - error) / max(high - low, 1e-9) * (HEIGHT - 1) + 0.5), 0), HEIGHT - 1)

    def column_of(x: float) -> int:
        return min(max(int((x - left) / span * (WIDTH - 1) + 0.5), 0), WIDTH - 1)

    # Steps: a size reaches what the largest adapter up to it does.
    errors = [high] * WIDTH
    for x, error in points:
        errors[column_of(x) :] = [error] * (WIDTH - column_of(x))
    for column, error in enumerate(errors):
        top = row_of(errors[max(column - 1, 0)])
        for row in range(min(top + 1, row_of(error)), row_of(error) + 1):
            cells[row][column] = "·"
    cells[row_of(chosen[1])][column_of(math.log(max(chosen[0], 1)))] = "●"
    labels = [f"{high - (high - low) * row / (HEIGHT - 1):6.3f} ┤" for row in range(HEIGHT)]
    lines = [label + "".join(line).rstrip() for label, line in zip(labels, cells, strict=True)]
    first, last = size(int(math.exp(left))), size(int(math.exp(right)))
    axis = " " * 7 + "└" + "─" * WIDTH
    return "\n".join(
        [
            "  error",
            *lines,
            axis,
            f"        {first}{'bytes (logarithmic)':^{WIDTH - 2 * len(first)}}{last:>{len(first)}}",
        ]
    )
