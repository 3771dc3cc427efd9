"""`compare`: every decomposition at equal bytes, and what is printed of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_compress
import pytest
from click.testing import CliRunner
from lora_compress import Decomposition, Delta, PluginError
from lora_compress.cli import cli
from lora_compress.testing import loaded

from tests.conftest import Pair
from tests.test_decompositions import INTERLEAVED, SHARED, TUCKER, module


def test_no_decomposition_takes_more_bytes_than_pairs(pair: Pair) -> None:
    with loaded(module(SHARED, TUCKER, INTERLEAVED)):
        result = lora_compress.compare(*pair, sizes=(1, 4, "4kB"))
    assert result.sizes == ["rank 1", "rank 4", "4 kB"]
    assert result.contractions["shared"] == "layer out r, r in"
    for size in result.sizes:
        rows = [row for row in result.rows if row.size == size]
        assert {row.decomposition for row in rows} == {"ab", "shared", "tucker", "interleaved", "best"}
        # At rank 1 of these small matrices, not every decomposition fits.
        errors = [row.error for row in rows if not row.problem]
        assert errors == sorted(errors, key=lambda error: error or 0)
        assert all("no rank of" in row.problem for row in rows if row.problem)
        pairs = next(row for row in rows if row.decomposition == "ab")
        best = next(row for row in rows if row.decomposition == "best")
        fixed = sum(tensor.nbytes for tensor in pairs.tensors if not tensor.decomposition)
        assert fixed > 0, "norms are stored whole"
        assert all(row.nbytes <= row.allowed_bytes for row in rows)
        assert best.error == min(error for error in errors if error is not None)
    # A budget counts what is stored whole, and headers.
    assert {row.allowed_bytes for row in result.rows if row.size == "4 kB"}.pop() <= 4000


def test_what_is_measured_is_in_the_rows(pair: Pair) -> None:
    seen: list[Path] = []

    def measure(path: Path) -> dict[str, float]:
        seen.append(path)
        return {"kl": float(len(seen))}

    result = lora_compress.compare(*pair, sizes=[2], measure=measure)
    assert result.reference == {"base": {"kl": 1.0}, "tuned": {"kl": 2.0}}
    assert [row.measured for row in result.rows] == [{"kl": 3.0}]
    assert result.to_json()["rows"][0]["kl"] == 3.0
    assert not seen[-1].exists(), "adapters are removed again"


def test_what_fails_is_a_row_and_what_is_unknown_an_error(pair: Pair) -> None:
    def fit(delta: Delta, rank: int, *, seed: int, tolerance: float) -> Any:
        raise RuntimeError("out of luck")

    with loaded(module(Decomposition("unlucky", "out r, r in", fit=fit))):
        result = lora_compress.compare(*pair, sizes=[2])
    row = next(row for row in result.rows if row.decomposition == "unlucky")
    assert row.error is None
    assert "out of luck" in row.problem
    with pytest.raises(PluginError, match="there is no decomposition `nothing`"):
        lora_compress.compare(*pair, decompositions=["nothing"])
    with pytest.raises(ValueError, match="at least one size"):
        lora_compress.compare(*pair, sizes=[])


def test_the_command_prints_a_table_and_writes_json(pair: Pair, tmp_path: Path) -> None:
    with loaded(module(SHARED)):
        arguments = ["compare", *map(str, pair), "--size", "2", "-o", str(tmp_path / "comparison.json")]
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        assert "shared" in done.output
        assert "to ab" in done.output
        stored = json.loads((tmp_path / "comparison.json").read_text())
        assert stored["decompositions"] == {"ab": "out r, r in", "shared": "layer out r, r in"}
        assert {row["decomposition"] for row in stored["rows"]} == {"ab", "shared", "best"}
        again = CliRunner().invoke(cli, arguments)
        assert again.exit_code != 0, "an existing file is kept"
        printed = CliRunner().invoke(cli, ["compare", *map(str, pair), "--size", "2", "-d", "shared", "--json"])
        rows = json.loads(printed.stdout)["rows"]
        assert {row["decomposition"] for row in rows} == {"ab", "shared"}
        # The whole list of tensors is accounted for, with the decomposition that each has.
        assert {tensor["decomposition"] for row in rows for tensor in row["tensors"]} == {"ab", "shared", ""}
