//! Kernels that multiply bf16 and add in f32: in pairs (`vdpbf16ps`) and in tiles (AMX).
//!
//! Both multiply pairs along the summed index. Read plain, a block has them next to each other; to be read turned, two rows
//! are interleaved first: in registers, or for AMX a few blocks at a time.

use std::mem::MaybeUninit;

use super::walk::{Multiply, check, fetch};
use super::{AREA, BLOCK, CELL, GROUP, amx, vector, x86};

/// Blocks that are interleaved at a time: 16 KiB of pairs.
const TURNED: usize = 8;

/// `vdpbf16ps`: pairs of bf16.
pub(super) struct InPairs;

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

    /// Elements of Δ against a row of the operand: registers run along columns of the operand.
    #[inline(always)]
    unsafe fn plain(blocks: &[u16], step: usize, count: usize, x: &[u16], out: &mut [f32], ahead: usize) {
        const WORDS: usize = CELL / 2;
        const PAIRS: usize = BLOCK / 2;
        let groups = check(blocks, step, count, x, out);
        let (h, x_step) = (blocks.as_ptr().cast::<u32>(), groups * WORDS);
        for group in (0..groups).step_by(2) {
            let ahead = if group == 0 { ahead / 2 } else { 0 };
            // SAFETY: bounds are checked; x86-64 loads need no alignment; the caller vouches for the instructions.
            unsafe {
                let (x, out) = (x.as_ptr().cast::<u32>().add(group * WORDS), out.as_mut_ptr().add(group * CELL));
                if group + 1 < groups {
                    vector::multiply::<x86::Avx512Bf16, 8, 2, PAIRS, 1, PAIRS>(
                        h,
                        step / 2,
                        count,
                        x,
                        x_step,
                        out,
                        ahead,
                    );
                } else {
                    vector::multiply::<x86::Avx512Bf16, 16, 1, PAIRS, 1, PAIRS>(
                        h,
                        step / 2,
                        count,
                        x,
                        x_step,
                        out,
                        ahead,
                    );
                }
            }
        }
    }

    /// Interleaved rows of Δ against one element of the operand: registers run along columns of Δ, a result cell is 16×32.
    #[inline(always)]
    unsafe fn turned(blocks: &[u16], step: usize, count: usize, x: &[u16], out: &mut [f32], ahead: usize) {
        let groups = check(blocks, step, count, x, out);
        for (group, out) in out.chunks_exact_mut(CELL).enumerate() {
            let x = x[group * CELL..].as_ptr().cast();
            // SAFETY: as in `plain`.
            unsafe {
                let (ahead, out) = (if group == 0 { ahead } else { 0 }, out.as_mut_ptr());
                x86::multiply_turned(blocks.as_ptr(), step, count, x, groups * CELL / 2, out, ahead);
            }
        }
    }

    #[inline(always)]
    fn for_plain(cell: &[f32; CELL], out: &mut [u16]) {
        in_pairs(cell, out);
    }

    #[inline(always)]
    fn for_turned(cell: &[f32; CELL], out: &mut [u16]) {
        in_pairs(cell, out);
    }

    #[inline(always)]
    fn from_turned(cell: &[f32; CELL], out: &mut [f32; CELL]) {
        transpose(cell, out);
    }
}

/// AMX: tiles of bf16.
pub(super) struct InTiles;

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
    unsafe fn plain(blocks: &[u16], step: usize, count: usize, x: &[u16], out: &mut [f32], ahead: usize) {
        const TILE: usize = GROUP * GROUP * size_of::<f32>();
        let groups = check(blocks, step, count, x, out);
        if ahead > 0 {
            fetch(blocks, step, count, ahead);
        }
        for group in (0..groups).step_by(2) {
            let (x, out) = (&x[group * CELL..], &mut out[group * CELL..]);
            // SAFETY: bounds are checked, `groups` is even, and a session is alive.
            unsafe {
                amx::multiply_add::<{ 2 * CELL }, TILE, { 4 * CELL }>(
                    (blocks.as_ptr(), 2 * step),
                    (x.as_ptr(), 2 * groups * CELL),
                    64,
                    out.as_mut_ptr(),
                    count,
                );
            }
        }
    }

    /// Tiles of the operand's transpose on the left, interleaved Δ on the right; a result cell is 16×32.
    #[inline(always)]
    unsafe fn turned(blocks: &[u16], step: usize, count: usize, x: &[u16], out: &mut [f32], ahead: usize) {
        let groups = check(blocks, step, count, x, out);
        fetch(blocks, step, count, ahead);
        let mut pairs: Pairs = [const { MaybeUninit::uninit() }; TURNED];
        for first in (0..count).step_by(TURNED) {
            let some = TURNED.min(count - first);
            // SAFETY: as in `plain`; `some` blocks of pairs have been written.
            unsafe {
                interleave(&blocks[first * step..], step, &mut pairs[..some]);
                for group in (0..groups).step_by(2) {
                    let (x, out) = (&x[(first * groups + group) * CELL..], &mut out[group * CELL..]);
                    amx::multiply_add::<64, { 4 * CELL }, 64>(
                        (x.as_ptr(), 2 * groups * CELL),
                        (pairs.as_ptr().cast(), 2 * AREA),
                        128,
                        out.as_mut_ptr(),
                        some,
                    );
                }
            }
        }
    }

    #[inline(always)]
    fn for_plain(cell: &[f32; CELL], out: &mut [u16]) {
        in_pairs(cell, out);
    }

    #[inline(always)]
    fn for_turned(cell: &[f32; CELL], out: &mut [u16]) {
        for (j, column) in out.chunks_exact_mut(BLOCK).enumerate() {
            for (i, value) in column.iter_mut().enumerate() {
                *value = round(cell[i * GROUP + j]);
            }
        }
    }

    #[inline(always)]
    fn from_turned(cell: &[f32; CELL], out: &mut [f32; CELL]) {
        transpose(cell, out);
    }
}

/// 16×32 to 32×16.
#[inline(always)]
fn transpose(cell: &[f32; CELL], out: &mut [f32; CELL]) {
    for (j, column) in cell.chunks_exact(BLOCK).enumerate() {
        for (i, &value) in column.iter().enumerate() {
            out[i * GROUP + j] = value;
        }
    }
}

/// Memory for the blocks that are interleaved at a time.
type Pairs = [MaybeUninit<[u32; AREA / 2]>; TURNED];

/// Interleaves blocks into `pairs`, up to its length.
///
/// # Safety
/// AVX-512 BW must be available.
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
