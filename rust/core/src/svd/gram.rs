//! Truncated SVD through the Gram matrix ΔᵀΔ, formed and decomposed in f64: for narrow matrices, and for ranks so high that an
//! iteration would build most of the spectrum anyway.
//!
//! f64 squares Δ's range without harm here: singular values below 1e-8 of the largest are lost, which is the rounding of f32.

use faer::Mat;

use super::{SvdOptions, Triplets, eigen};
use crate::delta::Delta;
use crate::error::Result;
use crate::kernel::{self, Kernel};
use crate::packed::{Blocks, Packed};
use crate::panels;

/// Leading triplets of a Δ with ‖Δ‖² = `energy` > 0. Those that f64 cannot tell from zero are left out.
///
/// # Errors
/// As [`Delta::load`], since Δ is read again; [`crate::Error::NoConvergence`].
pub(super) fn triplets(delta: &Delta, energy: f64, options: SvdOptions) -> Result<Triplets> {
    let blocks = delta.pack_exactly()?;
    let (rows, cols) = (blocks.long(), blocks.short());
    let (values, vectors) = eigen(gram(&blocks).as_ref())?;
    let theta: Vec<f64> = values.into_iter().rev().collect();
    let rank = options.target.rank(&theta, energy).unwrap_or(theta.len());
    let floor = theta.first().copied().unwrap_or(0.0) * f64::EPSILON * cols as f64;
    let keep = theta.iter().take(rank).take_while(|&&value| value > floor).count();
    let v = Mat::from_fn(cols, keep, |i, j| vectors[(i, theta.len() - 1 - j)] as f32);
    let mut image = Mat::zeros(rows, keep);
    kernel::products(Kernel::current()?, &Packed::F32(blocks), v.as_ref(), image.as_mut(), None, delta.workspace());
    let sigma = theta.into_iter().take(keep).map(f64::sqrt).collect();
    Ok(Triplets { v, image, sigma, columns: 0 })
}

/// ΔᵀΔ of the tall orientation, panels of columns of the result side by side.
fn gram(blocks: &Blocks<f32>) -> Mat<f64> {
    /// Rows of Δ that are widened at a time, in panels; and columns of the result that one thread forms.
    const PANELS: usize = 16;
    const WIDTH: usize = 256;
    let short = blocks.short();
    let mut gram = Mat::<f64>::zeros(short, short);
    for first in (0..blocks.panels()).step_by(PANELS) {
        let slab = blocks.rows_f64(first, PANELS);
        let parts = panels::map(panels::cut(short, WIDTH), |columns| {
            // The lower triangle is enough.
            let below = slab.as_ref().subcols(columns.start, short - columns.start);
            let own = slab.as_ref().subcols(columns.start, columns.len());
            (columns, panels::inner_f64(below, own))
        });
        for (columns, part) in parts {
            let mut own =
                gram.as_mut().submatrix_mut(columns.start, columns.start, short - columns.start, columns.len());
            own += part;
        }
    }
    gram
}
