#!/usr/bin/env python3
"""Resizing a rank-128 adapter of all linear layers of a Llama-8B to rank 32, beside the dense way of PEFT and kohya.

The base is its header and a hole: resizing needs names and shapes. The peers form every ΔW and decompose it; one matrix
of each shape is timed and multiplied by how many there are.

python benchmarks/resizing.py [--work DIR] [--json DIR]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import torch
from lora_compress import Checkpoint
from lora_compress._native import Writer
from measure import ours, report
from pairs import ARCHITECTURES, shapes

LAYERS, BEFORE, AFTER = 32, 128, 32


def linear_layers() -> dict[str, tuple[int, int]]:
    """The 224 matrices, by name."""
    every = [item for shard in shapes(ARCHITECTURES["llama"], LAYERS).values() for item in shard]
    return {name: (shape[0], shape[1]) for name, shape in every if "proj" in name}


def write_base(folder: Path, matrices: dict[str, tuple[int, int]]) -> None:
    """A base whose weights are a hole in the file."""
    folder.mkdir()
    header: dict[str, Any] = {}
    end = 0
    for name, (rows, cols) in matrices.items():
        header[name] = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [end, end + 2 * rows * cols]}
        end += 2 * rows * cols
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')


def write_adapter(folder: Path, matrices: dict[str, tuple[int, int]]) -> None:
    """Factors whose product has σ that fall like 1/√i, as fine-tunes' do."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    keys = {name: f"base_model.model.{name.removesuffix('.weight')}" for name in matrices}
    expected = []
    for name, (rows, cols) in matrices.items():
        expected += [(f"{keys[name]}.lora_A.weight", "BF16", (BEFORE, cols))]
        expected += [(f"{keys[name]}.lora_B.weight", "BF16", (rows, BEFORE))]
    writer = Writer(folder / "adapter_model.safetensors", expected)
    root = np.arange(1, BEFORE + 1) ** -0.25
    for name, (rows, cols) in matrices.items():
        a = rng.standard_normal((BEFORE, cols), np.float32) / np.sqrt(cols)
        b = rng.standard_normal((rows, BEFORE), np.float32) / np.sqrt(rows)
        writer.append(f"{keys[name]}.lora_A.weight", "BF16", (root[:, None] * a).astype(np.float32))
        writer.append(f"{keys[name]}.lora_B.weight", "BF16", (b * root).astype(np.float32))
    writer.finish()
    config = {"peft_type": "LORA", "r": BEFORE, "lora_alpha": BEFORE, "target_modules": sorted({
        name.split(".")[-2] for name in matrices
    })}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def dense_seconds(matrices: dict[str, tuple[int, int]], adapter: Path) -> float:
    """All matrices the dense way: the product in float32, `torch.linalg.svd`, truncation."""
    weights = Checkpoint(adapter / "adapter_model.safetensors")
    total = 0.0
    for shape in sorted(set(matrices.values())):
        names = [name for name in matrices if matrices[name] == shape]
        key = f"base_model.model.{names[0].removesuffix('.weight')}"
        b, a = (torch.from_numpy(weights.read(f"{key}.lora_{side}.weight")) for side in "BA")
        started = time.perf_counter()
        u, sigma, vt = torch.linalg.svd(b @ a, full_matrices=False)
        _ = u[:, :AFTER] * sigma[:AFTER], vt[:AFTER]
        total += len(names) * (time.perf_counter() - started)
    return total


def excess(matrices: dict[str, tuple[int, int]], before: Path, after: Path) -> float:
    """The worst error above the optimum among one matrix of each shape, relatively; in float64 by QR of the factors."""
    worst = 0.0
    files = [Checkpoint(folder / "adapter_model.safetensors") for folder in (before, after)]
    for shape in sorted(set(matrices.values())):
        name = next(name for name in matrices if matrices[name] == shape).removesuffix(".weight")
        (b, a), (left, right) = (
            [file.read(f"base_model.model.{name}.lora_{side}.weight").astype(np.float64) for side in "BA"]
            for file in files
        )
        sigma = np.linalg.svd(np.linalg.qr(b)[1] @ np.linalg.qr(a.T)[1].T, compute_uv=False)
        # ‖BA − B'A'‖ from factors side by side.
        rest = np.linalg.norm(np.linalg.qr(np.hstack([b, -left]))[1] @ np.linalg.qr(np.vstack([a, right]).T)[1].T)
        worst = max(worst, float(rest / np.linalg.norm(sigma[AFTER:])) - 1)
    return worst


def main() -> None:
    """Measure both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    matrices = linear_layers()
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        base, before, after = (Path(scratch) / name for name in ("base", "before", "after"))
        write_base(base, matrices)
        write_adapter(before, matrices)
        command = ["resize", str(base), str(before), "--rank", str(AFTER), "--force", "-o"]
        process = min((ours(*command, str(after)) for _ in range(3)), key=lambda process: process.wall)
        lora_compress.resize(base, before, Path(scratch) / "exact", rank=AFTER, dtype="F32")
        dense = dense_seconds(matrices, before)
        rows = [
            {
                "way": "lora-compress resize",
                "seconds": process.wall,
                "peak MB": process.peak_rss,
                "times faster": dense / process.wall,
                "excess (F32 factors)": excess(matrices, before, Path(scratch) / "exact"),
            },
            {"way": "dense product and torch.linalg.svd (one matrix of each shape timed)", "seconds": dense},
        ]
    report("resizing", rows, args.json, matrices=len(matrices), before=BEFORE, after=AFTER)


if __name__ == "__main__":
    main()
