"""`lora-compress merge`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_compress.cli._console import PATH, common_options, print_json, progress, size, warn


@click.command(
    "merge",
    epilog="""\b
Examples:
  lora-compress merge llama-8b/ adapter/ -o merged/
  lora-compress merge base/ style/ facts/ -o both/        several adapters are summed
  lora-compress merge base.safetensors adapter/ -o merged.safetensors""",
)
@click.argument("base", type=PATH)
@click.argument("adapters", type=PATH, nargs=-1, required=True)
@click.option(
    "-o", "--out", type=PATH, required=True, help="Directory to create, or a file name ending in .safetensors."
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@common_options
def command(base: Path, adapters: tuple[Path, ...], out: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Merge ADAPTERS into BASE: W' = round(W + s·B·A), summed in float32 and rounded once.

    The output has the base's shards, dtypes and order; tensors that no adapter touches are copied byte for byte, and so
    are configuration and tokenizer.
    """
    if out.suffix == ".safetensors" and base.is_dir() and (base / "model.safetensors.index.json").is_file():
        raise click.UsageError(f"`{base}` has several shards: -o must name a directory")
    from lora_compress.verbs.merge import merge

    with progress(quiet=quiet or as_json) as bar:
        result = merge(base, adapters, out, force=force, progress=bar)
    warn(result.warnings)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        click.echo(
            f"{result.out}: {result.changed} tensors changed, {result.copied} copied, "
            f"{size(result.nbytes)}, {result.seconds:.1f} s"
        )
