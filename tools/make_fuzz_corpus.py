"""Writes the seeds of the fuzzers (`rust/fuzz/corpus`): small files of every kind that the doors read, good and bad.

python -m tools.make_fuzz_corpus
"""

from __future__ import annotations

import json
import pickle
import struct
import tempfile
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.checkpoints import BF16
from tests.torch_files import View, save_torch

CORPUS = Path(__file__).parents[1] / "rust" / "fuzz" / "corpus"


def headers() -> dict[str, bytes]:
    tensors: dict[str, Any] = {
        "model.layers.0.weight": np.zeros((2, 3), np.float32),
        "b": np.zeros(4, BF16),
        "empty": np.zeros((0, 3), np.float16),
        "scalar": np.array(1, np.int64),
    }
    good = save(tensors, metadata={"format": "pt"})

    def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    bad: dict[str, Any] = {
        "overlap": {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)},
        "overflow": {"a": entry("F64", [2**62, 8], 0, 2**63)},
        "backwards": {"a": entry("U8", [1], 5, 4)},
        "odd": {"a": entry("F4", [3], 0, 2), "__metadata__": {"x": "y"}},
    }
    texts = {name: json.dumps(header).encode() for name, header in bad.items()}
    one = json.dumps(entry("U8", [1], 0, 1))
    texts["twice"] = f'{{"a":{one},"a":{one}}}'.encode()
    texts["deep"] = b"[" * 200 + b"]" * 200
    files = {name: struct.pack("<Q", len(text)) + text + bytes(16) for name, text in texts.items()}
    return {"good": good, "long": struct.pack("<Q", 10**8), **files}


def indices() -> dict[str, bytes]:
    good = {"metadata": {"total_size": 9}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    values: dict[str, Any] = {
        "good": good,
        "traversal": {"weight_map": {"a": "../../etc/passwd"}},
        "absolute": {"weight_map": {"a": "/etc/passwd", "b": "C:\\x", "c": ".."}},
        "odd": {"weight_map": {"": "", "b": 3}},
    }
    return {name: json.dumps(value).encode() for name, value in values.items()}


def archives() -> dict[str, bytes]:
    weights: dict[str, Any] = OrderedDict(
        w=np.ones((3, 2), np.float32), half=np.ones(3, np.float16), tied=View(np.arange(6, dtype=BF16), (2, 3), (1, 2))
    )
    contents = {
        "good": weights,
        "nested": {"state_dict": weights, "epoch": 3, "lr": [0.1, None, True, b"x"]},
        "lies": {"w": View(np.ones(4, np.float32), (2**40, 2**40), (0, 2**60), 3)},
    }
    with tempfile.TemporaryDirectory() as folder:
        return {name: save_torch(Path(folder) / "x", content).read_bytes() for name, content in contents.items()}


def pickles() -> dict[str, bytes]:

    inside = {name: zipfile.ZipFile(BytesIO(data)).read("archive/data.pkl") for name, data in archives().items()}
    plain = {
        f"protocol_{protocol}": pickle.dumps({"a": [1, 2.0, "x", (None, True)], 3: {4}}, protocol)
        for protocol in range(6)
    }
    return {**inside, **plain, "call": b"cos\nsystem\n(X\x02\x00\x00\x00lstR.", "memo": b"\x80\x02]q\x00h\x00a."}


def patterns() -> dict[str, bytes]:
    texts = {
        "plain": "q_proj",
        "full": "^model\\.layers\\.0\\.self_attn\\.q_proj\nmodel.layers.0.self_attn.q_proj",
        "slow": "(a+)+b\n" + "a" * 40,
        "classes": "[\\w-]+\\.(?:up|down)_proj{1,3}",
        "odd": "(?P<x>.)(?=y)\\1",
    }
    return {name: text.encode() for name, text in texts.items()}


def configurations() -> dict[str, bytes]:
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.up"]}
    patterns = {"rank_pattern": {"^q": 2, "conv|up": 2, "embed.*": 2}, "alpha_pattern": {"q": 1e9}}
    values: dict[str, Any] = {
        "good": good,
        "patterns": {**good, "r": 4, **patterns},
        "rslora": {**good, "use_rslora": True, "fan_in_fan_out": True, "peft_version": "0.18.1"},
        "refused": {**good, "use_dora": True, "init_lora_weights": "pissa_niter_4"},
        "odd": {**good, "r": -1, "lora_alpha": "x", "rank_pattern": {"(": 2}, "target_parameters": [None, {}]},
    }
    return {name: json.dumps(value).encode() for name, value in values.items()}


def main() -> None:
    doors = {
        "adapter_config": configurations,
        "header": headers,
        "index": indices,
        "pattern": patterns,
        "pickle": pickles,
        "torch": archives,
    }
    for door, make in doors.items():
        (CORPUS / door).mkdir(parents=True, exist_ok=True)
        for name, content in make().items():
            (CORPUS / door / name).write_bytes(content)


if __name__ == "__main__":
    main()
