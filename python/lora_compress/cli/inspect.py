"""`lora-compress inspect`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import click

from lora_compress.cli._console import PATH, common_options, print_json, print_table, size

# The factor next to the input, in the formats that have no configuration to say the rank.
DOWN = re.compile(r"\.lora[_.](?:down|A)\.")
# What kohya's files say of themselves.
KOHYA = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_output_name")


@click.command(
    "inspect",
    epilog="""\b
Examples:
  lora-compress inspect model/
  lora-compress inspect adapter/ --tensors
  lora-compress inspect model.safetensors --json""",
)
@click.argument("path", type=PATH)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@common_options
def command(path: Path, tensors: bool, as_json: bool, quiet: bool) -> None:
    """Say what PATH is: a file of weights, a model directory, a name on the Hub, or an adapter. Reads headers only."""
    from lora_compress.verbs.inspect import inspect

    result = inspect(path)
    if as_json:
        print_json(result.to_json())
        return
    if quiet:
        return
    if tensors:
        rows = [
            [t.name, t.stored_dtype, "×".join(map(str, t.shape)), size(t.stored_nbytes), t.shard]
            for t in result.tensors
        ]
        print_table(["tensor ", "dtype ", "shape", "size", "file "], rows)
    facts = [
        ("kind", result.kind),
        ("files", str(len(result.files))),
        ("tensors", str(len(result.tensors))),
        ("parameters", f"{result.parameters:,}"),
        ("size", size(result.nbytes)),
        ("dtypes", ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in result.dtypes.items())),
    ]
    if result.kind == "adapter":
        config = result.config
        pattern = config.get("rank_pattern")
        facts.append(
            ("base", str(config.get("base_model_name_or_path") or config.get("ss_base_model_version", "unknown")))
        )
        ranks = sorted({t.shape[0] for t in result.tensors if t.shape and DOWN.search(t.name)})
        if "groups" in config:
            groups = [group for group in config["groups"] if isinstance(group, dict)]
            counts = Counter((str(group.get("decomposition")), str(group.get("contraction"))) for group in groups)
            facts += [
                (name, f"{count} groups, ΔW[out, in] ← {contraction}") for (name, contraction), count in counts.items()
            ]
        elif "peft_type" not in config:
            facts += [
                ("rank", " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "unknown"),
                *((name, config[name]) for name in KOHYA if name in config),
            ]
        else:
            facts += [
                ("rank", f"{config.get('r')} ({len(pattern) if isinstance(pattern, dict) else 0} modules differ)"),
                ("alpha", str(config.get("lora_alpha"))),
            ]
        if "totals" in result.manifest:
            totals = result.manifest.get("totals", {})
            facts.append(("error", f"{totals.get('error', 0.0):.4f}, made from {result.manifest.get('tuned')}"))
    else:
        facts.append(("model", result.architecture or "unknown"))
        if result.tied_embedding:
            facts.append(("tied head", f"shares {result.tied_embedding}"))
    width = max(12, *(len(name) + 2 for name, _ in facts))
    for name, value in facts:
        click.echo(f"{name:<{width}}{value}")
