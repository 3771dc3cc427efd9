"""`lora-compress demo`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_compress.cli._console import PATH, common_options, print_json, print_table, size


def _ranks(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    ranks = [item.strip() for item in value.split(",")]
    if not all(rank == "auto" or (rank.isascii() and rank.isdigit() and int(rank) > 0) for rank in ranks):
        raise click.BadParameter("a comma-separated list of positive ranks or auto is needed, such as auto,4,16")
    return ranks


@click.command("demo")
@click.option("--ranks", default="auto,4,16,48", show_default=True, callback=_ranks, help="Ranks to try.")
@click.option("--keep", type=PATH, metavar="DIR", help="Keep the adapters and merged models in DIR.")
@common_options
def command(ranks: list[str], keep: Path | None, as_json: bool, quiet: bool) -> None:
    """Extract, verify and merge on a real pair, and measure the loss that comes back.

    The pair ships with this package: a byte-level Llama of 0.8 million parameters with a tied embedding, and a full
    fine-tune of it on the Jargon File. The loss is measured on a part of that text which neither model was trained on.
    """
    from lora_compress.demo import run

    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise click.UsageError(f"`{keep}` exists and is not empty: choose another directory to keep things in")
    result = run(ranks, keep=keep)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        rows = [["base", size(result.base.nbytes), f"{result.base.loss:.4f}", "", ""]]
        for row in result.adapters:
            recovered = (result.base.loss - row.loss) / (result.base.loss - result.tuned.loss)
            rows.append(
                [
                    f"base + adapter, {row.asked}",
                    size(row.nbytes),
                    f"{row.loss:.4f}",
                    f"{recovered:.1%}",
                    f"{row.error:.3f}",
                ]
            )
        rows.append(["tuned", size(result.tuned.nbytes), f"{result.tuned.loss:.4f}", "100.0%", "0.000"])
        columns = ["model ", "bytes", "loss (nats/byte)", "of the gain", "‖ΔW − BA‖ / ‖ΔW‖"]
        print_table(columns, rows, title="A full fine-tune as an adapter, extracted, verified and merged back")
        click.echo(f"{result.seconds:.1f} s; every adapter verified as promised")
