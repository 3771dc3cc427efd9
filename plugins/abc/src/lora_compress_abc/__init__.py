"""Three factors: ΔW ≈ C·G·A, alone or with factors that layers share.

| name | contraction | which layers share |
|---|---|---|
| `abc` | `out p, p q, q in` | none: U, diag(σ) and Vᵀ |
| `abc-shared-input` | `layer out r, r in` | those of one input (q, k, v; gate, up) have one A |
| `abc-shared-depth` | `out p, layer p q, q in` | those of one kind in all blocks have one C and one A |

All lower exactly to pairs (B, A), so PEFT and its servers read them; only the format `factors` stores what is shared
once.
"""

from collections.abc import Callable

from lora_compress import Decomposition, across_depth, hookimpl, same_input

from lora_compress_abc import depth, layer, shared_input

ABC = Decomposition(
    "abc",
    "out p, p q, q in",
    description="three factors, the singular values in the middle",
    fit=layer.fit,
)
SHARED_INPUT = Decomposition(
    "abc-shared-input",
    "layer out r, r in",
    description="layers of one input share the factor next to it",
    fit=shared_input.fit,
    group=same_input,
)
SHARED_DEPTH = Decomposition(
    "abc-shared-depth",
    "out p, layer p q, q in",
    description="layers of one kind share both outer factors (Tucker-2)",
    axes=depth.axes,
    fit=depth.fit,
    group=across_depth,
)


@hookimpl
def register_decompositions(register: Callable[[Decomposition], None]) -> None:
    """Register all three."""
    for decomposition in (ABC, SHARED_INPUT, SHARED_DEPTH):
        register(decomposition)
