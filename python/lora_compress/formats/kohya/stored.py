"""kohya's file from factors as another format has them, under the names they had before where that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_compress._native import round_to
from lora_compress.errors import AdapterError, SelectionError
from lora_compress.formats.kohya.names import NameMap, stem_of
from lora_compress.formats.kohya.read import Tucker, factors_fit, number
from lora_compress.formats.kohya.rest import Rest, digest, fits
from lora_compress.formats.kohya.write import ALPHA_DTYPE, described, is_conv, keys_at, no_name
from lora_compress.formats.stored import StoredPair, Tensor, shapes, write
from lora_compress.model import Model


@dataclass(frozen=True, slots=True)
class Entry:
    """One module to write: its keys, the shapes of up and down, what of it is copied as it was before."""

    pair: StoredPair
    keys: Mapping[str, str]
    forms: tuple[list[int], list[int]]
    old_alpha: str | None
    has_alpha: bool
    is_tucker: bool
    is_as_before: bool

    @property
    def described(self) -> tuple[int, float, bool]:
        """As the metadata describes it."""
        return self.pair.rank, self.pair.alpha, is_conv(self.forms[1])


def write_stored(
    path: Path, base: Model, pairs: Sequence[StoredPair], rest: Rest | None, prefix: str | None, dtype: str | None
) -> int:
    """Write the file; return the bytes of the factors. Raises `SelectionError` for a tensor that has no name there."""
    names = NameMap(base, prefix)
    if prefix is not None and names.roots:
        raise SelectionError(
            f"`{base.path}` holds several components, whose prefixes are known: a prefix is for the one of a directory"
        )
    rest = rest if prefix is None else None
    entries = [_entry(base, names, pair, rest) for pair in pairs]
    used: dict[str, str] = {}
    for entry in entries:
        for key in entry.keys.values():
            if used.setdefault(key, entry.pair.tensor) != entry.pair.tensor:
                raise AdapterError(f"`{entry.pair.tensor}` and `{used[key]}` would both be `{key}`")
    tensors = [tensor for entry in entries for tensor in _tensors(entry, rest, dtype)]
    metadata = described(base, [entry.described for entry in entries], rest.metadata if rest is not None else {})
    if rest is not None and dtype is None and _is_whole(entries, rest):
        metadata = dict(rest.metadata)
    return write(path, tensors, metadata)


def _is_whole(entries: Sequence[Entry], rest: Rest) -> bool:
    """Whether what is written is the file that was kept."""
    pairs = [(entry.pair.file, entry.pair.b, entry.pair.a) for entry in entries if not entry.is_tucker]
    known = set(rest.keys) == {entry.pair.tensor for entry in entries}
    return known and all(entry.is_as_before for entry in entries) and digest(pairs) == rest.digest


def _entry(base: Model, names: NameMap, pair: StoredPair, rest: Rest | None) -> Entry:
    forms = shapes(base.checkpoint.info(pair.tensor).shape, pair.rank)
    keys: Mapping[str, str] | None = rest.keys.get(pair.tensor) if rest is not None else None
    if rest is None or keys is None:
        stem = names.stem(pair.tensor)
        if stem is None:
            raise SelectionError(no_name(pair.tensor))
        return Entry(pair, keys_at(stem), forms, None, True, False, False)
    # Without an alpha, or with one of 0, the scale is 1.
    old = keys.get("alpha") if keys.get("alpha", "") in rest.file else None
    value = number(rest.file, old) if old is not None else 0.0
    was_tucker = _has_tucker(base, pair, rest, keys)
    rank = rest.file.info(keys["down"]).shape[0] if was_tucker else pair.rank
    is_same = (value / rank if value else 1.0) == pair.scale
    is_tucker = was_tucker and is_same and _is_as_kept(pair, rest, keys)
    if not is_tucker:
        is_same = (value / pair.rank if value else 1.0) == pair.scale
        up, down = (rest.shapes.get(keys[part], form) for part, form in zip(("up", "down"), forms, strict=True))
        if "mid" not in keys and fits(up, forms[0]) and fits(down, forms[1]):
            forms = up, down
    has_alpha = old is not None or not is_same
    named = {**keys, "alpha": keys.get("alpha", f"{stem_of(keys['up'])}.alpha")}
    as_before = is_same and is_tucker == ("mid" in keys)
    return Entry(pair, named, forms, old if is_same else None, has_alpha, is_tucker, as_before)


def _has_tucker(base: Model, pair: StoredPair, rest: Rest, keys: Mapping[str, str]) -> bool:
    """Whether three factors of the tensor's shape were kept."""
    parts = ("up", "down", "mid")
    if "mid" not in keys or not all(keys[part] in rest.file for part in parts):
        return False
    up, down, mid = (rest.file.info(keys[part]).shape for part in parts)
    return factors_fit(base.checkpoint.info(pair.tensor).shape, up, down, mid)


def _is_as_kept(pair: StoredPair, rest: Rest, keys: Mapping[str, str]) -> bool:
    """Whether a pair is still what the three factors that were kept multiply to, in its dtypes."""
    kept = Tucker(rest.file, keys, 1.0).pair()
    for values, name in zip(kept, (pair.b, pair.a), strict=True):
        stored = pair.file.read(name)
        if values.size != stored.size or (round_to(values, pair.file.info(name).dtype).ravel() != stored.ravel()).any():
            return False
    return True


def _tensors(entry: Entry, rest: Rest | None, dtype: str | None) -> list[Tensor]:
    """The tensors of a module."""
    keys, pair = entry.keys, entry.pair
    if rest is not None and entry.is_tucker:
        tensors = [_kept(rest, keys[part], dtype) for part in ("up", "mid", "down")]
    else:
        tensors = pair.tensors((keys["up"], keys["down"]), entry.forms, dtype)
    if rest is not None and entry.old_alpha is not None:
        tensors.append(_kept(rest, entry.old_alpha, None))
    elif entry.has_alpha:
        alpha = np.array(pair.alpha, np.float32)
        if alpha == 0:
            raise SelectionError(
                f"the factors of `{pair.tensor}` have the scale {pair.scale:g}, and an alpha of 0 means 1 to kohya: "
                "leave them out with `resize` or `combine` (--exclude REGEX)"
            )
        tensors.append(Tensor(keys["alpha"], ALPHA_DTYPE, [], lambda: alpha))
    return tensors


def _kept(rest: Rest, key: str, dtype: str | None) -> Tensor:
    """A tensor that was kept, under its own name."""
    info = rest.file.info(key)
    return Tensor(key, dtype or info.dtype, info.shape, (rest.file, key))
