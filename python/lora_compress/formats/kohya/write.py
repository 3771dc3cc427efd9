"""Writing kohya's file: `lora.safetensors`, with the metadata that kohya's own tools look at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_compress._native import Checkpoint, Writer
from lora_compress.errors import SelectionError
from lora_compress.formats.kohya.names import NameMap
from lora_compress.formats.stored import WIDTH, shapes
from lora_compress.model import Model

if TYPE_CHECKING:
    from lora_compress.adapter import AdapterPlan, Float32Matrix

FILE = "lora.safetensors"
ALPHA_DTYPE = "F32"
# `sd-scripts` calls bases so (`library/model_util.py`, `sdxl_model_util.py`): a UNet's by the width of its text.
VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
# Digests of tensors: wrong as soon as one changes.
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
# Stale with new ranks: digests, and the configuration that diffusers loads factors by.
STALE = (*HASHES, "lora_adapter_metadata")


class KohyaWriter:
    """An adapter being written. The scale is in the factors, so alpha is the rank."""

    def __init__(self, path: Path, plan: AdapterPlan) -> None:
        self._path = path / FILE
        self._plan = plan
        self._names = NameMap(plan.base)
        self._ranks: list[tuple[int, bool]] = []
        planned = []
        expected: list[tuple[str, str, Sequence[int]]] = []
        for item in plan.factors:
            keys = self._keys(item.tensor)
            up, down = shapes(plan.base.checkpoint.info(item.tensor).shape, item.rank)
            expected += [(keys["up"], plan.dtype, up), (keys["down"], plan.dtype, down)]
            expected.append((keys["alpha"], ALPHA_DTYPE, []))
            planned.append((item.rank, is_conv(down)))
        self._expected = expected
        self._metadata = self._described(planned)
        self._writer = Writer(self._path, expected, self._metadata)

    def write(self, tensor: str, b: Float32Matrix, a: Float32Matrix) -> int:
        """Append B (rows, r), A (r, cols) and alpha of a tensor."""
        keys, rank = self._keys(tensor), b.shape[1]
        up, down = shapes(self._plan.base.checkpoint.info(tensor).shape, rank)
        self._writer.append(keys["up"], self._plan.dtype, b.reshape(up))
        self._writer.append(keys["down"], self._plan.dtype, a.reshape(down))
        self._writer.append(keys["alpha"], ALPHA_DTYPE, np.array(rank, np.float32))
        self._ranks.append((rank, is_conv(down)))
        return (a.size + b.size) * WIDTH[self._plan.dtype] + 4

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Complete the file."""
        self._writer.finish()
        metadata = self._described(self._ranks)
        if metadata == self._metadata:
            return
        # Ranks came out smaller than planned, and the header says which they are.
        written = Checkpoint(self._path)
        again = Writer(self._path, self._expected, metadata)
        for tensor in written.tensors():
            again.append_stored(tensor.name, written, tensor.name)
        again.finish()

    def _keys(self, tensor: str) -> dict[str, str]:
        stem = self._names.stem(tensor)
        if stem is None:
            raise SelectionError(no_name(tensor))
        return keys_at(stem)

    def _described(self, ranks: Sequence[tuple[int, bool]]) -> dict[str, str]:
        modules = [(rank, float(rank), conv) for rank, conv in ranks]
        return described(self._plan.base, modules, self._plan.metadata)


def no_name(tensor: str) -> str:
    """Why factors of a tensor cannot be written, and what to do."""
    return (
        f"the format `kohya` has no name for factors of `{tensor}`: leave it out with `resize` or `combine` "
        "(--exclude REGEX)"
    )


def keys_at(stem: str) -> dict[str, str]:
    """The keys of a module, by part."""
    return {"up": f"{stem}.lora_up.weight", "down": f"{stem}.lora_down.weight", "alpha": f"{stem}.alpha"}


def is_conv(down: Sequence[int]) -> bool:
    """Whether kohya counts a module to the convolutions, which have a rank of their own: kernels of 1 are not."""
    return math.prod(down[2:]) != 1


def described(base: Model, modules: Sequence[tuple[int, float, bool]], kept: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file with these modules (rank, alpha, whether it is a convolution's), the rest being kept."""
    linear = [(rank, alpha) for rank, alpha, has_kernel in modules if not has_kernel]
    conv = [(rank, alpha) for rank, alpha, has_kernel in modules if has_kernel]
    dim, alpha = _common(linear or conv)
    own = dict(zip(("conv_dim", "conv_alpha"), _common(conv), strict=True)) if conv else {}
    # What the file said of its base is better founded than a guess.
    known = {"ss_network_module": "networks.lora", **_version(base), **kept}
    known = {name: value for name, value in known.items() if name not in STALE}
    ranks = {"ss_network_dim": dim, "ss_network_alpha": alpha, "ss_network_args": _arguments(known, own)}
    return known | ranks


def _arguments(known: Mapping[str, str], arguments: Mapping[str, str]) -> str:
    """`ss_network_args` with the ranks of convolutions, whatever else it said being kept."""
    try:
        before = json.loads(known.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        before = {}
    others = (
        {k: v for k, v in before.items() if k not in {"conv_dim", "conv_alpha"}} if isinstance(before, dict) else {}
    )
    return json.dumps({**others, **arguments})


def _common(modules: Sequence[tuple[int, float]]) -> tuple[str, str]:
    """The rank and alpha of all, or "Dynamic" as kohya's resizing writes it."""
    ranks, alphas = {rank for rank, _ in modules}, {alpha for _, alpha in modules}
    dim = str(min(ranks)) if len(ranks) == 1 else "Dynamic"
    return dim, f"{min(alphas):g}" if len(alphas) == 1 else "Dynamic"


def _version(base: Model) -> dict[str, str]:
    """What kohya calls a UNet's base, where its configuration tells."""
    width = base.config.get("cross_attention_dim") if "UNet" in str(base.config.get("_class_name", "")) else None
    version = VERSIONS.get(width) if isinstance(width, int) else None
    return {} if version is None else {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
