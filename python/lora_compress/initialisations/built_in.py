"""The initialisations that ship with this package.

| name | factors | reference |
|---|---|---|
| `zero` | one is 0, so ΔW is; the others are random, as `Decomposition.initial` makes them | Hu et al. 2022 |
| `orthogonal` | as `zero`, the random ones with orthonormal rows or columns of the same norm | |
| `pissa` | the best of their rank for W, which loses them: W − s·ΔW₀ | Meng et al. 2024 |
| `olora` | Q and R of W, which loses them; pairs only | Büyükakyüz 2024 |
| `lora-xs` | U·diag(σ) and Vᵀ of W, frozen, and a small core between; three factors only | Bałazy et al. 2024 |

`pissa` and `lora-xs` find singular vectors by the core's truncated SVD; the weight is seen as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lora_compress.errors import SelectionError
from lora_compress.hookspecs import hookimpl
from lora_compress.initialisations.interface import Factor, Group, Initialisation, Start

# Of the core that LoRA-XS trains, at its beginning.
CORE_DEVIATION = 1e-5


def zero(group: Group) -> Start:
    """ΔW = 0."""
    first = group.seed_of(group.matrices[0])
    own = group.decomposition.network.own
    layers: list[list[Factor]] = []
    for matrix in group.matrices:
        seed = group.seed_of(matrix)
        factors = group.decomposition.initial(matrix.rows, matrix.cols, group.rank, seed=seed)
        if not all(own):
            shared = group.decomposition.initial(matrix.rows, matrix.cols, group.rank, seed=first)
            factors = [mine if is_own else ours for mine, ours, is_own in zip(factors, shared, own, strict=True)]
        layers.append(factors)
    return Start(_one_array(group, layers))


def orthogonal(group: Group) -> Start:
    """ΔW = 0, with factors that keep angles."""
    return Start(_one_array(group, [[_orthonormal(factor) for factor in layer] for layer in zero(group).layers]))


def pissa(group: Group) -> Start:
    """The principal part of W: for a pair B = U·√(σ/s), A = √(σ/s)·Vᵀ."""
    layers = group.decomposition.factors_of(group.deltas(), group.rank, seed=group.seed, tolerance=1e-4)
    share = np.float32(abs(group.scale) ** (-1 / len(layers[0])))
    # Arrays that layers share are scaled once.
    scaled = {id(factor): factor * share for layer in layers for factor in layer}
    return Start([[scaled[id(factor)] for factor in layer] for layer in layers], shifts=True)


def olora(group: Group) -> Start:
    """B = Q[:, :r], A = R[:r] of W = Q·R."""
    if group.decomposition.contraction != "out r, r in":
        raise SelectionError(f"`olora` starts pairs (B, A), which `{group.decomposition.name}` has none of")
    q, r = np.linalg.qr(group.matrices[0].weight())
    return Start([[np.ascontiguousarray(q[:, : group.rank]), np.ascontiguousarray(r[: group.rank])]], shifts=True)


def lora_xs(group: Group) -> Start:
    """U·diag(σ), a core N(0, 10⁻¹⁰), Vᵀ."""
    if group.decomposition.contraction != "out p, p q, q in":
        raise SelectionError(f"`lora-xs` trains the core between two factors, which `{group.decomposition.name}` lacks")
    matrix, delta = group.matrices[0], group.deltas()[0]
    u, sigma, vt = delta.truncated_svd(group.rank, seed=group.seed)
    rng = np.random.default_rng(group.seed_of(matrix))
    core = rng.standard_normal((len(sigma), len(sigma))) * CORE_DEVIATION
    return Start([[u * sigma.astype(np.float32), core.astype(np.float32), vt]], frozen=frozenset({0, 2}))


@hookimpl
def register_initialisations(register: Callable[[Initialisation], None]) -> None:
    """Register those of the table above."""
    register(Initialisation("zero", zero, "ΔW = 0: one factor is zero, the others are random"))
    register(Initialisation("orthogonal", orthogonal, "ΔW = 0: the random factors have orthonormal rows or columns"))
    register(Initialisation("pissa", pissa, "the principal part of W, which loses it"))
    register(Initialisation("olora", olora, "Q and R of W, which loses their product; pairs only"))
    register(
        Initialisation("lora-xs", lora_xs, "singular vectors of W, frozen, around a small core; three factors only")
    )


def _one_array(group: Group, layers: Sequence[Sequence[Factor]]) -> list[list[Factor]]:
    """What layers share as the same array in all."""
    own = group.decomposition.network.own
    return [
        [mine if is_own else ours for mine, ours, is_own in zip(layer, layers[0], own, strict=True)] for layer in layers
    ]


def _orthonormal(factor: Factor) -> Factor:
    """A random factor with orthonormal rows or columns, as a matrix of its first index and all others; of its norm."""
    norm = float(np.linalg.norm(factor))
    if factor.ndim < 2 or norm == 0:
        return factor
    flat = factor.reshape(len(factor), -1).astype(np.float64)
    tall = flat if flat.shape[0] >= flat.shape[1] else flat.T
    q, r = np.linalg.qr(tall)
    # The signs of R's diagonal make Q uniform (Mezzadri 2007).
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    found = (q if tall is flat else q.T) * (norm / math.sqrt(q.shape[1]))
    return found.reshape(factor.shape).astype(np.float32)
