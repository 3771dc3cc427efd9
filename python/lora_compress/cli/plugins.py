"""`lora-compress plugins`."""

from __future__ import annotations

from pathlib import Path

import click

from lora_compress.cli._console import PATH, common_options, print_json, print_table


@click.group("plugins")
def command() -> None:
    """Decompositions, formats and initialisations, and the plugins they come from.

    A plugin is an installed distribution with an entry point in the group `lora_compress`. LORA_COMPRESS_PLUGINS=0
    leaves all but the built-in ones out.
    """


@command.command("list")
@common_options
def list_(as_json: bool, quiet: bool) -> None:
    """List loaded plugins and what they registered."""
    from lora_compress import plugins

    host = plugins.load()
    infos = host.list()
    if as_json:
        print_json(
            {
                "schema_version": 1,
                "plugins": [
                    {
                        "name": info.name,
                        "distribution": info.distribution,
                        "version": info.version,
                        "decompositions": list(info.decompositions),
                        "formats": list(info.formats),
                        "initialisations": list(info.initialisations),
                    }
                    for info in infos
                ],
            }
        )
    elif not quiet:
        packages = {info.name: info.distribution for info in infos}
        rows = [
            [item.name, item.contraction, item.description, packages[host.decompositions.origin(item.name)]]
            for item in host.decompositions
        ]
        print_table(["decomposition ", "contraction, ΔW ← ", "what it is ", "package "], rows)
        print_table(
            ["format ", "package "], [[item.name, packages[host.formats.origin(item.name)]] for item in host.formats]
        )
        print_table(
            ["initialisation ", "of factors to train ", "package "],
            [
                [item.name, item.description, packages[host.initialisations.origin(item.name)]]
                for item in host.initialisations
            ],
        )


@command.command(
    "new",
    epilog="""\b
Examples:
  lora-compress plugins new my-factors
  lora-compress plugins new my-factors -o plugins/lora-compress-my-factors""",
)
@click.argument("name")
@click.option("-o", "--out", type=PATH, metavar="DIR", help="Directory to create.  [default: NAME]")
@common_options
def new(name: str, out: Path | None, as_json: bool, quiet: bool) -> None:
    """Start a plugin: a package with a working decomposition called NAME.

    It can be installed at once, and has tests that pass. NAME is a-z, 0-9 and inner hyphens; the module has underscores
    for the hyphens.
    """
    import shlex

    from lora_compress.verbs.new_plugin import new_plugin

    made = new_plugin(name, out)
    commands = [shlex.join(["pip", "install", "-e", f"{made.out}[test]"]), shlex.join(["pytest", str(made.out)])]
    if as_json:
        print_json(
            {
                "schema_version": 1,
                "name": made.name,
                "module": made.module,
                "out": str(made.out),
                "files": list(made.files),
                "next": commands,
            }
        )
    elif not quiet:
        click.echo(f"{made.out}: a plugin with the decomposition `{name}`. Next:\n")
        for line in commands:
            click.echo(f"  {line}")
