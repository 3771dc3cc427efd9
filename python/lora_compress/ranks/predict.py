"""What an extraction will take, from what planning took."""

from __future__ import annotations

import math

from lora_compress.ranks.plan import Plan, TensorPlan

# Products with columns that the iteration needs: about 6.5 for each direction, and some for the test of its claim
# (docs/performance.md). Looser tolerances and higher ones differ by less than this estimate is worth.
COLUMNS = 6.5
PROBE = 64
# Bytes of a process before it has read anything, and what small tensors in flight add.
PROCESS = 60_000_000
# Seconds that opening, comparing and writing a small model take.
STARTING = 0.2


def seconds(plan: Plan) -> float:
    """Seconds that an extraction at the plan's ranks would take on the machine that planned."""
    planned = sum(_work(tensor, len(tensor.spectrum.sigma)) for tensor in plan.low_rank if tensor.spectrum is not None)
    return STARTING + plan.seconds * sum(_work(tensor, tensor.rank) for tensor in plan.low_rank) / max(planned, 1.0)


def memory(plan: Plan) -> int:
    """Bytes at the peak of an extraction: the packed ΔW of the largest matrix, basis and image of its iteration, and
    half as much again for what is in flight beside it (ARCHITECTURE.md, "Memory").
    """
    return PROCESS + max((_bytes(tensor) for tensor in plan.low_rank), default=0) * 3 // 2


def _work(tensor: TensorPlan, rank: int) -> float:
    # A kernel is a matrix of its rows; the experts of a stack are one below the other.
    rows, cols = tensor.shape[0], math.prod(tensor.shape[1:])
    return rows * cols * (COLUMNS * rank + PROBE)


def _bytes(tensor: TensorPlan) -> int:
    rows, cols = tensor.spectrum.shape if tensor.spectrum is not None else (0, 0)
    columns = max(8 * tensor.rank, 384) + 128
    return 2 * rows * cols + 6 * (rows + cols) * min(columns, min(rows, cols)) + 64 * 64 * min(rows, cols)
