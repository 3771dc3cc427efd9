//! Tiles of B·A, the update of a merge: B has few columns, so the product is bound by arithmetic as long as A stays in cache.
//!
//! A is packed into strips of [`STRIP`] columns, in which the rows follow each other. Some rows and registers of the result are
//! summed over the rank together, one term after the other, so an element does not depend on how the work was cut. Instruction
//! sets with fused multiply-add agree to the bit, pairs of bf16 included; without, products are rounded.

use std::ops::Range;

use super::Kernel;
use super::vector::{Lanes, Portable};
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::matrix::Matrix;

/// Columns of a strip: a zmm register of f32, or two ymm. Tiles begin at a multiple of it.
pub(crate) const STRIP: usize = 16;

/// Factors of a low-rank update, or of several that are summed, packed for its tiles.
#[derive(Debug)]
pub(crate) struct Factors {
    kernel: Kernel,
    rank: usize,
    cols: usize,
    words: Words,
}

/// B of all terms side by side, row-major, and A of all below each other, in strips: [`STRIP`] words of every row, zeros beyond the
/// last column.
#[derive(Debug)]
enum Words {
    F32 {
        left: Vec<f32>,
        right: Vec<f32>,
    },
    /// Neighbours along the rank, the first in the upper half. `vdpbf16ps` adds the product of the upper halves, rounds, and
    /// adds that of the lower ones: the same sums to the bit, from half the memory, and on AMD at more than twice the rate.
    #[cfg(target_arch = "x86_64")]
    Pairs {
        left: Vec<u32>,
        right: Vec<u32>,
    },
}

impl Factors {
    /// Packs B `(rows, r)` and A `(r, cols)` of every term; all have as many rows, and columns, as each other.
    pub(crate) fn pack(kernel: Kernel, terms: &[(Matrix, Matrix)]) -> Self {
        let rank = terms.iter().map(|(_, a)| a.rows()).sum();
        let cols = terms.first().map_or(0, |(_, a)| a.cols());
        #[cfg(target_arch = "x86_64")]
        if kernel.rounds_operands()
            && Kernel::Avx512Bf16.is_available()
            && terms.iter().all(|(b, a)| suits_pairs(b) && suits_pairs(a))
        {
            let pair = |[first, second]: [f32; 2]| first.to_bits() & 0xffff_0000 | second.to_bits() >> 16;
            let (left, right) = pack(terms, pair);
            return Self { kernel, rank, cols, words: Words::Pairs { left, right } };
        }
        let (left, right) = pack(terms, |[value]: [f32; 1]| value);
        Self { kernel: kernel.for_f32(), rank, cols, words: Words::F32 { left, right } }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// `out = B·A` for some rows and, from a multiple of [`STRIP`] on, some columns; row-major.
    pub(crate) fn multiply(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        if self.rank == 0 || out.is_empty() {
            out.fill(0.0);
            return;
        }
        assert!(cols.end <= self.cols && cols.start.is_multiple_of(STRIP));
        match &self.words {
            Words::F32 { left, right } => in_f32(self.kernel, Tile::new(self.rank, left, right, rows, cols, out)),
            #[cfg(target_arch = "x86_64")]
            Words::Pairs { left, right } => {
                in_pairs(Tile::new(self.rank.div_ceil(2), left, right, rows, cols, out));
            }
        }
    }
}

/// Whether products of such values, summed as pairs, are those in f32 to the bit: all are bf16, and zero or so large that products
/// and their sums are multiples of 2^-124. None is subnormal then, which `vdpbf16ps` would take for zero.
#[cfg(target_arch = "x86_64")]
fn suits_pairs(matrix: &Matrix) -> bool {
    const LEAST: f32 = f32::from_bits((127 - 55) << 23);
    let suits = |value: &f32| (value.to_bits() & 0xffff == 0) & ((*value == 0.0) | (value.abs() >= LEAST));
    // Stretches without a branch.
    matrix.values().chunks(1024).all(|values| values.iter().fold(true, |all, value| all & suits(value)))
}

/// Left and right words of `DEPTH` neighbours along the rank each; zeros fill up the last one.
fn pack<W: Copy, const DEPTH: usize>(terms: &[(Matrix, Matrix)], word: impl Fn([f32; DEPTH]) -> W) -> (Vec<W>, Vec<W>) {
    let (rows, cols) = terms.first().map_or((0, 0), |(b, a)| (b.rows(), a.cols()));
    let words = terms.iter().map(|(_, a)| a.rows()).sum::<usize>().div_ceil(DEPTH);
    let mut left = Vec::with_capacity(rows * words);
    let mut row = vec![0f32; words * DEPTH];
    for i in 0..rows {
        let mut rest = row.as_mut_slice();
        for (b, _) in terms {
            let (part, after) = rest.split_at_mut(b.cols());
            part.copy_from_slice(&b.values()[i * b.cols()..(i + 1) * b.cols()]);
            rest = after;
        }
        left.extend(row.as_chunks().0.iter().map(|&values| word(values)));
    }
    let mut right = Vec::with_capacity(cols.next_multiple_of(STRIP) * words);
    let zeros = vec![0f32; cols];
    let lines = terms.iter().flat_map(|(_, a)| a.values().chunks_exact(cols.max(1)));
    let lines: Vec<&[f32]> = lines.chain(std::iter::repeat(zeros.as_slice())).take(words * DEPTH).collect();
    for first in (0..cols).step_by(STRIP) {
        let width = STRIP.min(cols - first);
        for lines in lines.as_chunks::<DEPTH>().0 {
            let parts = lines.map(|line| &line[first..first + width]);
            right.extend((0..width).map(|j| word(parts.map(|part| part[j]))));
            right.extend((width..STRIP).map(|_| word([0.0; DEPTH])));
        }
    }
    (left, right)
}

/// Rows of words and strips of words, and the place of their product.
struct Tile<'a, W> {
    /// Words along the rank.
    depth: usize,
    cols: usize,
    left: &'a [W],
    right: &'a [W],
    out: &'a mut [f32],
}

impl<'a, W> Tile<'a, W> {
    fn new(
        depth: usize,
        left: &'a [W],
        right: &'a [W],
        rows: Range<usize>,
        cols: Range<usize>,
        out: &'a mut [f32],
    ) -> Self {
        let left = &left[rows.start * depth..rows.end * depth];
        let right = &right[cols.start * depth..cols.end.next_multiple_of(STRIP) * depth];
        assert!(out.len() == rows.len() * cols.len());
        Self { depth, cols: cols.len(), left, right, out }
    }
}

/// All of a tile: `ROWS` rows of `VECTORS` registers at a time.
///
/// # Safety
/// The instructions of `L` must be available.
#[inline(always)]
unsafe fn multiply<L: Lanes, const ROWS: usize, const VECTORS: usize>(tile: Tile<'_, L::Word>) {
    let Tile { depth, cols, left, right, out } = tile;
    let (rows, strips) = (left.len() / depth, right.len() / (depth * STRIP));
    let at_a_time = VECTORS * L::WIDTH / STRIP;
    let mut strip = 0;
    while strip < strips {
        // A strip of the last columns goes through memory of its own, as it may reach beyond them.
        let whole = (strip + at_a_time) * STRIP <= cols;
        let mut row = 0;
        while row < rows {
            let tall = whole && row + ROWS <= rows;
            // SAFETY: strips up to `strip + at_a_time` (or one), rows up to `row + ROWS` (or one) and columns up to the end of
            // the strips are there; where the columns are not, `edge` has room for a strip.
            unsafe {
                let right = right.as_ptr().add(strip * depth * STRIP);
                let left = left.as_ptr().add(row * depth);
                if tall {
                    sum::<L, ROWS, VECTORS>(depth, left, right, out.as_mut_ptr().add(row * cols + strip * STRIP), cols);
                } else if whole {
                    sum::<L, 1, VECTORS>(depth, left, right, out.as_mut_ptr().add(row * cols + strip * STRIP), cols);
                } else {
                    let mut edge = [0f32; STRIP];
                    for part in (0..STRIP).step_by(L::WIDTH) {
                        sum::<L, 1, 1>(depth, left, right.add(part), edge.as_mut_ptr().add(part), STRIP);
                    }
                    let begin = strip * STRIP;
                    let end = (begin + STRIP).min(cols);
                    out[row * cols + begin..row * cols + end].copy_from_slice(&edge[..end - begin]);
                }
            }
            row += if tall { ROWS } else { 1 };
        }
        strip += if whole { at_a_time } else { 1 };
    }
}

/// Some elements, summed over the rank in registers: `ROWS` rows of `left`, `depth` apart, and the strips that `VECTORS` registers
/// reach from `right` on; into rows of `out` that are `stride` apart.
///
/// # Safety
/// All of that must be in bounds, and the instructions of `L` available.
#[inline(always)]
unsafe fn sum<L: Lanes, const ROWS: usize, const VECTORS: usize>(
    depth: usize,
    left: *const L::Word,
    right: *const L::Word,
    out: *mut f32,
    stride: usize,
) {
    let per_strip = STRIP / L::WIDTH;
    let place = |v: usize| (v / per_strip) * depth * STRIP + (v % per_strip) * L::WIDTH;
    // SAFETY: the caller vouches for the bounds.
    unsafe {
        let mut sums = [[L::ZERO; VECTORS]; ROWS];
        for k in 0..depth {
            for v in 0..VECTORS {
                let x = right.add(k * STRIP + place(v));
                for (r, row) in sums.iter_mut().enumerate() {
                    row[v] = L::multiply_add(row[v], left.add(r * depth + k), x);
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

/// By the registers of a kernel.
fn in_f32(kernel: Kernel, tile: Tile<'_, f32>) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        unsafe fn avx512(tile: Tile<'_, f32>) {
            // SAFETY: the instructions are enabled for this function.
            unsafe { multiply::<x86::Avx512, 6, 4>(tile) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(tile: Tile<'_, f32>) {
            // SAFETY: as above.
            unsafe { multiply::<x86::Avx2, 6, 2>(tile) }
        }
        // SAFETY: a kernel is run only where it is available.
        unsafe {
            if kernel == Kernel::Avx512 && kernel.is_available() {
                return avx512(tile);
            }
            if kernel == Kernel::Avx2 && kernel.is_available() {
                return avx2(tile);
            }
        }
    }
    let _ = kernel;
    // SAFETY: no particular instructions are needed.
    unsafe { multiply::<Portable, 2, 4>(tile) }
}

/// # Panics
/// Where there are no instructions for pairs; they are packed only where there are.
#[cfg(target_arch = "x86_64")]
fn in_pairs(tile: Tile<'_, u32>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")]
    unsafe fn avx512(tile: Tile<'_, u32>) {
        // SAFETY: the instructions are enabled for this function.
        unsafe { multiply::<x86::Avx512Bf16, 6, 4>(tile) }
    }
    assert!(Kernel::Avx512Bf16.is_available());
    // SAFETY: it is available.
    unsafe { avx512(tile) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use half::bf16;

    use super::*;

    /// Numbers in (-1, 1).
    fn numbers(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        }
    }

    fn matrix(rows: usize, cols: usize, mut next: impl FnMut() -> f32) -> Matrix {
        Matrix::new(rows, cols, (0..rows * cols).map(|_| next()).collect()).unwrap()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// Rows, ranks of two terms, columns.
    const SIZES: [(usize, [usize; 2], usize); 8] = [
        (1, [0, 1], 1),
        (7, [1, 2], 5),
        (13, [32, 32], 130),
        (6, [8, 9], 64),
        (20, [3, 2], 63),
        (3, [0, 0], 4),
        (0, [1, 1], 9),
        (5, [2, 0], 0),
    ];

    #[test]
    fn products_of_any_size_are_within_the_bound_of_their_sums() {
        let mut next = numbers(7);
        for ((rows, ranks, cols), kernel) in
            SIZES.into_iter().flat_map(|size| Kernel::available().map(move |k| (size, k)))
        {
            for rounded in [false, true] {
                let mut next = || if rounded { bf16::from_f32(next()).to_f32() } else { next() };
                let terms = ranks.map(|rank| (matrix(rows, rank, &mut next), matrix(rank, cols, &mut next)));
                let mut out = vec![f32::NAN; rows * cols];
                Factors::pack(kernel, &terms).multiply(0..rows, 0..cols, &mut out);
                for (at, &found) in out.iter().enumerate() {
                    let (i, j) = (at / cols, at % cols);
                    let (mut exact, mut size) = (0.0, 0.0);
                    for (b, a) in &terms {
                        for k in 0..a.rows() {
                            let term = f64::from(b.values()[i * b.cols() + k]) * f64::from(a.values()[k * cols + j]);
                            (exact, size) = (exact + term, size + term.abs());
                        }
                    }
                    let bound = (ranks[0] + ranks[1] + 1) as f64 * f64::from(f32::EPSILON) * size;
                    assert!((f64::from(found) - exact).abs() <= bound, "{rows}x{ranks:?}x{cols} at {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn tiles_are_parts_of_the_whole_to_the_bit() {
        for (kernel, rounded) in Kernel::available().flat_map(|kernel| [(kernel, false), (kernel, true)]) {
            let mut next = numbers(11);
            let mut next = || if rounded { bf16::from_f32(next()).to_f32() } else { next() };
            let factors = Factors::pack(kernel, &[(matrix(13, 9, &mut next), matrix(9, 100, &mut next))]);
            let mut whole = vec![0f32; 1300];
            factors.multiply(0..13, 0..100, &mut whole);
            for (rows, cols) in [(0..13, 0..16), (4..5, 96..100), (2..13, 32..99), (6..6, 0..16), (1..9, 48..48)] {
                let mut tile = vec![f32::NAN; rows.len() * cols.len()];
                factors.multiply(rows.clone(), cols.clone(), &mut tile);
                let expected: Vec<f32> = rows.flat_map(|i| whole[i * 100..][cols.clone()].to_vec()).collect();
                assert_eq!(bits(&tile), bits(&expected));
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn pairs_are_packed_where_they_are_exact_and_give_the_sums_of_f32_to_the_bit() {
        if !Kernel::Avx512Bf16.is_available() {
            return;
        }
        let mut next = numbers(13);
        for (rows, ranks, cols) in SIZES {
            // Magnitudes that differ by far, so that sums cancel and round; and zeros.
            let mut value = || bf16::from_f32(next() * (next() * 60.0).exp2()).to_f32();
            let mut value = || Some(value()).filter(|value| value.abs() >= 2f32.powi(-55)).unwrap_or(-0.0);
            let mut terms = ranks.map(|rank| (matrix(rows, rank, &mut value), matrix(rank, cols, &mut value)));
            let factors = Factors::pack(Kernel::Avx512Bf16, &terms);
            assert!(matches!(factors.words, Words::Pairs { .. }));
            assert!(matches!(Factors::pack(Kernel::Avx512, &terms).words, Words::F32 { .. }));
            let (mut found, mut expected) = (vec![0f32; rows * cols], vec![0f32; rows * cols]);
            factors.multiply(0..rows, 0..cols, &mut found);
            let (left, right) = pack(&terms, |[value]: [f32; 1]| value);
            if factors.rank > 0 {
                in_f32(Kernel::Avx512, Tile::new(factors.rank, &left, &right, 0..rows, 0..cols, &mut expected));
            }
            assert_eq!(bits(&found), bits(&expected));
            if ranks[1] * cols == 0 {
                continue;
            }
            for other in [f32::MIN_POSITIVE, 2f32.powi(-56), 1.0 + f32::EPSILON] {
                let last = ranks[1] * cols - 1;
                let values = (0..=last).map(|at| if at == last { other } else { 0.5 }).collect();
                terms[1].1 = Matrix::new(ranks[1], cols, values).unwrap();
                assert!(matches!(Factors::pack(Kernel::Avx512Bf16, &terms).words, Words::F32 { .. }));
            }
        }
    }
}
