"""How verbs report progress: to nobody, unless the caller passes something with these methods."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives progress; may be called from the thread that called the verb only."""

    def begin(self, what: str, nbytes: int, tensors: int) -> None:
        """A stage of work over so many bytes and tensors begins."""
        ...

    def advance(self, nbytes: int, tensors: int = 0, tensor: str = "") -> None:
        """So many more are done, `tensor` being the last."""
        ...


class Silent:
    """Ignores all reports."""

    def begin(self, what: str, nbytes: int, tensors: int) -> None:
        """Ignore."""

    def advance(self, nbytes: int, tensors: int = 0, tensor: str = "") -> None:
        """Ignore."""
