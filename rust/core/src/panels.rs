//! The one place that cuts matrices into panels and runs them in parallel.
//!
//! Panel bounds depend on the matrix alone, every panel is computed by one thread, and partial sums are added in panel order:
//! so no result depends on the number of threads or on who finished first.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Cuts `rows` into ranges of `height`, the last one shorter.
pub(crate) fn cut(rows: usize, height: usize) -> Vec<Range<usize>> {
    let height = height.max(1);
    (0..rows.div_ceil(height)).map(|panel| panel * height..((panel + 1) * height).min(rows)).collect()
}

/// Runs `job` on every range in parallel and returns the results in order.
pub(crate) fn map<T: Send>(ranges: Vec<Range<usize>>, job: impl Fn(Range<usize>) -> T + Sync + Send) -> Vec<T> {
    ranges.into_par_iter().map(job).collect()
}

/// `dst = alpha·lhs·rhs` on the calling thread.
pub(crate) fn multiply(dst: MatMut<'_, f32>, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>) {
    matmul(dst, Accum::Replace, lhs, rhs, 1.0, Par::Seq);
}

/// `dst += alpha·lhs·rhs` on the calling thread.
pub(crate) fn multiply_add(dst: MatMut<'_, f32>, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>, alpha: f32) {
    matmul(dst, Accum::Add, lhs, rhs, alpha, Par::Seq);
}

/// `leftᵀ·right` of two tall f32 matrices, summed in f64.
pub(crate) fn gram(left: MatRef<'_, f32>, right: MatRef<'_, f32>) -> Mat<f64> {
    // Tall enough to amortise the conversion, small enough for the converted panels to stay in cache.
    const HEIGHT: usize = 512;
    let widen = |m: MatRef<'_, f32>, rows: &Range<usize>| {
        let panel = m.subrows(rows.start, rows.len());
        Mat::from_fn(panel.nrows(), panel.ncols(), |i, j| f64::from(panel[(i, j)]))
    };
    let parts = map(cut(left.nrows(), HEIGHT), |rows| {
        let mut part = Mat::<f64>::zeros(left.ncols(), right.ncols());
        let (l, r) = (widen(left, &rows), widen(right, &rows));
        matmul(part.as_mut(), Accum::Replace, l.as_ref().transpose(), r.as_ref(), 1.0, Par::Seq);
        part
    });
    let mut sum = Mat::<f64>::zeros(left.ncols(), right.ncols());
    for part in parts {
        sum += part;
    }
    sum
}

/// `left·right` of a tall f32 matrix and a small one, by row panels.
pub(crate) fn tall_times_small(left: MatRef<'_, f32>, right: MatRef<'_, f32>) -> Mat<f32> {
    const HEIGHT: usize = 1024;
    let parts = map(cut(left.nrows(), HEIGHT), |rows| {
        let mut part = Mat::<f32>::zeros(rows.len(), right.ncols());
        multiply(part.as_mut(), left.subrows(rows.start, rows.len()), right);
        (rows, part)
    });
    let mut out = Mat::<f32>::zeros(left.nrows(), right.ncols());
    for (rows, part) in parts {
        out.as_mut().subrows_mut(rows.start, rows.len()).copy_from(part);
    }
    out
}
