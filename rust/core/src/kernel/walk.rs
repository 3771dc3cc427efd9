//! The walk over a packed Δ that all kernels share: chunks of panels side by side, a few panels at a time in cache.
//!
//! Chunks follow from the matrix alone, each is walked by one thread, and their partial sums of Z are added in order: the
//! result does not depend on the number of threads.

use bytemuck::Pod;
use faer::{Mat, MatRef};
use rayon::prelude::*;

use super::{AREA, BLOCK, CELL, GROUP};
use crate::packed::Blocks;

/// Chunks that a matrix is cut into, at most: each has a Z of its own, which has to be added up.
const CHUNKS: usize = 8;
/// Panels of a chunk, at least.
const SHORTEST: usize = 8;
/// Panels that are multiplied before Z is touched, at most.
const TALLEST: usize = 8;
/// Bytes of Δ that stay in cache between their two uses.
const CACHED: usize = 1 << 20;

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
    type Block: Copy + Default + Send + Sync;
    /// Element of an operand.
    type Operand: Copy + Default + Send + Sync;
    /// What a thread holds while it multiplies.
    type Session;

    /// Groups are padded to a multiple of this.
    const GROUPS: usize;

    unsafe fn session() -> Self::Session;
    /// Stored blocks as they are multiplied, in `scratch` where that is another type.
    fn stage<'a>(stored: &'a [Self::Stored], scratch: &'a mut Vec<Self::Block>) -> &'a [Self::Block];
    /// `out += Δ·x`: rows of the result are rows of the blocks.
    unsafe fn plain(blocks: &[Self::Block], step: usize, count: usize, x: &[Self::Operand], out: &mut [f32]);
    /// `out += Δᵀ·x`: rows of the result are columns of the blocks.
    unsafe fn turned(blocks: &[Self::Block], step: usize, count: usize, x: &[Self::Operand], out: &mut [f32]);
    /// A 32×16 cell as `plain` (or, if `turned`, `turned`) wants it.
    fn operand(turned: bool, cell: &[f32; CELL], out: &mut [Self::Operand]);
    /// What `plain` (or `turned`) has left in a cell, as 32×16.
    fn result(turned: bool, cell: &[f32], out: &mut [f32; CELL]);
}

/// Panels `first..first + panels` of Δ, and what they are multiplied with.
pub(super) struct Chunk<'a, M: Multiply> {
    pub(super) panels: &'a [M::Stored],
    /// Blocks in a panel.
    pub(super) depth: usize,
    pub(super) wide: bool,
    /// `[block][group][CELL]`.
    pub(super) operand: &'a [M::Operand],
    pub(super) groups: usize,
}

/// What a chunk contributes.
pub(super) struct Partial {
    /// Cells of Y: `[panel][group]`, 32×16 each.
    y: Vec<f32>,
    /// Cells of Z, as the kernel leaves them: `[block][group]`.
    z: Vec<f32>,
}

/// Both products of a chunk. To be inlined into a function that enables the kernel's instructions.
///
/// # Safety
/// The instructions of `M` must be available.
#[inline(always)]
pub(super) unsafe fn both<M: Multiply>(chunk: Chunk<'_, M>) -> Partial {
    let Chunk { panels, depth, wide, operand, groups } = chunk;
    let (panel, cells) = (depth * AREA, groups * CELL);
    let count = panels.len() / panel;
    let height = (CACHED / (panel * size_of::<M::Block>())).clamp(1, TALLEST);
    let mut y = vec![0f32; count * cells];
    let mut z = vec![0f32; depth * cells];
    let mut handed = vec![M::Operand::default(); height * cells];
    // SAFETY: the caller vouches for the instructions.
    let session = unsafe { M::session() };
    let mut scratch = Vec::new();
    let mut cell = [0f32; CELL];
    for (panels, y) in panels.chunks(height * panel).zip(y.chunks_mut(height * cells)) {
        let tall = panels.len() / panel;
        let panels = M::stage(panels, &mut scratch);
        for (number, (blocks, sums)) in panels.chunks(panel).zip(y.chunks_mut(cells)).enumerate() {
            // SAFETY: as above; likewise below.
            unsafe {
                if wide {
                    M::turned(blocks, AREA, depth, operand, sums);
                } else {
                    M::plain(blocks, AREA, depth, operand, sums);
                }
            }
            let handed = &mut handed[number * cells..(number + 1) * cells];
            for (sums, handed) in sums.chunks_mut(CELL).zip(handed.chunks_mut(CELL)) {
                M::result(wide, sums, &mut cell);
                M::operand(!wide, &cell, handed);
                sums.copy_from_slice(&cell);
            }
        }
        for (block, sums) in z.chunks_mut(cells).enumerate() {
            let blocks = &panels[block * AREA..];
            unsafe {
                if wide {
                    M::plain(blocks, panel, tall, &handed[..tall * cells], sums);
                } else {
                    M::turned(blocks, panel, tall, &handed[..tall * cells], sums);
                }
            }
        }
    }
    drop(session);
    Partial { y, z }
}

/// The product by a kernel: cuts, runs, adds up.
pub(super) fn products<M: Multiply>(
    blocks: &Blocks<M::Stored>,
    v: MatRef<'_, f32>,
    run: impl Fn(Chunk<'_, M>) -> Partial + Sync,
) -> (Mat<f32>, Mat<f32>) {
    let groups = v.ncols().div_ceil(GROUP).next_multiple_of(M::GROUPS);
    let (depth, cells) = (blocks.depth(), groups * CELL);
    let mut operand = vec![M::Operand::default(); depth * cells];
    for (block, operand) in operand.chunks_mut(cells).enumerate() {
        for (group, operand) in operand.chunks_mut(CELL).enumerate() {
            M::operand(blocks.is_wide(), &padded(v, block, group), operand);
        }
    }
    let panel = depth * AREA;
    let per_chunk = (blocks.panels().div_ceil(CHUNKS)).max(SHORTEST);
    let parts: Vec<Partial> = blocks
        .values()
        .par_chunks(per_chunk * panel)
        .map(|panels| run(Chunk { panels, depth, wide: blocks.is_wide(), operand: &operand, groups }))
        .collect();

    let mut y = Mat::zeros(blocks.long(), v.ncols());
    let mut z_cells = vec![0f32; depth * cells];
    for (number, part) in parts.iter().enumerate() {
        for (panel, sums) in part.y.chunks(cells).enumerate() {
            for (group, sums) in sums.chunks(CELL).enumerate() {
                place(&mut y, number * per_chunk + panel, group, sums);
            }
        }
        z_cells.iter_mut().zip(&part.z).for_each(|(sum, part)| *sum += part);
    }
    let mut z = Mat::zeros(blocks.short(), v.ncols());
    let mut cell = [0f32; CELL];
    for (block, sums) in z_cells.chunks(cells).enumerate() {
        for (group, sums) in sums.chunks(CELL).enumerate() {
            M::result(!blocks.is_wide(), sums, &mut cell);
            place(&mut z, block, group, &cell);
        }
    }
    (y, z)
}

/// Rows `32·block..` and columns `16·group..` of a matrix, padded with zeros.
fn padded(matrix: MatRef<'_, f32>, block: usize, group: usize) -> [f32; CELL] {
    let mut cell = [0f32; CELL];
    let (top, left) = (block * BLOCK, group * GROUP);
    for j in left..matrix.ncols().min(left + GROUP) {
        for i in top..matrix.nrows().min(top + BLOCK) {
            cell[(i - top) * GROUP + j - left] = matrix[(i, j)];
        }
    }
    cell
}

/// Writes a 32×16 cell into a matrix, without the padding.
fn place(matrix: &mut Mat<f32>, block: usize, group: usize, cell: &[f32]) {
    let (top, left) = (block * BLOCK, group * GROUP);
    for j in left..matrix.ncols().min(left + GROUP) {
        for i in top..matrix.nrows().min(top + BLOCK) {
            matrix[(i, j)] = cell[(i - top) * GROUP + j - left];
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
