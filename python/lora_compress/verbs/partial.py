"""Where output grows before it appears: a hidden directory beside it, held by the process that fills it.

    .NAME.KEY.partial/    KEY: 16 hexadecimal digits, random unless the work can be taken up again
        lock              held by its process as long as that lives; also the sign that the directory is ours
        made/             what becomes the output, by one rename
        replaced          what the output replaces, until it stands
        journal.json      of a merge: which files in `made` are complete (verbs/journal.py)

Beside the output, because a rename cannot cross file systems; for the same reason inside it where that is an empty
directory that nothing can be put beside: a volume of a container, say.

An exception removes it. A killed process leaves it: the same work finds it again by its key, and the next run for the
same output that succeeds removes it. That nobody holds the lock tells a dead directory from one that is at work, so
where there are no such locks nothing is taken up or removed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_compress.errors import OutputExistsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK, MADE, REPLACED = "lock", "made", "replaced"
KEY_DIGITS = 16


class PartialDirectory:
    """The hidden directory of an output. Without a `key` its name is random, so that nobody else has it."""

    def __init__(self, out: Path, key: str | None = None) -> None:
        self.out = out
        self._is_free = key is None
        digits = secrets.token_hex(KEY_DIGITS // 2) if key is None else key[:KEY_DIGITS]
        self._path = (out if stands_alone(out) else out.parent) / f".{out.name}.{digits}.partial"
        self._lock = -1

    @property
    def made(self) -> Path:
        """What becomes the output."""
        return self._path / MADE

    @property
    def replaced(self) -> Path:
        """Where what the output replaces waits."""
        return self._path / REPLACED

    def take(self) -> bool:
        """Make it, or take up what a killed process has left; False where it cannot be kept from others.

        Raises `OutputExistsError` while another process holds it.
        """
        while True:
            try:
                self._path.mkdir(mode=0o700, exist_ok=True)
            except FileExistsError:
                return False
            try:
                if not _is_own_directory(self._path):
                    return False
                self._lock = os.open(self._path / LOCK, _FLAGS | os.O_CREAT, 0o600)
            except FileNotFoundError:  # Removed meanwhile, by one that took it for a dead one's.
                continue
            except OSError:
                return False
            locked = _try_lock(self._lock)
            if locked is None:
                return False
            if _is_same(self._lock, self._path / LOCK):
                if not locked:
                    raise OutputExistsError(f"`{self.out}`: another process is writing it")
                return True
            self._close()

    def fill(self) -> None:
        """Make the directory that becomes the output, if it is not there."""
        self.made.mkdir(exist_ok=True)
        if not os.path.lexists(self.replaced):
            return
        if os.path.lexists(self.out):
            # Its process was killed after both renames: what was replaced is not wanted back.
            if self.replaced.is_dir() and not self.replaced.is_symlink():
                shutil.rmtree(self.replaced)
            else:
                self.replaced.unlink()
        else:
            # Between them.
            self.replaced.rename(self.out)

    def release(self) -> None:
        """Remove it, unless it is another's. A signal may have ended `take` between any two lines."""
        if self._is_free:
            if fcntl is None:
                self._close()  # Windows removes no open file.
            _remove(self._path)
        elif self._lock < 0:
            remove_dead(self._path)
        elif _try_lock(self._lock) and _is_same(self._lock, self._path / LOCK):
            _remove(self._path)
        self._close()

    def _close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@contextmanager
def partial_directory(out: Path, key: str | None = None) -> Iterator[PartialDirectory]:
    """A hidden directory for `out`, removed when the block ends; with a `key`, the one that the same work has left."""
    free = PartialDirectory(out)
    keyed = None if key is None else PartialDirectory(out, key)
    # Made inside the block that removes it: a signal may arrive between any two lines.
    try:
        taken = keyed if keyed is not None and keyed.take() else free
        if taken is free:
            free.take()
        taken.fill()
        yield taken
    finally:
        free.release()
        if keyed is not None:
            keyed.release()


def stands_alone(out: Path) -> bool:
    """Whether an output is a directory that can neither be replaced nor have anything beside it."""
    return not out.is_symlink() and out.is_dir() and (os.path.ismount(out) or not os.access(out.parent, os.W_OK))


def is_filled(out: Path) -> bool:
    """Whether a directory holds anything but hidden directories of its own."""
    return any(not _is_hidden(path.name, out) for path in out.iterdir())


def remove_dead_ones(out: Path) -> None:
    """Remove what killed processes have left of earlier attempts at `out`."""
    for folder in (out.parent, *([out] if stands_alone(out) else [])):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if _is_hidden(entry.name, out):
                    remove_dead(Path(entry.path))


def remove_dead(path: Path) -> None:
    """Remove a hidden directory if it is ours and no living process holds it."""
    with suppress(OSError):
        if not _is_own_directory(path):
            return
        try:
            lock = os.open(path / LOCK, _FLAGS)
        except FileNotFoundError:
            # Killed before it had a lock, so before it had anything; of what has something the system removes nothing.
            path.rmdir()
            return
        try:
            if _try_lock(lock) and _is_same(lock, path / LOCK):
                _remove(path)
        finally:
            os.close(lock)


# Neither a link to elsewhere nor a pipe that nobody writes to.
_FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def _remove(path: Path) -> None:
    """Remove a hidden directory, the lock last: if this is killed too, what is left is still known as ours."""
    with suppress(OSError):
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink(missing_ok=True)
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()


def _is_hidden(name: str, out: Path) -> bool:
    return re.fullmatch(rf"\.{re.escape(out.name)}\.[0-9a-f]{{{KEY_DIGITS}}}\.partial", name) is not None


def _is_own_directory(path: Path) -> bool:
    """Whether it is a directory, no link to one, and of this user: others could put anything into theirs."""
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == (os.geteuid() if hasattr(os, "geteuid") else status.st_uid)


def _is_same(opened: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(opened), path.lstat())
    except FileNotFoundError:
        return False


def _try_lock(opened: int) -> bool | None:
    """Whether this process has the lock now; None where there are no locks. A dead process holds none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
