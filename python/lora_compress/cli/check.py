"""`lora-compress check`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_compress.cli import EXIT_PROMISE_BROKEN
from lora_compress.cli._console import PATH, command_line, common_options, print_json, progress, size, warn

CONSUMERS = ("peft", "vllm", "sglang", "lorax", "llama.cpp")
# Names of modules that are printed before "and N more".
SHOWN = 3


@click.command(
    "check",
    epilog="""\b
Examples:
  lora-compress check adapter/ --for vllm
  lora-compress check adapter/ --for llama.cpp --fix fixed/ --base llama-8b/""",
)
@click.argument("adapter", type=PATH)
@click.option(
    "--for", "consumers", type=click.Choice(CONSUMERS), multiple=True, help="Consumer; repeatable.  [default: all]"
)
@click.option("--fix", "out", type=PATH, metavar="DIR", help="Write an adapter that the consumer takes (needs --base).")
@click.option("--base", type=PATH, help="What the adapter was made for: its names and shapes, for --fix.")
@click.option("--any-base", is_flag=True, help="Fix although the adapter was made for a base with other values.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@common_options
def command(
    adapter: Path,
    consumers: tuple[str, ...],
    out: Path | None,
    base: Path | None,
    any_base: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Say what a consumer would refuse or misread of ADAPTER, a directory of PEFT's: ranks, scales, patterns, whole
    weights, embeddings. Exits with 3 where one would.

    --fix writes an adapter that the consumer takes, with the same ΔW but for what it has no place for.
    """
    if (out is None) != (base is None) or (out is not None and len(consumers) != 1):
        raise click.UsageError("--fix DIR needs --base, and one consumer: --for NAME")
    from lora_compress.verbs.check import check, fix

    if out is not None and base is not None:
        with progress(quiet=quiet or as_json) as bar:
            done, result = fix(
                base, adapter, out, consumers[0], any_base=any_base, force=force, command=command_line(), progress=bar
            )
        results = [result]
        warn(done.warnings)
        if not quiet and not as_json:
            click.echo(f"{done.out}: {size(done.adapter_bytes)}, relative error {done.error:.4g} to the adapter given")
    else:
        results = [check(adapter, consumer) for consumer in consumers or CONSUMERS]
    if as_json:
        print_json({"schema_version": 1, "checks": [result.to_json() for result in results]})
    elif not quiet:
        for result in results:
            click.echo(f"{result.consumer}: {'takes it' if result.ok else 'does not take it as it is meant'}")
            for finding in result.findings:
                more = len(finding.where) - SHOWN
                where = ", ".join(f"`{name}`" for name in finding.where[:SHOWN]) + (
                    f" and {more} more" if more > 0 else ""
                )
                click.echo(f"  {finding.level}: {finding.problem}" + (f" ({where})" if where else ""))
    return 0 if all(result.ok for result in results) else EXIT_PROMISE_BROKEN
