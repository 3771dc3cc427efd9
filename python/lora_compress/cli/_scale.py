"""`--scale search`: what `extract` does when the scale is to be found."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lora_compress.torch.scale import ScaleSearch

SEARCH = "search"


class Scale(click.ParamType):  # type: ignore[type-arg]
    """A number, or `search`."""

    name = "scale"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """A float, or "search"."""
        if value == SEARCH:
            return SEARCH
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < abs(number) < float("inf"):
            self.fail(f"{value!r} is neither a number other than 0 nor `{SEARCH}`", param, ctx)
        return number


def found_scale(
    base: Path, tuned: Path, calibration: Path | None, *, by_module: bool, quiet: bool, **given: Any
) -> ScaleSearch:
    """Extract at scale 1 into a temporary directory, and search. Raises `click.UsageError` without PyTorch."""
    if calibration is None:
        raise click.UsageError("--scale search needs --calibration FILE: text, or token ids as .npy or .json")
    try:
        from lora_compress.torch.scale import search_scale
    except ImportError as error:
        raise click.UsageError(
            f"--scale search needs PyTorch and transformers: pip install 'lora-compress[torch]' ({error})"
        ) from error
    from lora_compress.verbs.extract import extract

    def tell(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        extract(base, tuned, adapter, **given)
        found = search_scale(base, tuned, adapter, calibration, by_module=by_module, progress=tell)
    before, after = found.heldout
    if found.at_edge:
        tell(
            "the best scale lies at the end of the interval that was searched: ranks may be too low for this fine-tune"
        )
    tell(
        f"scale {found.scale}: on held-out tokens KL(tuned ‖ adapter) is {after:.5f}, at scale 1 it is {before:.5f}"
        if found.improved
        else f"no scale is better than 1 on held-out tokens (KL {before:.5f}, the best other {after:.5f}): 1 is kept"
    )
    return found
