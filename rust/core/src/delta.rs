//! ΔW = W_tuned − W_base of one tensor: formed once, with its energy.
//!
//! Each element is the exact difference of the two stored values rounded once to f32. (bf16 checkpoints lose nothing there:
//! Sterbenz's lemma makes most differences exact in bf16 already.) ‖Δ‖² and ‖W‖² are summed in f64.
//!
//! A tensor of any rank is seen as a matrix of `shape[0]` rows; a vector or scalar as a single row.

use std::ops::Range;

use faer::{Mat, MatRef};

use crate::checkpoint::Checkpoint;
use crate::dtype::{Dtype, Element, with_element};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::panels;

/// Bytes of one side that are read at a time.
const READ: usize = 1 << 20;
/// Outside 2^±40 the products of two passes over Δ would leave the range of f32.
const COMFORTABLE: Range<f32> = 9.094_947e-13..1.099_511_6e12;

/// The difference of one tensor, dense in memory.
#[derive(Debug)]
pub struct Delta {
    /// Δ·2^-exponent, row-major.
    values: Vec<f32>,
    rows: usize,
    cols: usize,
    exponent: i32,
    energy: f64,
    base_energy: f64,
}

impl Delta {
    /// Reads `name` on both sides and subtracts. Where tuned has more rows than base (a grown vocabulary), the delta covers
    /// the rows of the base.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::UnsupportedDtype`], [`Error::ShapeMismatch`], [`Error::Io`];
    /// [`Error::NonFinite`] when either side holds NaN or an infinity, or the difference does not fit f32.
    pub fn load(base: &Checkpoint, tuned: &Checkpoint, name: &str) -> Result<Self> {
        let (rows, cols) = overlap(base, tuned, name)?;
        let mut values = vec![0f32; rows * cols];
        let height = (READ / (4 * cols.max(1))).clamp(1, rows.max(1));
        let parts: Vec<Result<(f64, f64, f32)>> = {
            use rayon::prelude::*;
            values
                .par_chunks_mut((height * cols).max(1))
                .enumerate()
                .map(|(panel, out)| subtract_panel(base, tuned, name, panel * height * cols, out))
                .collect()
        };
        let (mut energy, mut base_energy, mut largest) = (0.0, 0.0, 0f32);
        for part in parts {
            let (delta_part, base_part, peak) = part?;
            energy += delta_part;
            base_energy += base_part;
            largest = largest.max(peak);
        }
        let mut delta = Self { values, rows, cols, exponent: 0, energy, base_energy };
        delta.normalise(largest);
        Ok(delta)
    }

    /// Wraps a difference that is already in memory (row-major).
    ///
    /// # Errors
    /// [`Error::NonFinite`].
    pub fn from_values(values: Vec<f32>, rows: usize, cols: usize) -> Result<Self> {
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let value = values.get(index).copied().map_or(f64::NAN, f64::from);
            return Err(Error::NonFinite { path: "memory".into(), name: "delta".into(), index, value });
        }
        let energy = values.iter().map(|&value| f64::from(value).powi(2)).sum();
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let mut delta = Self { values, rows, cols, exponent: 0, energy, base_energy: 0.0 };
        delta.normalise(largest);
        Ok(delta)
    }

    /// Scales badly scaled values by a power of two, so that `largest` comes near 1.
    fn normalise(&mut self, largest: f32) {
        if largest > 0.0 && !COMFORTABLE.contains(&largest) {
            self.exponent = largest.log2().floor() as i32;
            // 2^-exponent itself can leave the range of f32, its two halves cannot.
            let down = -self.exponent;
            let (first, second) = (power_of_two(down / 2), power_of_two(down - down / 2));
            self.values.iter_mut().for_each(|value| *value = *value * first * second);
        }
    }

    /// Rows of the matrix view.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix view.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
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

    /// Rows `range` of Δ, row-major; rows beyond the last are left out.
    #[must_use]
    pub fn read_rows(&self, range: Range<usize>) -> Vec<f32> {
        let end = range.end.min(self.rows);
        let begin = range.start.min(end);
        self.flat(begin * self.cols, (end - begin) * self.cols)
    }

    /// `len` elements from flat index `begin` on.
    pub(crate) fn flat(&self, begin: usize, len: usize) -> Vec<f32> {
        let (first, second) = (power_of_two(self.exponent / 2), power_of_two(self.exponent - self.exponent / 2));
        self.values.get(begin..begin + len).unwrap_or_default().iter().map(|v| v * first * second).collect()
    }

    /// Δ·x for x of shape `(cols, k)`.
    #[must_use]
    pub fn times(&self, x: &Matrix) -> Matrix {
        let product = panels::tall_times_small(self.scaled(), x.view());
        Matrix::from_faer(product.as_ref(), self.scale())
    }

    /// Δᵀ·y for y of shape `(rows, k)`.
    #[must_use]
    pub fn transpose_times(&self, y: &Matrix) -> Matrix {
        let product = panels::tall_times_small(self.scaled().transpose(), y.view());
        Matrix::from_faer(product.as_ref(), self.scale())
    }

    /// ‖Δ − B·A‖²_F, from the residual itself: right however small it is (`T − Σσ²` would cancel).
    ///
    /// # Errors
    /// [`Error::UpdateShape`] when the factors do not fit.
    pub fn residual_energy(&self, b: &Matrix, a: &Matrix) -> Result<f64> {
        if b.rows() != self.rows || a.cols() != self.cols || b.cols() != a.rows() {
            return Err(Error::UpdateShape {
                name: "delta".into(),
                shape: vec![self.rows, self.cols],
                what: "factors".into(),
                found: vec![b.rows(), b.cols(), a.rows(), a.cols()],
            });
        }
        const HEIGHT: usize = 64;
        let down = f64::from(self.exponent).exp2().recip();
        let parts = panels::map(panels::cut(self.rows, HEIGHT), |rows| {
            let b_panel = b.view().subrows(rows.start, rows.len());
            let b_panel = Mat::from_fn(rows.len(), b.cols(), |i, j| (f64::from(b_panel[(i, j)]) * down) as f32);
            let mut product = vec![0f32; rows.len() * self.cols];
            let out = faer::MatMut::from_row_major_slice_mut(&mut product, rows.len(), self.cols);
            panels::multiply(out, b_panel.as_ref(), a.view());
            let values = self.values.get(rows.start * self.cols..rows.end * self.cols).unwrap_or_default();
            values.iter().zip(&product).map(|(&d, &p)| f64::from(d - p).powi(2)).sum::<f64>()
        });
        Ok(parts.iter().sum::<f64>() * self.scale().powi(2))
    }

    /// Δ·2^-exponent as a matrix view: what decompositions work on.
    pub(crate) fn scaled(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.values, self.rows, self.cols)
    }

    /// 2^exponent: what results on [`Self::scaled`] have to be multiplied with.
    pub(crate) fn scale(&self) -> f64 {
        f64::from(self.exponent).exp2()
    }
}

/// Whether two stored tensors have the same dtype, shape and bytes.
///
/// # Errors
/// [`Error::TensorMissing`], [`Error::Io`].
pub fn same_bytes(left: (&Checkpoint, &str), right: (&Checkpoint, &str)) -> Result<bool> {
    let ((our_file, our_name), (their_file, their_name)) = (left, right);
    let (left, right) = (our_file.info(our_name)?, their_file.info(their_name)?);
    if left.dtype != right.dtype || left.shape != right.shape {
        return Ok(false);
    }
    let chunk = READ.min(left.nbytes as usize);
    let (mut ours, mut theirs) = (vec![0u8; chunk], vec![0u8; chunk]);
    let mut begin = 0;
    while begin < left.nbytes {
        let len = chunk.min((left.nbytes - begin) as usize);
        let (ours, theirs) = (&mut ours[..len], &mut theirs[..len]);
        our_file.read_bytes(our_name, begin, ours)?;
        their_file.read_bytes(their_name, begin, theirs)?;
        if ours != theirs {
            return Ok(false);
        }
        begin += len as u64;
    }
    Ok(true)
}

/// Refuses NaN and infinities in the rows of a tensor from `first_row` on.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::TensorMissing`], [`Error::UnsupportedDtype`], [`Error::Io`].
pub fn check_finite(checkpoint: &Checkpoint, name: &str, first_row: usize) -> Result<()> {
    let info = checkpoint.info(name)?;
    let dtype = checkpoint.computable(name)?;
    let rows = info.shape.first().copied().unwrap_or(1).max(1) as u64;
    let size = dtype.bits() / 8;
    let mut begin = info.nbytes / rows * (first_row as u64).min(rows);
    let mut buffer = vec![0u8; READ];
    while begin < info.nbytes {
        let bytes = &mut buffer[..READ.min((info.nbytes - begin) as usize)];
        checkpoint.read_bytes(name, begin, bytes)?;
        if let Some((index, value)) = with_element!(dtype, E => first_non_finite::<E>(bytes)).flatten() {
            let index = (begin / size) as usize + index;
            return Err(Error::NonFinite { path: checkpoint.path().into(), name: name.into(), index, value });
        }
        begin += bytes.len() as u64;
    }
    Ok(())
}

/// Matrix shape of the part that both sides have.
fn overlap(base: &Checkpoint, tuned: &Checkpoint, name: &str) -> Result<(usize, usize)> {
    let (left, right) = (&base.info(name)?.shape, &tuned.info(name)?.shape);
    let mismatch = || Error::ShapeMismatch { name: name.into(), base: left.clone(), tuned: right.clone() };
    match (left.as_slice(), right.as_slice()) {
        ([], []) => Ok((1, 1)),
        ([base_rows, base_rest @ ..], [tuned_rows, tuned_rest @ ..]) if base_rest == tuned_rest => {
            if tuned_rows < base_rows {
                return Err(mismatch());
            }
            let cols: usize = base_rest.iter().product();
            Ok(if base_rest.is_empty() { (1, *base_rows) } else { (*base_rows, cols) })
        }
        _ => Err(mismatch()),
    }
}

/// Fills `out` with the difference of the elements from flat index `begin` on; returns ‖Δ‖², ‖W_base‖² and max |Δ|.
fn subtract_panel(
    base: &Checkpoint,
    tuned: &Checkpoint,
    name: &str,
    begin: usize,
    out: &mut [f32],
) -> Result<(f64, f64, f32)> {
    let read = |side: &Checkpoint| -> Result<(Dtype, Vec<u8>)> {
        let dtype = side.computable(name)?;
        let size = (dtype.bits() / 8) as usize;
        let mut bytes = vec![0u8; out.len() * size];
        side.read_bytes(name, (begin * size) as u64, &mut bytes)?;
        Ok((dtype, bytes))
    };
    let (base_dtype, base_bytes) = read(base)?;
    let (tuned_dtype, tuned_bytes) = read(tuned)?;
    let sums = with_element!(base_dtype, B => with_element!(tuned_dtype, T => {
        subtract::<B, T>(&base_bytes, &tuned_bytes, out)
    }))
    .flatten()
    .unwrap_or((f64::NAN, f64::NAN, 0.0));
    if sums.0.is_finite() && sums.1.is_finite() {
        return Ok(sums);
    }
    for (side, dtype, bytes) in [(base, base_dtype, &base_bytes), (tuned, tuned_dtype, &tuned_bytes)] {
        let found = with_element!(dtype, E => first_non_finite::<E>(bytes)).flatten();
        if let Some((index, value)) = found {
            return Err(Error::NonFinite { path: side.path().into(), name: name.into(), index: begin + index, value });
        }
    }
    let index = out.iter().position(|value| !value.is_finite()).unwrap_or(0);
    Err(Error::Overflow { name: name.into(), index: begin + index, value: sums.0, dtype: Dtype::F32 })
}

fn subtract<B: Element, T: Element>(base: &[u8], tuned: &[u8], out: &mut [f32]) -> (f64, f64, f32) {
    let (mut energy, mut base_energy, mut largest) = (0.0, 0.0, 0f32);
    let pairs = base.chunks_exact(B::BYTES).zip(tuned.chunks_exact(T::BYTES));
    for (value, (b, t)) in out.iter_mut().zip(pairs) {
        let b = B::read(b);
        // The f64 difference of two f32 values, rounded to f32, is their correctly rounded difference: 53 ≥ 2·24 + 2.
        let delta = (T::read(t) - b) as f32;
        *value = delta;
        energy += f64::from(delta) * f64::from(delta);
        base_energy += b * b;
        largest = largest.max(delta.abs());
    }
    (energy, base_energy, largest)
}

fn first_non_finite<E: Element>(bytes: &[u8]) -> Option<(usize, f64)> {
    bytes.chunks_exact(E::BYTES).map(E::read).enumerate().find(|(_, value)| !value.is_finite())
}

fn power_of_two(exponent: i32) -> f32 {
    f64::from(exponent).exp2() as f32
}
