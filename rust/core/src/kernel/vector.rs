//! One block times a few columns, in vector registers: broadcast an element of Δ, multiply it with a row of the operand.
//!
//! The same loop serves f32 and pairs of bf16 ([`Lanes`]), plain and turned (which differ in two strides), and registers of any
//! width; pairs are turned another way (`x86::multiply_turned`). It keeps a tile of results in registers for the whole sum.

use super::{BLOCK, CELL, GROUP};

/// A vector register of f32 sums, and what is multiplied into it.
///
/// # Safety
/// The methods of an implementation may be called only where its instructions are available.
pub(super) trait Lanes {
    /// What is broadcast: an f32, or a pair of bf16.
    type Word: Copy;
    /// The register of sums.
    type Sums: Copy;
    /// f32 sums in one register.
    const WIDTH: usize;
    /// No sums yet.
    const ZERO: Self::Sums;

    unsafe fn load(from: *const f32) -> Self::Sums;
    unsafe fn store(sums: Self::Sums, to: *mut f32);
    /// `sums + word·x[..WIDTH]`, where each word of `x` is multiplied with the broadcast one.
    unsafe fn multiply_add(sums: Self::Sums, word: *const Self::Word, x: *const Self::Word) -> Self::Sums;
}

/// `out[i][..] += Σ_k h[i, k]·x[k][..]` for the 32 result rows of a block and `GROUPS` groups of columns.
///
/// `h` points to `count` blocks, `step` words apart; `x` to as many operands of `[group][k][16]` words, `x_step` words apart;
/// `out` to `[group][32][16]` sums. Words of a block are `ROW` apart from one result row to the next and `SUM` along the sum,
/// which has `DEPTH` words in a block. `ROWS` result rows times `VECTORS` registers are summed at a time. Unless it is zero, what
/// lies `ahead` words after each block is brought into cache.
///
/// # Safety
/// All of that must be in bounds, and the instructions of `L` available.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a kernel takes what it takes")]
pub(super) unsafe fn multiply<
    L: Lanes,
    const ROWS: usize,
    const VECTORS: usize,
    const ROW: usize,
    const SUM: usize,
    const DEPTH: usize,
>(
    h: *const L::Word,
    step: usize,
    count: usize,
    x: *const L::Word,
    x_step: usize,
    out: *mut f32,
    ahead: usize,
) {
    let per_group = GROUP / L::WIDTH;
    // Place of vector `v` in an operand (words) and in the results (f32).
    let operand = |v: usize| (v / per_group) * DEPTH * GROUP + (v % per_group) * L::WIDTH;
    let result = |v: usize| (v / per_group) * CELL + (v % per_group) * L::WIDTH;
    for first in (0..BLOCK).step_by(ROWS) {
        // SAFETY: the caller vouches for the bounds; every offset below stays within one block, operand or cell.
        unsafe {
            let place = |r: usize, v: usize| out.add((first + r) * GROUP + result(v));
            // `array::from_fn` is compiled without the kernel's instructions: the sums would go through memory.
            let mut sums = [[L::ZERO; VECTORS]; ROWS];
            for (r, row) in sums.iter_mut().enumerate() {
                for (v, sums) in row.iter_mut().enumerate() {
                    *sums = L::load(place(r, v));
                }
            }
            for block in 0..count {
                let (h, x) = (h.add(block * step + first * ROW), x.add(block * x_step));
                for k in 0..DEPTH {
                    if first == 0 && ahead > 0 {
                        // Lines of 16 words: a block has two for each k.
                        prefetch(h.wrapping_add(ahead + 2 * k * GROUP));
                        prefetch(h.wrapping_add(ahead + (2 * k + 1) * GROUP));
                    }
                    for v in 0..VECTORS {
                        let x = x.add(k * GROUP + operand(v));
                        for (r, row) in sums.iter_mut().enumerate() {
                            row[v] = L::multiply_add(row[v], h.add(r * ROW + k * SUM), x);
                        }
                    }
                }
            }
            for (r, row) in sums.iter().enumerate() {
                for (v, &sums) in row.iter().enumerate() {
                    L::store(sums, place(r, v));
                }
            }
        }
    }
}

/// Asks for the cache line at an address, which need not be mapped.
#[inline(always)]
pub(super) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing; an address that is not mapped is ignored.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Eight f32 that the compiler puts where it can.
pub(super) struct Portable;

impl Lanes for Portable {
    type Word = f32;
    type Sums = [f32; 8];
    const WIDTH: usize = 8;
    const ZERO: [f32; 8] = [0.0; 8];

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: the caller vouches for the bounds; arrays of f32 have the alignment of f32.
        unsafe { from.cast::<[f32; 8]>().read() }
    }

    #[inline(always)]
    unsafe fn store(sums: [f32; 8], to: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<[f32; 8]>().write(sums) }
    }

    #[inline(always)]
    unsafe fn multiply_add(mut sums: [f32; 8], word: *const f32, x: *const f32) -> [f32; 8] {
        // SAFETY: as in `load`.
        let (word, x) = unsafe { (*word, x.cast::<[f32; 8]>().read()) };
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += word * x);
        sums
    }
}
