#!/usr/bin/env python3
"""Whole commands: `extract` beside mergekit-extract-lora and the machine's limits, its growth with layers, and `merge`.

python benchmarks/commands.py --work DIR --mergekit PROGRAM [--json DIR] [--part llama|smollm|growth|cold]...
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lora_compress import Checkpoint, Delta, verify
from lora_compress._native import kernels
from measure import Process, best, energy_beyond, ours, report, run

PARTS = ("llama", "smollm", "growth", "cold")
F32 = ("avx512", "avx2", "portable")


def pair(work: Path, model: str, layers: int) -> Path:
    """The pair, written if it is not there yet."""
    folder = work / f"{model}-{layers}"
    if not (folder / "tuned" / "model.safetensors.index.json").exists():
        script = Path(__file__).with_name("pairs.py")
        # In a process of its own: a child's peak memory begins at that of the process it was forked from.
        command = [sys.executable, str(script), str(folder), "--model", model, "--layers", str(layers)]
        subprocess.run(command, check=True)
    return folder


def read_seconds(folder: Path) -> float:
    """Time to read base and tuned once, front to back: the floor of any extraction."""
    buffer = bytearray(8 << 20)

    def job() -> None:
        for path in sorted(folder.glob("[bt]*/*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return best(job)


def extract(folder: Path, rank: int, **environment: str) -> Process:
    """Our extraction, the best of three."""
    names = [str(folder / name) for name in ("base", "tuned", "adapter")]
    runs = [
        ours("extract", *names[:2], "-o", names[2], "--rank", str(rank), "--force", **environment) for _ in range(3)
    ]
    return min(runs, key=lambda process: process.wall)


def mergekit(program: str, folder: Path, rank: int) -> Process:
    """mergekit's extraction of the same pair."""
    command = [program, "--model", str(folder / "tuned"), "--base-model", str(folder / "base")]
    command += ["--out-path", str(folder / "mergekit"), "--max-rank", str(rank), "--no-copy-tokenizer"]
    return run(command, HF_HUB_OFFLINE="1")


def written(folder: Path) -> int:
    """Megabytes of weights in a directory."""
    return round(sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6)


def excesses(folder: Path, rank: int) -> dict[str, float]:
    """Excess of every changed matrix over its exact optimum; errors are formed from the files."""
    checkpoints = Checkpoint(folder / "base"), Checkpoint(folder / "tuned")
    result = {}
    for tensor in verify(folder / "base", folder / "tuned", folder / "adapter").tensors:
        optimum = energy_beyond(Delta(*checkpoints, tensor.name), [rank])[rank]
        result[tensor.name] = (tensor.error_energy / optimum) ** 0.5 - 1
    return result


def against_mergekit(name: str, folder: Path, rank: int, program: str, out: Path | None) -> None:
    """One run of all on one pair, with the excess of every matrix."""
    floor = read_seconds(folder)
    extract(folder, rank)
    rows: list[dict[str, Any]] = []
    ours_default = extract(folder, rank)
    excess = excesses(folder, rank)
    adapter = written(folder / "adapter")
    processes = [("lora-compress extract", ours_default, adapter)]
    slower = next(kernel for kernel in F32 if kernel in kernels())
    processes.append((f"the same, {slower} kernel", extract(folder, rank, LORA_COMPRESS_KERNEL=slower), adapter))
    theirs = mergekit(program, folder, rank)
    processes.append(("mergekit-extract-lora", theirs, written(folder / "mergekit")))
    merging = ours("merge", str(folder / "base"), str(folder / "adapter"), "-o", str(folder / "merged"), "--force")
    processes.append(("lora-compress merge", merging, written(folder / "merged")))
    for label, process, megabytes in processes:
        rows.append({
            "command": label, "wall, s": process.wall, "CPU, s": process.cpu, "peak, MB": round(process.peak_rss),
            "written, MB": megabytes, "mergekit / it": theirs.wall / process.wall, "it / reading": process.wall / floor,
        })  # fmt: skip
    facts = {
        "rank": rank,
        "reading_seconds": round(floor, 3),
        "worst_excess": f"{max(excess.values()):.2e}",
        "matrices": len(excess),
        "gemm_gflops_bf16": round(gemm_rate(torch.bfloat16)),
        "gemm_gflops_f32": round(gemm_rate(torch.float32)),
    }
    report(name, rows, out, **facts)


def gemm_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a square product."""
    matrix = torch.ones(4096, 4096, dtype=dtype)
    return 2 * 4096**3 / best(lambda: matrix @ matrix) / 1e9


def growth(work: Path, rank: int, out: Path | None) -> None:
    """Seconds per layer from one to eight layers; the seconds that a layer adds are those between two rows."""
    rows: list[dict[str, Any]] = []
    for layers in (1, 2, 4, 8):
        folder = pair(work, "llama", layers)
        read_seconds(folder)
        process = extract(folder, rank)
        row: dict[str, Any] = {"layers": layers, "wall, s": process.wall, "s a layer": process.wall / layers}
        if rows:
            row["s an added layer"] = (process.wall - rows[-1]["wall, s"]) / (layers - rows[-1]["layers"])
        rows.append({**row, "peak, MB": round(process.peak_rss)})
    report("growth", rows, out, rank=rank)


def forget(folder: Path) -> None:
    """Have the system drop what it holds of a pair in memory."""
    for path in folder.glob("[bt]*/*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(folder: Path, rank: int, out: Path | None) -> None:
    """`extract` beside `cat`, both with nothing of the files in memory. A disk may hold them in a cache of its own."""
    files = [str(path) for path in sorted(folder.glob("[bt]*/*.safetensors"))]
    names = [str(folder / name) for name in ("base", "tuned", "adapter")]
    rows: list[dict[str, Any]] = []
    for _ in range(4):
        forget(folder)
        reading = run(["cat", *files])
        forget(folder)
        process = ours("extract", *names[:2], "-o", names[2], "--rank", str(rank), "--force")
        ratio = process.wall / reading.wall
        rows.append({"cat, s": reading.wall, "extract, s": process.wall, "extract / cat": ratio})
    report("cold", rows, out, rank=rank)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the pairs (up to 15 GB)")
    parser.add_argument("--mergekit", required=True, help="mergekit-extract-lora")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, action="append")
    arguments = parser.parse_args()
    parts = arguments.part or PARTS
    if "llama" in parts:
        against_mergekit("llama", pair(arguments.work, "llama", 2), 64, arguments.mergekit, arguments.json)
    if "smollm" in parts:
        against_mergekit("smollm", pair(arguments.work, "smollm", 30), 8, arguments.mergekit, arguments.json)
    if "growth" in parts:
        growth(arguments.work, 64, arguments.json)
    if "cold" in parts:
        cold(pair(arguments.work, "llama", 2), 64, arguments.json)


if __name__ == "__main__":
    main()
