"""The command line, driven as a user drives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_compress import cli
from safetensors.numpy import load_file, save_file

from tests.checkpoints import save, tiny_llama
from tests.conftest import Pair

COMMAND = [sys.executable, "-m", "lora_compress"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli._run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_whole_way(run: Any, pair: Pair, tmp_path: Path) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    code, text, errors = run("extract", *pair, "-o", out, "--rank", 4)
    assert (code, errors) == (0, "")
    for word in ("low-rank", "exact", "unchanged", "relative error", str(out)):
        assert word in text
    code, text, errors = run("verify", *pair, out)
    assert (code, errors) == (0, "")
    assert "as promised by extraction" in text
    assert run("merge", pair[0], out, "-o", merged)[0] == 0
    code, text, _ = run("inspect", merged, "--tensors")
    assert code == 0
    assert "model.layers.1.mlp.down_proj.weight" in text
    code, text, _ = run("inspect", out)
    assert "rank        4" in text


def test_json_is_one_object_and_nothing_else(run: Any, pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    commands: list[list[object]] = [
        ["extract", *pair, "-o", out, "--rank", 4, "--json"],
        ["verify", *pair, out, "--json"],
        ["merge", pair[0], out, "-o", tmp_path / "merged", "--json"],
        ["inspect", out, "--json"],
        ["inspect", pair[0], "--json"],
        ["plugins", "list", "--json"],
    ]
    for command in commands:
        code, text, errors = run(*command)
        assert (code, errors) == (0, ""), command
        assert json.loads(text)["schema_version"] == 1


def test_the_demo_recovers_more_at_higher_rank(run: Any, tmp_path: Path) -> None:
    code, text, _ = run("demo", "--ranks", "4,48", "--keep", tmp_path / "kept", "--json")
    assert code == 0
    result = json.loads(text)
    losses = [result["base"]["loss"], *(row["loss"] for row in result["adapters"]), result["tuned"]["loss"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(1.8708, abs=5e-5), "the README shows these"
    assert result["adapters"][1]["loss"] == pytest.approx(1.5548, abs=5e-4)
    assert (tmp_path / "kept" / "merged-48" / "model.safetensors").exists()
    assert run("demo", "--ranks", "4,x")[0] == 2


def test_mergekits_flags_mean_the_same(run: Any, pair: Pair, tmp_path: Path) -> None:
    base, tuned = pair
    assert run("extract", "--model", tuned, "--base-model", base, "--out-path", tmp_path / "a", "--max-rank", 3)[0] == 0
    assert run("extract", base, tuned, "-o", tmp_path / "b", "--rank", 3)[0] == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert run("extract", "--model", tuned, "-o", tmp_path / "c", "-r", 1)[0] == cli.EXIT_USAGE


def test_quiet_says_nothing(run: Any, pair: Pair, tmp_path: Path) -> None:
    assert run("extract", *pair, "-o", tmp_path / "out", "--rank", 4, "--quiet") == (0, "", "")
    assert run("verify", *pair, tmp_path / "out", "--quiet") == (0, "", "")
    assert run("merge", pair[0], tmp_path / "out", "-o", tmp_path / "merged", "--quiet") == (0, "", "")


def test_a_users_mistake_is_one_line_that_names_it(run: Any, pair: Pair, tmp_path: Path) -> None:
    base, tuned = pair
    out, broken = tmp_path / "out", tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 32)
    assert run("extract", base, tuned, "-o", out, "-r", 2, "-q")[0] == 0
    other, _ = tiny_llama(np.random.default_rng(1), hidden=12)
    save(tmp_path / "other", {name.replace("model.", "x."): value for name, value in other.items()}, {})
    mistakes: list[tuple[list[object], str]] = [
        (["inspect", tmp_path / "none"], "none`: No such file"),
        (["inspect", "some-org/some-model"], "as a Hub id it is not in the local cache"),
        (["inspect", broken], "broken.safetensors` is not a valid safetensors file"),
        (["extract", base, broken, "-o", tmp_path / "x", "-r", 2], "broken.safetensors"),
        (["extract", base, tuned, "-o", out, "-r", 2], "exists and is not empty"),
        (["extract", base, tuned, "-o", tmp_path / "x", "-r", 2, "-e", "zzz"], "`zzz` matches no tensor"),
        (["extract", base, tuned, "-o", tmp_path / "x", "-r", 2, "--decomposition", "no"], "no decomposition `no`"),
        (["merge", base, tmp_path, "-o", tmp_path / "x"], "not an adapter of any known format"),
        (["merge", tmp_path / "other", out, "-o", tmp_path / "x"], "is it an adapter of another base?"),
        (["verify", base, tuned, tmp_path / "nowhere"], "nowhere"),
    ]
    for arguments, message in mistakes:
        code, text, errors = run(*arguments)
        assert (code, text) == (1, ""), arguments
        assert errors.startswith("error: "), arguments
        assert message in errors, arguments
        assert errors.count("\n") == 1, arguments
    assert not (tmp_path / "x").exists()


def test_wrong_usage_exits_with_2(run: Any, pair: Pair, tmp_path: Path) -> None:
    for arguments in (
        ["extract", *pair],
        ["extract", *pair, "-o", tmp_path / "x", "--rank", 0],
        ["extract", *pair, "-o", tmp_path / "x", "--rank", 4, "--budget", "1MB"],
        ["extract", *pair, "-o", tmp_path / "x", "--budget", "some"],
        ["extract", *pair, "-o", tmp_path / "x", "--ranks-allowed", "8,,16"],
        ["plan", *pair, "--rank", "energy=7"],
        ["plan", tmp_path / "plan.json", "--exclude", "x"],
        ["extract", pair[0], "-o", tmp_path / "x", "--rank", 1],
        ["extract", *pair, "-o", tmp_path / "x", "--rank", 1, "--dtype", "int4"],
        ["merge", pair[0], "-o", tmp_path / "x"],
        ["merge", pair[0], tmp_path, "-o", tmp_path / "x.safetensors"],
        ["frobnicate"],
    ):
        code, text, errors = run(*arguments)
        assert (code, text) == (cli.EXIT_USAGE, ""), arguments
        assert "Error: " in errors


def test_a_tampered_adapter_exits_with_3(run: Any, pair: Pair, tmp_path: Path) -> None:
    run("extract", *pair, "-o", tmp_path / "out", "--rank", 4)
    path = tmp_path / "out" / "adapter_model.safetensors"
    factors: dict[str, Any] = load_file(path)
    key = "base_model.model.lm_head.lora_B.weight"
    factors[key] = factors[key] * factors[key].dtype.type(2)
    save_file(factors, path)
    code, text, errors = run("verify", *pair, tmp_path / "out")
    assert code == cli.EXIT_PROMISE_BROKEN
    assert "1 not as promised" in text
    assert "warning: `lm_head.weight`: its error is" in errors


def test_every_command_teaches_by_example(run: Any) -> None:
    assert run("--version")[1].startswith("lora-compress 0.")
    overview = run("--help")[1]
    for name in cli.COMMANDS:
        assert name in overview
        code, text, _ = run(name, "--help")
        assert code == 0
        assert ("Examples:" in text) == (name not in {"plugins", "demo"})


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    from lora_compress.verbs import inspect

    def bug(path: Path) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(inspect, "inspect", bug)
    with pytest.raises(RuntimeError, match="bug"):
        cli._run(["inspect", str(pair[0])])


def test_help_is_as_wide_as_what_it_shows_and_piped_tables_are_whole(pair: Pair) -> None:
    result = subprocess.run(
        [*COMMAND, "inspect", str(pair[0]), "--tensors"], capture_output=True, text=True, check=True
    )
    assert "model.layers.0.input_layernorm.weight" in result.stdout
    assert "…" not in result.stdout
    assert result.stderr == "", "no progress where nobody watches"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    many = {f"tensor.{i:05d}.weight": np.zeros((2, 2), np.float32) for i in range(3000)}
    save(tmp_path / "many", many, {})
    with subprocess.Popen(
        [*COMMAND, "inspect", str(tmp_path / "many"), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        # click ends quietly, with a code that depends on its version.
        assert process.wait(20) in {0, 1}


@pytest.fixture(scope="module")
def slow_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, tuned and adapter large enough that every verb is still at work when a signal arrives."""
    folder = tmp_path_factory.mktemp("slow")
    matrix = np.random.default_rng(0).standard_normal((2000, 2000), np.float32)
    base = {f"layer{i:02d}.weight": matrix for i in range(20)}
    save(folder / "base", base, {})
    save(folder / "tuned", {name: np.roll(value, 1, 0) for name, value in base.items()}, {})
    arguments = ["extract", "base", "tuned", "-o", "adapter", "--rank", "1", "--tolerance", "1", "--quiet"]
    subprocess.run([*COMMAND, *arguments], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("verb", ["extract", "merge"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals_leave_no_output(slow_case: Path, verb: str, number: signal.Signals, code: int) -> None:
    arguments = ["extract", "base", "tuned", "--rank", "64"] if verb == "extract" else ["merge", "base", "adapter"]
    out = f"{verb}-{code}"
    with subprocess.Popen(
        [*COMMAND, *arguments, "-o", out, "-q"],
        cwd=slow_case,
        stderr=subprocess.PIPE,
        # A shell starts background jobs with SIGINT ignored, and we may be running in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not list(slow_case.glob(f".{out}.*")) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        process.wait(30)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == code, "the work was over before the signal came" if process.returncode == 0 else ""
    assert not (slow_case / out).exists()
    if number != signal.SIGKILL:  # which no process can answer: its hidden partial directory stays
        assert not list(slow_case.glob(f".{out}.*"))


def test_output_that_cannot_be_written_is_named(pair: Pair, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/out")  # even root creates nothing there
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        target = tmp_path / "locked" / "out"
    command = [*COMMAND, "extract", *map(str, pair), "-o", str(target), "-r", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_names_do_nothing_to_the_terminal(run: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    name = "evil\x1b[2Jname.weight"
    base = {name: rng.standard_normal((8, 8)).astype(np.float32)}
    save(tmp_path / "base", base, {})
    save(tmp_path / "tuned", {name: base[name] + rng.standard_normal((8, 8)).astype(np.float32)}, {})
    code, text, errors = run("plan", tmp_path / "base", tmp_path / "tuned", "--tensors", "--rank", 2)
    assert code == 0
    assert "\x1b" not in text + errors
    assert "evil\\x1b[2Jname.weight" in text


def test_plan_then_extract(run: Any, pair: Pair, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    code, text, errors = run("plan", *pair, "--budget", "60kB", "-o", saved)
    assert (code, errors) == (0, "")
    for word in ("embed_tokens", "noise", "budget 60 kB", "extraction takes about", "error", "●"):
        assert word in text
    assert "exists: choose another" in run("plan", *pair, "-o", saved)[2]
    assert run("plan", pair[0])[0] == run("report", pair[0], "-o", tmp_path / "x.html")[0] == cli.EXIT_USAGE
    assert run("extract", *pair, "-o", tmp_path / "x", "--plan", saved, "--rank", 3)[0] == cli.EXIT_USAGE
    code, _, errors = run("plan", saved, "--error", 0.001, "-o", tmp_path / "unmet.json")
    assert code in {cli.EXIT_FAILED, 0}
    assert code == 0 or not (tmp_path / "unmet.json").exists()
    weights = next(pair[1].glob("*.safetensors"))
    assert "would replace" in run("plan", pair[0], weights, "-o", weights, "--force")[2]
    code, text, errors = run("plan", saved, "--rank", "energy=0.5", "--tensors")
    assert code == 0
    assert "model.layers.0.self_attn.q_proj.weight" in text
    assert "energy 0.5" in text
    code, text, errors = run("plan", saved, "--rank", "4", "--layout", "uniform")
    assert (code, errors) == (0, "")
    code, text, errors = run("plan", saved, "--max-rank", "12")
    assert "budget 60 kB, at most 12: " in text, "what is not said stays"
    assert run("report", saved, "-o", saved, "--force")[0] == cli.EXIT_FAILED
    assert run("report", *pair, "-o", weights, "--force")[0] == cli.EXIT_FAILED
    assert run("plan", *pair, "-o", tmp_path, "--force")[0] == cli.EXIT_FAILED
    assert run("plan", *pair, "-q", "-o", tmp_path / "new" / "plan.json")[0] == 0
    code, text, _ = run("plan", saved, "--json")
    assert json.loads(text)["choice"]["rule"] == "budget"
    code, text, errors = run("extract", *pair, "-o", tmp_path / "out", "--plan", saved)
    assert (code, errors) == (0, "")
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors")) <= 60_000
    code, _, errors = run("extract", pair[1], pair[0], "-o", tmp_path / "x", "--plan", saved)
    assert code == cli.EXIT_FAILED
    assert "was made for another base model" in errors
    code, _, errors = run("plan", tmp_path / "nothing.json")
    assert (code, errors.count("\n")) == (cli.EXIT_FAILED, 1)
