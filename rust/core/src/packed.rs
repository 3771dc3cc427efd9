//! Δ as the kernels read it: blocks of 32×32 elements, those of one panel next to each other.
//!
//! A panel is 32 rows of the tall orientation (Δ or its transpose, whichever has more rows), all columns. Inside a block
//! elements lie row by row of that orientation. The last blocks are padded with zeros.

use bytemuck::Pod;
use faer::Mat;
use rayon::prelude::*;

use crate::error::Result;
use crate::kernel::{AREA, BLOCK};
use crate::memory::{Array, Workspace};

/// Blocks of one element type.
#[derive(Debug)]
pub(crate) struct Blocks<T: Pod> {
    values: Array<T>,
    rows: usize,
    cols: usize,
}

/// A packed Δ.
#[derive(Debug)]
pub(crate) enum Packed {
    /// Rounded to bf16, as its bits.
    Bf16(Blocks<u16>),
    /// Exactly.
    F32(Blocks<f32>),
}

impl<T: Pod> Blocks<T> {
    /// To be filled.
    pub(crate) fn anything(rows: usize, cols: usize, workspace: &Workspace) -> Self {
        let values = Array::holding_anything(rows.div_ceil(BLOCK) * cols.div_ceil(BLOCK) * AREA, workspace);
        Self { values, rows, cols }
    }

    /// Whether the panels are columns of Δ.
    pub(crate) fn is_wide(&self) -> bool {
        self.rows < self.cols
    }

    /// Elements of the longer side.
    pub(crate) fn long(&self) -> usize {
        self.rows.max(self.cols)
    }

    /// Elements of the shorter side.
    pub(crate) fn short(&self) -> usize {
        self.rows.min(self.cols)
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.long().div_ceil(BLOCK)
    }

    /// Blocks in a panel.
    pub(crate) fn depth(&self) -> usize {
        self.short().div_ceil(BLOCK)
    }

    /// All blocks, panel by panel.
    pub(crate) fn values(&self) -> &[T] {
        self.values.values()
    }

    /// All blocks, to be written.
    pub(crate) fn values_mut(&mut self) -> &mut [T] {
        self.values.values_mut()
    }
}

impl Packed {
    /// Rows and columns of the tall orientation.
    pub(crate) fn tall(&self) -> (usize, usize) {
        match self {
            Self::Bf16(blocks) => (blocks.long(), blocks.short()),
            Self::F32(blocks) => (blocks.long(), blocks.short()),
        }
    }
}

impl Blocks<f32> {
    /// Rows of the tall orientation, `count` panels from `first` on, without padding.
    pub(crate) fn rows_f64(&self, first: usize, count: usize) -> Mat<f64> {
        let rows = (count * BLOCK).min(self.long() - first * BLOCK);
        Mat::from_fn(rows, self.short(), |i, j| {
            let block = (first + i / BLOCK) * self.depth() + j / BLOCK;
            f64::from(self.values()[block * AREA + i % BLOCK * BLOCK + j % BLOCK])
        })
    }
}

/// Strips whose blocks wait in memory of their own before they are turned into panels that are columns.
const ROUND: usize = 8;

impl<T: Pod + Send + Sync> Blocks<T> {
    /// Fills strip after strip: `job(strip, blocks)` gets the number of 32 rows of Δ and their blocks from left to right, whose
    /// padding is zero. Returns what the jobs return, by strip.
    ///
    /// # Errors
    /// The first strip's that fails.
    pub(crate) fn fill<R: Send>(&mut self, job: impl Fn(usize, &mut [T]) -> Result<R> + Sync) -> Result<Vec<R>> {
        let across = self.cols.div_ceil(BLOCK) * AREA;
        if across == 0 {
            return Ok(Vec::new());
        }
        let (whole, ragged) = (self.rows / BLOCK, !self.cols.is_multiple_of(BLOCK));
        let job = |strip: usize, blocks: &mut [T]| {
            if ragged || strip >= whole {
                blocks.fill(T::zeroed());
            }
            job(strip, blocks)
        };
        if !self.is_wide() {
            let strips = self.values.values_mut().par_chunks_mut(across).enumerate();
            let results: Vec<Result<R>> = strips.map(|(strip, blocks)| job(strip, blocks)).collect();
            return results.into_iter().collect();
        }
        let strips = self.rows.div_ceil(BLOCK);
        let mut waiting = vec![T::zeroed(); across * ROUND.min(strips)];
        let mut results = Vec::with_capacity(strips);
        for first in (0..strips).step_by(ROUND) {
            let some = ROUND.min(strips - first);
            let round: Vec<Result<R>> = waiting
                .par_chunks_mut(across)
                .take(some)
                .enumerate()
                .map(|(number, blocks)| job(first + number, blocks))
                .collect();
            for result in round {
                results.push(result?);
            }
            self.values.values_mut().par_chunks_mut(strips * AREA).enumerate().for_each(|(panel, blocks)| {
                let mine = blocks[first * AREA..].chunks_exact_mut(AREA);
                for (block, strip) in mine.zip(waiting.chunks_exact(across).take(some)) {
                    turn(&strip[panel * AREA..(panel + 1) * AREA], block);
                }
            });
        }
        Ok(results)
    }
}

/// Transposes a block.
fn turn<T: Copy>(block: &[T], out: &mut [T]) {
    /// Rows and columns that are moved at a time: as much as registers hold.
    const PIECE: usize = 8;
    for top in (0..BLOCK).step_by(PIECE) {
        for left in (0..BLOCK).step_by(PIECE) {
            for j in left..left + PIECE {
                for i in top..top + PIECE {
                    out[j * BLOCK + i] = block[i * BLOCK + j];
                }
            }
        }
    }
}
