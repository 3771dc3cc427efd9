"""`lora-compress merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_compress.cli._combine import check_weights
from lora_compress.cli._console import PATH, common_options, print_json, progress, size, warn


@click.command(
    "merge",
    epilog="""\b
Examples:
  lora-compress merge llama-8b/ adapter/ -o merged/
  lora-compress merge base/ style/ facts/ -o both/ -w 0.5 -w 1    several adapters are summed
  lora-compress merge base/ adapter/ -o merged/ --dtype F32
  lora-compress merge base.safetensors adapter/ -o merged.safetensors""",
)
@click.argument("base", type=PATH)
@click.argument("adapters", type=PATH, nargs=-1, required=True)
@click.option(
    "-o", "--out", type=PATH, required=True, help="Directory to create, or a file name ending in .safetensors."
)
@click.option(
    "-w", "--weight", "weights", type=float, multiple=True, metavar="W", help="One for each adapter.  [default: 1]"
)
@click.option(
    "--dtype",
    type=click.Choice(["BF16", "F16", "F32", "F64"], case_sensitive=False),
    help="Store all float tensors in this.  [default: the base's]",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="To nearest, or up or down at random, so that updates smaller than half a spacing survive on average.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of stochastic rounding.")
@click.option("--keep-base-patch", is_flag=True, help="Keep what `lora-compress unmerge` restores the base from.")
@click.option("--any-base", is_flag=True, help="Merge although an adapter was made for a base with other values.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@common_options
def command(base: Path, adapters: tuple[Path, ...], out: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Merge ADAPTERS into BASE: W' = round(W + Σ w·s·B·A), rounded once.

    The output has the base's shards, dtypes and order; tensors that no adapter touches are copied byte for byte, and so
    are configuration and tokenizer. Where the dtype is too coarse for the update, a warning says how much of it
    arrives.
    """
    if out.suffix == ".safetensors" and base.is_dir() and (base / "model.safetensors.index.json").is_file():
        raise click.UsageError(f"`{base}` has several shards: -o must name a directory")
    check_weights(given["weights"], adapters)
    from lora_compress.verbs.merge import merge

    with progress(quiet=quiet or as_json) as bar:
        result = merge(base, adapters, out, progress=bar, **given)
    warn(result.warnings)
    if result.resumed and not quiet:
        click.echo(f"resumed: {result.resumed} of {result.shards} shards were there", err=True)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        click.echo(
            f"{result.out}: {result.changed} tensors changed, {result.copied} copied, "
            f"{size(result.nbytes)}, {result.gain:.1%} of the update arrived, {result.seconds:.1f} s"
        )
