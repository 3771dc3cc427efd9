"""`lora-compress plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_compress.cli._console import PATH, common_options, print_json, progress, warn
from lora_compress.cli._options import RANKS, TENSORS, choice_of, options


@click.command(
    "plan",
    epilog="""\b
Examples:
  lora-compress plan llama-8b/ my-finetune/ -o plan.json
  lora-compress plan plan.json --budget 50MB               other wishes, the same spectra: no second read
  lora-compress plan base/ tuned/ --rank energy=0.9 --tensors
  lora-compress extract llama-8b/ my-finetune/ -o adapter/ --plan plan.json""",
)
@click.argument("base", type=PATH, metavar="BASE|PLAN")
@click.argument("tuned", type=PATH, required=False)
@options(RANKS)
@click.option("-o", "--out", type=PATH, metavar="FILE", help="Write the plan, spectra included, as JSON.")
@click.option("--tensors", is_flag=True, help="A row for every tensor, not for every kind of module.")
@click.option(
    "--bound",
    type=click.IntRange(1),
    metavar="N",
    help="Singular values to find in each matrix at first; more are found where ranks depend on them (knee: of those).",
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing file.")
@options(TENSORS)
@common_options
def command(
    base: Path,
    tuned: Path | None,
    out: Path | None,
    tensors: bool,
    bound: int | None,
    force: bool,
    format_: str,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Say which ranks an adapter of TUNED needs, what it costs and how much it keeps.

    The leading singular values of every ΔW are found in one read of both checkpoints. Ranks, sizes and errors follow
    from them alone, so a saved plan answers other wishes at once: `lora-compress plan PLAN --budget 20MB`.

    noise is the share of ‖ΔW‖² that rounding to the stored dtype explains; error is ‖ΔW − BA‖ / ‖ΔW‖.
    """
    from lora_compress.errors import PlanError
    from lora_compress.ranks import file
    from lora_compress.ranks.choice import choose
    from lora_compress.verbs import output
    from lora_compress.verbs.changes import Options
    from lora_compress.verbs.plan import plan

    asked = choice_of(given)
    if out is not None:
        output.check_file(out, force=force, inputs=(base, tuned) if tuned is not None else ())
    if tuned is None:
        if Options(format=format_ or Options().format, **given) != Options() or bound is not None:
            raise click.UsageError(
                "a saved plan already says which tensors, dtype and seed: give BASE and TUNED instead"
            )
        if base.is_dir():
            raise click.UsageError("TUNED is missing: lora-compress plan BASE TUNED")
        result = file.read(base)
        result = result.choose(choose(**asked, instead_of=result.choice))
        if result.unsettled:
            again = (
                "call `suggest` again with this wish"
                if result.is_of_gradients
                else f"plan again with this wish from `{result.base}` and `{result.tuned}`"
            )
            raise PlanError(
                f"{result.choice.describe()} depends on singular values that `{base}` does not have (it ends at an "
                f"error of {result.error:.4f}): {again}"
            )
    else:
        with progress(quiet=quiet or as_json) as bar:
            result = plan(
                base,
                tuned,
                **asked,
                bound=bound,
                options=Options(format=format_ or Options().format, **given),
                progress=bar,
            )
    if out is not None:
        file.write(result, out)
    if as_json:
        print_json(file.to_json(result))
        return
    from lora_compress.cli import _plan_view
    from lora_compress.ranks.recognise import recognise

    if not quiet:
        _plan_view.show(result, tensors=tensors)
    warn([*result.notes, *recognise(result).warnings])
    if not any(result.ranks.values()):
        warn(["no matrix gets any rank: the adapter would hold exact tensors only"])
