"""`lora-compress plugins`."""

from __future__ import annotations

import click

from lora_compress.cli._console import common_options, print_json, print_table


@click.group("plugins")
def command() -> None:
    """Decompositions and formats, and the plugins they come from.

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
                    }
                    for info in infos
                ],
            }
        )
    elif not quiet:
        rows = [
            ["decomposition", item.name, f"ΔW[out, in] ← {item.contraction}", host.decompositions.origin(item.name)]
            for item in host.decompositions
        ]
        rows += [["format", item.name, "", host.formats.origin(item.name)] for item in host.formats]
        print_table(["kind ", "name ", "contraction ", "plugin "], rows)
