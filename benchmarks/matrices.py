#!/usr/bin/env python3
"""One matrix: seconds and excess over the optimum, ours and the peers', for shapes and ranks of real layers.

python benchmarks/matrices.py [--json DIR] [--largest]     (--largest adds 8192×28672, which takes many minutes)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_compress import Delta
from measure import energy_beyond, report, timed
from sklearn.utils.extmath import randomized_svd

SHAPES = ((576, 1536), (49152, 576), (4096, 4096), (4096, 14336))
LARGEST = (8192, 28672)
RANKS = (8, 64, 256)
# A full SVD beyond this takes minutes.
FULL = 4096 * 4096

Factors = tuple[Any, Any]


def delta_of(rows: int, cols: int) -> Any:
    """A difference of bf16 checkpoints: power law with 256 directions, and white noise."""
    rng = np.random.default_rng([rows, cols])
    decay = np.arange(1, 257, dtype=np.float32) ** -0.5
    tail = rng.standard_normal((256, cols), np.float32)
    values = (rng.standard_normal((rows, 256), np.float32) * decay) @ tail
    values *= 0.0015 / values.std()
    values += 0.0005 * rng.standard_normal((rows, cols), np.float32)
    base = torch.from_numpy(0.02 * rng.standard_normal((rows, cols), np.float32)).bfloat16()
    tuned = (base.float() + torch.from_numpy(values)).bfloat16()
    return tuned.float() - base.float()


def prototype(delta: Any, rank: int) -> Factors:
    """Block Lanczos as a few lines of PyTorch in bf16: a fixed number of steps, tested for nothing."""
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    width, bases, images = max(rank // 4, 8), [], []
    start = tall.T @ (tall @ torch.randn(tall.shape[1], width).bfloat16())
    block = torch.linalg.qr(start.float())[0]
    for _ in range(3 * rank // width):
        image = tall @ block.bfloat16()
        bases.append(block.bfloat16().float())
        images.append(image.float())
        block = (tall.T @ image).float()
        basis = torch.cat(bases, 1)
        for _ in range(2):
            block -= basis @ (basis.T @ block)
        block = torch.linalg.qr(block)[0]
    basis, image = torch.cat(bases, 1), torch.cat(images, 1)
    vectors = torch.linalg.eigh((image.T @ image).double())[1][:, -rank:].float()
    left, right = image @ vectors, (basis @ vectors).T
    return (left.numpy(), right.numpy()) if tall is delta else (right.T.numpy(), left.T.numpy())


def methods(tensor: Any, delta: Delta, rank: int) -> dict[str, Callable[[], Factors]]:
    """Each gives (B, A) with B·A ≈ Δ."""

    def truncated() -> Factors:
        u, sigma, vt = delta.truncated_svd(rank)
        return u * sigma.astype(np.float32), vt

    def low_rank(columns: int, iterations: int) -> Factors:
        u, sigma, v = torch.svd_lowrank(tensor, q=columns, niter=iterations)
        return (u * sigma)[:, :rank].numpy(), v.T[:rank].contiguous().numpy()

    def full() -> Factors:
        u, sigma, vt = torch.linalg.svd(tensor, full_matrices=False)
        return (u * sigma)[:, :rank].numpy(), vt[:rank].contiguous().numpy()

    def scikit() -> Factors:
        u, sigma, vt = randomized_svd(tensor.numpy(), rank, random_state=0)
        return u * sigma, vt

    rounded = tensor.bfloat16()
    return {
        "ours": truncated,
        "prototype": lambda: prototype(rounded, rank),
        "svd_lowrank(r, 2)": lambda: low_rank(rank, 2),
        "svd_lowrank(1.5r, 4)": lambda: low_rank(rank * 3 // 2, 4),
        "scikit-learn": scikit,
        "linalg.svd": full,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--largest", action="store_true")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for height, length in (*SHAPES, LARGEST) if arguments.largest else SHAPES:
        tensor = delta_of(height, length)
        delta = Delta.from_array(tensor.numpy())
        optimum = energy_beyond(delta, RANKS)
        for rank in RANKS:
            row: dict[str, Any] = {"shape": f"{height}×{length}", "rank": rank}
            for name, method in methods(tensor, delta, rank).items():
                if name == "linalg.svd" and (height * length > FULL or rank != RANKS[0]):
                    continue
                seconds, factors = timed(method, 1 if name == "linalg.svd" else 3)
                row[f"{name}, ms"] = 1000 * seconds
                b, a = (np.ascontiguousarray(factor, np.float32) for factor in factors)
                row[f"{name}, excess"] = max((delta.residual_energy(b, a) / optimum[rank]) ** 0.5 - 1, 0.0)
            rows.append(row)
    report("matrices", rows, arguments.json)


if __name__ == "__main__":
    main()
