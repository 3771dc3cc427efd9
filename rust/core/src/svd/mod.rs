//! Truncated SVD of a delta: Δ ≈ U·diag(σ)·Vᵀ, the best approximation of its rank in the Frobenius norm (Eckart–Young).
//!
//! Both methods work on the tall orientation (rows ≥ cols) and find the right singular vectors only. With M = Δ·V the left
//! vectors and the singular values come for free (M = U·diag(σ)), and ‖Δ − M·Vᵀ‖² = ‖Δ‖² − ‖M‖² holds exactly for *any*
//! orthonormal V, converged or not: the energy captured is never overstated.

mod exact;
mod lanczos;

use faer::{Mat, MatRef};

use crate::delta::Delta;
use crate::error::Result;
use crate::matrix::Matrix;

/// Up to this many columns the exact decomposition costs less than steering an iteration.
const EXACT_COLS: usize = 192;

/// What is asked of [`truncated_svd`].
#[derive(Debug, Clone, Copy)]
pub struct SvdOptions {
    /// Singular triplets wanted; fewer come back when Δ has fewer that differ from zero.
    pub rank: usize,
    /// Bound on the excess: ‖Δ − Δ_r‖ may be this much above the optimum, relatively.
    pub tolerance: f64,
    /// Seed of the iteration's starting block.
    pub seed: u64,
}

/// The leading singular triplets, σ descending and positive.
#[derive(Debug, Clone)]
pub struct TruncatedSvd {
    /// Left singular vectors, `(rows, r)`.
    pub u: Matrix,
    /// Singular values.
    pub sigma: Vec<f64>,
    /// Right singular vectors, transposed: `(r, cols)`.
    pub vt: Matrix,
    /// Columns that Δ was multiplied with, both ways counted: the cost in units of 2·rows·cols flops; 0 for the exact method.
    pub columns: usize,
}

/// Leading right singular vectors and their image, in the tall orientation.
struct Triplets {
    /// `(cols, r)`, orthonormal.
    v: Mat<f32>,
    /// Δ·V, `(rows, r)`.
    image: Mat<f32>,
    /// Norms of the image's columns, descending.
    sigma: Vec<f64>,
    columns: usize,
}

/// The leading `rank` singular triplets of `delta`.
///
/// Exact (f64) for narrow matrices and for ranks near the full one; otherwise adaptive block Lanczos (`lanczos.rs`). The same delta, options and build give the same bits on any number of threads.
///
/// # Errors
/// [`crate::Error::NoConvergence`] when the dense factorisation inside fails.
pub fn truncated_svd(delta: &Delta, options: SvdOptions) -> Result<TruncatedSvd> {
    let matrix = delta.scaled();
    let wide = matrix.nrows() < matrix.ncols();
    let tall = if wide { matrix.transpose() } else { matrix };
    let rank = options.rank.min(tall.ncols());
    let energy = delta.energy() / delta.scale().powi(2);
    let triplets = if rank == 0 || energy == 0.0 {
        Triplets { v: Mat::zeros(tall.ncols(), 0), image: Mat::zeros(tall.nrows(), 0), sigma: Vec::new(), columns: 0 }
    } else if tall.ncols() <= EXACT_COLS || 2 * rank >= tall.ncols() {
        exact::triplets(tall, rank)?
    } else {
        lanczos::triplets(tall, energy, SvdOptions { rank, ..options })?
    };
    Ok(finish(&triplets, wide, delta.scale()))
}

/// A seed of its own for every tensor, so that results depend neither on the order of the work nor on the tensors around
/// (FNV-1a over the name, started from the user's seed).
#[must_use]
pub fn tensor_seed(seed: u64, name: &str) -> u64 {
    name.bytes()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Normalises the image into left vectors, fixes signs and undoes the transposition.
fn finish(triplets: &Triplets, wide: bool, scale: f64) -> TruncatedSvd {
    let Triplets { v, image, sigma, columns } = triplets;
    // A singular pair is unique up to one common sign. Let the right vector's largest entry be positive.
    let factors: Vec<(f32, f64)> = (0..sigma.len())
        .map(|j| {
            let column = (0..v.nrows()).map(|i| v[(i, j)]);
            let largest = column.fold(0f32, |best, x| if x.abs() > best.abs() { x } else { best });
            let sign = if largest < 0.0 { -1.0 } else { 1.0 };
            (sign, f64::from(sign) / sigma[j])
        })
        .collect();
    let v = Mat::from_fn(v.nrows(), sigma.len(), |i, j| v[(i, j)] * factors[j].0);
    let u = Mat::from_fn(image.nrows(), sigma.len(), |i, j| (f64::from(image[(i, j)]) * factors[j].1) as f32);
    let (left, right) = if wide { (v, u) } else { (u, v) };
    TruncatedSvd {
        u: Matrix::from_faer(left.as_ref(), 1.0),
        sigma: sigma.iter().map(|value| value * scale).collect(),
        vt: Matrix::from_faer(right.as_ref().transpose(), 1.0),
        columns: *columns,
    }
}

/// Shape of the tall orientation, for error messages.
fn shape(matrix: MatRef<'_, f32>) -> (usize, usize) {
    (matrix.nrows(), matrix.ncols())
}
