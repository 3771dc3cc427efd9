"""Turn a full fine-tune into a small adapter, check it, and merge adapters back.

    >>> import lora_compress
    >>> plan = lora_compress.plan("base/", "tuned/", budget="50MB")              # doctest: +SKIP
    >>> result = lora_compress.extract("base/", "tuned/", "adapter/", plan=plan) # doctest: +SKIP
    >>> lora_compress.verify("base/", "tuned/", "adapter/").ok                   # doctest: +SKIP
    >>> lora_compress.merge("base/", ["adapter/"], "merged/")                    # doctest: +SKIP

The pipeline, one way: checkpoint → delta → spectrum → plan (ranks) → factors → adapter → merged checkpoint. The verbs
here are those of the command line, with the same names. Importing this package loads neither plugins nor NumPy: names
are resolved when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_compress._native import Allocation, Checkpoint, Delta, Spectrum, __version__, set_threads
    from lora_compress.decompositions.groups import across_depth, same_input
    from lora_compress.decompositions.interface import Decomposition, Layer
    from lora_compress.errors import (
        AdapterError,
        CheckpointError,
        LoraCompressError,
        PlanError,
        PluginError,
        SelectionError,
        TensorError,
    )
    from lora_compress.hookspecs import hookimpl
    from lora_compress.initialisations.interface import Initialisation, Start
    from lora_compress.ranks.choice import RankChoice
    from lora_compress.ranks.plan import Plan
    from lora_compress.verbs.base_patch import unmerge
    from lora_compress.verbs.changes import Options
    from lora_compress.verbs.check import check
    from lora_compress.verbs.combine import combine, resize
    from lora_compress.verbs.compare import compare
    from lora_compress.verbs.convert import convert
    from lora_compress.verbs.extract import extract
    from lora_compress.verbs.inspect import inspect
    from lora_compress.verbs.merge import merge
    from lora_compress.verbs.plan import plan
    from lora_compress.verbs.verify import verify

_HOME = {
    "Allocation": "_native",
    "AdapterError": "errors",
    "Checkpoint": "_native",
    "CheckpointError": "errors",
    "Decomposition": "decompositions.interface",
    "Delta": "_native",
    "Initialisation": "initialisations.interface",
    "Layer": "decompositions.interface",
    "LoraCompressError": "errors",
    "Options": "verbs.changes",
    "Plan": "ranks.plan",
    "PlanError": "errors",
    "PluginError": "errors",
    "RankChoice": "ranks.choice",
    "SelectionError": "errors",
    "Spectrum": "_native",
    "Start": "initialisations.interface",
    "TensorError": "errors",
    "__version__": "_native",
    "across_depth": "decompositions.groups",
    "check": "verbs.check",
    "combine": "verbs.combine",
    "compare": "verbs.compare",
    "convert": "verbs.convert",
    "extract": "verbs.extract",
    "hookimpl": "hookspecs",
    "inspect": "verbs.inspect",
    "merge": "verbs.merge",
    "plan": "verbs.plan",
    "resize": "verbs.combine",
    "same_input": "decompositions.groups",
    "set_threads": "_native",
    "unmerge": "verbs.base_patch",
    "verify": "verbs.verify",
}

__all__ = [
    "AdapterError",
    "Allocation",
    "Checkpoint",
    "CheckpointError",
    "Decomposition",
    "Delta",
    "Initialisation",
    "Layer",
    "LoraCompressError",
    "Options",
    "Plan",
    "PlanError",
    "PluginError",
    "RankChoice",
    "SelectionError",
    "Spectrum",
    "Start",
    "TensorError",
    "__version__",
    "across_depth",
    "check",
    "combine",
    "compare",
    "convert",
    "extract",
    "hookimpl",
    "inspect",
    "merge",
    "plan",
    "resize",
    "same_input",
    "set_threads",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
