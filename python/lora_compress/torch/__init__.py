"""What needs PyTorch and transformers (`pip install 'lora-compress[torch]'`): nothing else of this package imports
them.

`attach` gives a model adapters of any decomposition to train; `AdapterSet` is what it returns. `suggest` says which
ranks to train with.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_compress.torch.adapter_set import AdapterSet
    from lora_compress.torch.install import attach
    from lora_compress.torch.suggestion import suggest

__all__ = ["AdapterSet", "attach", "suggest"]

_HOME = {"AdapterSet": "adapter_set", "attach": "install", "suggest": "suggestion"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
