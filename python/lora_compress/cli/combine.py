"""`lora-compress combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_compress.cli._combine import RESULT, check_weights, report, wishes
from lora_compress.cli._console import PATH, command_line, common_options, progress
from lora_compress.cli._options import RANKS, choice_of, options


@click.command(
    "combine",
    epilog="""\b
Examples:
  lora-compress combine llama-8b/ style/ facts/ -o both/                       exact: ranks add up
  lora-compress combine base/ style/ facts/ -o both/ -w 0.5 -w 1 --rank 16     recompressed""",
)
@click.argument("base", type=PATH)
@click.argument("adapters", type=PATH, nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, required=True, help="Directory to create.")
@click.option(
    "-w", "--weight", "factors", type=float, multiple=True, metavar="W", help="One for each adapter.  [default: 1]"
)
@options(RANKS, RESULT)
@common_options
def command(
    base: Path,
    adapters: tuple[Path, ...],
    out: Path,
    factors: tuple[float, ...],
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Add ADAPTERS of one BASE, each times its weight, into one adapter: exactly, or recompressed to other ranks.

    Works on the factors: no ΔW is formed. Without a wish for ranks, each matrix gets as many as the sum has directions.
    """
    check_weights(factors, adapters)
    asked = choice_of(given)
    from lora_compress.verbs.combine import combine

    with progress(quiet=quiet or as_json) as bar:
        result = combine(
            base, adapters, out, weights=factors, command=command_line(), progress=bar, **wishes(asked, given)
        )
    report(result, as_json=as_json, quiet=quiet)
