"""`lora-compress combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_compress.cli._combine import RESULT, check_method, check_weights, report, wishes
from lora_compress.cli._console import PATH, command_line, common_options, progress
from lora_compress.cli._options import RANKS, choice_of, options


@click.command(
    "combine",
    epilog="""\b
Examples:
  lora-compress combine llama-8b/ style/ facts/ -o both/                       exact: ranks add up
  lora-compress combine base/ style/ facts/ -o both/ -w 0.5 -w 1 --rank 16     recompressed
  lora-compress combine base/ style/ facts/ -o both/ --method ties --density 0.5 --rank 32""",
)
@click.argument("base", type=PATH)
@click.argument("adapters", type=PATH, nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, required=True, help="Directory to create.")
@click.option(
    "-w", "--weight", "factors", type=float, multiple=True, metavar="W", help="One for each adapter.  [default: 1]"
)
@click.option(
    "--method",
    type=click.Choice(["linear", "ties", "dare_linear", "dare_ties"]),
    default="linear",
    show_default=True,
    help="Add; or first thin out each ΔW (ties by magnitude, dare at random), then add or elect signs (ties).",
)
@click.option(
    "--density",
    "densities",
    type=float,
    multiple=True,
    metavar="D",
    help="Share of each ΔW's elements that ties or dare keep; once, or once for each adapter.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of dare's choice of elements."
)
@options(RANKS, RESULT)
@common_options
def command(
    base: Path,
    adapters: tuple[Path, ...],
    out: Path,
    factors: tuple[float, ...],
    method: str,
    densities: tuple[float, ...],
    seed: int,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Make one adapter of ADAPTERS of one BASE: their sum, each times its weight, or what TIES or DARE make of them.

    A sum is exact, or recompressed to the ranks that are wished for; it works on the factors, no ΔW is formed. TIES and
    DARE act on the elements of each ΔW; the result is cut to the largest rank that a matrix has in any adapter, or to
    the ranks that are wished for, and the error says what that leaves.
    """
    check_weights(factors, adapters)
    check_method(method, densities, seed, adapters)
    asked = choice_of(given)
    from lora_compress.verbs.combine import combine

    with progress(quiet=quiet or as_json) as bar:
        result = combine(
            base,
            adapters,
            out,
            weights=factors,
            method=method,
            density=densities or None,
            seed=seed,
            command=command_line(),
            progress=bar,
            **wishes(asked, given),
        )
    report(result, as_json=as_json, quiet=quiet)
