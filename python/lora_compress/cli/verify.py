"""`lora-compress verify`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_compress.cli import EXIT_PROMISE_BROKEN
from lora_compress.cli._console import PATH, common_options, print_json, print_table, progress, warn


@click.command(
    "verify",
    epilog="""\b
Examples:
  lora-compress verify base/ tuned/ adapter/
  lora-compress verify base/ tuned/ adapter/ --worst 20
  lora-compress verify base/ tuned/ adapter/ --quiet || echo "not what was promised\"""",
)
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.argument("adapter", type=PATH)
@click.option(
    "--worst",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="How many tensors to list, those first that add most to the total error.",
)
@common_options
def command(base: Path, tuned: Path, adapter: Path, worst: int, as_json: bool, quiet: bool) -> int:
    """Merge in memory, compare with TUNED, and hold the errors against what extraction promised.

    Errors are relative to the tensor's ‖ΔW‖; `merged` adds the rounding of the merged weights to the base's dtype.
    Exits with 3 when a tensor is not as promised.
    """
    from lora_compress.verbs.verify import verify

    with progress(quiet=quiet or as_json) as bar:
        result = verify(base, tuned, adapter, progress=bar)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        ranked = sorted(result.tensors, key=lambda tensor: -tensor.error_energy)
        listed = [tensor for tensor in ranked if tensor.delta_energy][:worst]
        rows = [[t.name, f"{t.error:.4f}", f"{t.merged_error:.4f}", f"{t.largest:.2e}"] for t in listed]
        if rows:
            print_table(["tensor ", "error", "merged", "largest difference"], rows)
        promise = "as promised by extraction" if result.ok else f"{len(result.problems)} not as promised"
        click.echo(
            f"{len(result.tensors)} tensors, relative error {result.error:.4f}, merged {result.merged_error:.4f}: "
            f"{promise if result.has_promise else 'no promise to compare with'}, {result.seconds:.1f} s"
        )
        warn(result.warnings)
        warn([f"`{name}` was not compared, or differs" for name in result.unchecked])
    warn([f"`{tensor.name}`: {tensor.problem}" for tensor in result.problems])
    if result.error > 1:
        warn(
            ["base + adapter is farther from TUNED than BASE alone: are BASE and TUNED swapped, or is it another base?"]
        )
    return 0 if result.ok else EXIT_PROMISE_BROKEN
