//! `Patch` and `unmerge_shard`: what a merge takes away, kept, and put back.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use lora_compress_core as core;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::error::to_python;
use crate::gate;

/// A patch being written to `path` while `base` is merged: with it, `unmerge_shard` gives the base back to the bit. `changed`: the
/// tensors that will be merged.
#[pyclass(frozen, module = "lora_compress._native")]
pub struct Patch {
    pub(crate) inner: Arc<Mutex<Option<core::Patch>>>,
}

#[pymethods]
impl Patch {
    #[new]
    fn new(py: Python<'_>, path: PathBuf, base: &Checkpoint, changed: Vec<String>) -> PyResult<Self> {
        let patch = gate::run_here(py, || core::Patch::create(&path, &base.inner, &changed))?;
        Ok(Self { inner: Arc::new(Mutex::new(Some(patch))) })
    }

    /// Completes the file; returns its size in bytes.
    fn finish(&self) -> PyResult<u64> {
        let patch = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        patch.ok_or_else(|| PyValueError::new_err("the patch is finished already"))?.finish().map_err(to_python)
    }
}

/// Writes shard number `shard` of the base that `merged` was made from to `path`, byte for byte; returns its size. `progress` as
/// for `merge_shard`. Raises `CheckpointError` for a patch that is damaged or of another merge.
#[pyfunction]
#[pyo3(signature = (merged, patch, shard, path, progress=None))]
pub fn unmerge_shard(
    py: Python<'_>,
    merged: &Checkpoint,
    patch: &Checkpoint,
    shard: usize,
    path: PathBuf,
    progress: Option<Py<PyAny>>,
) -> PyResult<u64> {
    gate::run_reporting(py, progress, |report| core::unmerge_shard(&merged.inner, &patch.inner, shard, &path, report))
}
