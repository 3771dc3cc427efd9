"""Turn a full fine-tune into a small adapter, check it, and merge adapters back.

    >>> import lora_compress
    >>> result = lora_compress.extract("base/", "tuned/", "adapter/", rank=16)   # doctest: +SKIP
    >>> lora_compress.verify("base/", "tuned/", "adapter/").ok                   # doctest: +SKIP
    >>> lora_compress.merge("base/", ["adapter/"], "merged/")                    # doctest: +SKIP

The pipeline, one way: checkpoint → delta → factors → adapter → merged checkpoint. The verbs here are those of the
command line, with the same names. Importing this package loads neither plugins nor NumPy: names are resolved when first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_compress._native import Checkpoint, Delta, __version__, set_threads
    from lora_compress.decompositions.interface import Decomposition
    from lora_compress.errors import (
        AdapterError,
        CheckpointError,
        LoraCompressError,
        PluginError,
        SelectionError,
        TensorError,
    )
    from lora_compress.hookspecs import hookimpl
    from lora_compress.verbs.extract import extract
    from lora_compress.verbs.inspect import inspect
    from lora_compress.verbs.merge import merge
    from lora_compress.verbs.verify import verify

_HOME = {
    "AdapterError": "errors",
    "Checkpoint": "_native",
    "CheckpointError": "errors",
    "Decomposition": "decompositions.interface",
    "Delta": "_native",
    "LoraCompressError": "errors",
    "PluginError": "errors",
    "SelectionError": "errors",
    "TensorError": "errors",
    "__version__": "_native",
    "extract": "verbs.extract",
    "hookimpl": "hookspecs",
    "inspect": "verbs.inspect",
    "merge": "verbs.merge",
    "set_threads": "_native",
    "verify": "verbs.verify",
}

__all__ = [
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "Decomposition",
    "Delta",
    "LoraCompressError",
    "PluginError",
    "SelectionError",
    "TensorError",
    "__version__",
    "extract",
    "hookimpl",
    "inspect",
    "merge",
    "set_threads",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
