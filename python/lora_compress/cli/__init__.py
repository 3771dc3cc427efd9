"""The command line: one file a command, imported only when it runs, so that `--help` answers at once.

Results go to stdout, progress and messages to stderr. Exit codes are decided here and nowhere else.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PROMISE_BROKEN = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# Name, module and one line of help: everything that `--help` needs to know of a command.
COMMANDS = {
    "inspect": ("inspect", "Say what a checkpoint or an adapter is."),
    "plan": ("plan", "Say which ranks a fine-tune needs, what they cost and what they keep."),
    "extract": ("extract", "Extract an adapter from a full fine-tune."),
    "merge": ("merge", "Merge adapters into a base model."),
    "unmerge": ("unmerge", "Restore the base of a merged model."),
    "resize": ("resize", "Give an adapter other ranks."),
    "combine": ("combine", "Add adapters into one."),
    "convert": ("convert", "Write an adapter in another format."),
    "check": ("check", "Say what a server would refuse or misread of an adapter."),
    "verify": ("verify", "Compare base + adapter with the tuned model."),
    "compare": ("compare", "Compare decompositions at equal bytes."),
    "report": ("report", "Write a plan as an HTML page."),
    "plugins": ("plugins", "List decompositions and formats, or start a plugin of your own."),
    "demo": ("demo", "Run the whole way on a real pair that ships with this package."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order of the pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"lora_compress.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from lora_compress._native import __version__

        click.echo(f"lora-compress {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not as promised (verify) or not taken (check), "
    "130 interrupted, 143 terminated.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """Turn a full fine-tune into a small LoRA adapter, check it, and merge adapters back.

    \b
    lora-compress demo                                    see it work
    lora-compress plan BASE TUNED                         ranks, sizes, errors
    lora-compress extract BASE TUNED -o ADAPTER
    lora-compress verify BASE TUNED ADAPTER
    lora-compress merge BASE ADAPTER -o MODEL
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    try:
        code: Any = cli.main(args, prog_name="lora-compress", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE if isinstance(error, click.UsageError) else EXIT_FAILED
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted, nothing was written", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        from lora_compress.cli._console import printable

        click.echo(f"{click.style('error', fg='red', bold=True)}: {printable(message)}", err=True)
        return EXIT_FAILED
    return int(code or 0)


def _explain(error: Exception) -> str | None:
    """The one line to show for an error that is not a bug of ours; None for a bug, whose traceback is wanted."""
    from lora_compress.errors import LoraCompressError

    if isinstance(error, LoraCompressError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"`{error.filename}`: {error.strerror}"
    return str(error) if isinstance(error, OSError) else None


def _terminated(*_: object) -> NoReturn:
    # An exception unwinds the stack, and with it removes partial output; the default would not.
    raise SystemExit(EXIT_TERMINATED)
