//! The kernels: how each multiplies a block, and the functions that enable its instructions.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use bytemuck::Pod;
use faer::{Mat, MatRef};

use super::vector::{self, Lanes, Portable};
use super::walk::{Chunk, Multiply, Partial, both, products};
#[cfg(target_arch = "x86_64")]
use super::{amx, x86};
use super::{AREA, BLOCK, CELL, GROUP, Kernel};
use crate::packed::Blocks;

/// Blocks that are interleaved at a time: 16 KiB of pairs.
const TURNED: usize = 8;

/// f32 arithmetic on blocks that are stored as `S`.
struct InF32<L, S>(PhantomData<(L, S)>);

/// Stored elements that an f32 kernel can multiply.
trait Widen: Pod + Send + Sync {
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
trait Tile: Lanes<Word = f32> {
    /// # Safety
    /// As [`vector::multiply`].
    unsafe fn groups<const ROW: usize, const SUM: usize>(
        h: *const f32,
        step: usize,
        count: usize,
        x: *const f32,
        groups: usize,
        out: *mut f32,
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
            ) {
                let mut group = 0;
                while group < groups {
                    // SAFETY: the caller vouches for the bounds of all groups.
                    unsafe {
                        let (x, out) = (x.add(group * CELL), out.add(group * CELL));
                        if $two > 0 && group + 1 < groups {
                            vector::multiply::<$lanes, { if $two > 0 { $two } else { 1 } }, $two_vectors, ROW, SUM, BLOCK>(
                                h, step, count, x, groups * CELL, out,
                            );
                            group += 2;
                        } else {
                            vector::multiply::<$lanes, $one, $one_vectors, ROW, SUM, BLOCK>(
                                h, step, count, x, groups * CELL, out,
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
    unsafe fn plain(blocks: &[f32], step: usize, count: usize, x: &[f32], out: &mut [f32]) {
        let groups = check(blocks, step, count, x, out);
        // SAFETY: bounds are checked; the caller vouches for the instructions.
        unsafe { L::groups::<BLOCK, 1>(blocks.as_ptr(), step, count, x.as_ptr(), groups, out.as_mut_ptr()) }
    }

    #[inline(always)]
    unsafe fn turned(blocks: &[f32], step: usize, count: usize, x: &[f32], out: &mut [f32]) {
        let groups = check(blocks, step, count, x, out);
        // SAFETY: as in `plain`.
        unsafe { L::groups::<1, BLOCK>(blocks.as_ptr(), step, count, x.as_ptr(), groups, out.as_mut_ptr()) }
    }

    #[inline(always)]
    fn operand(_: bool, cell: &[f32; CELL], out: &mut [f32]) {
        out.copy_from_slice(cell);
    }

    #[inline(always)]
    fn result(_: bool, cell: &[f32], out: &mut [f32; CELL]) {
        out.copy_from_slice(cell);
    }
}

/// `vdpbf16ps`: pairs of bf16.
#[cfg(target_arch = "x86_64")]
struct InPairs;

#[cfg(target_arch = "x86_64")]
impl InPairs {
    /// # Safety
    /// As [`vector::multiply`].
    #[inline(always)]
    unsafe fn groups<const ROW: usize, const SUM: usize>(
        h: *const u32,
        step: usize,
        count: usize,
        x: *const u32,
        groups: usize,
        out: *mut f32,
    ) {
        const WORDS: usize = CELL / 2;
        for group in (0..groups).step_by(2) {
            // SAFETY: the caller vouches for the bounds of all groups.
            unsafe {
                let (x, out) = (x.add(group * WORDS), out.add(group * CELL));
                if group + 1 < groups {
                    vector::multiply::<x86::Avx512Bf16, 8, 2, ROW, SUM, { BLOCK / 2 }>(
                        h, step, count, x, groups * WORDS, out,
                    );
                } else {
                    vector::multiply::<x86::Avx512Bf16, 16, 1, ROW, SUM, { BLOCK / 2 }>(
                        h, step, count, x, groups * WORDS, out,
                    );
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Multiply for InPairs {
    type Stored = u16;
    type Block = u16;
    type Operand = u16;
    type Session = ();
    const GROUPS: usize = 1;

    unsafe fn session() {}

    #[inline(always)]
    fn stage<'a>(stored: &'a [u16], _: &'a mut Vec<u16>) -> &'a [u16] {
        stored
    }

    #[inline(always)]
    unsafe fn plain(blocks: &[u16], step: usize, count: usize, x: &[u16], out: &mut [f32]) {
        let groups = check(blocks, step, count, x, out);
        // SAFETY: bounds are checked; x86-64 loads need no alignment; the caller vouches for the instructions.
        unsafe {
            Self::groups::<{ BLOCK / 2 }, 1>(
                blocks.as_ptr().cast(), step / 2, count, x.as_ptr().cast(), groups, out.as_mut_ptr(),
            );
        }
    }

    #[inline(always)]
    unsafe fn turned(blocks: &[u16], step: usize, count: usize, x: &[u16], out: &mut [f32]) {
        let groups = check(blocks, step, count, x, out);
        let mut pairs: Pairs = [const { MaybeUninit::uninit() }; TURNED];
        for first in (0..count).step_by(TURNED) {
            let some = TURNED.min(count - first);
            let x = x[first * groups * CELL..].as_ptr().cast();
            // SAFETY: as in `plain`; `some` blocks of pairs have been written.
            unsafe {
                interleave(&blocks[first * step..], step, &mut pairs[..some]);
                Self::groups::<1, BLOCK>(pairs.as_ptr().cast(), AREA / 2, some, x, groups, out.as_mut_ptr());
            }
        }
    }

    #[inline(always)]
    fn operand(_: bool, cell: &[f32; CELL], out: &mut [u16]) {
        in_pairs(cell, out);
    }

    #[inline(always)]
    fn result(_: bool, cell: &[f32], out: &mut [f32; CELL]) {
        out.copy_from_slice(cell);
    }
}

/// AMX: tiles of bf16.
#[cfg(target_arch = "x86_64")]
struct InTiles;

#[cfg(target_arch = "x86_64")]
impl Multiply for InTiles {
    type Stored = u16;
    type Block = u16;
    type Operand = u16;
    type Session = amx::Tiles;
    const GROUPS: usize = 2;

    #[inline(always)]
    unsafe fn session() -> amx::Tiles {
        // SAFETY: the caller vouches for the instructions.
        unsafe { amx::Tiles::configure() }
    }

    #[inline(always)]
    fn stage<'a>(stored: &'a [u16], _: &'a mut Vec<u16>) -> &'a [u16] {
        stored
    }

    /// Tiles of Δ on the left, pairs of the operand on the right; a result cell is 32×16.
    #[inline(always)]
    unsafe fn plain(blocks: &[u16], step: usize, count: usize, x: &[u16], out: &mut [f32]) {
        const TILE: usize = GROUP * GROUP * size_of::<f32>();
        let groups = check(blocks, step, count, x, out);
        for group in (0..groups).step_by(2) {
            let (x, out) = (&x[group * CELL..], &mut out[group * CELL..]);
            // SAFETY: bounds are checked, `groups` is even, and a session is alive.
            unsafe {
                amx::multiply_add::<{ 2 * CELL }, TILE, { 4 * CELL }>(
                    (blocks.as_ptr(), 2 * step), (x.as_ptr(), 2 * groups * CELL), 64, out.as_mut_ptr(), count,
                );
            }
        }
    }

    /// Tiles of the operand's transpose on the left, interleaved Δ on the right; a result cell is 16×32.
    #[inline(always)]
    unsafe fn turned(blocks: &[u16], step: usize, count: usize, x: &[u16], out: &mut [f32]) {
        let groups = check(blocks, step, count, x, out);
        let mut pairs: Pairs = [const { MaybeUninit::uninit() }; TURNED];
        for first in (0..count).step_by(TURNED) {
            let some = TURNED.min(count - first);
            // SAFETY: as in `plain`; `some` blocks of pairs have been written.
            unsafe {
                interleave(&blocks[first * step..], step, &mut pairs[..some]);
                for group in (0..groups).step_by(2) {
                    let (x, out) = (&x[(first * groups + group) * CELL..], &mut out[group * CELL..]);
                    amx::multiply_add::<64, { 4 * CELL }, 64>(
                        (x.as_ptr(), 2 * groups * CELL), (pairs.as_ptr().cast(), 2 * AREA), 128, out.as_mut_ptr(), some,
                    );
                }
            }
        }
    }

    #[inline(always)]
    fn operand(turned: bool, cell: &[f32; CELL], out: &mut [u16]) {
        if !turned {
            return in_pairs(cell, out);
        }
        for (j, column) in out.chunks_exact_mut(BLOCK).enumerate() {
            for (i, value) in column.iter_mut().enumerate() {
                *value = round(cell[i * GROUP + j]);
            }
        }
    }

    #[inline(always)]
    fn result(turned: bool, cell: &[f32], out: &mut [f32; CELL]) {
        if !turned {
            return out.copy_from_slice(cell);
        }
        for (j, column) in cell.chunks_exact(BLOCK).enumerate() {
            for (i, &value) in column.iter().enumerate() {
                out[i * GROUP + j] = value;
            }
        }
    }
}

/// Number of groups; panics unless all that is asked for is in bounds.
#[inline(always)]
fn check<B, X>(blocks: &[B], step: usize, count: usize, x: &[X], out: &[f32]) -> usize {
    let groups = out.len() / CELL;
    assert!(count > 0 && groups > 0 && (count - 1) * step + AREA <= blocks.len() && count * groups * CELL <= x.len());
    groups
}

/// Memory for the blocks that are interleaved at a time.
#[cfg(target_arch = "x86_64")]
type Pairs = [MaybeUninit<[u32; AREA / 2]>; TURNED];

/// Interleaves blocks into `pairs`, up to its length.
///
/// # Safety
/// AVX-512 BW must be available.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn interleave(blocks: &[u16], step: usize, pairs: &mut [MaybeUninit<[u32; AREA / 2]>]) {
    for (number, pairs) in pairs.iter_mut().enumerate() {
        if let Some(block) = blocks[number * step..].first_chunk() {
            // SAFETY: the caller vouches for the instructions.
            unsafe { x86::interleave(block, pairs.as_mut_ptr()) };
        }
    }
}

/// A cell as pairs of bf16 along its rows: `[16][16]` pairs.
#[inline(always)]
fn in_pairs(cell: &[f32; CELL], out: &mut [u16]) {
    for (rows, pairs) in cell.chunks_exact(2 * GROUP).zip(out.chunks_exact_mut(2 * GROUP)) {
        for j in 0..GROUP {
            pairs[2 * j] = round(rows[j]);
            pairs[2 * j + 1] = round(rows[GROUP + j]);
        }
    }
}

/// To the nearest bf16, ties to even, of a finite value.
#[inline(always)]
fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Defines a function that runs a chunk with `$features` enabled.
macro_rules! enabled {
    ($name:ident, $features:literal, $multiply:ty) => {
        #[target_feature(enable = $features)]
        pub(super) fn $name(chunk: Chunk<'_, $multiply>) -> Partial {
            // SAFETY: the instructions are enabled for this function.
            unsafe { both(chunk) }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod enabled {
    use super::{Chunk, InF32, InPairs, InTiles, Partial, both, x86};

    enabled!(tiles, "avx512f,avx512bw,avx512dq,avx512vl,fma", InTiles);
    enabled!(pairs, "avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16", InPairs);
    enabled!(avx512_bf16, "avx512f,avx512bw,avx512dq,avx512vl,fma", InF32<x86::Avx512, u16>);
    enabled!(avx512_f32, "avx512f,avx512bw,avx512dq,avx512vl,fma", InF32<x86::Avx512, f32>);
    enabled!(avx2_bf16, "avx2,fma", InF32<x86::Avx2, u16>);
    enabled!(avx2_f32, "avx2,fma", InF32<x86::Avx2, f32>);
}

fn portable<S: Widen>(chunk: Chunk<'_, InF32<Portable, S>>) -> Partial {
    // SAFETY: no particular instructions are needed.
    unsafe { both(chunk) }
}

/// Both products of a Δ stored in bf16.
pub(super) fn bf16_blocks(kernel: Kernel, blocks: &Blocks<u16>, v: MatRef<'_, f32>) -> (Mat<f32>, Mat<f32>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a kernel is run only where it is available.
    unsafe {
        match kernel {
            Kernel::Amx => return products(blocks, v, |chunk| enabled::tiles(chunk)),
            Kernel::Avx512Bf16 => return products(blocks, v, |chunk| enabled::pairs(chunk)),
            Kernel::Avx512 => return products(blocks, v, |chunk| enabled::avx512_bf16(chunk)),
            Kernel::Avx2 => return products(blocks, v, |chunk| enabled::avx2_bf16(chunk)),
            Kernel::Portable => {}
        }
    }
    let _ = kernel;
    products(blocks, v, portable::<u16>)
}

/// Both products of a Δ stored in f32.
pub(super) fn f32_blocks(kernel: Kernel, blocks: &Blocks<f32>, v: MatRef<'_, f32>) -> (Mat<f32>, Mat<f32>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a kernel is run only where it is available.
    unsafe {
        match kernel.for_f32() {
            Kernel::Avx512 => return products(blocks, v, |chunk| enabled::avx512_f32(chunk)),
            Kernel::Avx2 => return products(blocks, v, |chunk| enabled::avx2_f32(chunk)),
            _ => {}
        }
    }
    let _ = kernel;
    products(blocks, v, portable::<f32>)
}
