//! The one error type of the core. Every variant carries what a user needs to act: the file, the tensor, the numbers.

use std::path::{Path, PathBuf};

use crate::dtype::Dtype;
pub use crate::fault::{HeaderFault, IndexFault, TorchFault};

/// Result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a checkpoint, a delta or a merge was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a read or a write.
    #[error("`{}`: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },

    /// A checkpoint is to be read from something that is no file.
    #[error("`{}` is neither a file nor a directory", path.display())]
    NoFile {
        /// What it is called.
        path: PathBuf,
    },

    /// A directory holds no checkpoint under the names this crate knows.
    #[error("`{}` holds no model (`model.safetensors`, a shard index, `pytorch_model.bin`){hint}", path.display())]
    NoCheckpoint {
        /// The directory.
        path: PathBuf,
        /// What to do instead, empty or starting with a colon.
        hint: String,
    },

    /// A safetensors header contradicts the format or the file.
    #[error("`{}` is not a valid safetensors file: {fault}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: HeaderFault,
    },

    /// A file of PyTorch's holds something else than tensors, or contradicts itself.
    #[error("`{}` cannot be read as a PyTorch checkpoint: {fault}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: TorchFault,
    },

    /// A shard index contradicts itself or the shards.
    #[error("`{}` is not a valid shard index: {fault}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        fault: IndexFault,
    },

    /// Scales do not fit the weight that they are named after.
    #[error("`{name}` in `{}` has shape {scales:?}, which fits no grid of scales over `{weight}`", path.display())]
    Scales {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor of scales.
        name: String,
        /// Its shape.
        scales: Vec<usize>,
        /// The weight.
        weight: String,
    },

    /// New names collide.
    #[error("two tensors of `{}` would be called `{name}`", path.display())]
    Renamed {
        /// The checkpoint.
        path: PathBuf,
        /// The name.
        name: String,
    },

    /// A tensor was asked for that the checkpoint does not hold.
    #[error("`{}` has no tensor `{name}`", path.display())]
    TensorMissing {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor asked for.
        name: String,
    },

    /// Base and tuned disagree on a tensor's shape.
    #[error("tensor `{name}` has shape {base:?} in the base and {tuned:?} in the tuned model")]
    ShapeMismatch {
        /// The tensor.
        name: String,
        /// Its shape in the base.
        base: Vec<usize>,
        /// Its shape in the tuned model.
        tuned: Vec<usize>,
    },

    /// Factors or a stored replacement do not fit the tensor they are for.
    #[error("tensor `{name}` has shape {shape:?}, which does not fit {what} of shape {found:?}")]
    UpdateShape {
        /// The tensor of the base.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// What was to be applied, with its name.
        what: String,
        /// The shape found.
        found: Vec<usize>,
    },

    /// What was to compute a tensor's update failed.
    #[error("the update of `{name}` cannot be computed: {reason}")]
    Computed {
        /// The tensor of the base.
        name: String,
        /// What it said.
        reason: String,
    },

    /// A patch of a merge cannot be used.
    #[error("`{}`: {reason}", path.display())]
    Patch {
        /// The patch.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// Arithmetic was asked for on a tensor whose dtype this crate does not compute with.
    #[error("tensor `{name}` in `{}` is {dtype}: only BF16, F16, F32 and F64 can be computed with", path.display())]
    UnsupportedDtype {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its dtype.
        dtype: Dtype,
    },

    /// A tensor holds NaN or an infinity.
    #[error("tensor `{name}` in `{}` holds {value} at flat index {index}; `--exclude` leaves a tensor out", path.display())]
    NonFinite {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Row-major index of the first such element.
        index: usize,
        /// Its value.
        value: f64,
    },

    /// Base and tuned are so far apart that their difference leaves the range of f32.
    #[error(
        "tensor `{name}` in `{}` is so far from the base's at flat index {index} that the difference overflows F32; \
         `--exclude` leaves a tensor out",
        path.display()
    )]
    TooFar {
        /// The tuned checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Row-major index of the element.
        index: usize,
    },

    /// A finite result does not fit the dtype it has to be stored in.
    #[error("tensor `{name}`: the merged value {value:e} at flat index {index} overflows {dtype}")]
    Overflow {
        /// The tensor.
        name: String,
        /// Row-major index of the element.
        index: usize,
        /// The value before rounding.
        value: f64,
        /// The dtype it does not fit.
        dtype: Dtype,
    },

    /// A pattern of module names cannot be used.
    #[error("`{pattern}` is not a regular expression that can be matched in linear time")]
    Pattern {
        /// The pattern.
        pattern: String,
    },

    /// A dense factorisation did not converge (LAPACK would call it `info > 0`).
    #[error("the {what} of a {rows}x{cols} matrix did not converge")]
    NoConvergence {
        /// The factorisation.
        what: &'static str,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },

    /// Numbers that cannot be the spectrum of a delta.
    #[error("not a spectrum: {fault}")]
    Spectrum {
        /// What is wrong with them.
        fault: &'static str,
    },

    /// The caller broke the writing protocol: a programming error, not a user's.
    #[error("`{}`: {reason}", path.display())]
    Writer {
        /// The file being written.
        path: PathBuf,
        /// What was wrong.
        reason: String,
    },

    /// `LORA_COMPRESS_KERNEL` names a kernel that does not exist or cannot run here.
    #[error("LORA_COMPRESS_KERNEL is `{name}`, but this machine runs {available}")]
    Kernel {
        /// What it was set to.
        name: String,
        /// The names that it may be set to.
        available: String,
    },

    /// The progress callback asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Attaches a path to an I/O error.
pub(crate) trait IoContext<T> {
    fn at(self, path: &Path) -> Result<T>;
}

/// The system's own error where a library has put a path around it: its code says what happened, to whoever is told.
fn bare(error: std::io::Error) -> std::io::Error {
    let inner = error.get_ref().and_then(|wrapped| wrapped.source()?.downcast_ref::<std::io::Error>()?.raw_os_error());
    inner.map_or(error, std::io::Error::from_raw_os_error)
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io { path: path.to_path_buf(), source: bare(source) })
    }
}
