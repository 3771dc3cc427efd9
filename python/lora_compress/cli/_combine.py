"""What `resize` and `combine` have in common on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lora_compress.cli._console import print_json, size, warn

if TYPE_CHECKING:
    from lora_compress.verbs.combine import CombineResult

RESULT = (
    click.option(
        "--dtype",
        type=click.Choice(["BF16", "F16", "F32"], case_sensitive=False),
        default="BF16",
        show_default=True,
        help="Element type of the stored factors.",
    ),
    click.option("--format", default="peft", show_default=True, help="Format of the result: peft or kohya."),
    click.option(
        "-e",
        "--exclude",
        multiple=True,
        metavar="REGEX",
        help="Leave tensors out, they keep the base's values; repeatable.",
    ),
    click.option(
        "--tied-head/--no-tied-head",
        default=True,
        help="Store a tied embedding's factors for the output head too.  [default: tied-head]",
    ),
    click.option(
        "--base-name", metavar="NAME", help="What the adapter calls its base, such as a Hub id.  [default: BASE]"
    ),
    click.option("--any-base", is_flag=True, help="Go on although an adapter was made for a base with other values."),
    click.option("-f", "--force", is_flag=True, help="Replace an existing output."),
)


def check_weights(weights: Sequence[float], adapters: Sequence[object]) -> None:
    """Raise `click.UsageError` unless there is a number for each adapter, or none at all."""
    if weights and (len(weights) != len(adapters) or not all(map(math.isfinite, weights))):
        raise click.UsageError(
            f"weights are finite numbers, one --weight for each of the {len(adapters)} adapters: {list(weights)}"
        )


def check_method(method: str, densities: Sequence[float], seed: int, adapters: Sequence[object]) -> None:
    """Raise `click.UsageError` unless the densities are what the method needs for these adapters."""
    from lora_compress.verbs.methods import choose_method

    try:
        choose_method(method, densities or None, seed, len(adapters))
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def wishes(asked: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the verbs: there the weights of ranks have a name of their own, as adapters have weights too."""
    return {
        **given,
        **{name: value for name, value in asked.items() if name != "weights"},
        "rank_weights": asked["weights"],
    }


def report(result: CombineResult, *, as_json: bool, quiet: bool) -> None:
    """Print what was done."""
    warn(result.warnings)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        made = "what was given" if result.method == "linear" else f"what {result.method} makes of them"
        before, after = (max((pair[side] for pair in result.ranks.values()), default=0) for side in (0, 1))
        click.echo(
            f"{result.out}: {size(result.adapter_bytes)}, {len(result.ranks)} tensors, ranks up to {after} (before: "
            f"{before}), relative error {result.error:.4g} to {made}, {result.seconds:.1f} s"
        )
