//! Kernels with f32 arithmetic, on blocks stored in f32 or bf16.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::vector::{self, Lanes, Portable};
use super::walk::{Multiply, check, fetch};
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{BLOCK, CELL};

/// f32 arithmetic on blocks that are stored as `S`.
pub(super) struct InF32<L, S>(PhantomData<(L, S)>);

/// Stored elements that an f32 kernel can multiply.
pub(super) trait Widen: Pod + Send + Sync {
    fn stage<'a>(stored: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];
}

impl Widen for f32 {
    #[inline(always)]
    fn stage<'a>(stored: &'a [f32], _: &'a mut Vec<f32>) -> &'a [f32] {
        stored
    }
}

impl Widen for u16 {
    #[inline(always)]
    fn stage<'a>(stored: &'a [u16], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(stored.len(), 0.0);
        for (wide, &narrow) in scratch.iter_mut().zip(stored) {
            *wide = f32::from_bits(u32::from(narrow) << 16);
        }
        scratch
    }
}

/// Registers and how many of them hold sums: `TWO` rows for two groups at once (0: never), `ONE` rows for one.
pub(super) trait Tile: Lanes<Word = f32> {
    /// # Safety
    /// As [`vector::multiply`].
    unsafe fn groups<const ROW: usize, const SUM: usize>(
        h: *const f32,
        step: usize,
        count: usize,
        x: *const f32,
        groups: usize,
        out: *mut f32,
        ahead: usize,
    );
}

macro_rules! tile {
    ($lanes:ty, two groups by $two:literal rows in $two_vectors:literal registers, one by $one:literal in $one_vectors:literal) => {
        impl Tile for $lanes {
            #[inline(always)]
            unsafe fn groups<const ROW: usize, const SUM: usize>(
                h: *const f32,
                step: usize,
                count: usize,
                x: *const f32,
                groups: usize,
                out: *mut f32,
                ahead: usize,
            ) {
                let mut group = 0;
                while group < groups {
                    // SAFETY: the caller vouches for the bounds of all groups.
                    unsafe {
                        let (x, out) = (x.add(group * CELL), out.add(group * CELL));
                        if $two > 0 && group + 1 < groups {
                            vector::multiply::<
                                $lanes,
                                { if $two > 0 { $two } else { 1 } },
                                $two_vectors,
                                ROW,
                                SUM,
                                BLOCK,
                            >(
                                h, step, count, x, groups * CELL, out, if group == 0 { ahead } else { 0 }
                            );
                            group += 2;
                        } else {
                            vector::multiply::<$lanes, $one, $one_vectors, ROW, SUM, BLOCK>(
                                h,
                                step,
                                count,
                                x,
                                groups * CELL,
                                out,
                                if group == 0 { ahead } else { 0 },
                            );
                            group += 1;
                        }
                    }
                }
            }
        }
    };
}

tile!(Portable, two groups by 0 rows in 0 registers, one by 2 in 2);
#[cfg(target_arch = "x86_64")]
tile!(x86::Avx2, two groups by 0 rows in 0 registers, one by 4 in 2);
#[cfg(target_arch = "x86_64")]
tile!(x86::Avx512, two groups by 8 rows in 2 registers, one by 16 in 1);

/// How far ahead to fetch: blocks that have been widened are in memory of their own, and in cache.
fn stored<S>(ahead: usize) -> usize {
    if size_of::<S>() == size_of::<f32>() { ahead } else { 0 }
}

impl<L: Tile, S: Widen> Multiply for InF32<L, S> {
    type Stored = S;
    type Block = f32;
    type Operand = f32;
    type Session = ();
    const GROUPS: usize = 1;

    unsafe fn session() {}

    #[inline(always)]
    fn stage<'a>(stored: &'a [S], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        S::stage(stored, scratch)
    }

    #[inline(always)]
    unsafe fn plain(blocks: &[f32], step: usize, count: usize, x: &[f32], out: &mut [f32], ahead: usize) {
        let (groups, ahead) = (check(blocks, step, count, x, out), stored::<S>(ahead));
        // SAFETY: bounds are checked; the caller vouches for the instructions.
        unsafe { L::groups::<BLOCK, 1>(blocks.as_ptr(), step, count, x.as_ptr(), groups, out.as_mut_ptr(), ahead) }
    }

    #[inline(always)]
    unsafe fn turned(blocks: &[f32], step: usize, count: usize, x: &[f32], out: &mut [f32], ahead: usize) {
        let groups = check(blocks, step, count, x, out);
        if stored::<S>(ahead) > 0 {
            fetch(blocks, step, count, ahead);
        }
        // SAFETY: as in `plain`.
        unsafe { L::groups::<1, BLOCK>(blocks.as_ptr(), step, count, x.as_ptr(), groups, out.as_mut_ptr(), 0) }
    }

    #[inline(always)]
    fn for_plain(cell: &[f32; CELL], out: &mut [f32]) {
        out.copy_from_slice(cell);
    }

    #[inline(always)]
    fn for_turned(cell: &[f32; CELL], out: &mut [f32]) {
        out.copy_from_slice(cell);
    }

    #[inline(always)]
    fn from_turned(cell: &[f32; CELL], out: &mut [f32; CELL]) {
        *out = *cell;
    }
}
