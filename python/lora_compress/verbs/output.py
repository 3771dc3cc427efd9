"""Output that appears complete or not at all, and never in the place of what it may not replace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_compress.errors import OutputExistsError
from lora_compress.hub import local
from lora_compress.verbs.partial import PartialDirectory, is_filled, partial_directory, remove_dead_ones, stands_alone


@contextmanager
def new_directory(out: Path, *, force: bool, inputs: tuple[Path, ...] = (), key: str | None = None) -> Iterator[Path]:
    """A directory to fill, renamed to `out` when the block ends and removed when it raises.

    Raises `OutputExistsError` when `out` exists and is not an empty directory (unless `force`), or is or contains one
    of `inputs` (always): at the beginning, and at the end again, as another process may have been faster.

    key: says what the output will be; the directory may then hold what a killed process has made of it. Two processes
    with the same key do not write at the same time: the second gets an `OutputExistsError`.
    """
    with _partial(out, key, force=force, inputs=inputs) as partial:
        yield partial.made
        check(out, force=force, inputs=inputs)
        _put(partial, force=force)
        remove_dead_ones(partial.out)


@contextmanager
def new_file(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """As `new_directory`, for a file."""
    with _partial(out, None, force=force, inputs=inputs) as partial:
        made = partial.made / partial.out.name
        yield made
        check(out, force=force, inputs=inputs)
        made.replace(partial.out)
        remove_dead_ones(partial.out)


@contextmanager
def _partial(out: Path, key: str | None, *, force: bool, inputs: tuple[Path, ...]) -> Iterator[PartialDirectory]:
    # `.` has a name and a parent too.
    place = out if out.is_symlink() else out.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial_directory(place, key) as partial:
            check(out, force=force, inputs=inputs)
            yield partial
    except OSError as error:
        # Of a full disk Python names no file, or the source of a copy; and nobody knows the hidden directory.
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        if error.strerror is None or (paths and not any(f"{os.sep}.{place.name}." in path for path in paths)):
            raise
        # The core's text may go on with a temporary file's name.
        raise OSError(error.errno, error.strerror.partition(" (os error")[0], str(out)) from error


def _put(partial: PartialDirectory, *, force: bool) -> None:
    """Make the output visible. What it replaces survives until it stands."""
    out, made = partial.out, partial.made
    if out.is_dir() and not out.is_symlink() and not is_filled(out):
        _move_into(out, made)
        return
    try:
        # Not without `force`: then the rename fails where something has come up since it was looked for.
        if os.path.lexists(out) and (force or out.is_symlink()):
            out.rename(partial.replaced)
        made.rename(out)
    except BaseException as error:
        if os.path.lexists(partial.replaced) and not os.path.lexists(out):
            partial.replaced.rename(out)
        if isinstance(error, OSError) and os.path.lexists(out) and not force:
            raise OutputExistsError(f"`{out}` exists: another process has written it") from error
        raise


def _move_into(out: Path, made: Path) -> None:
    """Fill an empty directory where it stands: somebody's shell may be in it."""
    names = sorted(path.name for path in made.iterdir())
    try:
        for name in names:
            (made / name).rename(out / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(made / name):
                (out / name).rename(made / name)
        raise


def check(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Raise `OutputExistsError` unless `out` may be written; called before any work."""
    resolved = out.resolve()
    for path in inputs:
        source, named = local(path).resolve(), path.absolute()
        if source == resolved or resolved in {*source.parents, *named.parents}:
            raise OutputExistsError(f"the output `{out}` would replace the input `{path}`")
        if out.exists() and source == resolved.parent:
            raise OutputExistsError(f"the output `{out}` would replace a part of the input `{path}`")
    if os.path.lexists(out) and not (out.is_dir() or out.is_file()):
        raise OutputExistsError(f"`{out}` is a device, a pipe or a dangling link, which is never replaced")
    filled = resolved.is_dir() and is_filled(resolved)
    if not force and (out.is_file() or filled):
        state = "exists" if out.is_file() else "exists and is not empty"
        raise OutputExistsError(f"`{out}` {state}: choose another output or pass --force")
    if force and filled:
        here = Path.cwd()
        if resolved in {here, *here.parents}:
            raise OutputExistsError(f"`{out}` is where you are, or above it: that is never replaced")
        if not _is_ours(out):
            raise OutputExistsError(f"`{out}` holds neither an adapter nor a model: --force replaces nothing else")
        if stands_alone(out if out.is_symlink() else resolved):
            raise OutputExistsError(f"`{out}` is mounted, or in a read-only folder: only a directory in it is replaced")


def check_directory(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """As `check`, where a file would be asked for by its name."""
    check(out, force=force, inputs=inputs)
    if out.suffix == ".safetensors":
        raise OutputExistsError(f"`{out}` would be a directory: choose a name without `.safetensors` for it")


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
