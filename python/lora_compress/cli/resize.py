"""`lora-compress resize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_compress.cli._combine import RESULT, report, wishes
from lora_compress.cli._console import PATH, command_line, common_options, progress
from lora_compress.cli._options import RANKS, choice_of, options


@click.command(
    "resize",
    epilog="""\b
Examples:
  lora-compress resize llama-8b/ adapter/ -o smaller/ --rank 32
  lora-compress resize base/ adapter/ -o smaller/ --budget 20MB
  lora-compress resize base/ adapter/ -o padded/ --rank energy=0.99 --ranks-allowed 8,16,32""",
)
@click.argument("base", type=PATH)
@click.argument("adapter", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Directory to create.")
@options(RANKS, RESULT)
@common_options
def command(base: Path, adapter: Path, out: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Give ADAPTER other ranks: the best pairs of each rank, from its factors alone.

    BASE is what the adapter was made for: its names and shapes are needed, none of its weights is read. Tensors that
    the adapter stores whole are kept.
    """
    asked = choice_of(given)
    if all(value is None for value in asked.values()):
        raise click.UsageError("say how large: --rank, --budget, --error, --max-rank, --ranks-allowed or --layout")
    from lora_compress.verbs.combine import resize

    with progress(quiet=quiet or as_json) as bar:
        result = resize(base, adapter, out, command=command_line(), progress=bar, **wishes(asked, given))
    report(result, as_json=as_json, quiet=quiet)
