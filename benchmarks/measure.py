"""What the benchmarks share: timing, processes, the machine, tables and their JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_compress import Delta, __version__
from lora_compress._native import kernel

Result = TypeVar("Result")


@dataclass(frozen=True)
class Process:
    """A finished process: seconds, and megabytes of resident memory at its peak."""

    wall: float
    cpu: float
    peak_rss: float


# A process is charged the peak memory of the one it was forked from, so a small one starts it.
_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - started
print(json.dumps([status, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000]))
"""


def run(command: Sequence[str], **environment: str) -> Process:
    """Run a command to its end and take the system's account of it."""
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    done = subprocess.run(launcher, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    status, *account = json.loads(done.stdout)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return Process(*account)


def ours(*arguments: str, **environment: str) -> Process:
    """Run `lora-compress` as a user would."""
    return run([sys.executable, "-m", "lora_compress", *arguments, "--quiet"], **environment)


def best(job: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds of the fastest of a few runs."""
    return timed(job, repeats)[0]


def timed(job: Callable[[], Result], repeats: int = 3) -> tuple[float, Result]:
    """Seconds of the fastest of a few runs, and what the last returned."""
    fastest = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        result = job()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest, result


def energy_beyond(delta: Delta, ranks: Sequence[int]) -> dict[int, float]:
    """Smallest ‖Δ − BA‖² of each rank, from the eigenvalues of the f64 Gram matrix on the smaller side."""
    import torch

    values = torch.from_numpy(delta.rows(0, delta.shape[0]))
    wide = values.shape[0] < values.shape[1]
    gram = torch.zeros((min(delta.shape),) * 2, dtype=torch.float64)
    for part in values.split(2048, dim=1 if wide else 0):
        part64 = part.double()
        gram += part64 @ part64.T if wide else part64.T @ part64
    spectrum = torch.linalg.eigvalsh(gram).flip(0)
    return {rank: float(spectrum[rank:].sum()) for rank in ranks}


def machine() -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "kernel": kernel(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lora_compress": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def report(name: str, rows: Sequence[dict[str, Any]], out: Path | None, **facts: Any) -> None:
    """Print rows as a Markdown table, and write them with the machine's facts as JSON."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print(f"\n## {name}\n\n{', '.join(f'{key} {value}' for key, value in {**machine(), **facts}.items())}\n")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
    sys.stdout.flush()
    if out:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"benchmark": name, **machine(), **facts, "rows": rows}, indent=1)
        (out / f"{name}.json").write_text(text + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line.split(": ")[1] for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
