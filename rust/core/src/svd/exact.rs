//! Exact truncated SVD by a dense factorisation in f64, for matrices where it is cheap.

use faer::Mat;

use super::{SvdOptions, Triplets};
use crate::delta::Delta;
use crate::error::{Error, Result};

/// Leading triplets in the tall orientation. Singular values that f64 cannot tell from zero are left out.
pub(super) fn triplets(delta: &Delta, energy: f64, options: SvdOptions) -> Result<Triplets> {
    let tall = delta.tall_f64()?;
    let (rows, cols) = (tall.nrows(), tall.ncols());
    let svd = tall.thin_svd().map_err(|_| Error::NoConvergence { what: "singular value decomposition", rows, cols })?;
    let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let squares: Vec<f64> = values.iter().map(|value| value * value).collect();
    let rank = options.target.rank(&squares, energy).unwrap_or(cols);
    let floor = values.first().copied().unwrap_or(0.0) * f64::EPSILON * rows as f64;
    let sigma: Vec<f64> = values.into_iter().take(rank).take_while(|&value| value > floor).collect();
    let (u, v) = (svd.U(), svd.V());
    Ok(Triplets {
        v: Mat::from_fn(cols, sigma.len(), |i, j| v[(i, j)] as f32),
        image: Mat::from_fn(rows, sigma.len(), |i, j| (u[(i, j)] * sigma[j]) as f32),
        sigma,
        columns: 0,
    })
}
