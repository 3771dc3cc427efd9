//! Rows of B·A, the update of a merge: B has few columns, so the product is bound by arithmetic as long as A stays in cache.
//!
//! A is packed into strips of [`STRIP`] columns, in which the rows follow each other. A tile of the result is summed over the
//! rank in registers, one term after the other, so an element does not depend on how the work was cut. Instruction sets
//! with fused multiply-add agree to the bit; without, products are rounded.

use faer::MatRef;

use super::Kernel;
use super::vector::{Lanes, Portable};
#[cfg(target_arch = "x86_64")]
use super::x86;

/// Columns of a strip: a zmm register of f32, or two ymm.
const STRIP: usize = 16;

/// The right factor of a low-rank update, or of several side by side.
#[derive(Debug)]
pub(crate) struct Right {
    rank: usize,
    cols: usize,
    /// Strips; in each, `rank` rows of [`STRIP`] values, zeros beyond the last column.
    values: Vec<f32>,
}

impl Right {
    /// Packs matrices of the same number of columns, one below the other.
    pub(crate) fn pack(parts: &[MatRef<'_, f32>]) -> Self {
        let rank: usize = parts.iter().map(MatRef::nrows).sum();
        let cols = parts.first().map_or(0, MatRef::ncols);
        let mut values = vec![0f32; cols.div_ceil(STRIP) * rank * STRIP];
        for (strip, out) in values.chunks_exact_mut((rank * STRIP).max(1)).enumerate() {
            let mut rows = out.chunks_exact_mut(STRIP);
            for part in parts {
                for (k, out) in (0..part.nrows()).zip(rows.by_ref()) {
                    for (j, value) in (strip * STRIP..cols).zip(out) {
                        *value = part[(k, j)];
                    }
                }
            }
        }
        Self { rank, cols, values }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// `out = left·right` for rows of the left factor: row-major, `rank` values each, into rows of `cols`.
    pub(crate) fn multiply(&self, left: &[f32], out: &mut [f32]) {
        if self.rank == 0 || self.cols == 0 {
            out.fill(0.0);
            return;
        }
        let rows = out.len() / self.cols;
        assert!(left.len() == rows * self.rank && out.len() == rows * self.cols);
        multiply(self, left, out);
    }
}

/// All tiles: `ROWS` rows of `VECTORS` registers at a time.
///
/// # Safety
/// The instructions of `L` must be available, and `left` and `out` have as many rows as each other.
#[inline(always)]
unsafe fn tiles<L: Lanes<Word = f32>, const ROWS: usize, const VECTORS: usize>(
    right: &Right,
    left: &[f32],
    out: &mut [f32],
) {
    let (rank, cols) = (right.rank, right.cols);
    let (rows, strips) = (out.len() / cols, right.values.len() / (rank * STRIP));
    let per_tile = VECTORS * L::WIDTH / STRIP;
    let mut strip = 0;
    while strip < strips {
        // A tile of the last columns goes through memory of its own, as it may reach beyond them.
        let whole = (strip + per_tile) * STRIP <= cols;
        let mut row = 0;
        while row < rows {
            let tall = whole && row + ROWS <= rows;
            // SAFETY: strips up to `strip + per_tile` (or one), rows up to `row + ROWS` (or one) and columns up to the end of
            // the strips are there; where the columns are not, `edge` has room for a strip.
            unsafe {
                let values = right.values.as_ptr().add(strip * rank * STRIP);
                let own = left.as_ptr().add(row * rank);
                if tall {
                    tile::<L, ROWS, VECTORS>(rank, own, values, out.as_mut_ptr().add(row * cols + strip * STRIP), cols);
                } else if whole {
                    tile::<L, 1, VECTORS>(rank, own, values, out.as_mut_ptr().add(row * cols + strip * STRIP), cols);
                } else {
                    let mut edge = [0f32; STRIP];
                    for part in 0..STRIP / L::WIDTH {
                        let values = values.add(part * L::WIDTH);
                        tile::<L, 1, 1>(rank, own, values, edge.as_mut_ptr().add(part * L::WIDTH), STRIP);
                    }
                    let begin = strip * STRIP;
                    let end = (begin + STRIP).min(cols);
                    out[row * cols + begin..row * cols + end].copy_from_slice(&edge[..end - begin]);
                }
            }
            row += if tall { ROWS } else { 1 };
        }
        strip += if whole { per_tile } else { 1 };
    }
}

/// One tile, summed over the rank in registers: `ROWS` rows of `left`, `rank` apart, and the strips that `VECTORS` registers reach
/// from `values` on; into rows of `out` that are `stride` apart.
///
/// # Safety
/// All of that must be in bounds, and the instructions of `L` available.
#[inline(always)]
unsafe fn tile<L: Lanes<Word = f32>, const ROWS: usize, const VECTORS: usize>(
    rank: usize,
    left: *const f32,
    values: *const f32,
    out: *mut f32,
    stride: usize,
) {
    let per_strip = STRIP / L::WIDTH;
    let place = |v: usize| (v / per_strip) * rank * STRIP + (v % per_strip) * L::WIDTH;
    // SAFETY: the caller vouches for the bounds.
    unsafe {
        let mut sums = [[L::ZERO; VECTORS]; ROWS];
        for k in 0..rank {
            for v in 0..VECTORS {
                let x = values.add(k * STRIP + place(v));
                for (r, row) in sums.iter_mut().enumerate() {
                    row[v] = L::multiply_add(row[v], left.add(r * rank + k), x);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, &sums) in row.iter().enumerate() {
                L::store(sums, out.add(r * stride + v * L::WIDTH));
            }
        }
    }
}

fn multiply(right: &Right, left: &[f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn avx512(right: &Right, left: &[f32], out: &mut [f32]) {
            // SAFETY: the instructions are enabled for this function; the caller vouches for the rows.
            unsafe { tiles::<x86::Avx512, 6, 4>(right, left, out) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(right: &Right, left: &[f32], out: &mut [f32]) {
            // SAFETY: as above.
            unsafe { tiles::<x86::Avx2, 6, 2>(right, left, out) }
        }
        // SAFETY: a kernel is run only where it is available; the numbers of rows have been compared.
        unsafe {
            if Kernel::Avx512.is_available() {
                return avx512(right, left, out);
            }
            if Kernel::Avx2.is_available() {
                return avx2(right, left, out);
            }
        }
    }
    // SAFETY: no particular instructions are needed; the numbers of rows have been compared.
    unsafe { tiles::<Portable, 2, 4>(right, left, out) }
}

#[cfg(test)]
mod tests {
    use faer::Mat;

    use super::*;

    #[test]
    fn products_of_any_size_are_within_the_bound_of_their_sums() {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        };
        for (rows, rank, cols) in
            [(1, 1, 1), (7, 3, 5), (13, 64, 130), (6, 17, 64), (20, 5, 63), (3, 0, 4), (0, 2, 9), (5, 2, 0)]
        {
            let left: Vec<f32> = (0..rows * rank).map(|_| next()).collect();
            let upper = Mat::from_fn(rank / 2, cols, |_, _| next());
            let lower = Mat::from_fn(rank - rank / 2, cols, |_, _| next());
            let right = Right::pack(&[upper.as_ref(), lower.as_ref()]);
            let mut out = vec![f32::NAN; rows * cols];
            right.multiply(&left, &mut out);
            let at = |k: usize, j: usize| if k < rank / 2 { upper[(k, j)] } else { lower[(k - rank / 2, j)] };
            for i in 0..rows {
                for j in 0..cols {
                    let terms = (0..rank).map(|k| f64::from(left[i * rank + k]) * f64::from(at(k, j)));
                    let (exact, size) =
                        terms.fold((0.0, 0.0), |(sum, size), term: f64| (sum + term, size + term.abs()));
                    let bound = (rank as f64 + 1.0) * f64::from(f32::EPSILON) * size;
                    assert!((f64::from(out[i * cols + j]) - exact).abs() <= bound, "{rows}x{rank}x{cols} at {i}, {j}");
                }
            }
        }
    }
}
