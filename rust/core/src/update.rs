//! What an adapter does to one tensor of the base: W' = round(W + Σ s·B·A), or a stored replacement, or appended rows.
//!
//! An [`Update`] names where its parts are stored, or what computes them; [`Update::load`] reads the factors (small) and leaves
//! everything stored of the tensor's own size on disk. [`LoadedUpdate`] then produces any range of the result, so that merging and
//! verifying stream.

use std::borrow::Cow;
use std::ops::Range;

use crate::checkpoint::Checkpoint;
use crate::dtype::{Dtype, Element, with_element};
use crate::error::{Error, Result};
use crate::header::TensorInfo;
use crate::kernel::{Factors, Kernel, STRIP};
use crate::matrix::Matrix;
use crate::rounding::{self, Applied, Storing};
use crate::terms::{Computed, LowRank, Source, Values};

/// Columns of a tile: the update of a panel's rows stays in the second-level cache, and A is read once for each panel.
const TILE: usize = 32 * STRIP;

/// Everything that adapters do to one tensor.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Low-rank terms, summed in this order.
    pub low_rank: Vec<LowRank>,
    /// Terms that are computed, summed after those.
    pub computed: Vec<Computed>,
    /// Stored values that take the place of the base's, each with a weight. One of weight 1 is copied; otherwise each one's difference
    /// to the base is added, as often as its weight says.
    pub replacements: Vec<(Source, f64)>,
    /// Rows appended after the base's last.
    pub new_rows: Option<Source>,
}

/// An update with its factors in memory.
#[derive(Debug)]
pub struct LoadedUpdate<'a> {
    name: &'a str,
    base: &'a Checkpoint,
    info: TensorInfo,
    /// Shape of the base's tensor as a matrix.
    rows: usize,
    cols: usize,
    /// All low-rank terms, scales included.
    factors: Factors,
    /// Terms that are whole differences.
    dense: Vec<Matrix>,
    /// Where W is read from.
    start: Start<'a>,
    /// Further replacements, as differences to the base.
    differences: &'a [(Source, f64)],
    new_rows: Option<&'a Source>,
}

/// Memory that one thread merges in again and again.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    base: Vec<u8>,
    delta: Vec<f32>,
    /// The merged bytes.
    pub(crate) out: Vec<u8>,
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
        let (rows, cols) = info.matrix_shape();
        let is_vector = info.shape.len() < 2;
        let mut terms = Vec::with_capacity(self.low_rank.len() + self.computed.len());
        for term in &self.low_rank {
            base.computable(name)?;
            let (left, right) = term.factors()?;
            if (left.rows(), right.cols()) != (rows, cols) || left.cols() != right.rows() || is_vector {
                return Err(misfit(&term.b, &[left.rows(), left.cols(), right.rows(), right.cols()]));
            }
            terms.push((left, right));
        }
        let mut dense = Vec::new();
        for term in &self.computed {
            base.computable(name)?;
            let values = (term.0)().map_err(|error| match error {
                // Who computes does not know for whom.
                Error::Computed { reason, .. } => Error::Computed { name: name.into(), reason },
                other => other,
            })?;
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
            if shape != Some((rows, cols)) || is_vector {
                let (shape, what) = (info.shape.clone(), "what was computed for it,".into());
                return Err(Error::UpdateShape { name: name.into(), shape, what, found });
            }
            match values {
                Values::Pair(b, a) => terms.push((b, a)),
                Values::Dense(matrix) => dense.push(matrix),
            }
        }
        for (source, _) in &self.replacements {
            if source.shape()? != info.shape {
                return Err(misfit(source, &source.shape()?));
            }
        }
        if let Some(source) = &self.new_rows {
            let shape = source.shape()?;
            if shape.is_empty() || info.shape.is_empty() || shape.get(1..) != info.shape.get(1..) {
                return Err(misfit(source, &shape));
            }
        }
        let (start, differences) = match self.replacements.as_slice() {
            [(only, weight)] if weight.to_bits() == 1f64.to_bits() => (Start::Replacement(only), [].as_slice()),
            several => (Start::Base, several),
        };
        Ok(LoadedUpdate {
            name,
            base,
            info,
            rows,
            cols,
            factors: Factors::pack(Kernel::current()?, &terms),
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

    /// The dtype that is stored.
    pub(crate) fn target(&self, storing: &Storing) -> Dtype {
        storing.target(&self.info)
    }

    pub(crate) fn appends_nothing(&self) -> bool {
        self.new_rows.is_none()
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
        let mut shape = self.info.shape.clone();
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
        let whole = self.whole_differences(&range)?;
        self.delta_tile(range, 0..self.cols, &whole, &mut delta);
        Ok(delta)
    }

    /// The same for some columns, from a multiple of [`STRIP`] on; `whole` are the [`Self::whole_differences`] of these rows.
    fn delta_tile(&self, rows: Range<usize>, cols: Range<usize>, whole: &[Cow<'_, [f32]>], delta: &mut [f32]) {
        self.factors.multiply(rows, cols.clone(), delta);
        for values in whole {
            let rows = delta.chunks_exact_mut(cols.len().max(1)).zip(values.chunks_exact(self.cols.max(1)));
            for (sums, row) in rows {
                sums.iter_mut().zip(&row[cols.clone()]).for_each(|(sum, value)| *sum += value);
            }
        }
    }

    /// Rows of what is summed besides low-rank terms.
    fn whole_differences(&self, rows: &Range<usize>) -> Result<Vec<Cow<'_, [f32]>>> {
        let elements = rows.start * self.cols..rows.end * self.cols;
        let dense = self
            .dense
            .iter()
            .map(|matrix| Ok(Cow::Borrowed(matrix.values().get(elements.clone()).unwrap_or_default())));
        let replaced = self.differences.iter().map(|(source, weight)| {
            let theirs = self.read_rows_f64(&source.checkpoint, &source.name, rows.clone())?;
            let ours = self.read_rows_f64(self.base, self.name, rows.clone())?;
            Ok(Cow::Owned(theirs.iter().zip(ours).map(|(theirs, ours)| (weight * (theirs - ours)) as f32).collect()))
        });
        dense.chain(replaced).collect()
    }

    /// The merged bytes of rows `range` of the base's tensor: W + delta rounded once to the dtype that is stored, the base's
    /// unless `storing` has another. Where the delta is zero and the dtype the base's, the stored bits are kept, so −0, NaN
    /// payloads and subnormals survive. Also returns what rounding did to the delta.
    ///
    /// # Errors
    /// [`Error::Overflow`] when a finite sum does not fit the dtype; [`Error::Io`], [`Error::UnsupportedDtype`].
    pub fn merged_rows(&self, range: Range<usize>, storing: &Storing) -> Result<(Vec<u8>, Applied)> {
        let mut scratch = Scratch::default();
        let applied = self.merge_into(range, storing, &mut scratch)?;
        Ok((scratch.out, applied))
    }

    /// As [`Self::merged_rows`], into `scratch.out`.
    pub(crate) fn merge_into(&self, range: Range<usize>, storing: &Storing, scratch: &mut Scratch) -> Result<Applied> {
        let target = self.target(storing);
        if let Start::Replacement(source) = self.start
            && self.has_no_terms()
        {
            scratch.out = self.convert(source, range, target)?;
            return Ok(Applied::default());
        }
        let stored = match self.start {
            Start::Base => {
                self.row_bytes_into(self.base, self.name, range.clone(), &mut scratch.base)?;
                self.info.dtype
            }
            Start::Replacement(source) => {
                scratch.base = self.convert(source, range.clone(), self.info.dtype)?;
                self.info.dtype
            }
        };
        let whole = self.whole_differences(&range)?;
        let (from, to) = (stored.bits() as usize / 8, target.bits() as usize / 8);
        scratch.out.resize(range.len() * self.cols * to, 0);
        let mut applied = Applied::default();
        for first in (0..self.cols).step_by(TILE) {
            let cols = first..(first + TILE).min(self.cols);
            scratch.delta.resize(range.len() * cols.len(), 0.0);
            self.delta_tile(range.clone(), cols.clone(), &whole, &mut scratch.delta);
            // Rows of a tile that is the tensor's width follow each other.
            let run = if cols.len() == self.cols { scratch.delta.len() } else { cols.len() };
            for (row, delta) in scratch.delta.chunks(run.max(1)).enumerate() {
                let begin = row * self.cols + cols.start;
                let part = begin..begin + delta.len();
                let base = &scratch.base[part.start * from..part.end * from];
                let out = &mut scratch.out[part.start * to..part.end * to];
                let index = range.start * self.cols + begin;
                applied.add(rounding::apply(self.name, index, (stored, target), base, delta, storing, out)?);
            }
        }
        Ok(applied)
    }

    /// The base's own bytes of some rows.
    pub(crate) fn base_rows(&self, range: Range<usize>) -> Result<Vec<u8>> {
        self.row_bytes(self.base, self.name, range)
    }

    fn has_no_terms(&self) -> bool {
        self.factors.rank() == 0 && self.dense.is_empty() && self.differences.is_empty()
    }

    /// The appended rows in the dtype that is stored, if any.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::UnsupportedDtype`].
    pub fn appended_bytes(&self, storing: &Storing) -> Result<Vec<u8>> {
        let target = self.target(storing);
        match self.new_rows {
            Some(source) => self.convert(source, 0..source.shape()?.first().copied().unwrap_or(0), target),
            None => Ok(Vec::new()),
        }
    }

    /// Bytes of rows of a tensor whose columns are those of the base's.
    fn row_bytes(&self, checkpoint: &Checkpoint, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.row_bytes_into(checkpoint, name, range, &mut bytes)?;
        Ok(bytes)
    }

    fn row_bytes_into(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let size = checkpoint.info(name)?.dtype.bits() as usize * self.cols;
        bytes.resize((range.len() * size).div_ceil(8), 0);
        checkpoint.read_bytes(name, (range.start * size / 8) as u64, bytes)
    }

    /// Rows of a stored tensor in a dtype: copied when it is theirs, else rounded once.
    fn convert(&self, source: &Source, range: Range<usize>, target: Dtype) -> Result<Vec<u8>> {
        let dtype = source.checkpoint.info(&source.name)?.dtype;
        let bytes = self.row_bytes(&source.checkpoint, &source.name, range.clone())?;
        if dtype == target {
            return Ok(bytes);
        }
        source.checkpoint.computable(&source.name)?;
        rounding::convert(self.name, range.start * self.cols, (dtype, target), &bytes)
    }

    fn read_rows_f64(&self, checkpoint: &Checkpoint, name: &str, range: Range<usize>) -> Result<Vec<f64>> {
        let dtype = checkpoint.computable(name)?;
        let bytes = self.row_bytes(checkpoint, name, range)?;
        with_element!(dtype, E => bytes.chunks_exact(E::BYTES).map(E::read).collect())
            .ok_or_else(|| checkpoint.unsupported(name, dtype))
    }
}
