//! ΔW = W_tuned − W_base of one tensor: its energy, and what decompositions need of it.
//!
//! The difference itself is not kept: whoever needs it exactly streams it ([`Difference`]). Kept is Δ rounded to bf16 and
//! packed for the kernels, two bytes an element. For most bf16 checkpoints that loses next to nothing (Sterbenz's lemma: the
//! difference of two bf16 within a factor of two of each other is a bf16); what it loses is measured (`rounding`), and where
//! that matters decompositions ask for an exact copy instead.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use faer::{Mat, MatRef};

use crate::checkpoint::Checkpoint;
use crate::difference::{Difference, with_scratch};
use crate::error::{Error, Result};
use crate::kernel::{self, AREA, BLOCK, Packing, Rounding};
use crate::matrix::Matrix;
use crate::memory::Workspace;
use crate::packed::{Blocks, Packed};
use crate::panels;

/// Elements that are read and formed at a time.
const READ: usize = 1 << 17;
/// Outside 2^±40 the products of two passes over Δ would leave the range of f32.
const COMFORTABLE: Range<f32> = 9.094_947e-13..1.099_511_6e12;
/// A shorter side up to this is decomposed from an exact copy, made when it is wanted.
const NARROW: usize = 192;

/// The difference of one tensor.
#[derive(Debug)]
pub struct Delta {
    difference: Difference,
    /// Δ·2^-exponent in bf16, unless one side is [`NARROW`].
    packed: Option<Packed>,
    exponent: i32,
    energy: f64,
    base_energy: f64,
    rounding_energy: f64,
    rounding: Rounding,
    workspace: Workspace,
}

impl Delta {
    /// Reads `name` on both sides and subtracts. Where one side has more rows (a grown vocabulary, or a padded one), the
    /// delta covers the rows that both have.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::UnsupportedDtype`], [`Error::ShapeMismatch`], [`Error::Io`];
    /// [`Error::NonFinite`] when either side holds NaN or an infinity, [`Error::TooFar`] when the difference does not fit
    /// f32.
    pub fn load(base: &Arc<Checkpoint>, tuned: &Arc<Checkpoint>, name: &str) -> Result<Self> {
        Self::load_in(&Workspace::default(), base, tuned, name)
    }

    /// As [`Self::load`], in memory of a workspace: much faster where many tensors follow each other.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_in(workspace: &Workspace, base: &Arc<Checkpoint>, tuned: &Arc<Checkpoint>, name: &str) -> Result<Self> {
        Self::pack(Difference::open(base, tuned, name)?, workspace)
    }

    /// Wraps a difference that is already in memory (row-major).
    ///
    /// # Errors
    /// [`Error::NonFinite`].
    pub fn from_values(values: Vec<f32>, rows: usize, cols: usize) -> Result<Self> {
        Self::pack(Difference::from_values(values, rows, cols), &Workspace::default())
    }

    /// The rows of several deltas, one below the other, read anew from where they came from.
    ///
    /// # Errors
    /// [`Error::UpdateShape`] when there are none or their columns differ; as [`Self::load`].
    pub fn stack(deltas: &[&Self]) -> Result<Self> {
        let parts = deltas.iter().map(|delta| delta.difference.clone()).collect();
        let difference = Difference::stack(parts).ok_or_else(|| Error::UpdateShape {
            name: "stack of deltas".into(),
            shape: deltas.iter().map(|delta| delta.cols()).collect(),
            what: "a stack".into(),
            found: deltas.iter().map(|delta| delta.rows()).collect(),
        })?;
        let workspace = deltas.first().map(|delta| delta.workspace.clone()).unwrap_or_default();
        Self::pack(difference, &workspace)
    }

    fn pack(difference: Difference, workspace: &Workspace) -> Result<Self> {
        let (rows, cols) = (difference.rows(), difference.cols());
        if rows.min(cols) <= NARROW {
            let sums = difference.sums()?;
            let exponent = exponent(sums.largest);
            let (energy, base_energy) = (sums.energy, sums.base_energy);
            return Ok(Self {
                rounding_energy: difference.rounding_energy(&sums),
                difference,
                packed: None,
                exponent,
                energy,
                base_energy,
                rounding: Rounding::default(),
                workspace: workspace.clone(),
            });
        }
        let (mut packing, mut blocks) = pack_bf16(&difference, 0, workspace)?;
        let exponent = exponent(packing.sums.largest);
        if exponent != 0 {
            drop(blocks);
            (packing, blocks) = pack_bf16(&difference, exponent, workspace)?;
        }
        Ok(Self {
            rounding_energy: difference.rounding_energy(&packing.sums),
            difference,
            packed: Some(Packed::Bf16(blocks)),
            exponent,
            energy: packing.sums.energy,
            base_energy: packing.sums.base_energy,
            rounding: packing.rounding,
            workspace: workspace.clone(),
        })
    }

    /// Rows of the matrix view.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.difference.rows()
    }

    /// Columns of the matrix view.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.difference.cols()
    }

    /// ‖Δ‖²_F.
    #[must_use]
    pub fn energy(&self) -> f64 {
        self.energy
    }

    /// ‖W_base‖²_F over the rows that the delta covers.
    #[must_use]
    pub fn base_energy(&self) -> f64 {
        self.base_energy
    }

    /// Energy that rounding W_tuned to its dtype has added to Δ, were it spread evenly over the spacing of each element that
    /// changed: Σ spacing²/12. 0 for values in memory.
    #[must_use]
    pub fn rounding_energy(&self) -> f64 {
        self.rounding_energy
    }

    /// Rows `range` of Δ, row-major; rows beyond the last are left out.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn read_rows(&self, range: Range<usize>) -> Result<Vec<f32>> {
        let end = range.end.min(self.rows());
        let begin = range.start.min(end);
        let mut values = vec![0f32; (end - begin) * self.cols()];
        with_scratch(0, |_, scratch| self.difference.read(begin * self.cols(), &mut values, scratch))?;
        Ok(values)
    }

    /// Δ·x for x of shape `(cols, k)`.
    ///
    /// # Errors
    /// As [`Self::load`]; [`Error::UpdateShape`] when `x` does not fit.
    pub fn times(&self, x: &Matrix) -> Result<Matrix> {
        self.fits(x.rows() == self.cols(), &[x])?;
        Ok(Matrix::from_faer(self.product(x.view())?.as_ref(), self.scale()))
    }

    /// Δᵀ·y for y of shape `(rows, k)`.
    ///
    /// # Errors
    /// As [`Self::load`]; [`Error::UpdateShape`] when `y` does not fit.
    pub fn transpose_times(&self, y: &Matrix) -> Result<Matrix> {
        self.fits(y.rows() == self.rows(), &[y])?;
        Ok(Matrix::from_faer(self.transpose_product(y.view())?.as_ref(), self.scale()))
    }

    /// 2^-exponent·Δ·v in the tall orientation, from the difference itself.
    pub(crate) fn tall_product(&self, v: MatRef<'_, f32>) -> Result<Mat<f32>> {
        if self.rows() < self.cols() { self.transpose_product(v) } else { self.product(v) }
    }

    fn product(&self, x: MatRef<'_, f32>) -> Result<Mat<f32>> {
        let parts = self.for_strips(
            |rows| (rows.start, Mat::<f32>::zeros(rows.len(), x.ncols())),
            |(first, product), rows, strip| {
                let product = product.as_mut().subrows_mut(rows.start - *first, rows.len());
                panels::multiply(product, strip.as_ref(), x);
            },
        )?;
        let mut product = Mat::<f32>::zeros(self.rows(), x.ncols());
        for (first, part) in parts {
            product.as_mut().subrows_mut(first, part.nrows()).copy_from(part);
        }
        Ok(product)
    }

    fn transpose_product(&self, y: MatRef<'_, f32>) -> Result<Mat<f32>> {
        let parts = self.for_strips(
            |_| Mat::<f32>::zeros(self.cols(), y.ncols()),
            |product, rows, strip| {
                let y = y.subrows(rows.start, rows.len());
                panels::multiply_add(product.as_mut(), strip.as_ref().transpose(), y, 1.0);
            },
        )?;
        let mut product = Mat::<f32>::zeros(self.cols(), y.ncols());
        for part in parts {
            product += part;
        }
        Ok(product)
    }

    /// The packed copy in bf16, and what rounding has cost; both scaled by 2^-exponent. `None` for a narrow Δ.
    pub(crate) fn packed(&self) -> Option<(&Packed, Rounding)> {
        self.packed.as_ref().map(|packed| (packed, self.rounding))
    }

    /// A packed copy that loses nothing, scaled by 2^-exponent.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub(crate) fn pack_exactly(&self) -> Result<Blocks<f32>> {
        pack_f32(&self.difference, self.exponent, &self.workspace)
    }

    /// Where decompositions take memory from.
    pub(crate) fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// 2^exponent: what results on scaled values have to be multiplied with.
    pub(crate) fn scale(&self) -> f64 {
        f64::from(self.exponent).exp2()
    }

    /// Streams Δ·2^-exponent: chunks of rows side by side, each chunk strip by strip into what `begin` makes of its rows.
    pub(crate) fn for_strips<A: Send>(
        &self,
        begin: impl Fn(Range<usize>) -> A + Sync,
        step: impl Fn(&mut A, Range<usize>, Strip<'_>) + Sync,
    ) -> Result<Vec<A>> {
        /// Partial results are as many as chunks, so their number is bounded.
        const CHUNKS: usize = 16;
        const SHORTEST: usize = 32;
        let cols = self.cols();
        let height = (READ / cols.max(1)).clamp(SHORTEST, 1024);
        let chunk = self.rows().div_ceil(CHUNKS).next_multiple_of(SHORTEST);
        let parts = panels::map(panels::cut(self.rows(), chunk), |rows| {
            let mut part = begin(rows.clone());
            with_scratch(height.min(rows.len()) * cols, |values, scratch| {
                for strip in panels::cut(rows.len(), height) {
                    let strip = rows.start + strip.start..rows.start + strip.end;
                    let values = &mut values[..strip.len() * cols];
                    self.difference.read(strip.start * cols, values, scratch)?;
                    rescale(values, self.exponent);
                    step(&mut part, strip, Strip { values, cols });
                }
                Ok(part)
            })
        });
        parts.into_iter().collect()
    }

    pub(crate) fn fits(&self, fits: bool, factors: &[&Matrix]) -> Result<()> {
        if fits {
            return Ok(());
        }
        Err(Error::UpdateShape {
            name: "delta".into(),
            shape: vec![self.rows(), self.cols()],
            what: "factors".into(),
            found: factors.iter().flat_map(|factor| [factor.rows(), factor.cols()]).collect(),
        })
    }
}

/// Some rows of Δ, in memory for a moment.
pub(crate) struct Strip<'a> {
    values: &'a mut [f32],
    cols: usize,
}

impl<'a> Strip<'a> {
    pub(crate) fn ncols(&self) -> usize {
        self.cols
    }

    pub(crate) fn as_ref(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(self.values, self.values.len() / self.cols.max(1), self.cols)
    }

    pub(crate) fn values(self) -> &'a mut [f32] {
        self.values
    }
}

/// ‖Δ‖² and ‖W_base‖² of a tensor, without a copy of it.
///
/// # Errors
/// As [`Delta::load`].
pub fn energies(base: &Arc<Checkpoint>, tuned: &Arc<Checkpoint>, name: &str) -> Result<(f64, f64)> {
    let sums = Difference::open(base, tuned, name)?.sums()?;
    Ok((sums.energy, sums.base_energy))
}

/// Δ·2^-exponent as blocks of bf16, its sums (unscaled), and what the rounding loses (scaled).
fn pack_bf16(difference: &Difference, exponent: i32, workspace: &Workspace) -> Result<(Packing, Blocks<u16>)> {
    let mut blocks = Blocks::anything(difference.rows(), difference.cols(), workspace);
    let packing = fill(difference, &mut blocks, |strip, rows, blocks| {
        if exponent == 0
            && let Some(packing) =
                with_scratch(0, |_, scratch| difference.pack_stored(rows.start - strip, rows.clone(), blocks, scratch))?
        {
            return Ok(packing);
        }
        with_scratch(rows.len() * difference.cols(), |values, scratch| {
            let sums = difference.read(rows.start * difference.cols(), values, scratch)?;
            rescale(values, exponent);
            let rounding = kernel::pack_rows(values, difference.cols(), rows.start - strip, blocks);
            Ok(Packing { sums, rounding })
        })
    })?;
    Ok((packing, blocks))
}

/// Δ·2^-exponent as blocks of f32.
fn pack_f32(difference: &Difference, exponent: i32, workspace: &Workspace) -> Result<Blocks<f32>> {
    let cols = difference.cols();
    let mut blocks = Blocks::anything(difference.rows(), cols, workspace);
    fill(difference, &mut blocks, |strip, rows, blocks| {
        with_scratch(rows.len() * cols, |values, scratch| {
            let sums = difference.read(rows.start * cols, values, scratch)?;
            rescale(values, exponent);
            for (row, values) in (rows.start - strip..).zip(values.chunks_exact(cols)) {
                for (values, block) in values.chunks(BLOCK).zip(blocks.chunks_exact_mut(AREA)) {
                    block[row * BLOCK..row * BLOCK + values.len()].copy_from_slice(values);
                }
            }
            Ok(Packing { sums, rounding: Rounding::default() })
        })
    })?;
    Ok(blocks)
}

/// Fills blocks with `pack(first row of the strip, rows, blocks of the strip)`, some rows at a time; adds up what that returns.
fn fill<T: Pod + Send + Sync>(
    difference: &Difference,
    blocks: &mut Blocks<T>,
    pack: impl Fn(usize, Range<usize>, &mut [T]) -> Result<Packing> + Sync,
) -> Result<Packing> {
    let height = (READ / difference.cols().max(1)).clamp(1, BLOCK);
    let parts = blocks.fill(|strip, blocks| {
        let first = strip * BLOCK;
        let mut total = Packing::default();
        for rows in panels::cut((difference.rows() - first).min(BLOCK), height) {
            total.add(pack(first, first + rows.start..first + rows.end, blocks)?);
        }
        Ok(total)
    })?;
    let mut total = Packing::default();
    parts.into_iter().for_each(|part| total.add(part));
    Ok(total)
}

/// The power of two that brings badly scaled values near 1; 0 for all others.
fn exponent(largest: f32) -> i32 {
    if largest > 0.0 && !COMFORTABLE.contains(&largest) { largest.log2().floor() as i32 } else { 0 }
}

/// `values·2^-exponent`, exactly but where that is subnormal.
fn rescale(values: &mut [f32], exponent: i32) {
    if exponent != 0 {
        // 2^-exponent itself can leave the range of f32, its two halves cannot.
        let (first, second) = (power_of_two(-exponent / 2), power_of_two(-exponent - -exponent / 2));
        values.iter_mut().for_each(|value| *value = *value * first * second);
    }
}

fn power_of_two(exponent: i32) -> f32 {
    f64::from(exponent).exp2() as f32
}
