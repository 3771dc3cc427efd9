//! `Checkpoint` and `TensorInfo`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use lora_compress_core as core;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::gate;

/// An opened, validated checkpoint: a safetensors file, or a directory with `model.safetensors` or a shard index.
///
/// Opening reads headers only. Raises `CheckpointError` when a file breaks its format, `OSError` when it cannot be read.
#[pyclass(frozen, module = "lora_compress._native")]
pub struct Checkpoint {
    pub inner: Arc<core::Checkpoint>,
}

/// What a stored tensor is.
#[pyclass(frozen, get_all, module = "lora_compress._native")]
pub struct TensorInfo {
    /// Name in the checkpoint.
    name: String,
    /// Element type as it is read, in safetensors' words: "BF16", "F32", …
    dtype: String,
    /// Element type in the file: weights of eight bits are read as F32 (with scales) or BF16.
    stored_dtype: String,
    /// Row-major shape.
    shape: Vec<usize>,
    /// Length in bytes, as it is read.
    nbytes: u64,
    /// Length in bytes in the file.
    stored_nbytes: u64,
    /// File name of its shard.
    shard: String,
}

/// Whether two stored tensors have the same dtype, shape and bytes; `other_name` is `name` if not said otherwise.
#[pyfunction]
#[pyo3(signature = (checkpoint, other, name, other_name=None))]
pub fn same_bytes(
    py: Python<'_>,
    checkpoint: &Checkpoint,
    other: &Checkpoint,
    name: &str,
    other_name: Option<&str>,
) -> PyResult<bool> {
    gate::run(py, || core::same_bytes((&checkpoint.inner, name), (&other.inner, other_name.unwrap_or(name))))
}

/// Raises `TensorError` when a float tensor holds NaN or an infinity in its rows from `first_row` on.
#[pyfunction]
#[pyo3(signature = (checkpoint, name, first_row=0))]
pub fn check_finite(py: Python<'_>, checkpoint: &Checkpoint, name: &str, first_row: usize) -> PyResult<()> {
    gate::run(py, || core::check_finite(&checkpoint.inner, name, first_row))
}

#[pymethods]
impl TensorInfo {
    fn __repr__(&self) -> String {
        format!("TensorInfo({}, {} {:?}, {} bytes in {})", self.name, self.dtype, self.shape, self.nbytes, self.shard)
    }
}

#[pymethods]
impl Checkpoint {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let inner = gate::run(py, || core::Checkpoint::open(&path))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The path it was opened from.
    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path().to_path_buf()
    }

    /// Paths of its files, sorted.
    #[getter]
    fn shards(&self) -> Vec<PathBuf> {
        self.inner.shards().iter().map(|shard| shard.path().to_path_buf()).collect()
    }

    /// The header metadata of each file, in the order of `shards`.
    #[getter]
    fn metadata(&self) -> Vec<BTreeMap<String, String>> {
        self.inner.shards().iter().map(|shard| shard.metadata().clone()).collect()
    }

    /// The same files with other names: `names` has the new one for each that changes. Raises `CheckpointError` when two would be
    /// the same.
    fn renamed(&self, names: BTreeMap<String, String>) -> PyResult<Self> {
        let inner = self.inner.renamed(&names).map_err(crate::error::to_python)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Whether every file is safetensors, and no weight has eight bits.
    #[getter]
    fn is_stored_as_read(&self) -> bool {
        self.inner.is_stored_as_read()
    }

    /// What a user has to know of files that hold more than weights.
    #[getter]
    fn notes(&self) -> Vec<String> {
        let note = |shard: &core::Shard| shard.note().map(|note| format!("`{}`: {note}", shard.path().display()));
        self.inner.shards().iter().filter_map(note).collect()
    }

    /// All tensors, sorted by name.
    fn tensors(&self) -> PyResult<Vec<TensorInfo>> {
        self.inner.tensors().map(|(name, _)| self.info(name)).collect()
    }

    /// One tensor. Raises `TensorError` when there is none of that name.
    fn info(&self, name: &str) -> PyResult<TensorInfo> {
        let info = self.inner.info(name).map_err(crate::error::to_python)?;
        let shard = self.inner.shard_of(name).map_err(crate::error::to_python)?;
        Ok(TensorInfo {
            name: name.into(),
            dtype: info.dtype.to_string(),
            stored_dtype: info.stored.to_string(),
            shape: info.shape,
            nbytes: info.nbytes,
            stored_nbytes: info.nbytes / info.dtype.bits().max(1) * info.stored.bits(),
            shard: shard.path().file_name().unwrap_or_default().to_string_lossy().into_owned(),
        })
    }

    fn __contains__(&self, name: &str) -> bool {
        self.inner.contains(name)
    }

    fn __len__(&self) -> usize {
        self.inner.tensors().len()
    }

    fn __repr__(&self) -> String {
        format!("Checkpoint({:?}, {} tensors)", self.inner.path().display().to_string(), self.inner.tensors().len())
    }

    /// Ask the system to have a tensor read by the time it is wanted: a hint.
    fn announce(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        gate::run_here(py, || self.inner.announce(name))
    }

    /// A float tensor's values as float32 in the tensor's shape (F64 is rounded).
    fn read<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let shape = self.inner.info(name).map_err(crate::error::to_python)?.shape.clone();
        let values = gate::run(py, || self.inner.read_f32(name))?;
        let flat: Bound<'py, PyArray1<f32>> = values.into_pyarray(py);
        flat.call_method1("reshape", (shape,))
    }

    /// `length` stored bytes of a tensor from byte `begin` on; all that remain without a length.
    #[pyo3(signature = (name, begin=0, length=None))]
    fn read_bytes<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        begin: u64,
        length: Option<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = gate::run(py, || {
            let total = self.inner.info(name)?.nbytes;
            // Never more than the tensor holds: the core refuses the range, but only after the buffer is there.
            let length = length.unwrap_or_else(|| total.saturating_sub(begin)).min(total + 1);
            let mut bytes = vec![0u8; length as usize];
            self.inner.read_bytes(name, begin, &mut bytes)?;
            Ok(bytes)
        })?;
        Ok(PyBytes::new(py, &bytes))
    }
}

/// SHA-256, in hexadecimal, over names, dtypes, shapes and some bytes of every tensor: tells models apart without reading all of
/// them. Does not depend on shards. An edit of single elements can escape it.
#[pyfunction]
pub fn fingerprint(py: Python<'_>, checkpoint: &Checkpoint) -> PyResult<String> {
    gate::run_here(py, || core::fingerprint(&checkpoint.inner))
}
