//! Truncated SVD of a delta: Δ ≈ U·diag(σ)·Vᵀ, the best approximation of its rank in the Frobenius norm (Eckart–Young).
//!
//! All methods work on the tall orientation (rows ≥ cols) and find the right singular vectors only. With M = Δ·V the left
//! vectors and the singular values come for free (M = U·diag(σ)), and ‖Δ − M·Vᵀ‖² = ‖Δ‖² − ‖M‖² holds for *any*
//! orthonormal V, converged or not: the energy captured is never overstated.
//!
//! | file | method | for |
//! |---|---|---|
//! | `lanczos` (`search`, `space`, `columns`) | adaptive block Lanczos on a packed Δ | low ranks |
//! | `gram` | eigenvectors of ΔᵀΔ in f64 | a shorter side up to 192, ranks beyond a sixth of it |

mod columns;
mod gram;
mod lanczos;
mod search;
mod space;

use faer::{Mat, MatRef, Side};

use crate::delta::Delta;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::matrix::Matrix;
use crate::packed::Packed;
use crate::panels;

/// Above this share of the shorter side an iteration costs more than all of the spectrum.
const DENSE: usize = 6;

/// How many triplets are wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// This many; fewer come back when Δ has fewer singular values that differ from zero.
    Rank(usize),
    /// As many as bring ‖Δ − Δ_r‖ down to this share of ‖Δ‖.
    Error(f64),
}

impl Target {
    /// The number wanted, given the largest θ² (descending) and the energy that they are part of; `None` when more are
    /// needed than there are.
    fn rank(self, theta: &[f64], energy: f64) -> Option<usize> {
        match self {
            Self::Rank(rank) => Some(rank),
            Self::Error(error) => {
                let mut rest = energy * (1.0 - error * error);
                if rest <= 0.0 {
                    return Some(0);
                }
                let met = |value: &f64| {
                    rest -= value;
                    rest <= 0.0
                };
                theta.iter().position(met).map(|last| last + 1)
            }
        }
    }
}

/// What is asked of [`truncated_svd`].
#[derive(Debug, Clone, Copy)]
pub struct SvdOptions {
    /// Singular triplets wanted.
    pub target: Target,
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
    /// Columns that Δ was multiplied with, both ways counted: the cost in units of 2·rows·cols flops; 0 for dense methods.
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

impl Triplets {
    fn none(rows: usize, cols: usize) -> Self {
        Self { v: Mat::zeros(cols, 0), image: Mat::zeros(rows, 0), sigma: Vec::new(), columns: 0 }
    }
}

/// The leading singular triplets of `delta`.
///
/// The same delta, options, build and kernel give the same bits on any number of threads.
///
/// # Errors
/// [`Error::NoConvergence`] when a dense factorisation inside fails; as [`Delta::load`] when Δ has to be read again.
pub fn truncated_svd(delta: &Delta, options: SvdOptions) -> Result<TruncatedSvd> {
    let triplets = triplets(delta, options)?;
    Ok(finish(&triplets, delta.rows() < delta.cols(), delta.scale()))
}

/// The leading singular values of `delta`, descending: those of [`truncated_svd`].
///
/// # Errors
/// As [`truncated_svd`].
pub fn singular_values(delta: &Delta, options: SvdOptions) -> Result<Vec<f64>> {
    let sigma = triplets(delta, options)?.sigma;
    Ok(sigma.into_iter().map(|value| value * delta.scale()).collect())
}

fn triplets(delta: &Delta, options: SvdOptions) -> Result<Triplets> {
    let short = delta.rows().min(delta.cols());
    let energy = delta.energy() / delta.scale().powi(2);
    let options = match options.target {
        Target::Rank(rank) => SvdOptions { target: Target::Rank(rank.min(short)), ..options },
        Target::Error(_) => options,
    };
    let nothing = energy == 0.0 || matches!(options.target.rank(&[], energy), Some(0));
    match delta.packed() {
        _ if nothing => Ok(Triplets::none(delta.rows().max(delta.cols()), short)),
        None => gram::triplets(delta, energy, options),
        Some(_) if matches!(options.target, Target::Rank(rank) if rank * DENSE > short) => {
            gram::triplets(delta, energy, options)
        }
        Some((packed, rounding)) => iterate(delta, packed, rounding.lost, energy, options),
    }
}

/// Lanczos on the rounded copy, where that is good enough; else on an exact one. Dense when the iteration gives up.
fn iterate(delta: &Delta, packed: &Packed, lost: f64, energy: f64, options: SvdOptions) -> Result<Triplets> {
    let kernel = Kernel::current()?;
    // Rounding Δ by R turns its leading subspace. R is as good as independent of Δ, so what that costs is of second order in
    // ‖R‖: a few times ‖R‖²·r/n (each pair of a kept and a lost direction mixes by about |R_ij|²). Asking for ‖R‖² itself
    // leaves room for an R that is not so independent.
    // A target error is compared with what is captured, where R counts to the first order.
    let tail = match options.target {
        Target::Rank(_) => f64::INFINITY,
        Target::Error(error) => error * error * energy,
    };
    if lost <= options.tolerance * energy && 2.0 * (lost * energy).sqrt() <= options.tolerance * tail {
        let Some(triplets) = lanczos::triplets(kernel, packed, energy, options, delta.workspace())? else {
            return gram::triplets(delta, energy, options);
        };
        let captured: f64 = triplets.sigma.iter().map(|sigma| sigma * sigma).sum();
        let allowed = options.tolerance * (energy - captured).max(0.0);
        if lost <= allowed {
            // Even if all of R fell into the subspace, an image without it would take a twentieth of the tolerance.
            return if lost <= 0.1 * allowed { Ok(triplets) } else { refine(delta, triplets) };
        }
    }
    let exact = Packed::F32(delta.pack_exactly()?);
    match lanczos::triplets(kernel, &exact, energy, options, delta.workspace())? {
        Some(triplets) => Ok(triplets),
        None => gram::triplets(delta, energy, options),
    }
}

/// The same subspace with its exact image, and the singular triplets of that.
fn refine(delta: &Delta, triplets: Triplets) -> Result<Triplets> {
    let image = delta.tall_product(triplets.v.as_ref())?;
    let (values, vectors) = eigen(panels::gram(image.as_ref(), image.as_ref()).as_ref())?;
    let size = values.len();
    let rotation = Mat::from_fn(size, size, |i, j| vectors[(i, size - 1 - j)] as f32);
    Ok(Triplets {
        v: panels::tall_times_small(triplets.v.as_ref(), rotation.as_ref()),
        image: panels::tall_times_small(image.as_ref(), rotation.as_ref()),
        sigma: values.into_iter().rev().map(|value| value.max(f64::MIN_POSITIVE).sqrt()).collect(),
        columns: triplets.columns + size,
    })
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
    let factors: Vec<(f64, f64)> = (0..sigma.len())
        .map(|j| {
            let column = (0..v.nrows()).map(|i| v[(i, j)]);
            let largest = column.fold(0f32, |best, x| if x.abs() > best.abs() { x } else { best });
            let sign = if largest < 0.0 { -1.0 } else { 1.0 };
            (sign, sign / sigma[j])
        })
        .collect();
    let (v_factors, u_factors): (Vec<f64>, Vec<f64>) = factors.into_iter().unzip();
    let (left, left_factors, right, right_factors) =
        if wide { (v, v_factors, image, u_factors) } else { (image, u_factors, v, v_factors) };
    TruncatedSvd {
        u: Matrix::from_columns(left.as_ref(), &left_factors),
        sigma: sigma.iter().map(|value| value * scale).collect(),
        vt: Matrix::from_transposed_columns(right.as_ref(), &right_factors),
        columns: *columns,
    }
}

/// Eigenvalues ascending with their eigenvectors, of a symmetric f64 matrix.
fn eigen(matrix: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let decomposition = matrix.self_adjoint_eigen(Side::Lower).map_err(|_| no_eigenvalues(matrix.nrows()))?;
    Ok((decomposition.S().column_vector().iter().copied().collect(), decomposition.U().to_owned()))
}

fn no_eigenvalues(size: usize) -> Error {
    Error::NoConvergence { what: "eigenvalue decomposition", rows: size, cols: size }
}
