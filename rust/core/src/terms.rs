//! What is summed into a tensor: low-rank terms that are stored, and terms that are computed when their turn comes.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::matrix::Matrix;

/// A stored tensor.
#[derive(Debug, Clone)]
pub struct Source {
    /// The checkpoint (or adapter file) that holds it.
    pub checkpoint: Arc<Checkpoint>,
    /// Its name there.
    pub name: String,
}

impl Source {
    pub(crate) fn shape(&self) -> Result<Vec<usize>> {
        Ok(self.checkpoint.info(&self.name)?.shape)
    }

    fn read_matrix(&self) -> Result<Matrix> {
        let info = self.checkpoint.info(&self.name)?;
        let values = self.checkpoint.read_f32(&self.name)?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let value = values.get(index).copied().map_or(f64::NAN, f64::from);
            let path = self.checkpoint.path().into();
            return Err(Error::NonFinite { path, name: self.name.clone(), index, value });
        }
        // Factors of convolutions have the dimensions of kernels.
        let (rows, cols) = info.matrix_shape();
        let matrix = if info.shape.len() < 2 { None } else { Matrix::new(rows, cols, values) };
        matrix.ok_or_else(|| Error::UpdateShape {
            name: self.name.clone(),
            shape: info.shape.clone(),
            what: "a factor, which has at least two dimensions,".into(),
            found: info.shape,
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
    /// Which of the factors these are, where B and A hold those of several matrices.
    pub part: Option<Part>,
}

/// One of E pairs of factors that are stored as one: A as `(E·r, in)`, matrix by matrix, and B as `(out, r·E)`, where the columns
/// of one matrix are E apart (PEFT's `ParamWrapper.get_delta_factors`).
#[derive(Debug, Clone)]
pub struct Part {
    number: usize,
    count: usize,
    /// B and A of all: parts are wanted one after the other, and each reading would read them all.
    held: Arc<Mutex<Option<Held>>>,
}

type Held = Arc<(Matrix, Matrix)>;

impl Part {
    /// The parts of a pair that holds the factors of `count` matrices.
    #[must_use]
    pub fn all(count: usize) -> Vec<Self> {
        let held = Arc::default();
        (0..count).map(|number| Self { number, count, held: Arc::clone(&held) }).collect()
    }

    fn of(&self, read: impl FnOnce() -> Result<(Matrix, Matrix)>) -> Result<Option<(Matrix, Matrix)>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = match held.take() {
            Some(whole) => whole,
            None => Arc::new(read()?),
        };
        if self.number + 1 < self.count {
            *held = Some(Arc::clone(&whole));
        }
        drop(held);
        let (b, a) = &*whole;
        let rank = a.rows() / self.count.max(1);
        if rank * self.count != a.rows() || a.rows() != b.cols() {
            return Ok(None);
        }
        let columns = b.values().chunks_exact(b.cols().max(1));
        let left = columns.flat_map(|row| row.iter().skip(self.number).step_by(self.count).copied()).collect();
        let first = self.number * rank * a.cols();
        let right = a.values().get(first..first + rank * a.cols()).unwrap_or_default().to_vec();
        Ok(Matrix::new(b.rows(), rank, left).zip(Matrix::new(rank, a.cols(), right)))
    }
}

impl LowRank {
    /// Left and right factor in the orientation of the base's tensor, the scale in the left one.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::UpdateShape`], [`Error::NonFinite`], [`Error::UnsupportedDtype`], [`Error::Io`].
    pub fn factors(&self) -> Result<(Matrix, Matrix)> {
        let read = || Ok((self.b.read_matrix()?, self.a.read_matrix()?));
        let (b, a) = match &self.part {
            None => read()?,
            Some(part) => part.of(read)?.ok_or_else(|| Error::UpdateShape {
                name: self.b.name.clone(),
                shape: self.b.shape().unwrap_or_default(),
                what: format!("the factor of {} matrices", part.count),
                found: self.a.shape().unwrap_or_default(),
            })?,
        };
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
pub struct Computed(pub(crate) Arc<dyn Fn() -> Result<Values> + Send + Sync>);

impl Computed {
    /// A term that `compute` makes; called once for each time that the tensor is merged, on any thread.
    pub fn new(compute: impl Fn() -> Result<Values> + Send + Sync + 'static) -> Self {
        Self(Arc::new(compute))
    }
}

impl fmt::Debug for Computed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Computed")
    }
}
