"""The model card: front matter as the Hub reads it, and in the body what was kept and what was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def model_card(manifest: Mapping[str, Any]) -> str:
    """README.md of an adapter, from the account of its extraction."""
    base = str(manifest["base"])
    # A JSON string is a YAML string, whatever characters a path holds.
    front = [
        "---",
        f"base_model: {json.dumps(base)}",
        "base_model_relation: adapter",
        "library_name: peft",
        *(["pipeline_tag: text-generation"] if manifest.get("causal_lm") else []),
        "tags:",
        f"- {json.dumps('base_model:adapter:' + base)}",
        "- lora",
        "- lora-compress",
        "---",
    ]
    if "converted_from" in manifest and "totals" not in manifest:
        return "\n".join([*front, "", *_converted(manifest), ""])
    if "made_from" in manifest:
        return "\n".join([*front, "", *_combined(manifest), ""])
    if "trained" in manifest:
        return "\n".join([*front, "", *_trained(manifest), ""])
    totals = manifest["totals"]
    body = [
        f"# LoRA adapter of `{manifest['tuned']}`",
        "",
        f"The difference between `{manifest['tuned']}` and its base `{base}`, extracted by "
        f"[lora-compress](https://pypi.org/project/lora-compress/) {manifest['version']}:",
        "",
        f"    {manifest['command']}",
        "",
        f"The adapter holds {1 - totals['error'] ** 2:.2%} of the squared norm of the fine-tune's change ‖ΔW‖²; "
        f"the relative error ‖ΔW − BA‖ / ‖ΔW‖ over all tensors is {totals['error']:.3f}. The scale is folded into the "
        "factors (alpha = r).",
        "",
        "| treatment | tensors | share of ‖ΔW‖² | bytes |",
        "|---|---:|---:|---:|",
        *(
            f"| {row['treatment']} | {row['tensors']} | {row['share']:.2%} | {row['bytes']:,} |"
            for row in totals["treatments"]
        ),
        "",
    ]
    if totals["side_file"]:
        body += [
            "Tensors that a LoRA cannot carry (norms, biases, new rows) are in `lora_compress/exact.safetensors`: "
            "`lora-compress merge` applies them, servers ignore them.",
            "",
        ]
    body += ["| tensor | shape | rank | error |", "|---|---|---:|---:|"]
    body += [
        f"| `{tensor['name']}` | {'×'.join(map(str, tensor['shape']))} | {tensor['rank']} | {tensor['error']:.3f} |"
        for tensor in manifest["tensors"]
        if tensor["treatment"] == "low-rank"
    ]
    return "\n".join([*front, "", *body, ""])


def _trained(manifest: Mapping[str, Any]) -> list[str]:
    """The body of a card of an adapter that was trained."""
    return [
        "# LoRA adapter",
        "",
        f"For the base `{manifest['base']}`, trained as `{manifest['decomposition']}` with "
        f"[lora-compress](https://pypi.org/project/lora-compress/) {manifest['version']}. The scale is folded into the "
        "factors (alpha = r).",
    ]


def _converted(manifest: Mapping[str, Any]) -> list[str]:
    """The body of a card of an adapter that was converted from another format."""
    return [
        "# LoRA adapter",
        "",
        f"For the base `{manifest['base']}`, converted from `{manifest['converted_from']}` by "
        f"[lora-compress](https://pypi.org/project/lora-compress/) {manifest['version']}:",
        "",
        f"    {manifest['command']}",
    ]


def _combined(manifest: Mapping[str, Any]) -> list[str]:
    """The body of a card of an adapter that was made from others."""
    densities = manifest.get("density", [None] * len(manifest["weights"]))
    sources = zip(manifest["made_from"], manifest["weights"], densities, strict=True)
    is_sum = manifest.get("method", "linear") == "linear"
    made = "their sum" if is_sum else f"what `{manifest['method']}` makes of them (seed {manifest['seed']})"
    return [
        "# LoRA adapter made from others",
        "",
        f"For the base `{manifest['base']}`, by [lora-compress](https://pypi.org/project/lora-compress/) "
        f"{manifest['version']}:",
        "",
        f"    {manifest['command']}",
        "",
        *(
            f"- `{path}`, weight {weight:g}" + ("" if density is None else f", density {density:g}")
            for path, weight, density in sources
        ),
        "",
        f"It leaves a relative error ‖ΔW − BA‖ / ‖ΔW‖ of {manifest['combined_error']:.4f} in {made}. The scale is "
        "folded into the factors (alpha = r).",
    ]
