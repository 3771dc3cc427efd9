//! When an iteration may stop: the rank that it looks for, the energy found so far, and claims that are put to the test.
//!
//! Increments of the top-r energy shrink geometrically, and their predicted sum bounds the excess. θ ≤ σ by interlacing: what
//! is claimed is always reached. But a Krylov space holds at most one direction per start vector of every repeated singular
//! value, and few of a tight cluster: it can look converged without having seen the others. So a claim has to stand two steps
//! from a random block outside the space, which sees them.

use faer::Mat;

use super::{DENSE, SvdOptions, Target};
use crate::error::Result;

/// Energy below this share of ‖Δ‖² cannot be told from rounding of the captured energy.
const ENERGY_NOISE: f64 = 1e-10;
/// Steps from the random block before a claim is believed, and its columns.
const PROBE_STEPS: usize = 2;
pub(super) const PROBE_WIDTH: usize = 16;
/// Share of the tolerance that is kept for the prediction's own error, and of what a probe may bring to light: it sees some of
/// what is hidden, not all of it.
const RESERVE: f64 = 0.5;
const HIDDEN: f64 = 0.125;

/// What follows after a step.
pub(super) enum Step {
    /// Another step from where the last one led, or from a random block where that was nowhere new.
    Go,
    /// A step from a random block.
    Probe,
    /// Nothing: the result is good enough.
    Done,
    /// Nothing: a dense method would need less work.
    Dense,
}

/// The search for a rank and its energy.
pub(super) struct Search {
    options: SvdOptions,
    energy: f64,
    /// Columns of Δ in the tall orientation.
    cols: usize,
    rank: usize,
    progress: Progress,
    probe: Option<Probe>,
    /// Size of the space when Ritz values were last looked at.
    checked_at: usize,
}

/// A claim of convergence under test: the energy captured when it was made, and the steps taken since.
struct Probe {
    captured: f64,
    steps: usize,
}

impl Search {
    pub(super) fn new(options: SvdOptions, energy: f64, cols: usize) -> Self {
        // A rank that is not known yet is looked for from the first step on.
        let rank = if let Target::Rank(rank) = options.target { rank } else { 0 };
        Self { options, energy, cols, rank, progress: Progress::default(), probe: None, checked_at: 0 }
    }

    /// The rank wanted, as far as it is known.
    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn is_probing(&self) -> bool {
        self.probe.is_some()
    }

    /// Whether the step just taken was the first from a random block.
    pub(super) fn begins_probe(&self) -> bool {
        self.probe.as_ref().is_some_and(|probe| probe.steps == 0)
    }

    /// Whether no step from where the next one leads will probably follow, once the space has `size` columns.
    pub(super) fn may_end(&self, size: usize) -> bool {
        match &self.probe {
            Some(probe) => probe.steps + 1 == PROBE_STEPS,
            None => self.is_due(size) && self.progress.expects_to_be_done(self.energy, self.options.tolerance),
        }
    }

    /// The eigenproblem costs K³: it is solved once the space could hold the rank twice, and then when the basis has grown
    /// enough for the answer to have changed.
    fn is_due(&self, size: usize) -> bool {
        size >= 2 * self.rank && 10 * size >= 11 * self.checked_at
    }

    /// Looks at the space of `size` columns after a step; `exhausted` where that led nowhere new.
    pub(super) fn step(
        &mut self,
        size: usize,
        exhausted: bool,
        ritz_values: impl FnOnce() -> Result<Vec<f64>>,
    ) -> Result<Step> {
        let due = match &mut self.probe {
            Some(probe) => {
                probe.steps += 1;
                exhausted || probe.steps == PROBE_STEPS
            }
            None => exhausted || self.is_due(size),
        };
        if !due {
            return Ok(Step::Go);
        }
        self.checked_at = size;
        let theta = ritz_values()?;
        let wanted = self.options.target.rank(&theta, self.energy);
        if wanted.is_none() && DENSE * size > self.cols {
            return Ok(Step::Dense);
        }
        // A rank that is still sinking begins a new series of increments.
        let found = wanted.unwrap_or(0);
        if found != self.rank {
            self.progress = Progress::default();
            self.probe = None;
            self.rank = found;
        }
        let captured: f64 = theta.iter().take(self.rank).sum();
        let tolerance = self.options.tolerance;
        let allowed = HIDDEN * tolerance * (self.energy - captured).max(ENERGY_NOISE * self.energy);
        match self.probe.take() {
            Some(claim) if captured - claim.captured <= allowed => return Ok(Step::Done),
            Some(_) => self.progress = Progress::default(),
            None if self.rank > 0 && self.progress.done(captured, self.energy, tolerance) || exhausted => {
                self.probe = Some(Probe { captured, steps: 0 });
                return Ok(Step::Probe);
            }
            None => {}
        }
        Ok(if exhausted { Step::Probe } else { Step::Go })
    }

    /// To be told when the space has been replaced by a smaller one.
    pub(super) fn restarted(&mut self) {
        self.checked_at = 0;
        self.progress = Progress::default();
    }
}

/// Energy increments, and what they predict.
#[derive(Default)]
struct Progress {
    captured: f64,
    increment: Option<f64>,
    ratio: Option<f64>,
}

impl Progress {
    /// Takes in the energy captured now; whether the excess of the top-r error is predicted to be within `tolerance`.
    fn done(&mut self, captured: f64, energy: f64, tolerance: f64) -> bool {
        let error = energy - captured;
        if error <= ENERGY_NOISE * energy {
            return true;
        }
        let previous = self.increment;
        let increment = captured - self.captured;
        let first = self.captured == 0.0;
        self.captured = captured;
        if first {
            return false;
        }
        self.increment = Some(increment.max(0.0));
        // One ratio is needed for a prediction; increments at rounding level need none.
        if increment <= ENERGY_NOISE * energy {
            return true;
        }
        let Some(previous) = previous else { return false };
        let ratio = (increment / previous).clamp(0.0, 0.95);
        self.ratio = Some(ratio);
        excess(increment, ratio, error) < (1.0 - RESERVE) * tolerance
    }

    /// Whether the next look will probably say so.
    fn expects_to_be_done(&self, energy: f64, tolerance: f64) -> bool {
        let (Some(increment), Some(ratio)) = (self.increment, self.ratio) else { return false };
        excess(increment * ratio, ratio, energy - self.captured) < (1.0 - RESERVE) * tolerance
    }
}

/// Predicted ‖Δ−Δ̂‖/‖Δ−Δ_r‖ − 1 ≈ ½·(missing energy)/(error energy), increments going on to shrink at this ratio.
fn excess(increment: f64, ratio: f64, error: f64) -> f64 {
    0.5 * increment * ratio / (1.0 - ratio) / error
}

/// SplitMix64 (Steele, Lea & Flood 2014): counter based, so a block depends on seed and position alone. Uniform numbers serve a
/// random start as well as normal ones do, and need no library function that could differ between platforms.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn block(&mut self, rows: usize, cols: usize) -> Mat<f32> {
        Mat::from_fn(rows, cols, |_, _| self.uniform())
    }

    /// Uniform in [−1, 1).
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        // The top 24 bits fill a significand exactly.
        ((z >> 40) as f32) / 8_388_608.0 - 1.0
    }
}
