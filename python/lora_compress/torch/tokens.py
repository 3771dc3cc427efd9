"""Calibration data: a text file, or token ids that somebody else has made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from lora_compress.errors import SelectionError


def read_tokens(path: str | Path, model: Path, *, context: int, most: int) -> torch.Tensor:
    """Windows of token ids, int64 (n, context), at least two and at most `most` tokens in all, spread over the file.

    `.npy` (integers of one or two dimensions) and `.json` (a list of them) hold ids; anything else is text, for the
    tokenizer beside `model`. Raises `SelectionError`.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            ids = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            ids = np.array(json.loads(path.read_text(encoding="utf-8")))
        else:
            ids = _tokenized(path.read_text(encoding="utf-8"), model)
    except (ValueError, EOFError, RecursionError) as error:
        raise SelectionError(f"`{path}` is neither text in UTF-8 nor token ids: {error}") from error
    if ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise SelectionError(f"`{path}` holds no token ids")
    flat = torch.from_numpy(ids.astype(np.int64).reshape(-1))
    context = min(context, len(flat) // 2)
    if context < 8:
        raise SelectionError(
            f"`{path}` has {len(flat)} tokens: two windows of 8 are the least that calibrates and checks"
        )
    windows = flat[: len(flat) // context * context].view(-1, context)
    wanted = max(2, most // context)
    if len(windows) <= wanted:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, wanted).long()]


def _tokenized(text: str, model: Path) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SelectionError(
            f"`{model}` has no tokenizer: give token ids as .npy or .json instead of text ({error})"
        ) from error
    return np.array(tokenizer(text).input_ids, dtype=np.int64)
