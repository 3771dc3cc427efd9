//! Ranks of many tensors at once: bytes go where they buy most.
//!
//! A tensor of weight w gains w·Σσ² when directions are added to it, and each costs the same bytes. Allowed ranks cut its spectrum
//! into steps; a step's worth is its gain by byte. σ descends, so the average of a later step is never above that of an earlier
//! one, whatever ranks are allowed: gains are concave, and taking steps by falling worth is optimal up to the last one taken (the
//! greedy solution of a fractional knapsack; the worth of the last step is the Lagrange multiplier of the budget).

use super::Spectrum;

/// What sums of gains may be off by.
const ROUNDING: f64 = 1e-9;

/// A tensor that ranks are looked for.
#[derive(Debug)]
pub struct Candidate<'a> {
    /// Its spectrum.
    pub spectrum: &'a Spectrum,
    /// What a unit of its energy is worth.
    pub weight: f64,
    /// Bytes that one more rank takes.
    pub unit: u64,
    /// Allowed ranks above 0, ascending. Those beyond the σ known are left out, unless no other σ is above 0: such a rank costs what
    /// it costs and gains what there is.
    pub ranks: Vec<usize>,
}

/// What an allocation has to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// At most this many bytes.
    Budget(u64),
    /// √(Σ‖Δ − Δ_k‖² / Σ‖Δ‖²) at most this: weights decide what is taken first, and not what is an error.
    Error(f64),
    /// Every step that lowers Σ w‖Δ − Δ_k‖² / Σ w‖Δ‖² by at least this for each byte.
    Worth(f64),
}

/// One more step of one tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Index of the tensor.
    pub tensor: usize,
    /// Its rank from here on.
    pub rank: usize,
    /// Bytes that this step adds.
    pub bytes: u64,
    /// Share of Σ w‖Δ‖² that it captures.
    pub gain: f64,
    /// Share of Σ‖Δ‖² that it captures.
    pub share: f64,
}

impl Step {
    /// Gain by byte.
    #[must_use]
    pub fn worth(&self) -> f64 {
        self.gain / self.bytes.max(1) as f64
    }
}

/// All steps of all tensors, by falling worth: every allocation is read off this one list.
#[derive(Debug, Clone)]
pub struct Allocation {
    tensors: usize,
    steps: Vec<Step>,
}

impl Allocation {
    /// Orders the steps of `candidates`. Ties go to the earlier tensor.
    #[must_use]
    pub fn new(candidates: &[Candidate<'_>]) -> Self {
        let whole: f64 = candidates.iter().map(|candidate| candidate.weight * candidate.spectrum.energy()).sum();
        let plain: f64 = candidates.iter().map(|candidate| candidate.spectrum.energy()).sum();
        let mut steps = Vec::new();
        for (tensor, candidate) in candidates.iter().enumerate() {
            let (mut from, mut worth) = (0, f64::INFINITY);
            let spectrum = candidate.spectrum;
            let known = if spectrum.is_complete() { usize::MAX } else { spectrum.sigma().len() };
            for &rank in candidate.ranks.iter().filter(|&&rank| rank <= known) {
                if rank <= from || whole <= 0.0 {
                    continue;
                }
                let captured = spectrum.rest(from) - spectrum.rest(rank);
                let gain = candidate.weight * captured / whole;
                let bytes = candidate.unit * (rank - from) as u64;
                // Rounding must not let a later step overtake an earlier one.
                let gain = gain.min(worth * bytes.max(1) as f64);
                let step = Step { tensor, rank, bytes, gain, share: captured / plain };
                if gain <= 0.0 {
                    break;
                }
                worth = step.worth();
                steps.push(step);
                from = rank;
            }
        }
        steps.sort_by(|a, b| b.worth().total_cmp(&a.worth()).then(a.tensor.cmp(&b.tensor)).then(a.rank.cmp(&b.rank)));
        Self { tensors: candidates.len(), steps }
    }

    /// The steps, by falling worth.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The rank of every tensor; `None` when no allocation of the steps there are reaches an error.
    ///
    /// A budget goes on with smaller steps where one does not fit; the tensor of that one gets no more.
    #[must_use]
    pub fn ranks(&self, goal: Goal) -> Option<Vec<usize>> {
        let mut ranks = vec![0; self.tensors];
        match goal {
            Goal::Budget(budget) => {
                let (mut left, mut closed) = (budget, vec![false; self.tensors]);
                for step in &self.steps {
                    if closed[step.tensor] {
                        continue;
                    }
                    if step.bytes > left {
                        closed[step.tensor] = true;
                        continue;
                    }
                    left -= step.bytes;
                    ranks[step.tensor] = step.rank;
                }
            }
            Goal::Error(error) => return self.for_error(error * error),
            Goal::Worth(least) => {
                for step in self.steps.iter().take_while(|step| step.worth() >= least) {
                    ranks[step.tensor] = step.rank;
                }
            }
        }
        Some(ranks)
    }

    /// Steps by falling worth until no more than `most` of Σ‖Δ‖² is left; then, from the last to the first, those are taken
    /// back that were not needed in the end.
    fn for_error(&self, most: f64) -> Option<Vec<usize>> {
        let most = most * (1.0 + ROUNDING) + ROUNDING * ROUNDING;
        let (mut rest, mut taken) = (1.0, 0);
        while rest > most {
            rest -= self.steps.get(taken)?.share;
            taken += 1;
        }
        let mut ranks = vec![0; self.tensors];
        self.steps[..taken].iter().for_each(|step| ranks[step.tensor] = step.rank);
        let mut needed = vec![false; self.tensors];
        for (at, step) in self.steps[..taken].iter().enumerate().rev() {
            // Only the last step of a tensor can be taken back.
            if needed[step.tensor] || rest + step.share > most {
                needed[step.tensor] = true;
                continue;
            }
            rest += step.share;
            let before = self.steps[..at].iter().rev().find(|other| other.tensor == step.tensor);
            ranks[step.tensor] = before.map_or(0, |step| step.rank);
        }
        Some(ranks)
    }
}
