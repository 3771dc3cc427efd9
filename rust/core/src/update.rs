//! What an adapter does to one tensor of the base: W' = round(W + Σ s·B·A), or a stored replacement, or appended rows.
//!
//! An [`Update`] names where its parts are stored, or what computes them; [`Update::load`] reads the factors (small) and leaves
//! everything stored of the tensor's own size on disk. [`LoadedUpdate`] then produces any range of the result, so that merging and verifying stream.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use faer::MatMut;

use crate::checkpoint::Checkpoint;
use crate::dtype::{Dtype, Element, with_element};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::panels;

/// A stored tensor.
#[derive(Debug, Clone)]
pub struct Source {
    /// The checkpoint (or adapter file) that holds it.
    pub checkpoint: Arc<Checkpoint>,
    /// Its name there.
    pub name: String,
}

impl Source {
    fn shape(&self) -> Result<&[usize]> {
        Ok(&self.checkpoint.info(&self.name)?.shape)
    }

    fn read_matrix(&self) -> Result<Matrix> {
        let shape = self.shape()?.to_vec();
        let values = self.checkpoint.read_f32(&self.name)?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let value = values.get(index).copied().map_or(f64::NAN, f64::from);
            let path = self.checkpoint.path().into();
            return Err(Error::NonFinite { path, name: self.name.clone(), index, value });
        }
        let matrix = match shape.as_slice() {
            [rows, cols] => Matrix::new(*rows, *cols, values),
            _ => None,
        };
        matrix.ok_or_else(|| Error::UpdateShape {
            name: self.name.clone(),
            shape: shape.clone(),
            what: "a factor, which has two dimensions,".into(),
            found: shape,
        })
    }
}

/// One low-rank term s·B·A.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// B, stored as `(out, r)`.
    pub b: Source,
    /// A, stored as `(r, in)`.
    pub a: Source,
    /// The scale s.
    pub scale: f64,
    /// The tensor is stored as `(in, out)`: embeddings, and layers with `fan_in_fan_out`.
    pub transposed: bool,
}

impl LowRank {
    /// Left and right factor in the orientation of the base's tensor, the scale in the left one.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::UpdateShape`], [`Error::NonFinite`], [`Error::UnsupportedDtype`], [`Error::Io`].
    pub fn factors(&self) -> Result<(Matrix, Matrix)> {
        let (b, a) = (self.b.read_matrix()?, self.a.read_matrix()?);
        if self.transposed {
            let right = Matrix::from_faer(b.view().transpose(), 1.0);
            return Ok((Matrix::from_faer(a.view().transpose(), self.scale), right));
        }
        Ok((Matrix::from_faer(b.view(), self.scale), a))
    }
}

/// The values of a term that is not stored as a pair of factors.
#[derive(Debug)]
pub enum Values {
    /// B and A, whose product is added.
    Pair(Matrix, Matrix),
    /// The whole difference.
    Dense(Matrix),
}

/// A term that is computed when its tensor's turn comes: decompositions that do not lower to a small pair would otherwise hold
/// all of a model in memory.
#[derive(Clone)]
pub struct Computed(Arc<dyn Fn() -> std::result::Result<Values, String> + Send + Sync>);

impl Computed {
    /// A term that `compute` makes; called once for each time that the tensor is merged, on any thread.
    pub fn new(compute: impl Fn() -> std::result::Result<Values, String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(compute))
    }
}

impl fmt::Debug for Computed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Computed")
    }
}

/// Everything that adapters do to one tensor.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Low-rank terms, summed in this order.
    pub low_rank: Vec<LowRank>,
    /// Terms that are computed, summed after those.
    pub computed: Vec<Computed>,
    /// Stored values that take the place of the base's. One is copied; of several, each one's difference to the base is added.
    pub replacements: Vec<Source>,
    /// Rows appended after the base's last.
    pub new_rows: Option<Source>,
}

/// An update with its factors in memory.
#[derive(Debug)]
pub struct LoadedUpdate<'a> {
    name: &'a str,
    base: &'a Checkpoint,
    dtype: Dtype,
    /// Shape of the base's tensor as a matrix.
    rows: usize,
    cols: usize,
    /// Left and right factor in the tensor's own orientation, the scale, and whether the stored ones are transposed.
    terms: Vec<(Matrix, Matrix, f32, bool)>,
    /// Terms that are whole differences.
    dense: Vec<Matrix>,
    /// Where W is read from.
    start: Start<'a>,
    /// Further replacements, as differences to the base.
    differences: &'a [Source],
    new_rows: Option<&'a Source>,
}

#[derive(Debug)]
enum Start<'a> {
    Base,
    Replacement(&'a Source),
}

impl Update {
    /// Reads the factors and checks every shape against the base's tensor.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::UpdateShape`], [`Error::NonFinite`], [`Error::UnsupportedDtype`], [`Error::Io`].
    pub fn load<'a>(&'a self, base: &'a Checkpoint, name: &'a str) -> Result<LoadedUpdate<'a>> {
        let info = base.info(name)?;
        let misfit = |what: &Source, found: &[usize]| Error::UpdateShape {
            name: name.into(),
            shape: info.shape.clone(),
            what: format!("`{}` of `{}`", what.name, what.checkpoint.path().display()),
            found: found.to_vec(),
        };
        let (rows, cols) = match info.shape.as_slice() {
            [] => (1, 1),
            [len] => (*len, 1),
            [rows, rest @ ..] => (*rows, rest.iter().product()),
        };
        let mut terms = Vec::with_capacity(self.low_rank.len());
        for term in &self.low_rank {
            base.computable(name)?;
            let (b, a) = (term.b.read_matrix()?, term.a.read_matrix()?);
            let fits = if term.transposed {
                (a.cols(), b.rows()) == (rows, cols)
            } else {
                (b.rows(), a.cols()) == (rows, cols)
            };
            if !fits || info.shape.len() != 2 {
                return Err(misfit(&term.b, &[b.rows(), b.cols(), a.rows(), a.cols()]));
            }
            if b.cols() != a.rows() {
                return Err(misfit(&term.a, &[b.rows(), b.cols(), a.rows(), a.cols()]));
            }
            let (left, right) = if term.transposed { (a, b) } else { (b, a) };
            terms.push((left, right, term.scale as f32, term.transposed));
        }
        let mut dense = Vec::new();
        for term in &self.computed {
            base.computable(name)?;
            let values = (term.0)().map_err(|reason| Error::Computed { name: name.into(), reason })?;
            let (shape, found, values) = match values {
                Values::Pair(b, a) => {
                    let shape = (b.cols() == a.rows()).then_some((b.rows(), a.cols()));
                    (shape, [b.rows(), b.cols(), a.rows(), a.cols()].to_vec(), Values::Pair(b, a))
                }
                Values::Dense(matrix) => {
                    let shape = (matrix.rows(), matrix.cols());
                    (Some(shape), [shape.0, shape.1].to_vec(), Values::Dense(matrix))
                }
            };
            if shape != Some((rows, cols)) || info.shape.len() != 2 {
                let (shape, what) = (info.shape.clone(), "what was computed for it,".into());
                return Err(Error::UpdateShape { name: name.into(), shape, what, found });
            }
            match values {
                Values::Pair(b, a) => terms.push((b, a, 1.0, false)),
                Values::Dense(matrix) => dense.push(matrix),
            }
        }
        for source in &self.replacements {
            if source.shape()? != info.shape {
                return Err(misfit(source, source.shape()?));
            }
        }
        if let Some(source) = &self.new_rows {
            let shape = source.shape()?;
            if shape.is_empty() || info.shape.is_empty() || shape.get(1..) != info.shape.get(1..) {
                return Err(misfit(source, shape));
            }
        }
        let (start, differences) = match self.replacements.as_slice() {
            [only] => (Start::Replacement(only), [].as_slice()),
            several => (Start::Base, several),
        };
        Ok(LoadedUpdate {
            name,
            base,
            dtype: info.dtype,
            rows,
            cols,
            terms,
            dense,
            start,
            differences,
            new_rows: self.new_rows.as_ref(),
        })
    }
}

impl LoadedUpdate<'_> {
    /// Rows and columns of the base's tensor, seen as a matrix (a vector is a column).
    #[must_use]
    pub fn matrix_shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Whether stored values take the place of the base's.
    #[must_use]
    pub fn is_replacement(&self) -> bool {
        matches!(self.start, Start::Replacement(_))
    }

    /// Shape of the merged tensor.
    ///
    /// # Errors
    /// [`Error::TensorMissing`].
    pub fn merged_shape(&self) -> Result<Vec<usize>> {
        let mut shape = self.base.info(self.name)?.shape.clone();
        if let (Some(source), Some(rows)) = (self.new_rows, shape.first_mut()) {
            *rows = rows.saturating_add(source.shape()?.first().copied().unwrap_or(0));
        }
        Ok(shape)
    }

    /// The sum of all differences for rows `range`, before it is added to W: f32, row-major.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::UnsupportedDtype`].
    pub fn delta_rows(&self, range: Range<usize>) -> Result<Vec<f32>> {
        let mut delta = vec![0f32; range.len() * self.cols];
        for (left, right, scale, transposed) in &self.terms {
            let out = MatMut::from_row_major_slice_mut(&mut delta, range.len(), self.cols);
            let (left, right) = if *transposed {
                (left.view().transpose(), right.view().transpose())
            } else {
                (left.view(), right.view())
            };
            panels::multiply_add(out, left.subrows(range.start, range.len()), right, *scale);
        }
        for matrix in &self.dense {
            let rows = matrix.values().chunks_exact(self.cols.max(1)).skip(range.start);
            for (sum, row) in delta.chunks_exact_mut(self.cols.max(1)).zip(rows) {
                sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
        }
        for source in self.differences {
            let theirs = self.read_rows_f64(&source.checkpoint, &source.name, range.clone())?;
            let ours = self.read_rows_f64(self.base, self.name, range.clone())?;
            for ((value, theirs), ours) in delta.iter_mut().zip(theirs).zip(ours) {
                *value += (theirs - ours) as f32;
            }
        }
        Ok(delta)
    }

    /// The merged bytes of rows `range` of the base's tensor: W + delta summed in f32, rounded once to the base's dtype.
    /// Where the delta is zero the stored bits are kept, so −0, NaN payloads and subnormals survive.
    ///
    /// # Errors
    /// [`Error::Overflow`] when a finite sum does not fit the dtype; [`Error::Io`], [`Error::UnsupportedDtype`].
    pub fn merged_rows(&self, range: Range<usize>) -> Result<Vec<u8>> {
        let start = match self.start {
            Start::Base => self.row_bytes(self.base, self.name, range.clone())?,
            Start::Replacement(source) => self.convert(source, range.clone())?,
        };
        if self.terms.is_empty() && self.dense.is_empty() && self.differences.is_empty() {
            return Ok(start);
        }
        let first = range.start * self.cols;
        let delta = self.delta_rows(range)?;
        let mut out = start.clone();
        let overflow = with_element!(self.dtype, E => add_rows::<E>(&start, &delta, &mut out));
        match overflow {
            None => Err(self.base.unsupported(self.name, self.dtype)),
            Some(Some((index, value))) => {
                Err(Error::Overflow { name: self.name.into(), index: first + index, value, dtype: self.dtype })
            }
            Some(None) => Ok(out),
        }
    }

    /// The appended rows in the base's dtype, if any.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::UnsupportedDtype`].
    pub fn appended_bytes(&self) -> Result<Vec<u8>> {
        match self.new_rows {
            Some(source) => self.convert(source, 0..source.shape()?.first().copied().unwrap_or(0)),
            None => Ok(Vec::new()),
        }
    }

    /// Bytes of rows of a tensor whose columns are those of the base's.
    fn row_bytes(&self, checkpoint: &Checkpoint, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let size = checkpoint.info(name)?.dtype.bits() as usize * self.cols;
        let mut bytes = vec![0u8; (range.len() * size).div_ceil(8)];
        checkpoint.read_bytes(name, (range.start * size / 8) as u64, &mut bytes)?;
        Ok(bytes)
    }

    /// Rows of a stored tensor in the base's dtype: copied when the dtypes agree, else rounded once.
    fn convert(&self, source: &Source, range: Range<usize>) -> Result<Vec<u8>> {
        let dtype = source.checkpoint.info(&source.name)?.dtype;
        if dtype == self.dtype {
            return self.row_bytes(&source.checkpoint, &source.name, range);
        }
        let first = range.start * self.cols;
        let values = self.read_rows_f64(&source.checkpoint, &source.name, range)?;
        let mut overflow = None;
        let bytes = with_element!(self.dtype, E => {
            let mut bytes = vec![0u8; values.len() * E::BYTES];
            for (index, (&value, out)) in values.iter().zip(bytes.chunks_exact_mut(E::BYTES)).enumerate() {
                if !E::write(value, out) && value.is_finite() {
                    overflow.get_or_insert((index, value));
                }
            }
            bytes
        });
        match (overflow, bytes) {
            (Some((index, value)), _) => {
                Err(Error::Overflow { name: self.name.into(), index: first + index, value, dtype: self.dtype })
            }
            (None, bytes) => bytes.ok_or_else(|| self.base.unsupported(self.name, self.dtype)),
        }
    }

    fn read_rows_f64(&self, checkpoint: &Checkpoint, name: &str, range: Range<usize>) -> Result<Vec<f64>> {
        let dtype = checkpoint.computable(name)?;
        let bytes = self.row_bytes(checkpoint, name, range)?;
        with_element!(dtype, E => bytes.chunks_exact(E::BYTES).map(E::read).collect())
            .ok_or_else(|| checkpoint.unsupported(name, dtype))
    }
}

/// Adds `delta` where it is not zero; returns the first element whose finite sum overflowed the dtype.
fn add_rows<E: Element>(start: &[u8], delta: &[f32], out: &mut [u8]) -> Option<(usize, f64)> {
    let mut overflow = None;
    let pairs = start.chunks_exact(E::BYTES).zip(out.chunks_exact_mut(E::BYTES));
    for (index, ((start, out), &delta)) in pairs.zip(delta).enumerate() {
        if delta != 0.0 && !E::add(start, delta, out) && E::read(start).is_finite() && overflow.is_none() {
            overflow = Some((index, E::read(start) + f64::from(delta)));
        }
    }
    overflow
}
