#!/usr/bin/env python3
"""Measure `lora-compress extract` and `merge` as whole processes on a Llama-8B-shaped pair.

Time, memory, and the excess of three matrices over their exact optimum, beside the time to read the bytes.

    make bench                                  or  python benchmarks/extract.py --work DIR --layers 2 --rank 64
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lora_compress import Checkpoint, Delta, __version__

CHECKED = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Process:
    """A finished process: seconds, and megabytes of resident memory at its peak."""

    wall: float
    cpu: float
    peak_rss: float


def run(*arguments: str) -> Process:
    """Run the command line as a user would and take the system's account of it."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lora_compress", *arguments, "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"lora-compress {' '.join(arguments)} failed")
    return Process(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def read_seconds(*folders: Path) -> float:
    """Time to read all weights once, front to back: the floor of any extraction."""
    started = time.perf_counter()
    buffer = bytearray(8 << 20)
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return time.perf_counter() - started


def gemm_rate(dtype: Any, size: int = 2048) -> float:
    """GFLOP/s of a square product in NumPy, the best of five."""
    a = np.random.default_rng(0).standard_normal((size, size)).astype(dtype)
    best = min(_timed(lambda: a @ a) for _ in range(5))
    return 2 * size**3 / best / 1e9


def _timed(job: Any) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def optimum(delta: Delta, rank: int) -> float:
    """Smallest ‖Δ − BA‖² of that rank, from the eigenvalues of the f64 Gram matrix on the smaller side."""
    values = delta.rows(0, delta.shape[0]).astype(np.float64)
    gram = values @ values.T if delta.shape[0] < delta.shape[1] else values.T @ values
    return float(np.linalg.eigvalsh(gram)[:-rank].sum())


def main() -> None:
    """Run the benchmark and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the pair (2.8 GB for two layers)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    pair = arguments.work / f"llama-{arguments.layers}"
    base, tuned, adapter, merged = (pair / name for name in ("base", "tuned", "adapter", "merged"))
    if not tuned.exists():
        # In a process of its own: a child's peak memory begins at that of the process it was forked from.
        script = Path(__file__).with_name("llama_pair.py")
        subprocess.run([sys.executable, str(script), str(pair), "--layers", str(arguments.layers)], check=True)
    read_seconds(base, tuned)
    floor = read_seconds(base, tuned)
    rank = str(arguments.rank)
    extraction = run("extract", str(base), str(tuned), "-o", str(adapter), "--rank", rank, "--force")
    merging = run("merge", str(base), str(adapter), "-o", str(merged), "--force")

    manifest = json.loads((adapter / "lora_compress" / "manifest.json").read_text())
    errors = {row["name"]: row["error_energy"] for row in manifest["tensors"]}
    treatments = {row["name"]: row["treatment"] for row in manifest["tensors"]}
    checkpoints = Checkpoint(base), Checkpoint(tuned)
    excess = {}
    for module in CHECKED:
        name = f"model.layers.0.{module}.weight"
        best = optimum(Delta(*checkpoints, name), arguments.rank)
        excess[name] = (errors[name] / best) ** 0.5 - 1
    report = {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "version": __version__,
        "layers": arguments.layers,
        "rank": arguments.rank,
        "read_floor_seconds": floor,
        "gemm_gflops": {"f32": gemm_rate(np.float32), "f64": gemm_rate(np.float64)},
        "extract": asdict(extraction),
        "merge": asdict(merging),
        "adapter_bytes": sum(path.stat().st_size for path in adapter.rglob("*.safetensors")),
        "unchanged": sorted(name for name, treatment in treatments.items() if treatment == "unchanged"),
        "excess": excess,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['machine']} lora-compress {__version__}, {arguments.layers} layers, rank {arguments.rank}")
    print(f"reading both checkpoints once     {floor:7.2f} s (warm)")
    for name, process in (("extract", extraction), ("merge", merging)):
        ratio = process.wall / floor
        print(f"{name:<10} wall {process.wall:6.2f} s  cpu {process.cpu:6.2f} s  ", end="")
        print(f"peak {process.peak_rss:5.0f} MB  {ratio:5.1f} × the reading")
    print(
        f"adapter    {report['adapter_bytes'] / 1e6:.1f} MB; unchanged, not stored: {len(report['unchanged'])} tensors"
    )
    for name, value in excess.items():
        print(f"excess     {value:9.2e}  {name}")
    print(f"NumPy GEMM {report['gemm_gflops']['f32']:.0f} GFLOP/s f32, {report['gemm_gflops']['f64']:.0f} f64")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line.split(": ")[1] for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
