"""What a training checkpoint can do without: the base, which nobody trains."""

from __future__ import annotations

from torch import nn

from lora_compress.torch.adapter import Adapters


def base_names(module: nn.Module) -> set[str]:
    """Names in a module's state dict of frozen parameters that are no factors, a tied one's every name.

    What remains is all that training changes (factors, whatever else was made trainable, buffers) and frozen factors.
    """
    factors = {id(each) for child in module.modules() if isinstance(child, Adapters) for each in child.parameters()}
    return {
        name
        for name, each in module.named_parameters(remove_duplicate=False)
        if not each.requires_grad and id(each) not in factors
    }
