#!/usr/bin/env python3
"""Do three factors, or a tensor train, beat two at equal bytes? Every decomposition on real pairs, with KL; and what an
extraction by each takes.

python benchmarks/three_factors.py --cache DIR --work DIR [--json DIR] [--part pairs|input|time]... [PAIR]...
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lora_compress
import lora_compress_abc
import lora_compress_lokr
import lora_compress_tensor_train
from commands import pair as llama_pair
from lora_compress.testing import loaded
from measure import report
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).with_name("ranks")))
from fidelity import Fidelity
from fine_tunes import PAIRS
from plot import line_chart

PARTS = ("pairs", "input", "time")
SIZES = (2, 4, 8, 16, 32, 64)
# Layers that share their input, in the names of the pairs. ANARCII's are stored as one matrix and split here.
INPUT_GROUPS = {
    "smollm2": {"q, k, v": ["[qkv]_proj"], "gate, up": ["gate_proj", "up_proj"]},
    "minilm": {"q, k, v": [r"(query|key|value)\.weight"]},
    "shark": {"q, k, v": ["[qkv]_proj"]},
    "tcr": {"q, k, v": ["[qkv]_proj"]},
}
FUSED = "self_attention.multihead_attn.in_proj_weight"
TIMED = ("ab", "abc", "abc-shared-input", "tensor-train", "tensor-train-interleaved")


def measured(fidelity: Fidelity, path: Path) -> Mapping[str, float]:
    """KL and loss of an adapter, merged as a user would; of a model as it is."""
    if (path / "config.json").exists() or (path / "model.safetensors").exists():
        return fidelity(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        merged = Path(scratch) / "merged"
        lora_compress.merge(fidelity.base, [path], merged)
        return fidelity(merged)


def compare_pair(name: str, cache: Path, windows: int) -> dict[str, Any]:
    """All decompositions at all sizes: totals, and errors by kind of module."""
    fidelity = Fidelity(cache, name, windows)

    def measure(path: Path) -> Mapping[str, float]:
        # The base of `tcr` has one token less: there is nothing to measure it on.
        return {} if name == "tcr" and path == fidelity.base else measured(fidelity, path)

    result = lora_compress.compare(fidelity.base, fidelity.tuned, sizes=SIZES, measure=measure).to_json()
    for row in result["rows"]:
        row["by_decomposition"] = by_decomposition(row.pop("tensors"))
    return {"pair": name, **result, "base": "base", "tuned": "tuned"}


def by_decomposition(tensors: list[dict[str, Any]]) -> dict[str, int]:
    """How many tensors each decomposition has."""
    counts: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        if tensor["decomposition"]:
            counts[tensor["decomposition"]] += 1
    return dict(counts)


def compare_inputs(name: str, cache: Path) -> list[dict[str, Any]]:
    """Layers of one input alone: one A for all against a pair each."""
    rows = []
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        folder = split(cache / "fine-tunes" / name, Path(scratch))
        for layers, include in INPUT_GROUPS[name].items():
            result = lora_compress.compare(
                folder / "base",
                folder / "tuned",
                sizes=SIZES,
                decompositions=["ab", "abc-shared-input"],
                include=include,
            )
            for size in result.sizes:
                found = {row.decomposition: row.error or 0.0 for row in result.rows if row.size == size}
                ratio = found["abc-shared-input"] / found["ab"]
                rows.append({"pair": name, "layers": layers, "size": size, **found, "to ab": ratio})
    return rows


def split(folder: Path, scratch: Path) -> Path:
    """The pair with fused matrices of queries, keys and values apart; as it is where there are none."""
    for side in ("base", "tuned"):
        tensors = load_file(folder / side / "model.safetensors")
        fused = [name for name in tensors if name.endswith(FUSED)]
        if not fused:
            return folder
        parts = {
            name.replace("in_proj_weight", f"{letter}_proj.weight"): part.contiguous()
            for name in fused
            for letter, part in zip("qkv", tensors[name].chunk(3), strict=True)
        }
        (scratch / side).mkdir()
        save_file(parts, scratch / side / "model.safetensors")
    return scratch


def times(work: Path) -> list[dict[str, Any]]:
    """Seconds of whole extractions of the 2-layer Llama pair, the best of three, at rank 64."""
    folder = llama_pair(work, "llama", 2)
    rows: list[dict[str, Any]] = []
    for name in TIMED:
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            results = [
                lora_compress.extract(
                    folder / "base",
                    folder / "tuned",
                    Path(scratch) / str(number),
                    rank=64,
                    decomposition=name,
                    format="factors",
                )
                for number in range(4)
            ]
        # The first run may find the files in no cache.
        seconds = min(result.seconds for result in results[1:])
        first = rows[0]["seconds"] if rows else seconds
        rows.append({"decomposition": name, "seconds": seconds, "to ab": seconds / first, "error": results[0].error})
    return rows


def main() -> None:
    """Measure all parts, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens to measure a language model on")
    parser.add_argument("names", nargs="*", default=list(PAIRS))
    args = parser.parse_args()
    # Beside whatever is installed: the plugins of this clone.
    with loaded(lora_compress_abc, lora_compress_lokr, lora_compress_tensor_train):
        measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """The parts that were asked for."""
    parts = args.part or PARTS
    if "time" in parts:
        report("decomposition-times", times(args.work), args.json)
    if "input" in parts:
        report("shared-input", [row for name in args.names for row in compare_inputs(name, args.cache)], args.json)
    for name in args.names if "pairs" in parts else ():
        result = compare_pair(name, args.cache, args.windows)
        for row in result["rows"]:
            print(
                f"{name:8} {row['size']:8} {row['decomposition']:26} {row['bytes']:>10} {row['error']} {row.get('kl')}"
            )
        if args.json:
            (args.json / f"compare-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            draw(args.json)


def draw(folder: Path) -> None:
    """The picture of docs/three-factors.md: KL by that of `ab` at every size, for every pair that has been measured."""
    panels = []
    for name in PAIRS:
        path = folder / f"compare-{name}.json"
        if path.exists():
            lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
            rows = json.loads(path.read_text())["rows"]
            pairs = {row["size"]: row["kl"] for row in rows if row["decomposition"] == "ab"}
            for row in rows:
                if row["error"] is not None:
                    lines[row["decomposition"]].append((row["allowed_bytes"], row["kl"] / pairs[row["size"]]))
            panels.append((name, {key: sorted(points) for key, points in lines.items()}))
    (folder.parent / "three-factors.svg").write_text(
        line_chart(panels, "bytes allowed", "KL, relative to ab", most=3.0)
    )


if __name__ == "__main__":
    main()
