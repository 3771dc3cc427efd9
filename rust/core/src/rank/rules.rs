//! The rank of one tensor, by a rule.

use super::Spectrum;

/// How to cut one spectrum. All but [`Rule::Knee`] are exact: the smallest rank that does what is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// This rank.
    Rank(usize),
    /// Σ_{i≤k} σ² ≥ this share of ‖Δ‖².
    Energy(f64),
    /// ‖Δ − Δ_k‖ ≤ this share of ‖Δ‖.
    Error(f64),
    /// Every σ above this value.
    Threshold(f64),
    /// Every σ of at least σ₁ divided by this.
    Ratio(f64),
    /// Every σ above what white noise with all of ‖Δ‖² would reach ([`Spectrum::bulk_edge`]), and above that of rounding noise.
    BulkEdge,
    /// Every σ above the edge of rounding noise ([`Spectrum::noise_edge`]).
    NoiseEdge,
    /// Every σ above the hard threshold of Gavish & Donoho ([`Spectrum::hard_threshold`]).
    HardThreshold,
    /// Where the captured energy, over the σ that are known, bends most: farthest above the chord from first to last (Satopää et
    /// al. 2011, "Finding a Kneedle in a Haystack"). Depends on how many σ are known.
    Knee,
}

impl Spectrum {
    /// The rank that `rule` gives, at most the number of positive σ; `None` where it depends on σ that are not known.
    #[must_use]
    pub fn rank(&self, rule: Rule) -> Option<usize> {
        match rule {
            Rule::Rank(rank) => self.known(rank.min(self.rows.min(self.cols))),
            Rule::Energy(share) => self.within((1.0 - share) * self.energy),
            Rule::Error(error) => self.within(error * error * self.energy),
            Rule::Threshold(least) => self.above(|sigma| sigma > least),
            Rule::Ratio(ratio) => {
                let least = self.sigma.first().map_or(0.0, |first| first / ratio);
                self.above(|sigma| sigma >= least)
            }
            Rule::BulkEdge => {
                let edge = self.bulk_edge(0).max(self.noise_edge());
                self.above(|sigma| sigma > edge)
            }
            Rule::NoiseEdge => self.above(|sigma| sigma > self.noise_edge()),
            Rule::HardThreshold => self.above(|sigma| sigma > self.hard_threshold()),
            Rule::Knee => Some(self.knee()),
        }
    }

    /// The number of positive σ, where all are known.
    fn positive(&self) -> usize {
        self.sigma.iter().take_while(|&&sigma| sigma > 0.0).count()
    }

    fn known(&self, rank: usize) -> Option<usize> {
        if rank <= self.sigma.len() || self.is_complete() { Some(rank.min(self.positive())) } else { None }
    }

    /// The smallest rank that leaves no more than `rest`.
    fn within(&self, rest: f64) -> Option<usize> {
        let rank = (0..=self.sigma.len()).find(|&rank| self.rest(rank) <= rest);
        rank.or_else(|| self.is_complete().then(|| self.positive()))
    }

    /// The number of leading σ that are `kept`.
    fn above(&self, kept: impl Fn(f64) -> bool) -> Option<usize> {
        let count = self.sigma.iter().take_while(|&&sigma| sigma > 0.0 && kept(sigma)).count();
        if count < self.sigma.len() || self.is_complete() {
            return Some(count);
        }
        // The next σ is no larger than the last one, and no larger than what is left.
        let next = self.rest(count).sqrt().min(self.sigma.last().copied().unwrap_or(f64::INFINITY));
        (!kept(next)).then_some(count)
    }

    fn knee(&self) -> usize {
        let count = self.positive();
        let last = self.captured[count];
        // Ties go to the smaller rank.
        let height = |rank: usize| self.captured[rank] / last - rank as f64 / count as f64;
        (1..=count).reduce(|best, rank| if height(rank) > height(best) { rank } else { best }).unwrap_or(0)
    }
}
