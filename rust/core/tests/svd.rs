//! The truncated SVD against f64 references: optimality, exactness, orthogonality, determinism.
#![allow(clippy::unwrap_used, missing_docs)]

use faer::Mat;
use std::sync::Arc;

use lora_compress_core::{Delta, Matrix, SvdOptions, Target, TruncatedSvd, truncated_svd};
use proptest::prelude::*;

const EPS: f64 = f32::EPSILON as f64;

/// Pseudo-random numbers in [−1, 1), different for every seed.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

/// A matrix with singular values of about `decay(i)`: diagonal between two random (nearly orthogonal) factors.
fn with_spectrum(rows: usize, cols: usize, seed: u64, decay: impl Fn(usize) -> f32) -> Vec<f32> {
    let mut next = noise(seed);
    let k = rows.min(cols);
    let left = Mat::from_fn(rows, k, |_, _| next());
    let right = Mat::from_fn(k, cols, |i, _| decay(i) * next());
    let product = left * right;
    (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| product[(i, j)]).collect()
}

fn singular_values(values: &[f32], rows: usize, cols: usize) -> Vec<f64> {
    let matrix = Mat::from_fn(rows, cols, |i, j| f64::from(values[i * cols + j]));
    matrix.singular_values().unwrap()
}

fn factors(svd: &TruncatedSvd) -> (Matrix, Matrix) {
    let r = svd.sigma.len();
    let b = svd.u.values().iter().enumerate().map(|(i, u)| (f64::from(*u) * svd.sigma[i % r.max(1)]) as f32).collect();
    (Matrix::new(svd.u.rows(), r, b).unwrap(), svd.vt.clone())
}

/// ‖QᵀQ − I‖_max of the columns (or rows) of a factor.
fn orthogonality(matrix: &Matrix, by_rows: bool) -> f64 {
    let m = Mat::from_fn(matrix.rows(), matrix.cols(), |i, j| f64::from(matrix.values()[i * matrix.cols() + j]));
    let m = if by_rows { m.transpose().to_owned() } else { m };
    let gram = m.transpose() * &m;
    (0..gram.nrows())
        .flat_map(|i| (0..gram.ncols()).map(move |j| (i, j)))
        .map(|(i, j)| (gram[(i, j)] - f64::from(i == j)).abs())
        .fold(0.0, f64::max)
}

/// Checks everything that must hold for any matrix, rank and method, against the exact spectrum.
fn check(values: Vec<f32>, rows: usize, cols: usize, rank: usize, tolerance: f64) -> TruncatedSvd {
    let sigma = singular_values(&values, rows, cols);
    let total: f64 = sigma.iter().map(|s| s * s).sum();
    let norm = total.sqrt();
    let delta = Delta::from_values(values, rows, cols).unwrap();
    // The delta sums squares of f32 values in f64: it agrees with the reference to the rounding of both sums.
    assert!((delta.energy() - total).abs() <= total * 1e-12 * (rows * cols) as f64);
    let svd = truncated_svd(&delta, SvdOptions { target: Target::Rank(rank), tolerance, seed: 1 }).unwrap();
    assert!(svd.sigma.len() <= rank.min(rows).min(cols));
    assert!(svd.sigma.windows(2).all(|pair| pair[0] >= pair[1]) && svd.sigma.iter().all(|&s| s > 0.0));
    // θ never exceeds σ (interlacing), beyond the f32 rounding of the image, √(m·n)·ε relative to the largest, and beyond the
    // norm of what was rounded away: a tenth of the tolerated energy is let stand.
    let optimum = sigma.iter().skip(rank).map(|s| s * s).sum::<f64>().sqrt();
    let slack = EPS * ((rows * cols) as f64).sqrt().max(8.0) * sigma.first().copied().unwrap_or(0.0)
        + (0.1 * tolerance).sqrt() * optimum * (1.0 + tolerance);
    for (theta, exact) in svd.sigma.iter().zip(&sigma) {
        assert!(*theta <= exact + slack, "{theta} > {exact}");
    }
    // One side is the basis, the other its image divided by σ, with rounding errors of the size of σ₁.
    let range = svd.sigma.first().copied().unwrap_or(1.0) / svd.sigma.last().copied().unwrap_or(1.0);
    let unit = EPS * 8.0 * (rows.max(cols) as f64).sqrt() * range;
    assert!(orthogonality(&svd.vt, true) <= unit.max(2e-5), "vt {}", orthogonality(&svd.vt, true));
    let (b, a) = factors(&svd);
    let error = delta.direct_residual(&b, &a).unwrap().sqrt();
    // Eckart–Young from below, the tolerance plus the f32 rounding of factors and product from above.
    // The iteration looks at energy, of which it cannot tell 1e-10 (`ENERGY_NOISE`).
    let untold = if rows.min(cols) > 192 { 1e-5 * norm } else { 0.0 };
    let rounding = EPS * (8.0 * rows.max(cols) as f64).sqrt() * norm + untold;
    assert!(error >= optimum - rounding, "error {error} below the optimum {optimum}");
    assert!(error <= optimum * (1.0 + tolerance) + rounding, "error {error}, optimum {optimum}, rounding {rounding}");
    svd
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(24), ..ProptestConfig::default() })]

    #[test]
    fn small_matrices_are_decomposed_exactly(rows in 1usize..40, cols in 1usize..40, rank in 1usize..50, seed in any::<u64>(), power in 0.0f32..3.0) {
        check(with_spectrum(rows, cols, seed, |i| (i as f32 + 1.0).powf(-power)), rows, cols, rank, 1e-12);
    }

    #[test]
    fn the_iteration_reaches_its_tolerance(rows in 200usize..330, cols in 200usize..330, rank in 1usize..90, seed in any::<u64>(), power in 0.2f32..2.0) {
        check(with_spectrum(rows, cols, seed, |i| (i as f32 + 1.0).powf(-power)), rows, cols, rank, 1e-3);
    }

    #[test]
    fn exact_rank_is_found_and_nothing_beyond_it(rows in 200usize..400, cols in 200usize..400, true_rank in 1usize..40, seed in any::<u64>()) {
        let mut next = noise(seed);
        // Small integers: the product is exact in f32, so the matrix has this rank and not merely nearly so.
        let left = Mat::from_fn(rows, true_rank, |_, _| (next() * 4.0).round());
        let right = Mat::from_fn(true_rank, cols, |_, _| (next() * 4.0).round());
        let product = left * right;
        let values: Vec<f32> = (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| product[(i, j)]).collect();
        let svd = check(values, rows, cols, 64, 1e-4);
        prop_assert!(svd.sigma.len() <= true_rank, "{} triplets of a matrix of rank {}", svd.sigma.len(), true_rank);
    }

    #[test]
    fn error_falls_with_rank(rows in 200usize..260, cols in 200usize..260, seed in any::<u64>()) {
        let delta = Delta::from_values(with_spectrum(rows, cols, seed, |i| 0.97f32.powi(i as i32)), rows, cols).unwrap();
        let mut last = f64::INFINITY;
        for rank in [1, 2, 5, 17, 60, 130, 200] {
            let (b, a) = factors(&truncated_svd(&delta, SvdOptions { target: Target::Rank(rank), tolerance: 1e-4, seed: 3 }).unwrap());
            let error = delta.residual_energy(&b, &a).unwrap();
            prop_assert!(error <= last * (1.0 + 1e-3), "rank {}: {} after {}", rank, error, last);
            last = error;
        }
    }

    #[test]
    fn scaling_by_a_power_of_two_changes_nothing_but_sigma(seed in any::<u64>(), exponent in -140i32..100) {
        // At the lower end elements are subnormal: they keep few bits, but the products must not vanish.
        let (rows, cols) = (210, 200);
        let factor = 2f64.powi(exponent) as f32;
        let values: Vec<f32> = with_spectrum(rows, cols, seed, |i| 0.9f32.powi(i as i32)).iter().map(|v| v * factor).collect();
        for delta in [scaled(&values, rows, cols), Delta::from_values(values.clone(), rows, cols).unwrap()] {
            let svd = truncated_svd(&delta, SvdOptions { target: Target::Rank(20), tolerance: 1e-3, seed: 0 }).unwrap();
            let captured: f64 = svd.sigma.iter().map(|s| s * s).sum();
            let exact: f64 = singular_values(&values, rows, cols).iter().take(20).map(|s| s * s).sum();
            prop_assert!((captured / exact - 1.0).abs() < 1e-3, "{} of {}", captured, exact);
        }
    }
}

/// Through the checkpoint door, where badly scaled deltas are rescaled.
fn scaled(values: &[f32], rows: usize, cols: usize) -> Delta {
    use lora_compress_core::{Checkpoint, Dtype, Spec, Writer, encode};
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, values: &[f32]| {
        let path = folder.path().join(name);
        let spec = Spec { name: "w".into(), dtype: Dtype::F32, shape: vec![rows, cols] };
        let mut writer = Writer::create(&path, std::slice::from_ref(&spec), Default::default()).unwrap();
        writer.begin(spec).unwrap();
        writer.write(&encode(Dtype::F32, values).unwrap()).unwrap();
        writer.finish().unwrap();
        Arc::new(Checkpoint::open(&path).unwrap())
    };
    let (base, tuned) = (write("base.safetensors", &vec![0.0; values.len()]), write("tuned.safetensors", values));
    Delta::load(&base, &tuned, "w").unwrap()
}

fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[test]
fn repeated_singular_values_do_not_stop_the_iteration_early() {
    // An orthogonal matrix: every Krylov space is invariant after one block.
    let n = 256;
    let mut values = vec![0f32; n * n];
    for i in 0..n {
        values[i * n + (i * 7 + 3) % n] = 2.0;
    }
    let svd = check(values, n, n, 40, 1e-4);
    assert_eq!(svd.sigma.len(), 40);
}

#[test]
fn clusters_and_repeated_values_are_found_whole() {
    let eye = |n: usize| (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect::<Vec<f32>>();
    assert_eq!(check(eye(256), 256, 256, 64, 1e-4).sigma.len(), 64);
    assert_eq!(check(eye(400), 400, 400, 100, 1e-4).sigma.len(), 100);
    // Diagonal, so that the values are repeated exactly or to a stated width.
    let diagonal = |values: &dyn Fn(usize) -> f32| {
        let mut matrix = vec![0f32; 600 * 400];
        (0..400).for_each(|i| matrix[(i * 3 % 600 + i / 200) * 400 + i] = values(i));
        matrix
    };
    let spectra: [&dyn Fn(usize) -> f32; 4] = [
        &|i| [8.0, 4.0, 2.0, 1.0][i / 100],
        &|i| if i < 120 { 3.0 } else { 1.0 },
        &|i| if i < 10 { 10.0 } else { 1.0 },
        &|i| [8.0, 4.0, 2.0, 1.0][i / 100] * (1.0 + 0.05 * (i % 100) as f32 / 100.0),
    ];
    for spectrum in spectra {
        for rank in [16, 64, 100, 150] {
            assert_eq!(check(diagonal(spectrum), 600, 400, rank, 1e-3).sigma.len(), rank);
        }
    }
}

#[test]
fn a_plateau_after_the_rank_is_no_trap() {
    let values = with_spectrum(300, 280, 5, |i| if i < 12 { 4.0 } else { 1.0 });
    check(values, 300, 280, 12, 1e-3);
}

#[test]
fn what_bf16_would_lose_is_not_lost() {
    // A merged LoRA in f32: rank 8 but for rounding. Rounded to bf16 its tail would be a hundred times as large.
    let (rows, cols) = (320, 400);
    let mut values = with_spectrum(rows, cols, 11, |i| if i < 8 { 1.0 / (i + 1) as f32 } else { 0.0 });
    let mut next = noise(12);
    values.iter_mut().for_each(|value| *value += 1e-6 * next());
    assert_eq!(check(values, rows, cols, 8, 1e-4).sigma.len(), 8);
}

#[test]
fn pure_noise_is_restarted_and_still_ends() {
    let mut next = noise(3);
    let (rows, cols) = (1500, 1400);
    let values: Vec<f32> = (0..rows * cols).map(|_| next()).collect();
    let delta = Delta::from_values(values, rows, cols).unwrap();
    let solve = |tolerance| truncated_svd(&delta, SvdOptions { target: Target::Rank(32), tolerance, seed: 0 }).unwrap();
    // A space of 384 columns, two products each, is the largest that is kept; the start takes at most 64.
    let restarted = solve(1e-8);
    assert!(restarted.columns > 832, "{} columns are no restart", restarted.columns);
    // Below what f32 can tell: the iteration can't know when it is done, and leaves it to the dense method.
    let dense = solve(1e-14);
    assert_eq!(dense.columns, 0);
    let captured = |svd: &TruncatedSvd| svd.sigma.iter().map(|sigma| sigma * sigma).sum::<f64>();
    let tail = delta.energy() - captured(&dense);
    assert!(
        (captured(&dense) - captured(&restarted)).abs() <= 2e-8 * tail.max(delta.energy()),
        "the restart lost directions"
    );
}

#[test]
fn a_target_error_is_met_by_as_few_directions_as_needed() {
    for (rows, cols, power) in [(300, 260, 1.0), (260, 420, 0.6), (150, 180, 0.8), (400, 400, 0.2)] {
        let values = with_spectrum(rows, cols, 21, |i| (i as f32 + 1.0).powf(-power));
        let sigma = singular_values(&values, rows, cols);
        let total: f64 = sigma.iter().map(|s| s * s).sum();
        let delta = Delta::from_values(values, rows, cols).unwrap();
        for error in [0.9, 0.5, 0.1] {
            let options = SvdOptions { target: Target::Error(error), tolerance: 1e-4, seed: 0 };
            let svd = truncated_svd(&delta, options).unwrap();
            let (b, a) = factors(&svd);
            let reached = (delta.residual_energy(&b, &a).unwrap() / total).sqrt();
            assert!(reached <= error * (1.0 + 1e-4), "{reached} for {error}");
            let tail = |rank: usize| sigma.iter().skip(rank).map(|s| s * s).sum::<f64>().sqrt();
            let fewest = (0..=sigma.len()).find(|&rank| tail(rank) <= error * total.sqrt()).unwrap();
            // θ are lower bounds of σ: one direction too many where the target lies between two ranks by a hair.
            assert!(svd.sigma.len() == fewest || svd.sigma.len() == fewest + 1, "{} of {fewest}", svd.sigma.len());
        }
    }
}

#[test]
fn degenerate_shapes_and_a_zero_delta() {
    for (rows, cols) in [(1, 1), (1, 500), (500, 1), (3, 1000), (1000, 3)] {
        check(with_spectrum(rows, cols, 9, |_| 1.0), rows, cols, 64, 1e-6);
    }
    let delta = Delta::from_values(vec![0.0; 300 * 300], 300, 300).unwrap();
    let svd = truncated_svd(&delta, SvdOptions { target: Target::Rank(8), tolerance: 1e-4, seed: 0 }).unwrap();
    assert_eq!((svd.sigma.len(), svd.u.rows(), svd.u.cols(), svd.vt.rows()), (0, 300, 0, 0));
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let values = with_spectrum(700, 260, 2, |i| (i as f32 + 1.0).powf(-0.5));
    let run = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let delta = Delta::from_values(values.clone(), 700, 260).unwrap();
            truncated_svd(&delta, SvdOptions { target: Target::Rank(24), tolerance: 1e-4, seed: 7 }).unwrap()
        })
    };
    let one = run(1);
    for threads in [2, 3, 8] {
        let other = run(threads);
        assert_eq!(one.sigma, other.sigma);
        assert_eq!(one.u, other.u);
        assert_eq!(one.vt, other.vt);
    }
}

#[test]
fn the_short_residual_is_the_direct_one() {
    for (rows, cols, rank) in [(300, 260, 20), (260, 420, 7), (1200, 1000, 64), (1000, 1200, 64)] {
        let values = with_spectrum(rows, cols, 31, |i| (i as f32 + 1.0).powf(-0.5));
        let rounded: Vec<f32> = values.iter().map(|&value| half::bf16::from_f32(value).to_f32()).collect();
        for (values, lossless) in [(values, false), (rounded, true)] {
            let delta = Delta::from_values(values, rows, cols).unwrap();
            let options = SvdOptions { target: Target::Rank(rank), tolerance: 1e-4, seed: 0 };
            let (b, a) = factors(&truncated_svd(&delta, options).unwrap());
            let (short, direct) = (delta.residual_energy(&b, &a).unwrap(), delta.direct_residual(&b, &a).unwrap());
            // Each of the three terms is at most ‖Δ‖² + ‖BA‖² and right to the rounding of f32 sums over one side.
            let rounding = 4.0 * EPS * (rows.max(cols) as f64).sqrt() * delta.energy();
            let turned = if lossless { 0.0 } else { 1e-3 * direct };
            assert!((short - direct).abs() <= rounding + turned, "{short} and {direct} of {rows}×{cols}");
        }
    }
}

#[test]
fn exactly_low_rank_deltas_end_soon_and_whole() {
    // A merged LoRA in bf16, and small integers: what is left of a block is noise, which must not be taken for directions.
    for (rows, cols, true_rank, rank) in [(700, 600, 16, 64), (600, 700, 8, 64), (1100, 300, 40, 40), (512, 512, 3, 32)]
    {
        let mut next = noise(41);
        let left = Mat::from_fn(rows, true_rank, |_, _| (next() * 3.0).round());
        let right =
            Mat::from_fn(true_rank, cols, |_, j| (next() * 3.0).round() * if j % 2 == 0 { 1.0 } else { 1.0 / 64.0 });
        let product = left * right;
        let values: Vec<f32> =
            (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| product[(i, j)]).collect();
        let svd = check(values, rows, cols, rank, 1e-4);
        assert_eq!(svd.sigma.len(), true_rank.min(rank));
        assert!(svd.columns <= 12 * true_rank.max(16), "{} columns for rank {true_rank}", svd.columns);
    }
}

#[test]
fn rounding_that_leans_one_way_does_not_mislead_the_residual() {
    // One step of a sign descent: every element is ±c, and rounding c to bf16 scales all of Δ.
    let (rows, cols) = (400, 300);
    let mut next = noise(51);
    let values: Vec<f32> = (0..rows * cols).map(|_| if next() < 0.0 { -1.003_906 } else { 1.003_906 }).collect();
    let delta = Delta::from_values(values, rows, cols).unwrap();
    let svd = truncated_svd(&delta, SvdOptions { target: Target::Rank(40), tolerance: 1e-4, seed: 0 }).unwrap();
    let (b, a) = factors(&svd);
    let (short, direct) = (delta.residual_energy(&b, &a).unwrap(), delta.direct_residual(&b, &a).unwrap());
    assert!((short - direct).abs() <= 1e-3 * direct, "{short} and {direct}");
    // A target error is met to its tolerance, whatever rounding does.
    let options = SvdOptions { target: Target::Error(0.6), tolerance: 1e-4, seed: 0 };
    let (b, a) = factors(&truncated_svd(&delta, options).unwrap());
    let reached = (delta.direct_residual(&b, &a).unwrap() / delta.energy()).sqrt();
    assert!(reached <= 0.6 * (1.0 + 1e-4), "{reached}");
}

#[test]
fn a_stack_is_the_matrix_of_all_rows() {
    // Heights that end inside blocks of 32 rows, and a part of no row; wide enough to be packed.
    let (cols, heights) = (211, [45usize, 0, 97, 150]);
    let values = with_spectrum(heights.iter().sum(), cols, 9, |i| 1.0 / (1.0 + i as f32));
    let mut rest = values.as_slice();
    let parts: Vec<Delta> = heights
        .iter()
        .map(|&rows| {
            let (own, after) = rest.split_at(rows * cols);
            rest = after;
            Delta::from_values(own.to_vec(), rows, cols).unwrap()
        })
        .collect();
    let stack = Delta::stack(&parts.iter().collect::<Vec<_>>()).unwrap();
    let whole = Delta::from_values(values.clone(), heights.iter().sum(), cols).unwrap();
    assert_eq!(stack.read_rows(0..usize::MAX).unwrap(), values);
    assert_eq!(stack.read_rows(40..60).unwrap(), values[40 * cols..60 * cols]);
    let options = SvdOptions { target: Target::Rank(12), tolerance: 1e-4, seed: 1 };
    let (ours, theirs) = (truncated_svd(&stack, options).unwrap(), truncated_svd(&whole, options).unwrap());
    // The same packed values, and sums whose pieces are cut elsewhere.
    assert!((stack.energy() - whole.energy()).abs() <= 1e-12 * whole.energy());
    assert_eq!(ours.sigma, theirs.sigma);
    let other = Delta::from_values(vec![1.0; 6], 2, 3).unwrap();
    assert!(Delta::stack(&[&parts[0], &other]).is_err());
    assert!(Delta::stack(&[]).is_err());
}
