//! The walk over a packed Δ that all kernels share: chunks of panels side by side, a few panels at a time in cache.
//!
//! Chunks follow from the matrix alone, each is walked by one thread, and their partial sums of Z are added in order: the
//! result does not depend on the number of threads.

use bytemuck::Pod;
use faer::{MatMut, MatRef};
use rayon::prelude::*;

use super::vector::prefetch;
use super::{AREA, BLOCK, CELL, GROUP};
use crate::memory::{Array, Workspace};
use crate::packed::Blocks;
use crate::panels;

/// Chunks that a matrix is cut into, at most: each has a Z of its own, which has to be added up.
const CHUNKS: usize = 16;
/// Panels of a chunk, or a little less.
const SHORTEST: usize = 16;
/// Panels that are multiplied before Z is touched, at most.
const TALLEST: usize = 8;
/// Bytes of Δ that stay in the second-level cache between their two uses, beside operand, sums and what is fetched ahead.
const CACHED: usize = 1 << 18;
/// Blocks that the first product fetches ahead where the second has not done so.
const SOON: usize = 8;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Blocks of rows that one thread converts at a time.
const CONVERTED: usize = 16;

/// One block times groups of 16 columns.
///
/// Operands and results come in cells of 32×16, one for each block and group. `count` blocks lie `step` elements apart and
/// are summed; cells of operand and result are `[group][CELL]`.
///
/// # Safety
/// The methods of an implementation may be called only where its instructions are available.
pub(super) trait Multiply {
    /// Element of a stored block.
    type Stored: Pod + Send + Sync;
    /// Element of a block as it is multiplied.
    type Block: Copy + Send + Sync;
    /// Element of an operand.
    type Operand: Copy + Default + Send + Sync;
    /// What a thread holds while it multiplies.
    type Session;

    /// Groups are padded to a multiple of this.
    const GROUPS: usize;

    unsafe fn session() -> Self::Session;
    /// Stored blocks as they are multiplied, in `scratch` where that is another type.
    fn stage<'a>(stored: &'a [Self::Stored], scratch: &'a mut Vec<Self::Block>) -> &'a [Self::Block];
    /// `out += Δ·x`: rows of the result are rows of the blocks. What lies `ahead` elements after each block is wanted soon (0:
    /// nothing).
    unsafe fn plain(
        blocks: &[Self::Block],
        step: usize,
        count: usize,
        x: &[Self::Operand],
        out: &mut [f32],
        ahead: usize,
    );
    /// `out += Δᵀ·x`: rows of the result are columns of the blocks. `ahead` as for `plain`.
    unsafe fn turned(
        blocks: &[Self::Block],
        step: usize,
        count: usize,
        x: &[Self::Operand],
        out: &mut [f32],
        ahead: usize,
    );
    /// A 32×16 cell as `plain` wants it.
    fn for_plain(cell: &[f32; CELL], out: &mut [Self::Operand]);
    /// A 32×16 cell as `turned` wants it.
    fn for_turned(cell: &[f32; CELL], out: &mut [Self::Operand]);
    /// What `turned` has left in a cell, as 32×16. (`plain` leaves 32×16.)
    fn from_turned(cell: &[f32; CELL], out: &mut [f32; CELL]);
}

/// Some panels of Δ, and what they are multiplied with.
pub(super) struct Chunk<'a, M: Multiply> {
    pub(super) panels: &'a [M::Stored],
    /// Blocks in a panel.
    pub(super) depth: usize,
    /// `[block][group][CELL]`.
    pub(super) operand: &'a [M::Operand],
    pub(super) groups: usize,
    /// The rows of Y that these panels give.
    pub(super) y: MatMut<'a, f32>,
    /// Cells of these panels' part of Z as the kernel leaves them, `[block][group]`; empty where Z is not asked for.
    pub(super) z: &'a mut [f32],
}

/// Both products of a chunk. To be inlined into a function that enables the kernel's instructions.
///
/// # Safety
/// The instructions of `M` must be available.
#[inline(always)]
pub(super) unsafe fn both<M: Multiply>(chunk: Chunk<'_, M>) {
    let Chunk { panels, depth, operand, groups, mut y, z } = chunk;
    let (panel, cells) = (depth * AREA, groups * CELL);
    let height = (CACHED / (panel * size_of::<M::Block>())).clamp(1, TALLEST);
    let mut handed = vec![M::Operand::default(); height * cells];
    let mut sums = vec![0f32; cells];
    let mut scratch = Vec::new();
    z.fill(0.0);
    // SAFETY: the caller vouches for the instructions.
    let session = unsafe { M::session() };
    for (visit, stored) in panels.chunks(height * panel).enumerate() {
        let tall = stored.len() / panel;
        // The second product fetches the next panels. The first one has to where there was none before it.
        let ahead = if z.is_empty() || visit == 0 { SOON * AREA } else { 0 };
        let blocks = M::stage(stored, &mut scratch);
        for (number, blocks) in blocks.chunks(panel).enumerate() {
            sums.fill(0.0);
            // SAFETY: as above; likewise below.
            unsafe { M::plain(blocks, AREA, depth, operand, &mut sums, ahead) };
            let handed = &mut handed[number * cells..(number + 1) * cells];
            for (group, (sums, handed)) in sums.as_chunks().0.iter().zip(handed.chunks_mut(CELL)).enumerate() {
                place(&mut y, visit * height + number, group, sums);
                if !z.is_empty() {
                    M::for_turned(sums, handed);
                }
            }
        }
        for (block, sums) in z.chunks_mut(cells).enumerate() {
            unsafe {
                M::turned(&blocks[block * AREA..], panel, tall, &handed[..tall * cells], sums, stored.len());
            }
        }
    }
    drop(session);
}

/// Asks for what lies `ahead` elements after each of `count` blocks to be brought into cache: otherwise the first product of a
/// panel would wait for memory.
#[inline(always)]
pub(super) fn fetch<T>(blocks: &[T], step: usize, count: usize, ahead: usize) {
    for block in 0..count {
        let from = blocks.as_ptr().wrapping_add(block * step + ahead);
        (0..AREA).step_by(LINE / size_of::<T>()).for_each(|element| prefetch(from.wrapping_add(element)));
    }
}

/// What is multiplied with Δ, and where the products go.
pub(super) struct Operands<'a> {
    pub(super) v: MatRef<'a, f32>,
    pub(super) y: MatMut<'a, f32>,
    pub(super) z: Option<MatMut<'a, f32>>,
    pub(super) workspace: &'a Workspace,
}

/// The products by a kernel: cuts, runs, adds up.
pub(super) fn products<M: Multiply>(
    blocks: &Blocks<M::Stored>,
    operands: Operands<'_>,
    run: impl Fn(Chunk<'_, M>) + Sync + Send,
) {
    let Operands { v, y, z, workspace } = operands;
    if v.ncols() == 0 || v.nrows() == 0 {
        return;
    }
    let groups = v.ncols().div_ceil(GROUP).next_multiple_of(M::GROUPS);
    let (depth, cells) = (blocks.depth(), groups * CELL);
    let mut operand = vec![M::Operand::default(); depth * cells];
    operand.par_chunks_mut(CONVERTED * cells).enumerate().for_each(|(part, operand)| {
        let mut cell = [0f32; CELL];
        for (block, operand) in operand.chunks_mut(cells).enumerate() {
            for (group, operand) in operand.chunks_mut(CELL).enumerate() {
                take(v, part * CONVERTED + block, group, &mut cell);
                M::for_plain(&cell, operand);
            }
        }
    });
    let panel = depth * AREA;
    // A power of two, so that as many threads have equal shares.
    let chunks = blocks.panels().div_ceil(SHORTEST).next_power_of_two().min(CHUNKS);
    let per_chunk = blocks.panels().div_ceil(chunks);
    let part = if z.is_some() { depth * cells } else { 0 };
    let mut sums = Array::<f32>::holding_anything(blocks.panels().div_ceil(per_chunk) * part, workspace);
    let mut rest = sums.values_mut();
    let mut chunks = Vec::with_capacity(CHUNKS);
    let strips = panels::strips(y, per_chunk * BLOCK);
    for (panels, (_, y)) in blocks.values().chunks(per_chunk * panel).zip(strips) {
        let (z, others) = std::mem::take(&mut rest).split_at_mut(part);
        rest = others;
        chunks.push(Chunk { panels, depth, operand: &operand, groups, y, z });
    }
    chunks.into_par_iter().for_each(run);

    let Some(z) = z else { return };
    let sums = sums.values();
    panels::strips(z, CONVERTED * BLOCK).into_par_iter().for_each(|(rows, mut z)| {
        let mut cell = [0f32; CELL];
        for block in 0..rows.len().div_ceil(BLOCK) {
            for group in 0..groups {
                let place_of = (rows.start / BLOCK + block) * cells + group * CELL;
                let mut total = [0f32; CELL];
                for part in sums.chunks(part) {
                    total.iter_mut().zip(&part[place_of..]).for_each(|(sum, part)| *sum += part);
                }
                M::from_turned(&total, &mut cell);
                place(&mut z, block, group, &cell);
            }
        }
    });
}

/// Rows `32·block..` and columns `16·group..` of a matrix, padded with zeros.
fn take(matrix: MatRef<'_, f32>, block: usize, group: usize, cell: &mut [f32; CELL]) {
    cell.fill(0.0);
    let (top, left) = (block * BLOCK, group * GROUP);
    let bottom = matrix.nrows().min(top + BLOCK);
    for j in left..matrix.ncols().min(left + GROUP) {
        let column = panels::column(matrix, j);
        for (row, &value) in cell.chunks_exact_mut(GROUP).zip(&column[top..bottom]) {
            row[j - left] = value;
        }
    }
}

/// Writes a 32×16 cell into a matrix, without the padding.
#[inline(always)]
fn place(matrix: &mut MatMut<'_, f32>, block: usize, group: usize, cell: &[f32; CELL]) {
    let (top, left) = (block * BLOCK, group * GROUP);
    let bottom = matrix.nrows().min(top + BLOCK);
    for j in left..matrix.ncols().min(left + GROUP) {
        let column = panels::column_mut(matrix.as_mut(), j);
        for (value, row) in column[top..bottom].iter_mut().zip(cell.chunks_exact(GROUP)) {
            *value = row[j - left];
        }
    }
}

/// Number of groups; panics unless all that is asked for is in bounds.
#[inline(always)]
pub(super) fn check<B, X>(blocks: &[B], step: usize, count: usize, x: &[X], out: &[f32]) -> usize {
    let groups = out.len() / CELL;
    assert!(count > 0 && groups > 0 && (count - 1) * step + AREA <= blocks.len() && count * groups * CELL <= x.len());
    groups
}
