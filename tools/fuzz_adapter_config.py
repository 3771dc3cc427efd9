"""Coverage-guided fuzzing of PEFT's `adapter_config.json` (`make fuzz-adapter_config`; needs atheris).

    python -m tools.fuzz_adapter_config CORPUS… -runs=10000000

Whatever the file says, reading the adapter beside it ends in an adapter or in an error of this package.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import atheris
import numpy as np
from safetensors.numpy import save_file

with atheris.instrument_imports(include=["lora_compress.formats.peft", "lora_compress.model"]):
    from lora_compress.errors import LoraCompressError
    from lora_compress.formats.peft.layout import CONFIG, PREFIX
    from lora_compress.formats.peft.read import interpret
    from lora_compress.model import Model, parse_json

from lora_compress import Checkpoint

FOLDER = Path(tempfile.mkdtemp())
KEYS = (
    "peft_type", "LORA", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "use_dora",
    "target_parameters", "target_modules", "init_lora_weights", "pissa_niter_4", "peft_version", "0.18.1", "lora_bias",
    "mlp.experts.up", "q.weight", "conv", "embed_tokens", "lm_head", "null", "true", "1e400", "NaN", "-0.0", "\\ud800",
)  # fmt: skip


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 2**31, 2**64, 0.5, -0.0, 1e30, 1e308, "", "LORA", "x", "0.18.1", "(", "^q$",
    ".*", "q|conv", "(a+)+b", "mlp.experts.up", "q.weight", "\ud800", [], ["q"], ["mlp.experts.up"], [None], {},
    {"q": 2}, {"q": 2, ".*": 4}, {"(": 1}, {"conv": "x"}, {"mlp.experts.up": 2.5},
)  # fmt: skip


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Another value under one of the names that are read; now and then, anything that libFuzzer does to bytes."""
    chance = random.Random(seed)  # noqa: S311 (nothing is to be kept secret)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or chance.random() < 0.3:
        mutated: bytes = atheris.Mutate(data, max_size)
        return mutated
    for _ in range(chance.randint(1, 3)):
        holder, key = config, chance.choice(KEYS)
        if isinstance(config.get(key), dict) and chance.random() < 0.7:
            holder, key = config[key], chance.choice([*config[key], *KEYS, "^q", "conv|up"])
        if chance.random() < 0.2:
            holder.pop(key, None)
        else:
            holder[key] = deepcopy(chance.choice(VALUES))
    return json.dumps(config).encode()[:max_size]


def prepare() -> tuple[Model, Checkpoint]:
    """A base with one weight of every kind, and an adapter of rank 2 for them."""
    shapes = {"q.weight": (6, 4), "conv.weight": (6, 4, 3), "embed_tokens.weight": (9, 4), "mlp.experts.up": (3, 6, 4)}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, FOLDER / "model.safetensors")
    factors = {
        "q.lora_A.weight": (2, 4),
        "q.lora_B.weight": (6, 2),
        "conv.lora_A.weight": (2, 4, 3),
        "conv.lora_B.weight": (6, 2, 1),
        "embed_tokens.lora_embedding_A": (2, 9),
        "embed_tokens.lora_embedding_B": (4, 2),
        "mlp.experts.lora_A.weight": (6, 4),
        "mlp.experts.lora_B.weight": (6, 6),
    }
    save_file({PREFIX + name: np.zeros(shape, np.float32) for name, shape in factors.items()}, FOLDER / "weights")
    return Model.open(FOLDER), Checkpoint(FOLDER / "weights")


BASE, WEIGHTS = prepare()


def one(data: bytes) -> None:
    """One configuration."""
    try:
        adapter = interpret(FOLDER, parse_json(data, FOLDER / CONFIG), BASE, WEIGHTS)
    except LoraCompressError as error:
        message = str(error)
    else:
        message = str(FOLDER) if adapter.tensors() else ""
    # An adapter that changes something, or an error that names the file.
    assert str(FOLDER) in message, message  # noqa: S101


def main() -> None:
    """Fuzz, with what configurations are made of as a dictionary."""
    words = FOLDER / "words"
    words.write_text("".join(f"{json.dumps(key)}\n" for key in KEYS if "\\" not in key))
    atheris.Setup([*sys.argv, f"-dict={words}"], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
