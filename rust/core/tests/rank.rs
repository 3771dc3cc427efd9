//! Ranks: rules against their definitions, allocations against brute force, noise edges and cliffs against planted matrices.
#![allow(clippy::unwrap_used)]

use faer::Mat;
use lora_compress_core::{Allocation, Candidate, Delta, Goal, Rule, Spectrum, SvdOptions, Target, singular_values};
use proptest::collection::vec;
use proptest::prelude::*;

/// All σ of a delta of this shape, descending.
fn complete(shape: (usize, usize), mut sigma: Vec<f64>) -> Spectrum {
    sigma.sort_by(|a, b| b.total_cmp(a));
    sigma.truncate(shape.0.min(shape.1));
    let energy = sigma.iter().map(|value| value * value).sum();
    Spectrum::new(shape, sigma, energy, 1.0, 0.0).unwrap()
}

/// The same spectrum with only the first `known` of its σ.
fn cut(spectrum: &Spectrum, known: usize) -> Spectrum {
    let sigma = spectrum.sigma()[..known].to_vec();
    Spectrum::new((spectrum.rows(), spectrum.cols()), sigma, spectrum.energy(), 1.0, 0.0).unwrap()
}

fn spectra(sides: std::ops::Range<usize>) -> impl Strategy<Value = Spectrum> {
    (sides.clone(), sides).prop_flat_map(|shape| {
        let count = shape.0.min(shape.1);
        vec(prop_oneof![4 => 0.01f64..10.0, 1 => Just(0.0)], count).prop_map(move |sigma| complete(shape, sigma))
    })
}

/// Ranks from 0 on whose every step is allowed.
fn all_ranks(choices: &[Vec<usize>]) -> Vec<Vec<usize>> {
    choices.iter().fold(vec![vec![]], |prefixes, ranks| {
        prefixes
            .iter()
            .flat_map(|prefix| {
                std::iter::once(0).chain(ranks.iter().copied()).map(|rank| [&prefix[..], &[rank]].concat())
            })
            .collect()
    })
}

proptest! {
    /// Every rule gives the smallest rank that does what it says, by definition.
    #[test]
    fn rules_are_exact(spectrum in spectra(1..12), share in 0.0f64..=1.0, least in 0.0f64..10.0, ratio in 1.0f64..50.0) {
        let positive = spectrum.sigma().iter().filter(|&&sigma| sigma > 0.0).count();
        let above = |least: f64| spectrum.sigma().iter().filter(|&&sigma| sigma > least).count();
        let tail = |rank: usize| spectrum.sigma()[rank..].iter().map(|sigma| sigma * sigma).sum::<f64>();
        let rounding = 1e-12 * spectrum.energy();

        let error = spectrum.rank(Rule::Error(share)).unwrap();
        prop_assert!(tail(error) <= share * share * spectrum.energy() + rounding);
        prop_assert!(error == 0 || tail(error - 1) >= share * share * spectrum.energy() - rounding);
        let energy = spectrum.rank(Rule::Energy(share)).unwrap();
        prop_assert!(tail(energy) <= (1.0 - share) * spectrum.energy() + rounding);
        prop_assert!(energy == 0 || tail(energy - 1) >= (1.0 - share) * spectrum.energy() - rounding);

        prop_assert_eq!(spectrum.rank(Rule::Threshold(least)).unwrap(), above(least));
        let first = spectrum.sigma().first().copied().unwrap_or(0.0);
        prop_assert_eq!(spectrum.rank(Rule::Ratio(ratio)).unwrap(), spectrum.sigma().iter().filter(|&&sigma| sigma > 0.0 && sigma >= first / ratio).count());
        prop_assert_eq!(spectrum.rank(Rule::Rank(3)).unwrap(), positive.min(3));
        prop_assert!(spectrum.rank(Rule::Knee).unwrap() <= positive);
    }

    /// A spectrum of which only some σ are known gives the rank of the whole one, or none.
    #[test]
    fn what_is_not_known_is_not_guessed(spectrum in spectra(2..14), known in 1usize..14, share in 0.0f64..=1.0, least in 0.0f64..10.0) {
        let part = cut(&spectrum, known.min(spectrum.sigma().len()));
        for rule in [Rule::Energy(share), Rule::Error(share), Rule::Threshold(least), Rule::Ratio(1.0 + least), Rule::BulkEdge, Rule::Rank(known + 1)] {
            if let Some(rank) = part.rank(rule) {
                prop_assert_eq!(Some(rank), spectrum.rank(rule), "{:?}", rule);
            }
        }
    }

    /// Within a budget no allocation gains more than the greedy one and its next step; and none is cheaper for an error by
    /// more than the last step.
    #[test]
    fn allocations_are_optimal_up_to_one_step(
        spectra in vec(spectra(1..6), 1..5),
        weights in vec(0.1f64..5.0, 5),
        ladder in prop_oneof![Just(vec![1, 2, 3, 4, 5]), Just(vec![2, 4]), Just(vec![1, 3]), Just(vec![4])],
        budget in 1u64..200,
        error in 0.05f64..1.0,
    ) {
        let candidates: Vec<Candidate<'_>> = spectra.iter().zip(&weights).map(|(spectrum, &weight)| {
            let limit = spectrum.sigma().len();
            // The first rank beyond the last direction is allowed: a server may know no other.
            let end = ladder.iter().position(|&rank| rank >= limit).map_or(ladder.len(), |last| last + 1);
            let ranks = ladder[..end].to_vec();
            Candidate { spectrum, weight, unit: (spectrum.rows() + spectrum.cols()) as u64, ranks }
        }).collect();
        let whole: f64 = candidates.iter().map(|candidate| candidate.weight * candidate.spectrum.energy()).sum();
        prop_assume!(whole > 0.0);
        let bytes = |ranks: &[usize]| candidates.iter().zip(ranks).map(|(candidate, &rank)| candidate.unit * rank as u64).sum::<u64>();
        let rest = |ranks: &[usize]| candidates.iter().zip(ranks).map(|(candidate, &rank)| candidate.weight * candidate.spectrum.rest(rank)).sum::<f64>() / whole;
        let choices: Vec<Vec<usize>> = candidates.iter().map(|candidate| candidate.ranks.clone()).collect();
        let everything = all_ranks(&choices);

        let allocation = Allocation::new(&candidates);
        let greedy = allocation.ranks(Goal::Budget(budget)).unwrap();
        prop_assert!(bytes(&greedy) <= budget);
        let best = everything.iter().filter(|ranks| bytes(ranks) <= budget).map(|ranks| rest(ranks)).fold(f64::INFINITY, f64::min);
        // The first step that did not fit is what a fractional knapsack would have taken a part of.
        let largest = allocation.steps().iter().map(|step| step.gain).fold(0.0, f64::max);
        prop_assert!(rest(&greedy) <= best + largest + 1e-9);
        let skipped = allocation.steps().iter().scan(0u64, |sum, step| { *sum += step.bytes; Some((*sum, step.gain)) }).find(|(sum, _)| *sum > budget);
        if let Some((_, gain)) = skipped {
            prop_assert!(rest(&greedy) <= best + gain + 1e-9);
        } else {
            prop_assert!(rest(&greedy) <= best + 1e-9);
        }

        // An error is one in the plain norm, whatever the weights; the cheapest way to it is found where there are none.
        let energy: f64 = candidates.iter().map(|candidate| candidate.spectrum.energy()).sum();
        let rest = |ranks: &[usize]| candidates.iter().zip(ranks).map(|(candidate, &rank)| candidate.spectrum.rest(rank)).sum::<f64>() / energy;
        if let Some(found) = allocation.ranks(Goal::Error(error)) {
            prop_assert!(rest(&found) <= error * error + 1e-9);
        }
        let unweighted: Vec<Candidate<'_>> = candidates.iter().map(|candidate| Candidate { weight: 1.0, ranks: candidate.ranks.clone(), ..*candidate }).collect();
        let allocation = Allocation::new(&unweighted);
        if let Some(found) = allocation.ranks(Goal::Error(error)) {
            prop_assert!(rest(&found) <= error * error + 1e-9);
            let cheapest = everything.iter().filter(|ranks| rest(ranks) <= error * error).map(|ranks| bytes(ranks)).min().unwrap_or(u64::MAX);
            let last = allocation.steps().iter().map(|step| step.bytes).max().unwrap_or(0);
            prop_assert!(bytes(&found) <= cheapest.saturating_add(last));
            // Nothing of it could be left out.
            for (tensor, candidate) in candidates.iter().enumerate().filter(|(tensor, _)| found[*tensor] > 0) {
                let mut fewer = found.clone();
                fewer[tensor] = candidate.ranks.iter().copied().filter(|&rank| rank < found[tensor]).max().unwrap_or(0);
                let gained = candidate.spectrum.rest(fewer[tensor]) > candidate.spectrum.rest(found[tensor]);
                prop_assert!(!gained || rest(&fewer) > error * error);
            }
        } else {
            prop_assert!(everything.iter().all(|ranks| rest(ranks) > error * error));
        }
    }

    /// Larger budgets never take a direction away, until a step is skipped for not fitting: error falls all the same.
    #[test]
    fn steps_fall_in_worth(spectra in vec(spectra(1..9), 1..6)) {
        let candidates: Vec<Candidate<'_>> = spectra.iter().map(|spectrum| Candidate {
            spectrum, weight: 1.0, unit: (spectrum.rows() + spectrum.cols()) as u64, ranks: (1..=spectrum.sigma().len()).collect(),
        }).collect();
        let allocation = Allocation::new(&candidates);
        prop_assert!(allocation.steps().is_sorted_by(|a, b| a.worth() >= b.worth()));
        let mut ranks = vec![0; spectra.len()];
        for step in allocation.steps() {
            prop_assert!(step.rank == ranks[step.tensor] + 1, "steps of one tensor come in order");
            ranks[step.tensor] = step.rank;
        }
    }
}

/// Deterministic normal numbers (Box–Muller over SplitMix64).
fn normal(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..count).map(|_| (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()).collect()
}

/// The σ, and the energy, of a low-rank matrix of this rank and noise of unit variance on every element.
fn planted(rows: usize, cols: usize, rank: usize, strength: f64, known: usize) -> (Spectrum, f64) {
    let (b, a) = (normal(rows * rank, 1), normal(rank * cols, 2));
    let (b, a) = (Mat::from_fn(rows, rank, |i, j| b[i * rank + j]), Mat::from_fn(rank, cols, |i, j| a[i * cols + j]));
    let (signal, noise) = (&b * &a, normal(rows * cols, 3));
    let values = (0..rows * cols).map(|at| (strength * signal[(at / cols, at % cols)] + noise[at]) as f32).collect();
    let delta = Delta::from_values(values, rows, cols).unwrap();
    let sigma = singular_values(&delta, SvdOptions { target: Target::Rank(known), tolerance: 1e-4, seed: 0 }).unwrap();
    let noise_energy = (rows * cols) as f64;
    (Spectrum::new((rows, cols), sigma, delta.energy(), 1.0, noise_energy).unwrap(), noise_energy)
}

#[test]
fn noise_ends_at_its_edge_and_a_planted_rank_stands_out() {
    for (rows, cols, rank) in [(300, 300, 5), (400, 250, 16), (220, 700, 40)] {
        let (spectrum, _) = planted(rows, cols, rank, 1.0, rank + 20);
        assert_eq!(spectrum.low_rank(), Some(rank));
        assert_eq!(spectrum.rank(Rule::NoiseEdge), Some(rank));
        assert_eq!(spectrum.rank(Rule::HardThreshold), Some(rank));
        // The edge holds up to fluctuations of order n^(-2/3) (Tracy & Widom).
        let first = spectrum.sigma()[rank] / spectrum.noise_edge();
        assert!((0.9..1.02).contains(&first), "{first}");
        // Too few σ to see the cliff: no claim.
        assert_eq!(cut(&spectrum, rank).low_rank(), None);
    }
}

#[test]
fn pure_noise_and_smooth_decay_are_not_low_rank() {
    let (noise, _) = planted(300, 250, 1, 0.0, 60);
    assert_eq!((noise.low_rank(), noise.rank(Rule::NoiseEdge), noise.rank(Rule::BulkEdge)), (None, Some(0), Some(0)));
    assert!(noise.noise_share() > 0.99);
    for power in [0.25, 0.5, 1.0] {
        let decaying = complete((200, 300), (1..=200).map(|i| f64::from(i).powf(-power)).collect());
        assert_eq!(cut(&decaying, 100).low_rank(), None, "{power}");
    }
}

#[test]
fn a_small_matrix_of_full_rank_is_not_low_rank() {
    for size in 1..8 {
        let spectrum = complete((size, 300), (1..=size).map(|i| 1.0 / i as f64).collect());
        assert_eq!(spectrum.low_rank(), None, "{size}");
    }
}

#[test]
fn an_end_that_is_near_is_suspected() {
    // Equal directions: 40 of them are left after 48, and 160.
    for (count, near) in [(88, true), (208, false)] {
        let spectrum = complete((300, 300), (0..300).map(|i| f64::from(i < count)).collect());
        assert_eq!(cut(&spectrum, 48).may_end_soon(), near);
    }
}

#[test]
fn behind_a_cliff_no_other_is_suspected() {
    // Noise three times as strong as rounding explains: no merged LoRA, and no reason to look on.
    for known in [30, 60, 120] {
        let (spectrum, noise) = planted(300, 300, 20, 1.0, known);
        let spectrum =
            Spectrum::new((300, 300), spectrum.sigma().to_vec(), spectrum.energy(), 1.0, noise / 1e3).unwrap();
        assert!(spectrum.low_rank().is_none() && !spectrum.may_end_soon(), "{known}");
    }
}

#[test]
fn exact_low_rank_is_found_without_noise() {
    let mut sigma = vec![3.0, 2.0, 1.0];
    sigma.resize(40, 0.0);
    assert_eq!(complete((40, 60), sigma).low_rank(), Some(3));
}

/// Gavish & Donoho (2014): λ is 4/√3 for square matrices and 1.5066 for β = 0.05.
#[test]
fn the_hard_threshold_is_that_of_gavish_and_donoho() {
    let square = Spectrum::new((100, 100), vec![], 1e9, 1.0, 100.0 * 100.0).unwrap();
    assert!((square.hard_threshold() / 10.0 - 4.0 / 3f64.sqrt()).abs() < 1e-9);
    let wide = Spectrum::new((50, 1000), vec![], 1e9, 1.0, 50.0 * 1000.0).unwrap();
    assert!((wide.hard_threshold() / 1000f64.sqrt() - 1.5066).abs() < 1e-4);
}

#[test]
fn effective_and_stable_ranks() {
    let flat = complete((8, 20), vec![2.0; 8]);
    assert!((flat.effective_rank() - 8.0).abs() < 1e-9 && (flat.stable_rank() - 8.0).abs() < 1e-9);
    // Missing σ are taken as equal, which is an upper bound.
    let decaying = complete((50, 50), (1..=50).map(|i| 1.0 / f64::from(i)).collect());
    assert!(cut(&decaying, 10).effective_rank() >= decaying.effective_rank());
}

#[test]
fn what_cannot_be_a_spectrum_is_refused() {
    for (sigma, energy) in [
        (vec![1.0, 2.0], 9.0),
        (vec![-1.0], 9.0),
        (vec![f64::NAN], 9.0),
        (vec![3.0], 1.0),
        (vec![1.0; 5], 9.0),
        (vec![1.0], f64::INFINITY),
    ] {
        assert!(Spectrum::new((4, 6), sigma, energy, 1.0, 0.0).is_err());
    }
}
