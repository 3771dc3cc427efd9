"""What a training checkpoint can do without: the base, which nobody trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from lora_compress.torch.adapter import all_factors


def base_names(module: nn.Module) -> set[str]:
    """Names in a module's state dict of frozen parameters that are no factors, a tied one's every name; and of what
    quantised ones are stored with (scales, code books).

    What remains is all that training changes (factors, whatever else was made trainable, buffers) and frozen factors.
    """
    factors = {id(each) for each in all_factors(module)}
    names = {
        name
        for name, each in module.named_parameters(remove_duplicate=False)
        if not each.requires_grad and id(each) not in factors
    }
    for path, layer in module.named_modules(remove_duplicate=False):
        own = list(layer.parameters(recurse=False))
        if own and not any(each.requires_grad or id(each) in factors for each in own):
            prefix = path + "." if path else ""
            names |= {prefix + name for name in _unnamed(layer)}
    # What checkpoints activations takes its own name out of state dicts.
    return {name.replace(_CHECKPOINT_PREFIX, "") for name in names}


def _unnamed(layer: nn.Module) -> set[str]:
    """What a layer puts into state dicts that is neither a parameter nor a buffer of it."""
    if type(layer)._save_to_state_dict is nn.Module._save_to_state_dict:
        return set()
    saved: dict[str, Any] = {}
    # The layer's own part of `state_dict()`: that of a whole model would gather what is sharded.
    layer._save_to_state_dict(saved, "", True)
    return {*saved} - {*layer._parameters, *layer._buffers, _EXTRA_STATE_KEY_SUFFIX}
