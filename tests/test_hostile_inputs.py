"""Attacks by what a command reads: files that lie about themselves, ask for too much, lead elsewhere, or hold poison.

Whatever a file says: one line on stderr that names it (and the tensor, where there is one), exit code 1, no output, and
nothing that was there before touched. The fuzzers (`make fuzz`) look for what nobody thought of.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lora_compress
import numpy as np
import pytest
from safetensors.numpy import save

from tests.checkpoints import BF16, contents
from tests.checkpoints import save as save_model
from tests.torch_files import View, save_torch, write_zip

WEIGHT = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
LARGE = np.ones(2**16, np.float32)
GOOD = save({"w.weight": WEIGHT})


def header(content: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, JSON or what can be written as it."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class Attack(NamedTuple):
    """What becomes of the model's one file, and what is said of it."""

    content: bytes
    says: str


FILES: dict[str, Attack] = {
    "empty": Attack(b"", "0 bytes are too few to hold a header"),
    "cut in the length": Attack(GOOD[:5], "5 bytes are too few"),
    "cut in the header": Attack(GOOD[:40], "the header claims"),
    "cut in the data": Attack(GOOD[:-1], "the tensors end at byte 256 of the data, the file at 255"),
    "longer than it says": Attack(GOOD + b"x", "the tensors end at byte 256 of the data, the file at 257"),
    "a header of 2^63 bytes": Attack(struct.pack("<Q", 2**63) + GOOD[8:], "a header of 9223372036854775808 bytes"),
    "a header of the limit": Attack(struct.pack("<Q", 10**8) + GOOD[8:], "the header claims 100000000 bytes"),
    "a header behind the end": Attack(struct.pack("<Q", len(GOOD)) + GOOD[8:], "the header claims"),
    "no JSON": Attack(header(b"\xff" * 40), "the header is not valid"),
    "a list": Attack(header([1, 2]), "the header is not valid"),
    "nothing but null": Attack(header(None), "the header is not valid"),
    "deep": Attack(header(b"[" * 1_000_000), "the header is not valid"),
    "deep inside": Attack(header(b'{"w":{"dtype":' + b"[" * 1_000_000), "tensor `w`"),
    "two of one name": Attack(
        header(b'{"w":%s,"w":%s}' % ((json.dumps(entry([2], 0, 8)).encode(),) * 2), bytes(8)), "`w` appears twice"
    ),
    "overlap": Attack(header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "`b` begins at 4"),
    "the same place": Attack(header({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)), "begins at 0"),
    "hole": Attack(header({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, bytes(24)), "`b` begins at 16"),
    "backwards": Attack(header({"a": entry([2], 8, 0)}, bytes(8)), "`a` ends before it begins"),
    "behind the end": Attack(
        header({"a": entry([2**40], 0, 2**42)}, bytes(8)), "the tensors end at byte 4398046511104"
    ),
    "2^63 elements": Attack(header({"a": entry([2**62, 2], 0, 2**63)}), "`a` has a shape whose size overflows"),
    "2^64 and none": Attack(header({"a": entry([2**63, 4, 0], 0, 0)}), "`a` has a shape whose size overflows"),
    "negative": Attack(header({"a": entry([-8], 0, 8)}, bytes(8)), "tensor `a`"),
    "another size": Attack(header({"a": entry([3], 0, 8)}, bytes(8)), "`a` needs 12 bytes, its offsets span 8"),
    "half a byte": Attack(header({"a": entry([3], 0, 2, "F4")}, bytes(2)), "`a`"),
    "unknown dtype": Attack(header({"a": entry([2], 0, 8, "F33")}, bytes(8)), "tensor `a`"),
    "metadata of numbers": Attack(header({"__metadata__": {"x": 3}}), "`__metadata__`"),
    "lines in a name": Attack(header({"a\nerror: b\x1b[31m": entry([3], 0, 8)}, bytes(8)), "needs 12 bytes"),
    "a picture": Attack(b"\x89PNG\r\n\x1a\n" + bytes(64), "is it one at all?"),
    "a pickle": Attack(b"\x80\x02}q\x00." + bytes(64), "not a valid safetensors file"),
    "an archive": Attack(b"PK\x03\x04" + bytes(96), "not a valid safetensors file"),
    "NaN": Attack(save({"w.weight": np.where(WEIGHT > 0.9, np.nan, WEIGHT).astype(np.float32)}), "`w.weight` in "),
    "infinite": Attack(save({"w.weight": np.where(WEIGHT > 0.9, -np.inf, WEIGHT).astype(np.float32)}), "holds -inf"),
    "NaN in BF16": Attack(save({"w.weight": np.full((8, 8), np.nan, BF16)}), "holds NaN at flat index 0"),
    "too far apart": Attack(save({"w.weight": np.full((8, 8), 1e300)}), "`w.weight`"),
    "scales of another": Attack(
        header({"w.weight": entry([8, 8], 0, 64, "F8_E4M3"), "w.weight_scale_inv": entry([3, 5], 64, 124)}, bytes(124)),
        "`w.weight_scale_inv`",
    ),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", {"w.weight": WEIGHT}, {"model_type": "llama"})


@pytest.fixture
def refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command that has to fail; returns the line that it says."""
    from lora_compress import cli

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        before, names = contents(tmp_path), sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as exit_:
            cli.main([*map(str, arguments), "-q"])
        captured = capsys.readouterr()
        assert (exit_.value.code, captured.out) == (cli.EXIT_FAILED, "")
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert "\x1b[31m" not in captured.err.removeprefix("error: ")
        assert (contents(tmp_path), sorted(tmp_path.iterdir())) == (before, names)
        return captured.err

    return call


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_file_that_lies_is_refused(refused: Callable[..., str], tmp_path: Path, name: str, side: str) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "model.safetensors").write_bytes(save({"w.weight": WEIGHT * 2}))
    (tmp_path / side / "model.safetensors").write_bytes(FILES[name].content)
    said = refused("extract", "base", "tuned", "-o", "out", "-r", 2)
    assert FILES[name].says in said, said
    assert f"{side}" in said


INDICES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "is not a valid shard index"),
    "deep": (b"[" * 1_000_000, "is not a valid shard index"),
    "no map": ({"weight_map": []}, "is not a valid shard index"),
    "numbers": ({"weight_map": {"w.weight": 3}}, "is not a valid shard index"),
    "up and away": ({"weight_map": {"w.weight": "../secret.safetensors"}}, "`../secret.safetensors` is not a plain"),
    "absolute": ({"weight_map": {"w.weight": "/etc/passwd"}}, "`/etc/passwd` is not a plain file name"),
    "of Windows": ({"weight_map": {"w.weight": "..\\secret.safetensors"}}, "is not a plain file name"),
    "a drive": ({"weight_map": {"w.weight": "C:secret"}}, "is not a plain file name"),
    "a folder": ({"weight_map": {"w.weight": "."}}, "is not a plain file name"),
    "nothing": ({"weight_map": {"w.weight": ""}}, "is not a plain file name"),
    "missing": ({"weight_map": {"w.weight": "none.safetensors"}}, "none.safetensors"),
    "not there": ({"weight_map": {"v.weight": "model-1.safetensors"}}, "`v.weight` is not in `model-1.safetensors`"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_lies_is_refused(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    content, says = INDICES[name]
    folder = tmp_path / "tuned"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(GOOD)
    (folder / "model-1.safetensors").write_bytes(GOOD)
    index = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "model.safetensors.index.json").write_bytes(index)
    said = refused("extract", "base", "tuned", "-o", "out", "-r", 2)
    assert says in said, said


def test_two_shards_of_one_tensor_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(GOOD)
    (folder / "b.safetensors").write_bytes(save({"w.weight": WEIGHT, "v": WEIGHT}))
    index = {"weight_map": {"w.weight": "a.safetensors", "v": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "`w.weight` is in both `a.safetensors` and `b.safetensors`" in refused("inspect", "tuned")


def test_links_and_pipes_are_no_checkpoints(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert "tuned" in refused("inspect", "tuned")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    # A pipe that nobody writes to would be waited for.
    assert "tuned" in refused("inspect", "tuned")
    assert "is neither a file nor a directory" in refused("inspect", folder / "model.safetensors")


PICKLES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a call": (lambda path: write_zip(path, {"data.pkl": b"cos\nsystem\n(X\x04\x00\x00\x00idle\x85R."}), "`os.system`"),
    "a call by another way": (
        lambda path: write_zip(path, {"data.pkl": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04idle\x85R."}),
        "asks for `os.system`",
    ),
    "an instance": (lambda path: write_zip(path, {"data.pkl": b"(ios\nsystem\n."}), "opcode 0x69"),
    "an extension": (lambda path: write_zip(path, {"data.pkl": b"\x80\x02\x82\x01."}), "opcode 0x82"),
    "ten million lists": (lambda path: write_zip(path, {"data.pkl": b"]" * 10_000_000 + b"."}), "too many values"),
    "very deep": (lambda path: write_zip(path, {"data.pkl": b"]" + b"\x85" * 2_000_000 + b"."}), "no dictionary"),
    "expanded": (
        lambda path: save_torch(path, {"w": View(np.ones(4, np.float32), (2**40, 4), (0, 1))}),
        "`w` is a view that repeats its elements",
    ),
    "everything shared": (
        lambda path: save_torch(path, {f"w{n}": View(LARGE, (2**16,), (1,)) for n in range(999)}),
        "would take 261881856 bytes",
    ),
    "no dictionary": (lambda path: save_torch(path, [np.ones(3, np.float32)]), "no dictionary of tensors"),
    "a name twice": (
        lambda path: write_zip(path, {"data.pkl": b"\x80\x02}(X\x01\x00\x00\x00wNX\x01\x00\x00\x00wNu."}),
        "no dictionary of tensors",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_lies_is_refused(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    make, says = PICKLES[name]
    make(tmp_path / "tuned.bin")
    said = refused("extract", "base", "tuned.bin", "-o", "out", "-r", 2)
    assert says in said, said
    assert "tuned.bin" in said


@pytest.mark.parametrize("name", ["deflated", "deep header", "ten million lists"])
def test_small_files_take_little_memory(tmp_path: Path, name: str) -> None:
    """A zip bomb, and texts that parsers blow up: with 1 GiB of address space beyond what the process starts with."""
    path = tmp_path / "x.bin"
    if name == "deflated":
        import zipfile

        save_torch(path, {"w": np.zeros(1 << 26, np.float32)}, compression=zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 1 << 20
    elif name == "deep header":
        path = tmp_path / "x.safetensors"
        path.write_bytes(header(b'{"a":' * 4_000_000))
    else:
        write_zip(path, {"data.pkl": b"]" * 50_000_000 + b"."})

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    command = [sys.executable, "-m", "lora_compress", "inspect", str(path), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert str(path) in done.stderr


CONFIGURATIONS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "is not valid JSON"),
    "deep": (b"[" * 1_000_000, "is not valid JSON"),
    "a list": (b"[]", "does not hold a JSON object"),
    "not a number": (b'{"peft_type": "LORA", "r": NaN}', "is not valid JSON"),
    "half a character": (b'{"peft_type": "LORA", "alpha_pattern": {"w\\ud800": 2}}', "is not valid JSON"),
    "a rank of none": ({"r": 0}, "r is 0"),
    "a rank of all": ({"r": 2**63}, "r is 9223372036854775808"),
    "another rank": ({"r": 3}, "the rank 3"),
    "an endless alpha": (b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}', "lora_alpha is inf"),
    "a slow pattern": ({"rank_pattern": {"(a+)+" * 20 + "(?=b)": 2}}, "rank_pattern"),
    "poisoned patterns": ({"alpha_pattern": {"w": [2]}}, "alpha_pattern of `w`"),
    "more than LoRA": ({"use_dora": True}, "DoRA"),
    "another method": ({"peft_type": "LOHA"}, "only LORA adapters"),
}


def adapter(folder: Path, config: Any = None, **factors: Any) -> Path:
    folder.mkdir()
    pair = {"A": np.ones((2, 8), np.float32), "B": np.ones((8, 2), np.float32), **factors}
    keyed = {f"base_model.model.w.lora_{side}.weight": factor for side, factor in pair.items()}
    (folder / "adapter_model.safetensors").write_bytes(save(keyed))
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w"]}
    content = config if isinstance(config, bytes) else json.dumps({**whole, **(config or {})}).encode()
    (folder / "adapter_config.json").write_bytes(content)
    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_lies_is_refused(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    config, says = CONFIGURATIONS[name]
    adapter(tmp_path / "adapter", config)
    said = refused("merge", "base", "adapter", "-o", "out")
    assert says in said, said


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"A": np.full((2, 8), np.nan, np.float32)}, "holds NaN"),
        ({"B": np.full((8, 2), np.inf, np.float32)}, "holds inf"),
        ({"B": np.full((8, 2), 3e38, np.float32), "A": np.full((2, 8), 3e38, np.float32)}, "`w.weight`"),
        ({"A": np.ones((2, 9), np.float32)}, "`w.weight` has shape [8, 8]"),
        ({"B": np.ones((8, 3), np.float32)}, "`w.weight` has shape [8, 8]"),
        ({"A": np.ones(16, np.float32)}, "rank 2"),
        ({"A": np.ones((2, 8), np.int32)}, "I32"),
    ],
    ids=str,
)
def test_factors_that_do_harm_are_refused(
    refused: Callable[..., str], tmp_path: Path, factors: dict[str, Any], says: str
) -> None:
    adapter(tmp_path / "adapter", **factors)
    said = refused("merge", "base", "adapter", "-o", "out")
    assert says in said, said
    assert "out" not in {path.name for path in tmp_path.iterdir()}


def test_the_adapter_of_all_these_is_good_as_it_is(base: Path, tmp_path: Path) -> None:
    """What the tables above attack is taken when nothing is wrong with it."""
    lora_compress.merge(base, [adapter(tmp_path / "adapter")], tmp_path / "merged")
    assert lora_compress.Checkpoint(tmp_path / "merged").read("w.weight") == pytest.approx(WEIGHT + 2)
