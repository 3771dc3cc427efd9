//! One-sided adaptive block Lanczos: leading singular triplets from a few dozen products with Δ.
//!
//! Let G = ΔᵀΔ, acting on the smaller side. From a random block V₁ the iteration builds an orthonormal basis of the block
//! Krylov space span{V₁, G·V₁, G²·V₁, …} (Musco & Musco 2015, arXiv 1504.05477; small blocks suffice: Meyer, Musco & Musco
//! 2023, arXiv 2305.02535) and keeps M = Δ·V beside it:
//!
//! ```text
//! repeat   Y = Δ·Vⱼ,  Z = Δᵀ·Y          one read of Δ for both, by row panels
//!          V ← [V Vⱼ],  M ← [M Y]
//!          MᵀM = C·diag(θ²)·Cᵀ           K×K, in f64 (Rayleigh–Ritz)
//!          stop when the energy still to come is small
//!          Vⱼ₊₁ = orth(Z − V·VᵀZ)
//! result   V_r = V·C_r,  Δ·V_r = M·C_r
//! ```
//!
//! A claim of convergence is put to the test by two more steps from a random block outside the space ([`Probe`]).
//!
//! Only the captured *energy* Σθ² has to converge, not single vectors, so the stopping rule looks at nothing else: increments
//! of the top-r energy shrink geometrically, and their predicted sum bounds the excess. θ ≤ σ by interlacing: what is
//! claimed is always reached.

use faer::{Mat, MatRef, Side};

use super::{SvdOptions, Triplets, shape};
use crate::error::{Error, Result};
use crate::panels;

/// Directions below this share of the largest are rounding noise of the f32 products.
const NOISE: f64 = 1e-6;
/// Energy below this share of ‖Δ‖² cannot be told from rounding of the captured energy.
const ENERGY_NOISE: f64 = 1e-10;

/// Leading triplets of a tall matrix with ‖Δ‖² = `energy` > 0.
pub(super) fn triplets(tall: MatRef<'_, f32>, energy: f64, options: SvdOptions) -> Result<Triplets> {
    let (rows, cols) = shape(tall);
    let width = (options.rank.div_ceil(4)).next_multiple_of(8).clamp(8, 64).min(cols);
    let mut random = Random(options.seed);
    let mut space = Space { basis: Mat::zeros(cols, 0), image: Mat::zeros(rows, 0), gram: Mat::zeros(0, 0) };
    let mut columns = width;
    let start = panels::tall_times_small(tall.transpose(), random.block(rows, width).as_ref());
    let mut block = space.orthonormalise(start, 0.0)?;
    let mut progress = Progress::default();
    let mut probe: Option<Probe> = None;
    let mut checked_at = 0;
    while block.ncols() > 0 {
        let (image, next) = both_products(tall, block.as_ref());
        columns += 2 * block.ncols();
        let image_norm = f64::from(image.norm_l2());
        if probe.as_ref().is_some_and(|probe| probe.steps == 0)
            && image_norm.powi(2) <= NOISE * NOISE * energy * width as f64
        {
            break; // Nothing but rounding noise is left outside the space.
        }
        space.extend(block.as_ref(), image.as_ref());
        if space.size() >= cols {
            break;
        }
        let floor = f64::from(f32::EPSILON) * 8.0 * f64::from(space.image_peak()) * image_norm;
        let next = space.orthonormalise(next, floor)?;
        let exhausted = next.ncols() == 0;
        let mut fresh = exhausted;
        let due = match &mut probe {
            Some(probe) => {
                probe.steps += 1;
                exhausted || probe.steps == PROBE_STEPS
            }
            // The eigenproblem costs K³: solve it when the basis has grown enough for the answer to have changed.
            None => exhausted || (space.size() >= options.rank && 10 * space.size() >= 11 * checked_at),
        };
        if due {
            checked_at = space.size();
            let captured: f64 = space.ritz()?.0.iter().take(options.rank).sum();
            // A probe sees some of what is hidden, not all of it: it may show an eighth of what is allowed.
            let allowed = 0.125 * options.tolerance * (energy - captured).max(ENERGY_NOISE * energy);
            match probe.take() {
                Some(claim) if captured - claim.captured <= allowed => break,
                Some(_) => progress = Progress::default(),
                None if progress.done(captured, energy, options.tolerance) || exhausted => {
                    probe = Some(Probe { captured, steps: 0 });
                    fresh = true;
                }
                None => {}
            }
        }
        let room = cols - space.size();
        block = if fresh {
            space.orthonormalise(random.block(cols, width.min(room)), 0.0)?
        } else if next.ncols() > room {
            next.subcols(0, room).to_owned()
        } else {
            next
        };
    }
    space.leading(options.rank, columns)
}

/// A claim of convergence under test: the energy captured when it was made, and the steps taken since from a fresh random
/// block. A Krylov space holds at most one direction per start vector of every repeated singular value, and few of a tight
/// cluster: it can look converged without having seen the others. A random block outside the space sees them.
struct Probe {
    captured: f64,
    steps: usize,
}

/// Steps from the random block before a claim is believed.
const PROBE_STEPS: usize = 2;

/// Basis V, image M = Δ·V and Gram matrix MᵀM.
struct Space {
    basis: Mat<f32>,
    image: Mat<f32>,
    gram: Mat<f64>,
}

impl Space {
    fn size(&self) -> usize {
        self.basis.ncols()
    }

    /// √λ_max of the Gram matrix's diagonal: a lower bound of σ₁ good enough to scale a noise floor.
    fn image_peak(&self) -> f32 {
        (0..self.gram.ncols()).map(|j| self.gram[(j, j)]).fold(0.0, f64::max).sqrt() as f32
    }

    fn extend(&mut self, block: MatRef<'_, f32>, image: MatRef<'_, f32>) {
        let (old, new) = (self.size(), self.size() + block.ncols());
        append(&mut self.basis, block);
        append(&mut self.image, image);
        let columns = panels::gram(self.image.as_ref(), image);
        self.gram.resize_with(new, new, |_, _| 0.0);
        for j in old..new {
            for i in 0..new {
                let value = columns[(i, j - old)];
                self.gram[(i, j)] = value;
                self.gram[(j, i)] = value;
            }
        }
    }

    /// Ritz values θ² descending, and the eigenvectors in the same order.
    fn ritz(&self) -> Result<(Vec<f64>, Mat<f64>)> {
        eigen(self.gram.as_ref())
    }

    /// Orthonormal basis of what `block` adds to the space; directions no longer than `floor` are dropped.
    ///
    /// Classical Gram–Schmidt against the basis, then normalisation through the block's own Gram matrix in f64 (an
    /// eigenvalue form of CholeskyQR that tells the rank), repeated until both are orthogonal to f32 accuracy.
    fn orthonormalise(&self, mut block: Mat<f32>, floor: f64) -> Result<Mat<f32>> {
        let mut floor = floor.max(f64::MIN_POSITIVE);
        for _ in 0..4 {
            if self.size() > 0 {
                // Twice is enough (Kahan–Parlett): one pass leaves a component of the size of its rounding.
                for _ in 0..2 {
                    let overlap = panels::tall_times_small(self.basis.as_ref().transpose(), block.as_ref());
                    panels::multiply_add(block.as_mut(), self.basis.as_ref(), overlap.as_ref(), -1.0);
                }
            }
            let (lambda, vectors) = eigen(panels::gram(block.as_ref(), block.as_ref()).as_ref())?;
            let longest = lambda.first().copied().unwrap_or(0.0).max(0.0).sqrt();
            let keep = lambda.iter().take_while(|&&value| value.max(0.0).sqrt() > floor.max(NOISE * longest)).count();
            let spread = lambda.iter().take(keep).fold(0.0, |worst: f64, value| worst.max((value - 1.0).abs()));
            if keep == block.ncols() && spread < 1e-5 {
                return Ok(block);
            }
            let rotation = Mat::from_fn(block.ncols(), keep, |i, j| (vectors[(i, j)] / lambda[j].sqrt()) as f32);
            block = panels::tall_times_small(block.as_ref(), rotation.as_ref());
            if keep == 0 {
                return Ok(block);
            }
            // From here on columns have unit length; one that collapses in the next round was not independent.
            floor = 0.5;
        }
        Ok(block)
    }

    /// The `rank` leading Ritz triplets, without those that are rounding noise.
    fn leading(&self, rank: usize, columns: usize) -> Result<Triplets> {
        let (theta, vectors) = self.ritz()?;
        let floor = theta.first().copied().unwrap_or(0.0) * NOISE * NOISE;
        let keep = theta.iter().take(rank).take_while(|&&value| value > floor).count();
        let rotation = Mat::from_fn(self.size(), keep, |i, j| vectors[(i, j)] as f32);
        Ok(Triplets {
            v: panels::tall_times_small(self.basis.as_ref(), rotation.as_ref()),
            image: panels::tall_times_small(self.image.as_ref(), rotation.as_ref()),
            sigma: theta.into_iter().take(keep).map(f64::sqrt).collect(),
            columns,
        })
    }
}

/// The stopping rule: energy increments, and what they predict.
#[derive(Default)]
struct Progress {
    captured: f64,
    increment: Option<f64>,
}

impl Progress {
    /// Whether the excess of the top-r error is predicted to be within `tolerance`.
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
        let to_come = increment * ratio / (1.0 - ratio);
        // ‖Δ−Δ̂‖/‖Δ−Δ_r‖ − 1 ≈ ½·(missing energy)/(error energy); half the tolerance is kept for the prediction's own error.
        0.5 * to_come / error < 0.5 * tolerance
    }
}

/// Y = Δ·X and Z = Δᵀ·Y with one read of Δ: each row panel serves both products while it is in cache.
fn both_products(tall: MatRef<'_, f32>, x: MatRef<'_, f32>) -> (Mat<f32>, Mat<f32>) {
    // At most 32 partial Zs are held, so the panels' height follows from the matrix and memory stays bounded.
    const PANELS: usize = 32;
    const STRIP: usize = 64;
    let (rows, cols, width) = (tall.nrows(), tall.ncols(), x.ncols());
    let height = rows.div_ceil(PANELS).next_multiple_of(STRIP);
    let parts = panels::map(panels::cut(rows, height), |panel| {
        let mut y = Mat::<f32>::zeros(panel.len(), width);
        let mut z = Mat::<f32>::zeros(cols, width);
        for strip in panels::cut(panel.len(), STRIP) {
            let delta = tall.subrows(panel.start + strip.start, strip.len());
            let mut y = y.as_mut().subrows_mut(strip.start, strip.len());
            panels::multiply(y.as_mut(), delta, x);
            panels::multiply_add(z.as_mut(), delta.transpose(), y.as_ref(), 1.0);
        }
        (panel, y, z)
    });
    let (mut y, mut z) = (Mat::<f32>::zeros(rows, width), Mat::<f32>::zeros(cols, width));
    for (panel, y_part, z_part) in parts {
        y.as_mut().subrows_mut(panel.start, panel.len()).copy_from(y_part);
        z += z_part;
    }
    (y, z)
}

/// Eigenvalues descending with their eigenvectors, of a symmetric f64 matrix.
fn eigen(matrix: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let size = matrix.nrows();
    let decomposition = matrix.self_adjoint_eigen(Side::Lower).map_err(|_| Error::NoConvergence {
        what: "eigenvalue decomposition",
        rows: size,
        cols: size,
    })?;
    let (values, vectors) = (decomposition.S().column_vector(), decomposition.U());
    let descending = (0..size).map(|i| values[size - 1 - i]).collect();
    Ok((descending, Mat::from_fn(size, size, |i, j| vectors[(i, size - 1 - j)])))
}

fn append(matrix: &mut Mat<f32>, columns: MatRef<'_, f32>) {
    let old = matrix.ncols();
    matrix.resize_with(columns.nrows(), old + columns.ncols(), |i, j| columns[(i, j - old)]);
}

/// SplitMix64 (Steele, Lea & Flood 2014): counter based, so a block depends on seed and position alone. Uniform numbers serve a
/// random start as well as normal ones do, and need no library function that could differ between platforms.
struct Random(u64);

impl Random {
    fn block(&mut self, rows: usize, cols: usize) -> Mat<f32> {
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
