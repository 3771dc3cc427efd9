//! `Writer`: safetensors files, streamed and atomic.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_compress_core as core;
use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::delta::parse_dtype;
use crate::error::to_python;
use crate::gate;

/// Bytes copied at a time.
const CHUNK: u64 = 8 << 20;

/// A safetensors file under construction: it appears under its name when `finish` is called, complete, or never.
///
/// `expected` lists (name, dtype, shape) of what may be written, with upper bounds for the shapes.
#[pyclass(module = "lora_compress._native")]
pub struct Writer {
    inner: Option<core::Writer>,
}

#[pymethods]
impl Writer {
    #[new]
    #[pyo3(signature = (path, expected, metadata=None))]
    fn new(
        path: PathBuf,
        expected: Vec<(String, String, Vec<usize>)>,
        metadata: Option<BTreeMap<String, String>>,
    ) -> PyResult<Self> {
        let specs = expected.into_iter().map(|(name, dtype, shape)| spec(name, &dtype, shape));
        let specs = specs.collect::<PyResult<Vec<_>>>()?;
        let inner = core::Writer::create(&path, &specs, metadata.unwrap_or_default()).map_err(to_python)?;
        Ok(Self { inner: Some(inner) })
    }

    /// Appends a float32 array, each value rounded once to `dtype`.
    fn append(
        &mut self,
        py: Python<'_>,
        name: String,
        dtype: &str,
        values: PyReadonlyArrayDyn<'_, f32>,
    ) -> PyResult<()> {
        let spec = spec(name, dtype, values.shape().to_vec())?;
        let values: Vec<f32> = values.as_array().iter().copied().collect();
        let writer = self.open()?;
        gate::run(py, || {
            let bytes = core::encode(spec.dtype, &values);
            writer.begin(spec)?;
            // A dtype that cannot be encoded yields no bytes, which the writer reports as an incomplete tensor.
            writer.write(&bytes.unwrap_or_default())
        })
    }

    /// Appends rows `first_row..stop_row` of a tensor of `checkpoint` byte for byte (all rows, if not said otherwise).
    #[pyo3(signature = (name, checkpoint, tensor, first_row=0, stop_row=None))]
    fn append_stored(
        &mut self,
        py: Python<'_>,
        name: String,
        checkpoint: &Checkpoint,
        tensor: &str,
        first_row: usize,
        stop_row: Option<usize>,
    ) -> PyResult<()> {
        let writer = self.open()?;
        gate::run(py, || {
            let info = checkpoint.inner.info(tensor)?;
            let mut shape = info.shape.clone();
            let rows = shape.first().copied().unwrap_or(1);
            let stop_row = stop_row.unwrap_or(rows).min(rows);
            let first_row = first_row.min(stop_row);
            if let Some(count) = shape.first_mut() {
                *count = stop_row - first_row;
            }
            let row_bytes = info.nbytes / rows.max(1) as u64;
            let (mut position, end) = (row_bytes * first_row as u64, row_bytes * stop_row as u64);
            writer.begin(core::Spec { name, dtype: info.dtype, shape })?;
            let mut buffer = vec![0u8; CHUNK.min(end - position) as usize];
            while position < end {
                let length = CHUNK.min(end - position) as usize;
                let bytes = &mut buffer[..length];
                checkpoint.inner.read_bytes(tensor, position, bytes)?;
                writer.write(bytes)?;
                position += length as u64;
            }
            Ok(())
        })
    }

    /// Writes the header and moves the file to its name; returns its size in bytes.
    fn finish(&mut self, py: Python<'_>) -> PyResult<u64> {
        let writer = self.inner.take().ok_or_else(closed)?;
        gate::run(py, || writer.finish())
    }

    /// Removes what was written. Also done when the object goes away unfinished.
    fn discard(&mut self) {
        self.inner = None;
    }
}

impl Writer {
    fn open(&mut self) -> PyResult<&mut core::Writer> {
        self.inner.as_mut().ok_or_else(closed)
    }
}

fn closed() -> PyErr {
    PyRuntimeError::new_err("the file is finished or discarded")
}

fn spec(name: String, dtype: &str, shape: Vec<usize>) -> PyResult<core::Spec> {
    let dtype = parse_dtype(dtype)?;
    if name.is_empty() {
        return Err(PyValueError::new_err("a tensor needs a name"));
    }
    Ok(core::Spec { name, dtype, shape })
}
