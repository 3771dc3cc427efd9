"""`lora-compress report`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_compress.cli._console import PATH, common_options, print_json, progress, size, warn


@click.command(
    "report",
    epilog="""\b
Examples:
  lora-compress report plan.json -o report.html
  lora-compress report plan.json --comparison comparison.json -o report.html
  lora-compress report llama-8b/ my-finetune/ -o report.html""",
)
@click.argument("source", metavar="PLAN.json | BASE", type=PATH)
@click.argument("tuned", metavar="[TUNED]", type=PATH, required=False)
@click.option(
    "--comparison",
    "comparison_file",
    type=PATH,
    metavar="FILE",
    help="What `compare -o FILE` wrote of the same models, for a section on decompositions.",
)
@click.option("-o", "--out", "out", type=PATH, required=True, help="HTML file to create.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@common_options
def command(
    source: Path,
    tuned: Path | None,
    comparison_file: Path | None,
    out: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a plan as one HTML page: spectra, ranks, sizes and errors, and a budget to play with.

    Takes a plan that `lora-compress plan` wrote, or BASE and TUNED, which are planned first (for a budget or other
    wishes, save a plan). The page needs no network
    and no server.
    """
    from lora_compress.ranks import file
    from lora_compress.report import comparison, page
    from lora_compress.verbs import output

    # Before the work, so that nobody waits for a refusal.
    output.check_file(
        out, force=force, inputs=tuple(path for path in (source, tuned, comparison_file) if path is not None)
    )
    if tuned is None and source.is_dir():
        raise click.UsageError("TUNED is missing: lora-compress report BASE TUNED -o FILE")
    compared = None if comparison_file is None else comparison.read(comparison_file)
    if compared is not None and tuned is not None:
        comparison.match(compared, str(source), str(tuned))
    if tuned is None:
        plan = file.read(source)
    else:
        from lora_compress.verbs.plan import plan as make_plan

        with progress(quiet=quiet or as_json) as bar:
            plan = make_plan(source, tuned, progress=bar)
    data = file.to_json(plan)
    document = page(data, compared)
    file.write_whole(out, document)
    nbytes = len(document.encode())
    warn(data["warnings"])
    if as_json:
        print_json(
            {
                "schema_version": data["schema_version"],
                "out": str(out),
                "bytes": nbytes,
                "totals": data["totals"],
                "warnings": data["warnings"],
            }
        )
    elif not quiet:
        click.echo(f"{out}: {size(nbytes)}, open it in a browser")
