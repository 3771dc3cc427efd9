"""`lora-compress convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_compress.cli._console import PATH, command_line, common_options, print_json, size, warn


@click.command(
    "convert",
    epilog="""\b
Examples:
  lora-compress convert sdxl/unet/ style.safetensors -o style-peft/ --to peft
  lora-compress convert sdxl/unet/ adapter/ -o style.safetensors --to kohya
  lora-compress convert sdxl/text_encoder/ adapter/ -o words.safetensors --to kohya --prefix lora_te1""",
)
@click.argument("base", type=PATH)
@click.argument("adapter", type=PATH)
@click.option(
    "-o", "--out", type=PATH, required=True, help="Directory to create; for kohya also a file, NAME.safetensors."
)
@click.option("--to", type=click.Choice(["peft", "kohya"]), required=True, help="Format to write.")
@click.option(
    "--prefix",
    metavar="NAME",
    help="Component that BASE is, in kohya's keys: lora_unet, lora_te, lora_te1, ….  [default: from its config.json]",
)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "BF16", "F16", "F32"], case_sensitive=False),
    default="keep",
    show_default=True,
    help="Element type of the stored factors.",
)
@click.option("--base-name", metavar="NAME", help="What the adapter calls its base, such as a Hub id.  [default: BASE]")
@click.option("--any-base", is_flag=True, help="Go on although the adapter was made for a base with other values.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@common_options
def command(base: Path, adapter: Path, out: Path, as_json: bool, quiet: bool, dtype: str, **given: Any) -> None:
    """Write ADAPTER, made for BASE, under other names: PEFT's directory, or the file that kohya's sd-scripts, ComfyUI
    and diffusers read.

    Factors, ranks and alphas stay as they are. What a file of kohya's says of itself is kept beside PEFT's, and written
    again on the way back.
    """
    from lora_compress.formats.kohya.names import PREFIX

    prefix = given["prefix"]
    if prefix is not None and (given["to"] != "kohya" or PREFIX.fullmatch(prefix) is None):
        raise click.UsageError("--prefix is for --to kohya: lora_unet, lora_te, lora_te1, lora_te2, …")
    from lora_compress.verbs.convert import convert

    result = convert(base, adapter, out, dtype=None if dtype == "keep" else dtype, command=command_line(), **given)
    warn(result.warnings)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        ranks = sorted(set(result.ranks.values()))
        spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        click.echo(
            f"{result.out}: {size(result.adapter_bytes)}, {len(result.ranks)} tensors, {spread}, {result.seconds:.1f} s"
        )
