"""Output that appears complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_compress.errors import OutputExistsError


@contextmanager
def new_directory(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A directory to fill, renamed to `out` when the block ends and removed when it raises.

    It is made beside `out`, because a rename cannot cross file systems. Raises `OutputExistsError` when `out` exists
    and is not an empty directory (unless `force`), or is or contains one of `inputs` (always).
    """
    check(out, force=force, inputs=inputs)
    if not out.is_symlink():
        # `.` has a name and a parent too.
        out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{secrets.token_hex(8)}.partial"
    try:
        # Made inside the block that removes it: a signal may arrive between any two lines.
        partial.mkdir()
        yield partial
        if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
            # Filled where it stands: somebody's shell may be in it.
            for path in sorted(partial.iterdir()):
                path.rename(out / path.name)
            return
        if out.is_symlink() or out.is_file():
            out.unlink()
        elif out.exists():
            _replace(out, partial)
            return
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Raise `OutputExistsError` unless `out` may be written; called before any work."""
    resolved = out.resolve()
    for path in inputs:
        source, named = path.resolve(), path.absolute()
        if source == resolved or resolved in {*source.parents, *named.parents}:
            raise OutputExistsError(f"the output `{out}` would replace the input `{path}`")
        if out.exists() and source == resolved.parent:
            raise OutputExistsError(f"the output `{out}` would replace a part of the input `{path}`")
    if os.path.lexists(out) and not (out.is_dir() or out.is_file()):
        raise OutputExistsError(f"`{out}` is a device, a pipe or a dangling link, which is never replaced")
    if not force and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        state = "exists" if out.is_file() else "exists and is not empty"
        raise OutputExistsError(f"`{out}` {state}: choose another output or pass --force")
    if force and out.is_dir() and any(out.iterdir()):
        here = Path.cwd()
        if resolved in {here, *here.parents}:
            raise OutputExistsError(f"`{out}` is where you are, or above it: that is never replaced")
        if not _is_ours(out):
            raise OutputExistsError(f"`{out}` holds neither an adapter nor a model: --force replaces nothing else")


def check_file(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """As `check`, for a file; makes its folder."""
    check(out, force=force, inputs=inputs)
    if out.is_dir():
        raise OutputExistsError(f"`{out}` is a directory: choose a file")
    out.parent.mkdir(parents=True, exist_ok=True)


def _is_ours(out: Path) -> bool:
    """Whether a directory looks like what is written here: an adapter, a model, or the files beside one."""
    return any(out.glob("*.safetensors")) or any(
        (out / name).exists() for name in ("adapter_config.json", "lora_compress")
    )


def _replace(out: Path, partial: Path) -> None:
    """Put `partial` in the place of the directory `out`, which survives until its successor stands."""
    old = out.parent / f".{out.name}.{secrets.token_hex(8)}.old"
    try:
        out.rename(old)
        partial.rename(out)
    except BaseException:
        if not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
