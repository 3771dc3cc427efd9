//! Ranks from singular values alone: no matrix is touched here.
//!
//! A [`Spectrum`] holds what one read of a delta has told: its leading σ, its energy ‖Δ‖² and the energy that rounding alone has
//! put there. A [`Rule`] turns one spectrum into a rank; [`Allocation`] shares bytes out among many.
//!
//! | file | question |
//! |---|---|
//! | `mod` | what a spectrum says by itself: errors, noise edges, effective ranks, a merged LoRA |
//! | `rules` | the rank of one tensor |
//! | `allocate` | the ranks of all tensors under one budget, or for one error |

mod allocate;
mod rules;

pub use allocate::{Allocation, Candidate, Goal, Step};
pub use rules::Rule;

use crate::error::{Error, Result};

/// Σσ² may exceed ‖Δ‖² by this share: both are sums that have been rounded.
const SLACK: f64 = 1e-3;
/// Energy below this share of ‖Δ‖² cannot be told from rounding of the sums.
const NOTHING: f64 = 1e-9;
/// A merged LoRA ends in a cliff: σ falls by this factor or more …
const CLIFF: f64 = 1.3;
/// … onto a floor that looks like white noise: its largest σ is what such noise of its energy would have, within a factor that
/// grows with the fall at this slope, from 1 to the limit below. Rounding noise is not quite white, since its variance follows the
/// size of the weights: rows of outliers stand out of it (by a factor of 3 in BERT's output layers), which only a high cliff can
/// be told from. And the flat end of a fine-tune's spectrum is not quite grey: a low cliff has to lead to white noise.
const SLOPE: f64 = 0.6;
const GREY: f64 = 4.0;
/// What lies behind the cliff is rounding noise, and no more than this factor above its estimate: where updates are smaller than
/// the spacing of the weights, most of them are lost and the few others too large (7 was seen at ‖Δ‖/‖W‖ = 0.001 in bf16).
const EXPLAINED: f64 = 10.0;

/// The leading singular values of one Δ and what else is known of it.
#[derive(Debug, Clone)]
pub struct Spectrum {
    rows: usize,
    cols: usize,
    sigma: Vec<f64>,
    /// `captured[k]` = Σ_{i<k} σ_i².
    captured: Vec<f64>,
    energy: f64,
    base_energy: f64,
    rounding_energy: f64,
}

impl Spectrum {
    /// Of a (`rows`, `cols`) delta with these leading σ, descending. `energy` is ‖Δ‖², `base_energy` ‖W_base‖²,
    /// `rounding_energy` Σ spacing²/12 over the elements that changed ([`crate::Delta::rounding_energy`]).
    ///
    /// # Errors
    /// [`Error::Spectrum`] when that cannot be a spectrum: negative, unordered or infinite values, more of them than the shorter
    /// side has, or with more energy than there is.
    pub fn new(
        (rows, cols): (usize, usize),
        sigma: Vec<f64>,
        energy: f64,
        base_energy: f64,
        rounding_energy: f64,
    ) -> Result<Self> {
        let captured: Vec<f64> = std::iter::once(0.0)
            .chain(sigma.iter().scan(0.0, |sum, value| {
                *sum += value * value;
                Some(*sum)
            }))
            .collect();
        let is_energy = |value: f64| value >= 0.0 && value.is_finite();
        let total = captured.last().copied().unwrap_or(0.0);
        let fault = if !(is_energy(energy) && is_energy(base_energy) && is_energy(rounding_energy)) {
            "an energy is negative or not finite"
        } else if !sigma.iter().all(|value| *value >= 0.0 && value.is_finite()) {
            "a singular value is negative or not finite"
        } else if !sigma.is_sorted_by(|a, b| a >= b) {
            "the singular values do not descend"
        } else if sigma.len() > rows.min(cols) {
            "there are more singular values than the shorter side has elements"
        } else if total > energy * (1.0 + SLACK) {
            "the singular values have more energy than the delta"
        } else {
            return Ok(Self { rows, cols, sigma, captured, energy, base_energy, rounding_energy });
        };
        Err(Error::Spectrum { fault })
    }

    /// Rows of Δ.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of Δ.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The σ that are known.
    #[must_use]
    pub fn sigma(&self) -> &[f64] {
        &self.sigma
    }

    /// ‖Δ‖².
    #[must_use]
    pub fn energy(&self) -> f64 {
        self.energy
    }

    /// ‖W_base‖².
    #[must_use]
    pub fn base_energy(&self) -> f64 {
        self.base_energy
    }

    /// Energy that rounding has put into Δ.
    #[must_use]
    pub fn rounding_energy(&self) -> f64 {
        self.rounding_energy
    }

    /// Whether no σ > 0 is missing.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.sigma.len() == self.rows.min(self.cols) || self.rest(self.sigma.len()) <= NOTHING * self.energy
    }

    /// ‖Δ − Δ_k‖², the energy beyond the first `rank` directions (the known ones, where that is more).
    #[must_use]
    pub fn rest(&self, rank: usize) -> f64 {
        (self.energy - self.captured[rank.min(self.sigma.len())]).max(0.0)
    }

    /// ‖Δ − Δ_k‖ / ‖Δ‖; 0 for Δ = 0.
    #[must_use]
    pub fn error(&self, rank: usize) -> f64 {
        if self.energy > 0.0 { (self.rest(rank) / self.energy).sqrt() } else { 0.0 }
    }

    /// Share of ‖Δ‖² that rounding to tuned's dtype explains, at most 1.
    #[must_use]
    pub fn noise_share(&self) -> f64 {
        if self.energy > 0.0 { (self.rounding_energy / self.energy).min(1.0) } else { 0.0 }
    }

    /// The largest σ that rounding noise alone would have: s·(√rows + √cols) with s² the variance of an element (the edge of
    /// Marchenko & Pastur 1967). Directions below it cannot be told from noise.
    #[must_use]
    pub fn noise_edge(&self) -> f64 {
        let (rows, cols) = (self.rows as f64, self.cols as f64);
        if self.rows * self.cols == 0 {
            return 0.0;
        }
        (self.rounding_energy.min(self.energy) / (rows * cols)).sqrt() * (rows.sqrt() + cols.sqrt())
    }

    /// The hard threshold for σ that recovers a low-rank signal from that noise with the least error as sizes grow:
    /// λ(β)·√n·s, n the longer side (Gavish & Donoho 2014, arXiv 1305.5870).
    #[must_use]
    pub fn hard_threshold(&self) -> f64 {
        let (short, long) = (self.rows.min(self.cols) as f64, self.rows.max(self.cols) as f64);
        if short == 0.0 {
            return 0.0;
        }
        let beta = short / long;
        let root = (beta * beta + 14.0 * beta + 1.0).sqrt();
        let lambda = (2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + root)).sqrt();
        lambda * (self.rounding_energy.min(self.energy) / short).sqrt()
    }

    /// ‖Δ‖² / σ₁², a lower bound of the rank; 0 for Δ = 0.
    #[must_use]
    pub fn stable_rank(&self) -> f64 {
        match self.sigma.first() {
            Some(&first) if first > 0.0 => self.energy / (first * first),
            _ => 0.0,
        }
    }

    /// exp(−Σ p·ln p) with p = σ/Σσ (Roy & Vetterli 2007). The σ that are not known are taken as equal, which makes it an upper
    /// bound where some are missing.
    #[must_use]
    pub fn effective_rank(&self) -> f64 {
        let missing = if self.is_complete() { 0 } else { self.rows.min(self.cols) - self.sigma.len() };
        let tail = if missing > 0 { (self.rest(self.sigma.len()) / missing as f64).sqrt() } else { 0.0 };
        let sum = self.sigma.iter().sum::<f64>() + missing as f64 * tail;
        if sum <= 0.0 {
            return 0.0;
        }
        let term = |value: f64| if value > 0.0 { -(value / sum) * (value / sum).ln() } else { 0.0 };
        (self.sigma.iter().map(|&value| term(value)).sum::<f64>() + missing as f64 * term(tail)).exp()
    }

    /// The rank of a Δ that is low-rank but for rounding noise, as that of a merged LoRA is: σ falls off a cliff, and what lies
    /// behind it is no more than rounding explains and looks like white noise. `None` for any other Δ, and where the σ known end
    /// before the cliff.
    #[must_use]
    pub fn low_rank(&self) -> Option<usize> {
        let size = self.rows.min(self.cols);
        // A Δ of nearly full rank is no low-rank one, however small it is.
        let ranks = 1..=self.sigma.len().min(size - size.div_ceil(4));
        if let Some(exact) = ranks.clone().find(|&rank| self.rest(rank) <= NOTHING * self.energy) {
            return Some(exact);
        }
        let cliffs = ranks.filter_map(|rank| {
            let fall = self.sigma[rank - 1] / self.sigma.get(rank).copied().filter(|&next| next > 0.0)?;
            let floor = self.bulk_edge(rank) * (1.0 + SLOPE * (fall - 1.0)).min(GREY);
            let is_noise = self.sigma[rank] <= floor && self.rest(rank) <= EXPLAINED * self.rounding_energy;
            (fall >= CLIFF && is_noise).then_some((rank, fall))
        });
        cliffs.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(rank, _)| rank)
    }

    /// Whether a cliff may lie beyond the σ that are known: as many directions again as are known, twice over, of the size of the
    /// last one would hold all that is left (in a fine-tune far more than that are left), and the last one still stands out of
    /// white noise with that energy (behind a cliff none does).
    #[must_use]
    pub fn may_end_soon(&self) -> bool {
        let (known, Some(&last)) = (self.sigma.len(), self.sigma.last()) else { return !self.is_complete() };
        let stands_out = last > 1.1 * self.bulk_edge(known);
        !self.is_complete() && stands_out && self.rest(known) <= 2.0 * known as f64 * last * last
    }

    /// The largest σ that white noise with all the energy beyond the first `rank` directions would have; 0 where none is left.
    #[must_use]
    pub fn bulk_edge(&self, rank: usize) -> f64 {
        if rank >= self.rows.min(self.cols) {
            return 0.0;
        }
        let (rows, cols) = ((self.rows - rank) as f64, (self.cols - rank) as f64);
        (self.rest(rank) / (rows * cols)).sqrt() * (rows.sqrt() + cols.sqrt())
    }
}
