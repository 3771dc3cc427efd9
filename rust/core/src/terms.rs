//! What is summed into a tensor: low-rank terms that are stored, and terms that are computed when their turn comes.

use std::fmt;
use std::sync::Arc;

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
    pub(crate) fn shape(&self) -> Result<&[usize]> {
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
