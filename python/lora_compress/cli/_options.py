"""Options that `plan` and `extract` share: which ranks, and which tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

RANKS = (
    click.option(
        "-r",
        "--rank",
        metavar="N|auto|RULE",
        help="A number for every matrix; auto (the default); or a rule for each: energy=0.9, error=0.3, "
        "threshold=0.01, ratio=50, bulk-edge, noise-edge, hard-threshold, knee.",
    ),
    click.option("--budget", metavar="SIZE", help="Size of the adapter's files instead, such as 50MB."),
    click.option(
        "--error",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="E",
        help="‖ΔW − adapter‖ / ‖ΔW‖ over all tensors instead.",
    ),
    click.option(
        "--ranks-allowed", metavar="LIST", help="Ranks that may be used: 8,16,32, or vllm, or 8x (multiples of 8)."
    ),
    click.option(
        "--max-rank",
        type=click.IntRange(1),
        metavar="N",
        help="No rank above this. Where nothing else is asked it is the rank, as in mergekit; a saved plan's cap.",
    ),
    click.option(
        "--layout",
        type=click.Choice(["peft", "uniform"]),
        help="A rank for every tensor, or one for all (SGLang, LoRAX, llama.cpp's converter).  [default: peft]",
    ),
    click.option(
        "--weights",
        type=click.Choice(["balanced", "delta", "relative", "base", "element"]),
        help="What each tensor's error is worth to a budget, an error or auto.  [default: balanced, delta for --error]",
    ),
)

TENSORS = (
    click.option("-i", "--include", "--include-regex", "include", multiple=True, metavar="REGEX",
                 help="Only tensors whose name matches; repeatable."),
    click.option("-e", "--exclude", "--exclude-regex", "exclude", multiple=True, metavar="REGEX",
                 help="Leave tensors out, they keep the base's values; repeatable."),
    click.option("--embedding", "embeddings", multiple=True, metavar="REGEX",
                 help="Matrices that are embeddings although their name does not say so."),
    click.option("--skip-missing", is_flag=True, help="Go on when one side lacks tensors."),
    click.option("--tied-head/--no-tied-head", default=True,
                 help="Store a tied embedding's factors for the output head too.  [default: tied-head]"),
    click.option("--dtype", type=click.Choice(["BF16", "F16", "F32"], case_sensitive=False), default="BF16",
                 show_default=True, help="Element type of the stored factors."),
    click.option("--format", "format_", metavar="FORMAT",
                 help="peft, kohya, or factors: any decomposition as it is.  [default: peft; factors for best]"),
    click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True,
                 help="Same inputs and seed, same bytes."),
)  # fmt: skip


ASKED = ("rank", "budget", "error", "ranks_allowed", "max_rank", "layout", "weights")


def choice_of(given: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of `RANKS` out of what was given. Raises `click.UsageError` where they make no sense."""
    from lora_compress.errors import SelectionError
    from lora_compress.ranks.choice import choose

    asked = {name: given.pop(name) for name in ASKED}
    try:
        choose(**asked)
    except SelectionError as error:
        raise click.UsageError(str(error)) from error
    return asked


def options(
    *groups: tuple[Callable[[Command], Command], ...], without: frozenset[str] = frozenset()
) -> Callable[[Command], Command]:
    """Adds groups of options to a command, in their order, but for those named."""

    def add(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        given: list[click.Parameter] = getattr(command, "__click_params__", [])
        given[:] = [parameter for parameter in given if parameter.name not in without]
        return command

    return add
