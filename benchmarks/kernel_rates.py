#!/usr/bin/env python3
"""Kernels: GFLOP/s of both products with Δ, beside what PyTorch (oneDNN) reaches on the same products one by one.

python benchmarks/kernel_rates.py [--json DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lora_compress._native import kernels, measure_kernel
from measure import best, report

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1536, 576))
WIDTHS = (16, 32, 64)


def torch_seconds(rows: int, cols: int, width: int, dtype: torch.dtype) -> float:
    """Y = Δ·V and Z = Δᵀ·Y by two calls, in the tall orientation."""
    delta = torch.ones(max(rows, cols), min(rows, cols), dtype=dtype)
    v = torch.ones(min(rows, cols), width, dtype=dtype)
    return best(lambda: delta.T @ (delta @ v), repeats=7)


def square_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a square product."""
    matrix = torch.ones(4096, 4096, dtype=dtype)
    return 2 * 4096**3 / best(lambda: matrix @ matrix) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for height, length in SHAPES:
        for width in WIDTHS:
            flops = 4 * height * length * width / 1e9
            row: dict[str, Any] = {"shape": f"{height}×{length}", "columns": width}
            for name, dtype in (("torch bf16", torch.bfloat16), ("torch f32", torch.float32)):
                row[name] = round(flops / torch_seconds(height, length, width, dtype))
            for name in kernels():
                row[name] = round(flops / measure_kernel(name, height, length, width))
            rows.append(row)
    rates = {f"square_{name}_gflops": round(square_rate(dtype)) for name, dtype in
             (("bf16", torch.bfloat16), ("f32", torch.float32))}  # fmt: skip
    report("kernels", rows, arguments.json, unit="GFLOP/s", **rates)


if __name__ == "__main__":
    main()
