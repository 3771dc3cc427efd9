//! Core errors as Python exceptions: one hierarchy, one conversion.

use lora_compress_core::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyKeyboardInterrupt, PyOSError, PyRuntimeError};
use pyo3::prelude::*;

create_exception!(_native, LoraCompressError, PyException, "Base of every error that lora_compress raises on purpose.");
create_exception!(_native, CheckpointError, LoraCompressError, "A checkpoint file or directory breaks its format.");
create_exception!(_native, TensorError, LoraCompressError, "A tensor cannot be used as asked; the message names it.");

/// Adds the exceptions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("LoraCompressError", py.get_type::<LoraCompressError>())?;
    module.add("CheckpointError", py.get_type::<CheckpointError>())?;
    module.add("TensorError", py.get_type::<TensorError>())
}

/// The only conversion of a core error. I/O errors become the matching subclass of `OSError`.
pub fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Io { path, source } => match source.raw_os_error() {
            Some(code) => PyOSError::new_err((code, reason(&source), path.display().to_string())),
            None => PyOSError::new_err(message),
        },
        Error::NoCheckpoint { .. }
        | Error::NoFile { .. }
        | Error::Header { .. }
        | Error::Torch { .. }
        | Error::Index { .. }
        | Error::Scales { .. }
        | Error::Renamed { .. }
        | Error::Patch { .. } => CheckpointError::new_err(message),
        Error::TensorMissing { .. }
        | Error::ShapeMismatch { .. }
        | Error::UpdateShape { .. }
        | Error::Computed { .. }
        | Error::UnsupportedDtype { .. }
        | Error::NonFinite { .. }
        | Error::Overflow { .. }
        | Error::TooFar { .. } => TensorError::new_err(message),
        // The callback's own exception is raised in its place (`gate::progress`); this is what remains without one.
        Error::Interrupted => PyKeyboardInterrupt::new_err(()),
        Error::Writer { .. } => PyRuntimeError::new_err(message),
        _ => LoraCompressError::new_err(message),
    }
}

/// The system's words without Rust's "(os error N)", which Python adds in its own form.
fn reason(source: &std::io::Error) -> String {
    let text = source.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
