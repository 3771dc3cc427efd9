#!/usr/bin/env python3
"""Merging a rank-64 adapter of all linear layers into two Llama-8B-shaped layers, beside PEFT and a copy of the base.

python benchmarks/merging.py --work DIR [--json DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from commands import pair
from measure import Process, ours, report, run

# What PEFT's documentation says: load, merge, save.
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
RUNS = 5


def fastest(command: list[str], out: Path) -> Process:
    """The best of a few runs, each into a directory that is not there."""
    runs = []
    for _ in range(RUNS):
        shutil.rmtree(out, ignore_errors=True)
        # What was written before is not to be written back meanwhile.
        os.sync()
        runs.append(run([*command, str(out)]))
    return min(runs, key=lambda process: process.wall)


def main() -> None:
    """Measure all in one run, bases of other types too. None of them waits for the disk (no fsync)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = pair(args.work, "llama", 2)
    base, adapter = folder / "base", folder / "adapter-64"
    ours("extract", str(base), str(folder / "tuned"), "-o", str(adapter), "--rank", "64", "--force")
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        out = Path(scratch) / "out"

        def merge(base: Path, *options: str) -> list[str]:
            command = [sys.executable, "-m", "lora_compress", "merge", str(base), str(adapter), "--quiet"]
            return [*command, *options, "-o"]

        ways = {
            "lora-compress merge": merge(base),
            "the same with --keep-base-patch": merge(base, "--keep-base-patch"),
            "cp -r": ["cp", "-r", str(base)],
            "PEFT: load, merge, save": [sys.executable, "-c", PEFT, str(base), str(adapter)],
        }
        for dtype in ("F16", "F32"):
            other = folder / f"base-{dtype}"
            ours("merge", str(base), str(adapter), "--dtype", dtype, "-o", str(other), "--force")
            ways[f"lora-compress merge of {dtype}"] = merge(other, "--any-base")
            ways[f"cp -r of {dtype}"] = ["cp", "-r", str(other)]
        rows: list[dict[str, Any]] = []
        for way, command in ways.items():
            process = fastest(command, out)
            rows.append({"way": way, "seconds": process.wall, "cpu": process.cpu, "peak MB": process.peak_rss})
    for row in rows:
        row["to ours"] = row["seconds"] / rows[0]["seconds"]
    report("merging", rows, args.json)


if __name__ == "__main__":
    main()
