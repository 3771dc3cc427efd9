//! The only way into long work: releases the GIL, runs on the chosen thread pool, converts the error.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

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

/// Number of threads that work uses.
#[pyfunction]
pub fn threads() -> usize {
    match &*POOL.read().unwrap_or_else(PoisonError::into_inner) {
        Some(pool) => pool.current_num_threads(),
        None => rayon::current_num_threads(),
    }
}

/// Runs `job` without the GIL.
pub fn run<T: Send>(py: Python<'_>, job: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(|| in_pool(job)).map_err(to_python)
}

/// As [`run`], on the calling thread: for what waits and does not compute.
pub fn run_here<T: Send>(py: Python<'_>, job: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(job).map_err(to_python)
}

/// As [`run`], for a job that reports bytes: each report calls `callback(bytes)`, on the caller's thread. Ctrl-C is looked for
/// there too (Python handles signals on its main thread only). What either raises ends the job and is what the caller sees.
pub fn run_reporting<T: Send>(
    py: Python<'_>,
    callback: Option<Py<PyAny>>,
    job: impl FnOnce(&mut dyn FnMut(u64) -> Result<()>) -> Result<T> + Send,
) -> PyResult<T> {
    /// How long Ctrl-C may wait.
    const PATIENCE: Duration = Duration::from_millis(50);
    let stop = AtomicBool::new(false);
    let mut raised: Option<PyErr> = None;
    let result = py.detach(|| {
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let stop = &stop;
            let worker = scope.spawn(move || {
                in_pool(|| {
                    job(&mut |bytes| {
                        if stop.load(Ordering::Relaxed) {
                            return Err(Error::Interrupted);
                        }
                        // Nobody listens any more only after `stop` was set.
                        let _ = sender.send(bytes);
                        Ok(())
                    })
                })
            });
            loop {
                let bytes = match receiver.recv_timeout(PATIENCE) {
                    Ok(bytes) => Some(bytes),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => break,
                };
                let outcome = Python::attach(|py| {
                    py.check_signals()?;
                    match (&callback, bytes) {
                        (Some(callback), Some(bytes)) => callback.call1(py, (bytes,)).map(drop),
                        _ => Ok(()),
                    }
                });
                if let Err(error) = outcome {
                    raised = Some(error);
                    stop.store(true, Ordering::Relaxed);
                    break;
                }
            }
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    });
    match raised {
        Some(error) => Err(error),
        None => result.map_err(to_python),
    }
}

fn in_pool<T: Send>(job: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = POOL.read().unwrap_or_else(PoisonError::into_inner).clone();
    match pool {
        Some(pool) => pool.install(job),
        // On a thread of the pool: from outside, every parallel step would wait for one to wake up.
        None => rayon::scope(|_| job()),
    }
}
