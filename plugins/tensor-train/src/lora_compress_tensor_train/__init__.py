"""Tensor trains as decompositions of ΔW (Oseledets 2011), in two orders of its split rows and columns.

    tensor-train                o1 a, a o2 b, b i1 c, c i2 -> (o1 o2) (i1 i2)       `chain.py`
    tensor-train-interleaved    o1 i1 a, a o2 i2 -> (o1 o2) (i1 i2)                 `interleaved.py`

`tt_svd` and `tt_round` are the two algorithms of the field for any number of cores, to a prescribed accuracy.
"""

from __future__ import annotations

from collections.abc import Callable

import lora_compress

from lora_compress_tensor_train.chain import TENSOR_TRAIN
from lora_compress_tensor_train.cores import tt_round, tt_svd
from lora_compress_tensor_train.interleaved import INTERLEAVED

__all__ = ["INTERLEAVED", "TENSOR_TRAIN", "register_decompositions", "tt_round", "tt_svd"]


@lora_compress.hookimpl
def register_decompositions(register: Callable[[lora_compress.Decomposition], None]) -> None:
    """Register both."""
    register(TENSOR_TRAIN)
    register(INTERLEAVED)
