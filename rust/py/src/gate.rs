//! The only way into long work: releases the GIL, runs on the chosen thread pool, converts the error.

use std::sync::{Arc, PoisonError, RwLock};

use lora_compress_core::{Error, Result};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::to_python;

/// `None`: rayon's own pool, of one thread per processor.
static POOL: RwLock<Option<Arc<ThreadPool>>> = RwLock::new(None);

/// Sets the number of threads that all later work uses; 0 means one per processor. Results do not depend on it.
#[pyfunction]
pub fn set_threads(threads: usize) -> PyResult<()> {
    if threads > 4096 {
        return Err(PyValueError::new_err(format!("{threads} threads are more than the limit of 4096")));
    }
    let pool = if threads == 0 {
        None
    } else {
        let built = ThreadPoolBuilder::new().num_threads(threads).build();
        Some(Arc::new(built.map_err(|error| PyRuntimeError::new_err(error.to_string()))?))
    };
    *POOL.write().unwrap_or_else(PoisonError::into_inner) = pool;
    Ok(())
}

/// Runs `job` without the GIL.
pub fn run<T: Send>(py: Python<'_>, job: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(|| {
        let pool = POOL.read().unwrap_or_else(PoisonError::into_inner).clone();
        match pool {
            Some(pool) => pool.install(job),
            None => job(),
        }
    })
    .map_err(to_python)
}

/// As [`run`], for a job that reports bytes: each report calls `callback(bytes)` with the GIL and looks for Ctrl-C. What the
/// callback raises ends the job and is what the caller sees.
pub fn run_reporting<T: Send>(
    py: Python<'_>,
    callback: Option<Py<PyAny>>,
    job: impl FnOnce(&mut dyn FnMut(u64) -> Result<()>) -> Result<T> + Send,
) -> PyResult<T> {
    let mut raised: Option<PyErr> = None;
    let result = run(py, || {
        job(&mut |bytes| {
            Python::attach(|py| {
                py.check_signals()?;
                callback.as_ref().map_or(Ok(()), |callback| callback.call1(py, (bytes,)).map(drop))
            })
            .map_err(|error| {
                raised = Some(error);
                Error::Interrupted
            })
        })
    });
    match raised {
        Some(error) => Err(error),
        None => result,
    }
}
