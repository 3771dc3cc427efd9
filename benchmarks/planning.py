#!/usr/bin/env python3
"""Planning: from a saved plan of an 8B-shaped model, and what it takes beside the extraction that it predicts.

python benchmarks/planning.py --work DIR [--json DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from commands import pair
from lora_compress import Plan, Spectrum
from lora_compress.ranks.choice import choose
from lora_compress.ranks.plan import TensorPlan
from lora_compress.ranks.predict import memory, seconds
from measure import ours, report, run, timed
from pairs import ARCHITECTURES, shapes

LAYERS = 32
BOUND = 320


def plan_8b() -> Plan:
    """A plan of the 290 tensors of an 8B Llama, power laws of random strength and decay for spectra."""
    rng = np.random.default_rng(0)
    tensors = []
    names = [item for shard in shapes(ARCHITECTURES["llama"], LAYERS).values() for item in shard]
    for name, shape in names:
        if len(shape) == 1:
            tensors.append(TensorPlan(name, "BF16", shape, "exact", 1.0, 1e3, fixed=2 * shape[0]))
            continue
        rows, cols = shape
        sigma = rng.uniform(0.1, 1.0) * np.arange(1, BOUND + 1.0) ** -rng.uniform(0.5, 0.9)
        energy = float(np.square(sigma).sum() / rng.uniform(0.3, 0.6))
        spectrum = Spectrum((rows, cols), sigma.tolist(), energy, base_energy=1e4, rounding_energy=0.02 * energy)
        unit = 2 * (rows + cols)
        tensors.append(TensorPlan(name, "BF16", shape, "low-rank", energy, 1e4, unit=unit, spectrum=spectrum))
    digests = {"base": "0" * 64, "tuned": "1" * 64}
    return Plan("base", "tuned", digests, {}, choose(rank=16), tuple(tensors), 16 * 10**9, seconds=30.0)


def replanning() -> list[dict[str, Any]]:
    """Seconds from the file to other ranks."""
    plan = plan_8b()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        wishes: list[dict[str, Any]] = [
            {"budget": "200MB"},
            {"rank": "auto"},
            {"rank": "energy=0.2"},
            {"budget": "300MB", "ranks_allowed": "8x"},
        ]
        for wish in wishes:
            choice = choose(**wish)
            both, _ = timed(lambda choice=choice: Plan.load(path).choose(choice))  # type: ignore[misc]
            ranks, _ = timed(lambda choice=choice: plan.choose(choice))  # type: ignore[misc]
            asked = [f"--{name.replace('_', '-')}={value}" for name, value in wish.items()]
            command = [sys.executable, "-m", "lora_compress", "plan", str(path), *asked]
            rows.append(
                {
                    "wish": choice.describe(),
                    "tensors": len(plan.tensors),
                    "file_mb": path.stat().st_size / 1e6,
                    "load_and_choose_s": both,
                    "choose_s": ranks,
                    "whole_command_s": run(command).wall,
                }
            )
    return rows


def predictions(work: Path) -> list[dict[str, Any]]:
    """What `plan` takes and predicts, and what `extract` then takes."""
    rows = []
    for model, layers in (("llama", 2), ("smollm", 30)):
        folder = pair(work, model, layers)
        base, tuned = str(folder / "base"), str(folder / "tuned")
        path = folder / "plan.json"
        planned = ours("plan", base, tuned, "-o", str(path), "--force")
        plan = Plan.load(path)
        followed = ours("extract", base, tuned, "-o", str(folder / "adapter"), "--plan", str(path), "--force")
        both = ours("extract", base, tuned, "-o", str(folder / "adapter"), "--force")
        highest = max(plan.ranks.values())
        fixed = ours("extract", base, tuned, "-o", str(folder / "adapter"), "--rank", str(highest), "--force")
        rows.append(
            {
                "pair": f"{model}, {layers} layers",
                "ranks_up_to": highest,
                "adapter_mb": plan.nbytes / 1e6,
                "plan_s": planned.wall,
                "extract_plan_s": followed.wall,
                "predicted_s": seconds(plan),
                "extract_plan_mb": followed.peak_rss,
                "predicted_mb": memory(plan) / 1e6,
                "extract_auto_s": both.wall,
                "extract_fixed_rank_s": fixed.wall,
            }
        )
    return rows


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report("replanning", replanning(), args.json)
    report("planning", predictions(args.work), args.json)


if __name__ == "__main__":
    main()
