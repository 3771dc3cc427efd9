"""`lora-compress extract`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from lora_compress.cli._console import PATH, command_line, common_options, print_json, print_table, progress, size, warn
from lora_compress.cli._options import RANKS, TENSORS, choice_of, options
from lora_compress.cli._scale import SEARCH, Scale, found_scale


@click.command(
    "extract",
    epilog="""\b
Examples:
  lora-compress extract llama-8b/ my-finetune/ -o adapter/
  lora-compress extract llama-8b/ my-finetune/ -o adapter/ --budget 100MB --ranks-allowed 8x --max-rank 64
  lora-compress extract base/ tuned/ -o out/ --rank 16 --exclude 'embed_tokens|lm_head'
  lora-compress plan base/ tuned/ -o plan.json && lora-compress extract base/ tuned/ -o out/ --plan plan.json""",
)
@click.argument("base", type=PATH, required=False)
@click.argument("tuned", type=PATH, required=False)
@click.option("-o", "--out", "--out-path", "out", type=PATH, required=True, help="Directory to create.")
@options(RANKS)
@click.option(
    "--plan", type=PATH, metavar="FILE", help="Follow a plan of `lora-compress plan`, tensors and dtype included."
)
@click.option(
    "--scale",
    type=Scale(),
    default="1",
    show_default=True,
    metavar="S|search",
    help="Multiply the adapter's ΔW by this, in its factors; or find what is best on --calibration (needs PyTorch).",
)
@click.option("--calibration", type=PATH, metavar="FILE", help="Text, or token ids (.npy, .json), for --scale search.")
@click.option("--scale-by-module", is_flag=True, help="Search a scale for each kind of module.")
@click.option(
    "-d",
    "--decomposition",
    default="ab",
    show_default=True,
    metavar="NAME|best",
    help="See `lora-compress plugins list`; best is the one with the least error, for each layer or group of layers.",
)
@options(TENSORS)
@click.option(
    "--base-name", metavar="NAME", help="What the adapter calls its base, such as a Hub id.  [default: BASE as given]"
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=1e-4,
    show_default=True,
    help="Error above the best of its rank that each matrix may have, relatively.",
)
@click.option("--model", "model_option", type=PATH, hidden=True)
@click.option("--base-model", "base_option", type=PATH, hidden=True)
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@common_options
def command(
    base: Path | None,
    tuned: Path | None,
    format_: str,
    model_option: Path | None,
    base_option: Path | None,
    scale: float | str,
    calibration: Path | None,
    scale_by_module: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Extract an adapter that turns BASE into TUNED.

    BASE and TUNED are files of safetensors or PyTorch, directories of them, or names on the Hub. Every matrix becomes
    a pair of factors, the best pair of its rank there is (or what -d says instead); how large the adapter has to be and
    which matrix gets which rank is found from the spectra of ΔW (`lora-compress plan` shows them), unless it is given.
    Norms, biases and new vocabulary rows go to a side file that `lora-compress merge` applies and servers ignore;
    unchanged tensors cost nothing.

    The flags of mergekit-extract-lora mean the same here: --model, --base-model, --out-path, --max-rank, -i, -e.
    """
    # `--model TUNED --base-model BASE` is mergekit's way to say the same.
    if base_option is not None and model_option is not None and base is None:
        base, tuned = base_option, model_option
    if base is None or tuned is None or (base_option is not None) != (model_option is not None):
        raise click.UsageError("both BASE and TUNED are needed")
    from lora_compress.plugins import BEST
    from lora_compress.verbs import output
    from lora_compress.verbs.extract import extract

    asked = choice_of(given)
    if given["plan"] is not None and any(value is not None for value in asked.values()):
        raise click.UsageError("--plan already says which ranks: `lora-compress plan PLAN` gives a plan other wishes")
    given |= {"format": format_, **asked}
    output.check(given["out"], force=given["force"], inputs=(base, tuned))
    found = None
    if scale != SEARCH and (calibration is not None or scale_by_module):
        raise click.UsageError("--calibration and --scale-by-module belong to --scale search")
    if scale == SEARCH:
        settings = {name: value for name, value in given.items() if name not in {"out", "force"}}
        found = found_scale(base, tuned, calibration, by_module=scale_by_module, quiet=quiet or as_json, **settings)
    given["scale"] = scale if found is None else found.scale
    with progress(quiet=quiet or as_json) as bar:
        result = extract(base, tuned, command=command_line(), progress=bar, **given)
    warn(result.warnings)
    if as_json:
        print_json(result.to_json() | ({} if found is None else {"scale_search": found.to_json()}))
    elif not quiet:
        totals = result.to_json()["totals"]
        rows = [
            [row["treatment"], f"{row['tensors']}", f"{row['share']:.2%}", size(row["bytes"])]
            for row in totals["treatments"]
        ]
        print_table(["treatment ", "tensors", "share of ‖ΔW‖²", "bytes"], rows)
        if result.decomposition == BEST:
            counts = Counter(tensor.decomposition for tensor in result.tensors if tensor.decomposition)
            click.echo("best: " + ", ".join(f"{name} for {count}" for name, count in counts.most_common()))
        share = result.adapter_bytes / max(result.tuned_bytes, 1)
        click.echo(
            f"{result.out}: {size(result.adapter_bytes)} ({share:.2%} of the tuned model), "
            f"{result.choice.describe()}: ranks up to {result.rank}, relative error {result.error:.4f}, "
            f"{result.seconds:.1f} s"
        )
