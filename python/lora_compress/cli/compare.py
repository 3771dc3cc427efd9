"""`lora-compress compare`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_compress.cli._console import PATH, common_options, print_json, print_table, progress, size, warn
from lora_compress.cli._options import TENSORS, options

if TYPE_CHECKING:
    from lora_compress.verbs.compare import CompareResult


@click.command(
    "compare",
    epilog="""\b
Examples:
  lora-compress compare llama-8b/ my-finetune/
  lora-compress compare base/ tuned/ --size 16 --size 20MB -d ab -d abc-shared-input
  lora-compress compare base/ tuned/ --calibration heldout.txt -o comparison.json""",
)
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="RANK|BYTES",
    help="Bytes of pairs of a rank, or a budget such as 20MB; repeatable.  [default: 4, 16, 64]",
)
@click.option(
    "-d",
    "--decomposition",
    "decompositions",
    multiple=True,
    metavar="NAME",
    help="Only these beside ab; best is the best of all for each layer; repeatable.  [default: all, and best]",
)
@click.option(
    "--calibration",
    type=PATH,
    metavar="FILE",
    help="Text, or token ids (.npy, .json): loss and KL of each adapter on it (needs PyTorch).",
)
@options(TENSORS, without=frozenset({"format_", "tied_head"}))
@click.option("-o", "--out", type=PATH, help="File to write the comparison to, as JSON, for report --comparison.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@common_options
def command(
    base: Path,
    tuned: Path,
    sizes: tuple[str, ...],
    decompositions: tuple[str, ...],
    calibration: Path | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Compare decompositions at equal bytes: what each keeps of TUNED, and how long it takes.

    Every installed decomposition extracts an adapter of its own factors at each size. A layer, or a group of layers
    that share factors, may take as many bytes as pairs (B, A) would. Errors are ‖ΔW − stored‖ / ‖ΔW‖ over all tensors;
    "to ab" is an error by that of ab at the same size.
    """
    from lora_compress.ranks.file import write_whole
    from lora_compress.verbs import output
    from lora_compress.verbs.compare import SIZES, compare

    if out is not None:
        output.check_file(out, force=force, inputs=(base, tuned))
    with progress(quiet=quiet or as_json) as bar:
        result = compare(
            base,
            tuned,
            sizes=sizes or SIZES,
            decompositions=decompositions or None,
            measure=_measure(base, tuned, calibration),
            progress=bar,
            **given,
        )
    if out is not None:
        write_whole(out, json.dumps(result.to_json(), allow_nan=False) + "\n")
    warn(result.warnings)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        _print(result)


def _measure(base: Path, tuned: Path, calibration: Path | None) -> Callable[[Path], Mapping[str, float]] | None:
    if calibration is None:
        return None
    try:
        from lora_compress.torch.fidelity import Fidelity
    except ImportError as error:
        raise click.UsageError(
            f"--calibration needs PyTorch and transformers: pip install 'lora-compress[torch]' ({error})"
        ) from error
    return Fidelity(base, tuned, calibration)


def _print(result: CompareResult) -> None:
    measured = list(dict.fromkeys(name for row in result.rows for name in row.measured))
    headers = [
        "size ",
        "decomposition ",
        "bytes",
        "error",
        "to ab",
        "time",
        *({"kl": "KL"}.get(m, m) for m in measured),
    ]
    rows = []
    for row in result.rows:
        if row.error is None:
            rows.append([row.size, row.decomposition, "", "", "", "", *[""] * len(measured)])
            continue
        pair = result.pair_error(row.size)
        values = [f"{row.measured[name]:.4f}" for name in measured]
        ratio = f"{row.error / pair:.3f}" if pair else ""
        rows.append(
            [row.size, row.decomposition, size(row.nbytes), f"{row.error:.4f}", ratio, f"{row.seconds:.1f} s", *values]
        )
    print_table(headers, rows)
    for row in result.rows:
        if row.problem:
            warn([f"{row.decomposition} at {row.size}: {row.problem}"])
