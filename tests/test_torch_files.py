"""PyTorch's own files, read without PyTorch and without running anything."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_compress
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_compress import Checkpoint, CheckpointError

from tests.checkpoints import BF16, load, save, tiny_llama, tuned_from
from tests.torch_files import View, save_torch, write_zip


def values(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint(path)
    return {tensor.name: checkpoint.read(tensor.name) for tensor in checkpoint.tensors()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BF16])
def test_tensors_are_read_where_they_lie(tmp_path: Path, rng: np.random.Generator, dtype: Any) -> None:
    tensors = OrderedDict(
        matrix=rng.standard_normal((5, 7)).astype(dtype),
        scalar=np.array(2.5, dtype),
        empty=np.zeros((0, 3), dtype),
        kernel=rng.standard_normal((4, 3, 2, 2)).astype(dtype),
    )
    found = values(save_torch(tmp_path / "model.bin", tensors))
    assert list(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(found[name], tensor.astype(np.float32)), name


def test_whole_numbers_are_listed(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "model.pt", {"ids": np.arange(6), "mask": np.ones(3, bool)})
    assert [(tensor.name, tensor.dtype) for tensor in Checkpoint(path).tensors()] == [("ids", "I64"), ("mask", "BOOL")]
    assert Checkpoint(path).read_bytes("ids") == np.arange(6).tobytes()


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    first=st.integers(0, 3),
)
def test_views_are_gathered(tmp_path: Path, shape: list[int], order: Any, first: int) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    storage = np.arange(first + np.prod(shape), dtype=np.float32)
    viewed = storage[first:].reshape(shape).transpose(axes)
    strides = tuple(stride // 4 for stride in viewed.strides)
    path = save_torch(tmp_path / "views.pt", {"view": View(storage, viewed.shape, strides, first)})
    checkpoint = Checkpoint(path)
    assert np.array_equal(checkpoint.read("view"), viewed)
    whole = np.ascontiguousarray(viewed).tobytes()
    for begin in range(len(whole)):
        part = whole[begin : begin + 3]
        assert checkpoint.read_bytes("view", begin, len(part)) == part


def test_tensors_may_share_a_storage(tmp_path: Path, rng: np.random.Generator) -> None:
    storage = rng.standard_normal(12).astype(np.float32)
    views = {"embed": View(storage, (3, 4), (4, 1)), "head": View(storage, (3, 4), (4, 1))}
    views["rows"] = View(storage, (2, 4), (4, 1), 4)
    found = values(save_torch(tmp_path / "tied.pt", views))
    assert np.array_equal(found["embed"], found["head"])
    assert np.array_equal(found["rows"], storage.reshape(3, 4)[1:])


@pytest.mark.parametrize("key", ["state_dict", "model", "anything"])
def test_the_state_dict_may_lie_among_other_things(tmp_path: Path, key: str) -> None:
    weights = OrderedDict(w=np.ones((2, 2), np.float32), version=3)
    others = {"epoch": 7, "lr": [0.1, None, True, "x", b"y", {1}, (1 << 70,)]}
    path = save_torch(tmp_path / "epoch.pt", {**others, key: weights})
    assert list(values(path)) == ["w"]
    assert Checkpoint(path).notes == []


def test_weights_come_before_what_trained_them(tmp_path: Path) -> None:
    """What is left out is told where it has tensors, however deep."""
    one = {"w": np.ones(2, np.float32)}
    others = {"ema": one, "loss": one["w"], "optimizer": {"state": {0: {"exp_avg": one["w"]}}}, "epoch": 3}
    path = save_torch(tmp_path / "a.pt", {**others, "model_state_dict": {"v": one["w"]}})
    assert list(values(path)) == ["v"]
    said = "the weights are those under `model_state_dict`; tensors under `ema`, `loss`, `optimizer` are left out"
    assert Checkpoint(path).notes == [f"`{path}`: {said}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ema": {"w": np.ones(2)}, "raw": {"v": np.ones(2)}}, "several dictionaries of tensors, `ema` and `raw`"),
        ({"w": np.ones(2), "layers": {"v": np.ones(2)}}, "`layers` holds tensors of its own"),
        ({"w": np.ones(2), "layers": [np.ones(2)]}, "`layers` holds tensors of its own"),
        ({"state_dict": {"w": np.ones(2), "sub": {"v": np.ones(2)}}}, "`sub` holds tensors of its own"),
        ({"model": {"encoder": {"w": np.ones(2)}}}, "no dictionary of tensors"),
        ({3: np.ones(2)}, "a tensor's name is no text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_tensor_is_lost_between_levels(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(save_torch(tmp_path / "x.pt", content))


class Call:
    """What `pickle` turns into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def pickled(path: Path, content: bytes, **entries: bytes) -> Path:
    return write_zip(path, {"data.pkl": content, **{name.replace("_", "/"): data for name, data in entries.items()}})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, "touch harmed"), "posix.system"),
        (Call(eval, "open('harmed', 'w')"), "builtins.eval"),
        (Call(Path, "harmed"), "pathlib"),
        (Call(pickle.loads, b"x"), "_?pickle.loads"),
        (Call(getattr, "x", "y"), "builtins.getattr"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nothing_that_a_pickle_asks_for_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    path = pickled(tmp_path / "evil.bin", pickle.dumps({"w": call}, protocol))
    name = name.replace("builtins", "__builtin__") if protocol == 2 else name
    with pytest.raises(CheckpointError, match=rf"evil\.bin` cannot be read.*asks for `{name}.*nothing of it was run"):
        Checkpoint(path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends too soon"),
        (b"\x80\x02", "ends too soon"),
        (b"\x80\x02}X\xff\xff\xff\xffw", "ends too soon"),
        (b"\x80\x02].", "no dictionary of tensors"),
        (b"\x80\x02}.", "no dictionary of tensors"),
        (b"\x80\x02.", "stack runs empty"),
        (b"\x80\x02(0.", "stack runs empty"),
        (b"\x80\x02u.", "mark is missing"),
        (b"\x80\x02h\x05.", "refers to what it has not named"),
        (b"\x80\x02I1\n.", "opcode 0x49"),
        (b"\x80\x02(i__main__\nX\n.", "opcode 0x69"),
        (b"\x80\x02\x82\x01.", "opcode 0x82"),
        (b"\x80\x02}X\x01\x00\x00\x00\xffNs.", "not UTF-8"),
        (b"\x80\x02(]" * 5_000_000, "too many values"),
        (b"\x80\x02" + b")" * 9_000_000 + b".", "too many values"),
        (b"\x80\x02N" + b"\x85" * 2_000_000 + b".", "no dictionary of tensors"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_broken_pickles_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(pickled(tmp_path / "w.bin", content))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(np.ones(4, np.float32), (5,), (1,)), "`w` leaves its storage"),
        (View(np.ones(4, np.float32), (2, 2), (2, 2)), "`w` leaves its storage"),
        (View(np.ones(4, np.float32), (4,), (1,), 1), "`w` leaves its storage"),
        (View(np.ones(4, np.float32), (1 << 40, 4), (0, 1)), "`w` is a view that repeats its elements"),
        (View(np.ones(4, np.float32), (1 << 62, 1 << 62), (1, 1)), "`w` has a shape whose size overflows"),
        (View(np.ones(4, np.float32), (4,), (1 << 62,)), "`w` leaves its storage"),
        (View(np.ones(4, np.float32), (-4,), (1,)), "a size is negative"),
        (View(np.ones(4, np.float32), (2, 2), (1,)), "do not fit together"),
        (View(np.ones(4, np.float32), (1,) * 9, (1,) * 9), "too many dimensions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_views_that_lie_are_refused(tmp_path: Path, view: View, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(save_torch(tmp_path / "w.bin", {"w": view}))


def test_a_small_file_does_not_describe_a_large_checkpoint(tmp_path: Path) -> None:
    storage = np.ones(1 << 16, np.float32)
    views = {f"w{number}": View(storage, (1 << 16,), (1,)) for number in range(64)}
    with pytest.raises(CheckpointError, match="would take 16777216 bytes"):
        Checkpoint(save_torch(tmp_path / "bomb.bin", views))


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    good = save_torch(tmp_path / "w.bin", {"w": np.ones((2, 2), np.float32)}).read_bytes()
    cases = {
        "compressed or encrypted": save_torch(
            tmp_path / "deflated.bin", {"w": np.zeros(1 << 20, np.float32)}, compression=zipfile.ZIP_DEFLATED
        ),
        "big-endian": save_torch(tmp_path / "big.bin", {"w": np.ones(1)}, extra={"byteorder": b"big"}),
        "no `data.pkl`, or several": save_torch(tmp_path / "two.bin", {"w": np.ones(1)}, extra={"x/data.pkl": b"."}),
        "storage of tensor `w` is missing": write_zip(
            tmp_path / "lost.bin", {"data.pkl": zipfile.ZipFile(tmp_path / "w.bin").read("archive/data.pkl")}
        ),
    }
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(path)
    for length in range(4, len(good)):
        (tmp_path / "cut.bin").write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"cut\.bin"):
            Checkpoint(tmp_path / "cut.bin")
    # The size of an entry, in the central directory.
    at = good.rindex(b"PK\x01\x02") + 20
    (tmp_path / "lie.bin").write_bytes(good[:at] + struct.pack("<II", 1 << 31, 1 << 31) + good[at + 8 :])
    with pytest.raises(CheckpointError, match=r"lie\.bin"):
        Checkpoint(tmp_path / "lie.bin")


@given(data=st.data())
def test_no_change_of_a_byte_does_harm(tmp_path: Path, data: st.DataObject) -> None:
    good = save_torch(tmp_path / "w.bin", {"w": np.ones((2, 2), np.float32), "v": np.ones(3)}).read_bytes()
    for _ in range(50):
        at = data.draw(st.integers(0, len(good) - 1))
        changed = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
        (tmp_path / "changed.bin").write_bytes(changed)
        try:
            values(tmp_path / "changed.bin")
        except lora_compress.LoraCompressError as error:
            assert "changed.bin" in str(error)  # noqa: PT017 (it need not fail)


def test_models_of_pytorch_files_go_all_the_way(tmp_path: Path, rng: np.random.Generator) -> None:
    """A sharded PyTorch base and a safetensors fine-tune: the merged model is safetensors with an index of its own."""
    base, config = tiny_llama(rng)
    tuned = tuned_from(base, rng)
    save(tmp_path / "tuned", tuned, config)
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    halves = [dict(list(base.items())[number::2]) for number in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_torch(folder / name, half)
    index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    lora_compress.extract(folder, tmp_path / "tuned", tmp_path / "adapter", rank=24, dtype="F32")
    assert lora_compress.verify(folder, tmp_path / "tuned", tmp_path / "adapter").ok
    lora_compress.merge(folder, [tmp_path / "adapter"], tmp_path / "merged")
    written = sorted(path.name for path in (tmp_path / "merged").iterdir())
    shards = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    assert written == ["config.json", *shards, "model.safetensors.index.json"]
    merged = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert merged["weight_map"] == {key: shard for shard, half in zip(shards, halves, strict=True) for key in half}
    for name, tensor in load(tmp_path / "merged").items():
        assert tensor.dtype == base[name].dtype
        assert np.allclose(tensor.astype(np.float32), tuned[name].astype(np.float32), rtol=2**-7, atol=1e-6), name


@pytest.mark.parametrize("tied_side", ["base", "tuned"])
def test_a_tied_head_that_is_stored_stays_tied(tmp_path: Path, rng: np.random.Generator, tied_side: str) -> None:
    """PyTorch's files have a tied model's matrix under both names; safetensors once."""
    base, config = tiny_llama(rng, tied=True)
    sides = {"base": base, "tuned": tuned_from(base, rng)}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for name, tensors in sides.items():
        save(tmp_path / name, tensors, config)
    folder = tmp_path / tied_side
    (folder / "model.safetensors").unlink()
    flat = sides[tied_side][embedding].reshape(-1)
    shared = {name: View(flat, sides[tied_side][embedding].shape, (24, 1)) for name in (embedding, head)}
    save_torch(folder / "pytorch_model.bin", {**sides[tied_side], **shared})
    paths = tmp_path / "base", tmp_path / "tuned"
    result = lora_compress.extract(*paths, tmp_path / "adapter", rank=24, dtype="F32")
    assert {tensor.name: tensor.treatment.value for tensor in result.tensors}[head] == "tied"
    checked = lora_compress.verify(*paths, tmp_path / "adapter")
    assert (checked.ok, checked.unchecked) == (True, ())
    lora_compress.merge(paths[0], [tmp_path / "adapter"], tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert np.allclose(merged[embedding].astype(np.float32), sides["tuned"][embedding].astype(np.float32), rtol=2**-7)
    if tied_side == "base":
        assert np.array_equal(merged[head], merged[embedding])
    else:
        assert head not in merged
    # PEFT applies factors to the forward of both.
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["ensure_weight_tying"]
