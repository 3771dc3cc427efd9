"""Stacks of experts: planned as one tensor, decomposed matrix by matrix.

Formats give the experts of one tensor one rank. So a plan sees the stack: its k-th singular value is √Σ σₖ² over the
experts, one more rank costs a direction of every expert, and ‖ΔW‖² and the energy of rounding noise are sums. Deltas,
factors, accounts and merged tensors are of `STACK[e]`, by which the core knows the e-th matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from lora_compress._native import Spectrum
from lora_compress.model import stack_of
from lora_compress.verbs.account import TensorAccount
from lora_compress.verbs.selection import Treatment

Item = TypeVar("Item")


def whole(tensor: str) -> str:
    """The stack that a matrix belongs to; any other tensor itself."""
    stack = stack_of(tensor)
    return stack[0] if stack else tensor


def join_accounts(accounts: Iterable[TensorAccount]) -> list[TensorAccount]:
    """Accounts in which every stack is one tensor."""
    joined = []
    for name, parts in _by_whole((account.name, account) for account in accounts).items():
        first = parts[0]
        if first.name == name:
            joined += parts
            continue
        treatments = {part.treatment for part in parts}
        treatment = Treatment.LOW_RANK if Treatment.LOW_RANK in treatments else first.treatment
        joined.append(
            replace(
                first,
                name=name,
                shape=(len(parts), *first.shape),
                treatment=treatment,
                delta_energy=_sum([part.delta_energy for part in parts]),
                base_energy=_sum([part.base_energy for part in parts]),
                error_energy=_sum([part.error_energy for part in parts]),
                nbytes=sum(part.nbytes for part in parts),
            )
        )
    return joined


def join_spectra(spectra: Mapping[str, Spectrum | None]) -> dict[str, Spectrum | None]:
    """The spectrum of every tensor, stacks as one. None where nothing changed."""
    joined: dict[str, Spectrum | None] = {}
    for name, parts in _by_whole(spectra.items()).items():
        known = [part for part in parts if part is not None]
        joined[name] = _pooled(known) if name not in spectra and known else (known[0] if known else None)
    return joined


def join_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Numbers that add up."""
    return {name: sum(parts) for name, parts in _by_whole(sizes.items()).items()}


def spread_ranks(ranks: Mapping[str, int], tensors: Iterable[str]) -> dict[str, int]:
    """The rank of every matrix, given those of stacks and of tensors alone."""
    return {name: ranks[whole(name)] for name in tensors if whole(name) in ranks}


def _pooled(spectra: Sequence[Spectrum]) -> Spectrum:
    # Of an incomplete spectrum the σ after the last are unknown, of a complete one they are 0.
    short = [len(spectrum.sigma) for spectrum in spectra if not spectrum.is_complete]
    count = min(short) if short else max(len(spectrum.sigma) for spectrum in spectra)
    energies = np.zeros(count)
    for spectrum in spectra:
        sigma = spectrum.sigma[:count]
        energies[: len(sigma)] += sigma**2
    return Spectrum(
        spectra[0].shape,
        np.sqrt(energies).tolist(),
        sum(spectrum.energy for spectrum in spectra),
        base_energy=sum(spectrum.base_energy for spectrum in spectra),
        rounding_energy=sum(spectrum.rounding_energy for spectrum in spectra),
    )


def _by_whole(items: Iterable[tuple[str, Item]]) -> dict[str, list[Item]]:
    parts: dict[str, list[Item]] = {}
    for name, item in items:
        parts.setdefault(whole(name), []).append(item)
    return parts


def _sum(energies: Sequence[float | None]) -> float | None:
    known = [energy for energy in energies if energy is not None]
    return sum(known) if len(known) == len(energies) else None
