//! Cutting matrices into panels, and running them in parallel.
//!
//! Panel bounds depend on the matrix alone, every panel is computed by one thread, and partial sums are added in panel order:
//! so no result depends on the number of threads or on who finished first.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::error::Result;
use crate::kernel;

/// Cuts `rows` into ranges of `height`, the last one shorter.
pub(crate) fn cut(rows: usize, height: usize) -> Vec<Range<usize>> {
    let height = height.max(1);
    (0..rows.div_ceil(height)).map(|panel| panel * height..((panel + 1) * height).min(rows)).collect()
}

/// Runs `job` on every range in parallel and returns the results in order.
pub(crate) fn map<T: Send>(ranges: Vec<Range<usize>>, job: impl Fn(Range<usize>) -> T + Sync + Send) -> Vec<T> {
    ranges.into_par_iter().map(job).collect()
}

/// Whether `job` holds for every range. With a `scratch` for each thread; ends early when it does not hold or fails.
pub(crate) fn all<S>(
    ranges: Vec<Range<usize>>,
    scratch: impl Fn() -> S + Sync + Send,
    job: impl Fn(Range<usize>, &mut S) -> Result<bool> + Sync + Send,
) -> Result<bool> {
    let outcome = ranges.into_par_iter().map_init(scratch, |scratch, range| match job(range, scratch) {
        Ok(true) => Ok(()),
        other => Err(other),
    });
    outcome.collect::<std::result::Result<(), Result<bool>>>().map_or_else(|other| other, |()| Ok(true))
}

/// `dst = lhs·rhs` on the calling thread.
pub(crate) fn multiply(dst: MatMut<'_, f32>, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>) {
    matmul(dst, Accum::Replace, lhs, rhs, 1.0, Par::Seq);
}

/// `dst += alpha·lhs·rhs` on the calling thread.
pub(crate) fn multiply_add(dst: MatMut<'_, f32>, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>, alpha: f32) {
    matmul(dst, Accum::Add, lhs, rhs, alpha, Par::Seq);
}

/// `leftᵀ·right` of two tall f32 matrices, summed in f64.
pub(crate) fn gram(left: MatRef<'_, f32>, right: MatRef<'_, f32>) -> Mat<f64> {
    /// Columns in a tile.
    const TILE: usize = 4;
    // Short enough for a panel of many columns to stay in cache.
    const HEIGHT: usize = 512;
    add_up(left, right, HEIGHT, |left, right| {
        let mut part = Mat::<f64>::zeros(left.ncols(), right.ncols());
        for j in (0..right.ncols()).step_by(TILE) {
            let right_columns = columns::<TILE>(right, j);
            for i in (0..left.ncols()).step_by(TILE) {
                let tile = kernel::inner_tile(&columns::<TILE>(left, i), &right_columns);
                for (i, row) in (i..left.ncols()).zip(tile) {
                    for (j, value) in (j..right.ncols()).zip(row) {
                        part[(i, j)] = value;
                    }
                }
            }
        }
        part
    })
}

/// `N` columns from the first on, the last again where there are no more.
fn columns<const N: usize>(matrix: MatRef<'_, f32>, first: usize) -> [&[f32]; N] {
    std::array::from_fn(|n| column(matrix, (first + n).min(matrix.ncols() - 1)))
}

/// A column; empty if it is not contiguous.
pub(crate) fn column(matrix: MatRef<'_, f32>, number: usize) -> &[f32] {
    matrix.col(number).try_as_col_major().map_or(&[][..], |column| column.as_slice())
}

/// A column to be written; empty if it is not contiguous.
pub(crate) fn column_mut(matrix: MatMut<'_, f32>, number: usize) -> &mut [f32] {
    matrix.col_mut(number).try_as_col_major_mut().map_or(&mut [][..], |column| column.as_slice_mut())
}

/// Cuts a matrix into strips of `height` rows.
pub(crate) fn strips(mut matrix: MatMut<'_, f32>, height: usize) -> Vec<(Range<usize>, MatMut<'_, f32>)> {
    let mut strips = Vec::new();
    for rows in cut(matrix.nrows(), height) {
        let (strip, rest) = matrix.split_at_row_mut(rows.len());
        strips.push((rows, strip));
        matrix = rest;
    }
    strips
}

/// `leftᵀ·right` on the calling thread.
pub(crate) fn inner_f64(left: MatRef<'_, f64>, right: MatRef<'_, f64>) -> Mat<f64> {
    let mut product = Mat::<f64>::zeros(left.ncols(), right.ncols());
    matmul(product.as_mut(), Accum::Replace, left.transpose(), right, 1.0, Par::Seq);
    product
}

/// ⟨left, right⟩ = Σ left·right over all elements, column by column in f64.
pub(crate) fn inner_product(left: MatRef<'_, f32>, right: MatRef<'_, f32>) -> f64 {
    let columns: Vec<f64> = (0..left.ncols())
        .into_par_iter()
        .map(|j| column(left, j).iter().zip(column(right, j)).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum())
        .collect();
    columns.iter().sum()
}

/// One step of classical Gram–Schmidt: `block − basis·N⁻¹·basisᵀ·block`, where N = basisᵀ·basis is so near to the identity that
/// N⁻¹ = 2 − N. Returns how much of a column that takes away, relatively, at most over all columns.
pub(crate) fn project_out(basis: MatRef<'_, f32>, overlap: MatRef<'_, f64>, block: &mut Mat<f32>) -> f32 {
    const HEIGHT: usize = 512;
    let inner = add_up(basis, block.as_ref(), HEIGHT, |basis, block| {
        let mut part = Mat::<f32>::zeros(basis.ncols(), block.ncols());
        multiply(part.as_mut(), basis.transpose(), block);
        part
    });
    let shares = block.col_iter().zip(inner.col_iter()).map(|(column, taken)| taken.norm_l2() / column.norm_l2());
    let most = shares.fold(0f32, f32::max);
    let correction =
        Mat::from_fn(overlap.nrows(), overlap.ncols(), |i, j| (f64::from(i == j) - overlap[(i, j)]) as f32);
    let mut coefficients = inner.clone();
    multiply_add(coefficients.as_mut(), correction.as_ref(), inner.as_ref(), 1.0);
    for_row_strips(block.as_mut(), HEIGHT, |rows, strip| {
        multiply_add(strip, basis.subrows(rows.start, rows.len()), coefficients.as_ref(), -1.0);
    });
    most
}

/// The sum of `job(left panel, right panel)` over panels of `height` rows, in order.
fn add_up<T>(
    left: MatRef<'_, f32>,
    right: MatRef<'_, f32>,
    height: usize,
    job: impl Fn(MatRef<'_, f32>, MatRef<'_, f32>) -> Mat<T> + Sync + Send,
) -> Mat<T>
where
    T: faer::traits::ComplexField + Send,
{
    let parts = map(cut(left.nrows(), height), |rows| {
        job(left.subrows(rows.start, rows.len()), right.subrows(rows.start, rows.len()))
    });
    let mut sum = Mat::<T>::zeros(left.ncols(), right.ncols());
    for part in parts {
        sum += part;
    }
    sum
}

/// `left·right` of a tall f32 matrix and a small one, by row panels.
pub(crate) fn tall_times_small(left: MatRef<'_, f32>, right: MatRef<'_, f32>) -> Mat<f32> {
    const HEIGHT: usize = 1024;
    let mut out = Mat::<f32>::zeros(left.nrows(), right.ncols());
    for_row_strips(out.as_mut(), HEIGHT, |rows, strip| multiply(strip, left.subrows(rows.start, rows.len()), right));
    out
}

/// Runs `job` on strips of `height` rows of a matrix, in parallel.
fn for_row_strips(matrix: MatMut<'_, f32>, height: usize, job: impl Fn(Range<usize>, MatMut<'_, f32>) + Sync + Send) {
    strips(matrix, height).into_par_iter().for_each(|(rows, strip)| job(rows, strip));
}
