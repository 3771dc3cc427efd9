//! Which kernel runs, and how fast each is.

use lora_compress_core::{Error, Kernel};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::to_python;
use crate::gate;

/// Name of the kernel that products with Δ use. Raises `LoraCompressError` when `LORA_COMPRESS_KERNEL` names none that this
/// machine can run.
#[pyfunction]
pub fn kernel() -> PyResult<&'static str> {
    Kernel::current().map(Kernel::name).map_err(to_python)
}

/// Names of the kernels that this machine can run, fastest first.
#[pyfunction]
pub fn kernels() -> Vec<&'static str> {
    Kernel::available().map(Kernel::name).collect()
}

/// Seconds that Y = Δ·V and Z = Δᵀ·Y take for a Δ of shape (rows, cols) and a V of `width` columns: 4·rows·cols·width flops. The
/// best of `repeats`.
#[pyfunction]
#[pyo3(signature = (name, rows, cols, width, repeats=5))]
pub fn measure_kernel(
    py: Python<'_>,
    name: &str,
    rows: usize,
    cols: usize,
    width: usize,
    repeats: usize,
) -> PyResult<f64> {
    let kernel = Kernel::available().find(|kernel| kernel.name() == name);
    let kernel = kernel.ok_or_else(|| PyValueError::new_err(format!("no kernel `{name}` runs here")))?;
    gate::run(py, || Ok::<f64, Error>(kernel.measure(rows, cols, width, repeats)))
}
