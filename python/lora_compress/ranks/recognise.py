"""What a fine-tune is, judged by its spectra: a merged LoRA, mostly rounding noise, or no fine-tune of this base at
all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_compress.ranks.text import some

if TYPE_CHECKING:
    from lora_compress.ranks.plan import Plan

# A tensor whose ΔW has more than this share of its energy from rounding keeps little that can be told from noise.
NOISY = 0.5
# ‖ΔW‖/‖W‖ of two models that were initialised apart is about √2; of full fine-tunes it stays far below.
UNRELATED = 1.0
LARGE = 0.3
# A spectrum is flat whose largest σ is hardly above what white noise would have.
FLAT = 1.2


@dataclass(frozen=True, slots=True)
class Recognition:
    """What was recognised. `merged_rank` is the largest rank of a fine-tune whose every ΔW is low-rank."""

    merged_rank: int | None
    noise_share: float
    relative_delta: float
    warnings: tuple[str, ...]


def recognise(plan: Plan) -> Recognition:
    """Judge a plan's tensors together; gradients are no fine-tune, and nothing is recognised in them."""
    spectra = [
        tensor.spectrum for tensor in plan.low_rank if tensor.spectrum is not None and tensor.spectrum.energy > 0
    ]
    if not spectra or plan.is_of_gradients:
        return Recognition(None, 0.0, 0.0, ())
    energy = math.fsum(spectrum.energy for spectrum in spectra)
    base_energy = math.fsum(spectrum.base_energy for spectrum in spectra)
    noise = math.fsum(spectrum.noise_share * spectrum.energy for spectrum in spectra) / energy
    relative = math.sqrt(energy / base_energy) if base_energy else 0.0
    ranks = [spectrum.low_rank for spectrum in spectra]
    known = [rank for rank in ranks if rank is not None]
    merged = max(known) if len(known) == len(ranks) else None
    warnings = []
    if relative >= UNRELATED:
        warnings.append(
            f"‖ΔW‖ is {relative:.2f} × ‖W_base‖: tuned is no fine-tune of this base (unrelated models are at 1.41); an "
            "adapter will not bring it back"
        )
    elif relative >= LARGE and merged is None:
        kept = math.fsum(spectrum.energy - spectrum.rest(8) for spectrum in spectra) / energy
        even = math.fsum(
            spectrum.energy for spectrum in spectra if spectrum.sigma.max(initial=0.0) <= FLAT * spectrum.bulk_edge
        )
        flat = " and its spectra are flat" if even > 0.5 * energy else ""
        warnings.append(
            f"‖ΔW‖ is {relative:.2f} × ‖W_base‖{flat}: more a retraining than a fine-tune; is this the right base? "
            f"(the first 8 directions hold {kept:.0%} of ‖ΔW‖²)"
        )
    if noise >= NOISY:
        warnings.append(
            f"{noise:.0%} of ‖ΔW‖² is what rounding to {_dtypes(plan)} alone adds (‖ΔW‖ is {relative:.1e} × ‖W_base‖): "
            "errors relative to ‖ΔW‖ say little, and ranks end at the noise"
        )
    else:
        noisy = [tensor.name for tensor in plan.low_rank if tensor.spectrum and tensor.spectrum.noise_share >= NOISY]
        if noisy:
            warnings.append(f"{some(noisy)}: more than half of ΔW is rounding noise")
    return Recognition(merged, noise, relative, tuple(warnings))


def _dtypes(plan: Plan) -> str:
    return " and ".join(sorted({tensor.dtype for tensor in plan.low_rank}))
