"""What a search for the scale gains: calibrated on some windows of held-out text, measured on others."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
from fidelity import Fidelity
from lora_compress.torch.scale import search_scale
from ranks import OPTIONS
from safetensors.torch import load_file

WISHES: tuple[dict[str, Any], ...] = ({"rank": 8}, {"rank": "auto"})


def main() -> None:
    """Search scales for the language model's pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    fidelity = Fidelity(args.cache, "smollm2", args.windows)
    windows = load_file(fidelity.folder / "heldout.safetensors")["ids"]
    rows = []
    with tempfile.TemporaryDirectory(dir=args.cache) as folder:
        scratch = Path(folder)
        # The first half of the windows: `Fidelity` measures on the second.
        np.save(scratch / "ids.npy", windows[: len(windows) // 2].numpy())
        for wish in WISHES:
            plan = lora_compress.plan(fidelity.base, fidelity.tuned, **wish, options=OPTIONS)

            def kl(scale: float | Mapping[str, float], plan: lora_compress.Plan = plan) -> float:
                out, merged = scratch / "adapter", scratch / "merged"
                lora_compress.extract(fidelity.base, fidelity.tuned, out, plan=plan, scale=scale, force=True)
                lora_compress.merge(fidelity.base, [out], merged, force=True)
                return fidelity(merged)["kl"]

            at_one = kl(1.0)
            # The adapter beside is searched at scale 1.
            lora_compress.extract(fidelity.base, fidelity.tuned, scratch / "one", plan=plan, force=True)
            found = search_scale(fidelity.base, fidelity.tuned, scratch / "one", scratch / "ids.npy")
            row = {
                "ranks": plan.choice.describe(),
                "bytes": plan.nbytes,
                "scale": found.scale if isinstance(found.scale, float) else dict(found.scale),
                "kl_at_1": at_one,
                "kl": kl(found.scale),
                "calibration": found.calibration,
                "heldout": found.heldout,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        (args.json / "scales.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
