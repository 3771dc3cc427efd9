"""Which ranks keep a fine-tune: KL and loss against bytes, on real pairs, for ways to share bytes out among tensors.

Every row is the whole way: extract, merge, measure the merged model on held-out data. `auto` and each budget's
`balanced` are compared with the best that ranks set by hand reach at that size.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lora_compress
from fidelity import Fidelity
from fine_tunes import PAIRS
from lora_compress import Options, Plan
from lora_compress.ranks.choice import choose
from lora_compress.ranks.weights import WEIGHTS

Row = dict[str, Any]
# Logarithms of sizes that are compared as one: a budget is filled up to its last step.
SAME = 0.01
# A tied embedding's factors are stored once here: merging applies them once, and bytes are compared.
OPTIONS = Options(tied_head=False)
UNIFORM = (2, 4, 8, 16, 32, 64)
ENERGY = (0.3, 0.5, 0.7)


def settings(plan: Plan, name: str) -> Iterator[tuple[str, Plan]]:
    """Names of settings, and plans with their ranks."""
    yield "auto", plan
    sizes = [plan.nbytes]
    for rank in UNIFORM:
        uniform = plan.choose(choose(rank=rank))
        sizes.append(uniform.nbytes)
        yield f"uniform {rank}", uniform
    for share in ENERGY:
        yield f"energy {share}", plan.choose(choose(rank=f"energy={share}"))
    for size in sizes:
        for weights in WEIGHTS:
            yield (
                f"{weights} at {size / 1e6:.3g} MB",
                plan.choose(choose(budget=size + header_room(plan), weights=weights)),
            )
    if name == "smollm2":
        for linear, embedding in ((8, 0), (8, 1), (8, 4), (8, 8), (16, 8), (32, 8), (32, 16), (64, 32)):
            yield f"linear {linear}, embedding {embedding}", by_hand(plan, linear, embedding)


def header_room(plan: Plan) -> int:
    """Budgets count file headers, `Plan.nbytes` does not."""
    return plan.least_bytes - plan.fixed


def by_hand(plan: Plan, linear: int, embedding: int) -> Plan:
    """The plan with one rank for linear layers and one for the embedding."""
    ranked = (
        replace(tensor, rank=embedding if "embed" in tensor.name else linear) if tensor.spectrum is not None else tensor
        for tensor in plan.tensors
    )
    return replace(plan, tensors=tuple(ranked))


def measure(name: str, cache: Path, windows: int, report: Callable[[str], None]) -> dict[str, Any]:
    """All rows of one pair."""
    fidelity = Fidelity(cache, name, windows)
    # All singular values: budgets of the table may give one tensor many.
    plan = lora_compress.plan(fidelity.base, fidelity.tuned, bound=1024, options=OPTIONS)
    rows: list[Row] = []
    seen: dict[tuple[int, ...], Row] = {}
    for label, planned in settings(plan, name):
        ranks = tuple(planned.ranks.values())
        if ranks in seen:
            rows.append({**seen[ranks], "setting": label})
            continue
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            out, merged = Path(scratch) / "adapter", Path(scratch) / "merged"
            result = lora_compress.extract(fidelity.base, fidelity.tuned, out, plan=planned)
            lora_compress.merge(fidelity.base, [out], merged)
            row: Row = {"setting": label, "bytes": planned.nbytes, "error": result.error, **fidelity(merged)}
        rows.append(row)
        seen[ranks] = row
        size = f"{row['bytes'] / 1e6:9.3f} MB  error {row['error']:.4f}"
        report(f"{label:32} {size}  KL {row['kl']:.5f}  loss {row['loss']:.4f}")
    # The base of `tcr` has one token less: there is nothing to measure it on.
    base = fidelity(fidelity.base) if name != "tcr" else None
    for row in rows:
        if row["setting"] == "auto" or row["setting"].startswith("balanced"):
            best = hand_tuned(rows, row["bytes"])
            row["of_best"] = row["kl"] / best if best is not None else None
            report(f"{row['setting']:32} {row['of_best'] or math.nan:.3f} × the best KL by hand at its size")
    return {"pair": name, "base": base, "tuned": fidelity(fidelity.tuned), "rows": rows}


def hand_tuned(rows: list[Row], nbytes: int) -> float | None:
    """The lowest KL at a size that ranks chosen by a person reach: the same rank everywhere, the same share of energy
    everywhere, one rank for linear layers and one for the embedding. Between neighbours of a family it is interpolated,
    straight in the logarithms. None where they have nothing so small.
    """
    best = math.inf
    for family in ("uniform", "energy", "linear"):
        members = [row for row in rows if row["setting"].startswith(family)]
        points = sorted((math.log(row["bytes"]), math.log(max(row["kl"], 1e-12))) for row in members)
        at = math.log(nbytes)
        best = min([best, *(y for x, y in points if x <= at + SAME)])
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 < at < x1:
                best = min(best, y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return math.exp(best) if math.isfinite(best) else None


def main() -> None:
    """Measure all pairs, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens to measure a language model on")
    parser.add_argument("names", nargs="*", default=list(PAIRS))
    args = parser.parse_args()
    for name in args.names:
        print(f"\n{name}")
        result = measure(name, args.cache, args.windows, lambda line: print(line, flush=True))
        if args.json:
            (args.json / f"ranks-{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
