"""The demonstration: extract, verify and merge on a real pair, and measure the loss.

`data/` holds the pair and a held-out text, made by `tools/train_demo_pair.py`; nothing about ΔW was planted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_compress.demo.llama import Llama
from lora_compress.errors import LoraCompressError
from lora_compress.verbs.account import SCHEMA_VERSION
from lora_compress.verbs.extract import extract
from lora_compress.verbs.merge import merge
from lora_compress.verbs.verify import verify

DATA = Path(__file__).parent / "data"
BASE, TUNED, TEXT = DATA / "base", DATA / "tuned", DATA / "heldout.txt"


@dataclass(frozen=True, slots=True)
class Row:
    """One model: what it takes on disk, and its loss. `asked` is empty and `rank` 0 for the models that are no
    adapters.
    """

    nbytes: int
    loss: float
    asked: str = ""
    rank: int = 0
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration measured."""

    base: Row
    tuned: Row
    adapters: tuple[Row, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As printed by `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "base": {"bytes": self.base.nbytes, "loss": self.base.loss},
            "tuned": {"bytes": self.tuned.nbytes, "loss": self.tuned.loss},
            "adapters": [
                {"asked": row.asked, "rank": row.rank, "bytes": row.nbytes, "loss": row.loss, "error": row.error}
                for row in self.adapters
            ],
            "seconds": self.seconds,
        }


def run(ranks: Sequence[int | str], *, keep: Path | None = None) -> DemoResult:
    """Go the whole way at each rank, or "auto". Raises `LoraCompressError` when an adapter is not what extraction
    promised.
    """
    started = time.perf_counter()
    text = TEXT.read_bytes()
    folder: Any = tempfile.TemporaryDirectory() if keep is None else nullcontext(keep)
    with folder as name:
        rows = [_adapter(Path(name), rank, text) for rank in ranks]
    return DemoResult(_model(BASE, text), _model(TUNED, text), tuple(rows), time.perf_counter() - started)


def _adapter(folder: Path, rank: int | str, text: bytes) -> Row:
    adapter, merged = folder / f"adapter-{rank}", folder / f"merged-{rank}"
    result = extract(BASE, TUNED, adapter, rank=rank, force=True)
    check = verify(BASE, TUNED, adapter)
    if not check.ok:
        raise LoraCompressError(f"`{check.problems[0].name}`: {check.problems[0].problem}")
    merge(BASE, [adapter], merged, force=True)
    return Row(result.adapter_bytes, Llama.open(merged).loss(text), result.choice.describe(), result.rank, result.error)


def _model(path: Path, text: bytes) -> Row:
    return Row(sum(file.stat().st_size for file in path.glob("*.safetensors")), Llama.open(path).loss(text))
