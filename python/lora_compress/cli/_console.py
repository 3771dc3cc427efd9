"""What commands share: common options, progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_compress.ranks.text import size as size

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


def common_options(command: Command) -> Command:
    """`--json`, `--quiet` and `--threads`."""
    for option in (
        click.option("--threads", type=click.IntRange(0, 4096), default=0, metavar="N", callback=_set_threads,
                     expose_value=False, help="Threads to use; 0 is one per processor. Results do not depend on it."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no table; errors still show."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."),
    ):  # fmt: skip
        command = option(command)
    return command


def _set_threads(ctx: click.Context, _: click.Parameter, value: int) -> None:
    if value and not ctx.resilient_parsing:
        from lora_compress._native import set_threads

        set_threads(value)


class Terminal:
    """Progress as bars on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), DownloadColumn(), TextColumn("{task.fields[count]}"))
        self.bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._done = self._tensors = 0

    def begin(self, what: str, nbytes: int, tensors: int) -> None:
        """Replace the bar by a new one."""
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        self._done, self._tensors = 0, tensors
        self._task = self.bars.add_task(what, total=nbytes, count="")

    def advance(self, nbytes: int, tensors: int = 0, tensor: str = "") -> None:
        """Move the bar."""
        self._done += tensors
        count = f"{self._done}/{self._tensors} tensors" if self._tensors else ""
        self.bars.update(self._task, advance=nbytes, count=count)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Terminal | None]:
    """A progress bar where somebody watches, None elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    terminal = Terminal()
    with terminal.bars:
        yield terminal


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout; columns whose heading ends with a space are aligned left, the others right."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        left = column.endswith(" ")
        # On a narrow terminal names are folded; numbers stay whole.
        table.add_column(column.rstrip(), justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    # Piped output has no width of its own: do not cut names at 80 columns.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def printable(text: str) -> str:
    """Text that does nothing to a terminal: names of tensors come from files of strangers."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def warn(messages: Sequence[str], *, limit: int = 5) -> None:
    """Warnings on stderr."""
    for message in messages[:limit]:
        click.echo(f"{click.style('warning', fg='yellow')}: {printable(message)}", err=True)
    if len(messages) > limit:
        click.echo(f"{click.style('warning', fg='yellow')}: and {len(messages) - limit} more of that kind", err=True)


def command_line() -> str:
    """The command as typed, for the model card."""
    import shlex

    return shlex.join(["lora-compress", *sys.argv[1:]])
