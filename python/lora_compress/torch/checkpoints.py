"""What a training checkpoint can do without: the base, which nobody trains."""

from __future__ import annotations

from torch import nn

from lora_compress.torch.adapter import Adapters

EXTRA_STATE = "_extra_state"


def base_names(module: nn.Module) -> set[str]:
    """Names in a module's state dict of frozen parameters that are no factors, a tied one's every name; and of what
    quantised ones are stored with (scales, code books).

    What remains is all that training changes (factors, whatever else was made trainable, buffers) and frozen factors.
    """
    factors = {id(each) for child in module.modules() if isinstance(child, Adapters) for each in child.parameters()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    frozen = {name for name, each in parameters.items() if not each.requires_grad and id(each) not in factors}
    layers = {name.rpartition(".")[0] for name in frozen}
    # Layers put these into state dicts by themselves: they are neither parameters nor buffers.
    unnamed = {*module.state_dict()} - {*parameters} - {name for name, _ in module.named_buffers()}
    return frozen | {name for name in unnamed if not name.endswith(EXTRA_STATE) and _is_below(name, layers)}


def _is_below(name: str, layers: set[str]) -> bool:
    """Whether a name is that of something in one of the layers."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            return True
    return False
