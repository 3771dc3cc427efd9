"""`lora-compress unmerge`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_compress.cli._console import PATH, common_options, print_json, progress, size


@click.command(
    "unmerge",
    epilog="""\b
Examples:
  lora-compress merge llama-8b/ adapter/ -o merged/ --keep-base-patch
  lora-compress unmerge merged/ -o llama-8b-again/""",
)
@click.argument("merged", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="Directory to create.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@common_options
def command(merged: Path, out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Restore the base of MERGED, to the bit: a model that was merged with --keep-base-patch."""
    from lora_compress.verbs.base_patch import unmerge

    with progress(quiet=quiet or as_json) as bar:
        result = unmerge(merged, out, force=force, progress=bar)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        click.echo(f"{result.out}: {size(result.nbytes)}, {result.seconds:.1f} s")
