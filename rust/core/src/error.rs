//! The one error type of the core. Every variant carries what a user needs to act: the file, the tensor, the numbers.

use std::path::{Path, PathBuf};

use crate::dtype::Dtype;

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

/// Ways in which a safetensors header can be wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderFault {
    /// Fewer than the eight bytes of the length field.
    #[error("{0} bytes are too few to hold a header")]
    TooShort(u64),
    /// The length field exceeds the format's limit.
    #[error("it would have a header of {0} bytes, and the limit is 100000000: is it one at all?")]
    TooLarge(u64),
    /// The length field points beyond the end of the file.
    #[error("the header claims {header} bytes, the file has {file}")]
    BeyondFile {
        /// Claimed header length.
        header: u64,
        /// Length of the file.
        file: u64,
    },
    /// The header is not the JSON that the format asks for.
    #[error("the header is not valid: {0}")]
    Json(String),
    /// The same tensor name twice.
    #[error("tensor `{0}` appears twice")]
    Duplicate(String),
    /// Element count or byte count overflows 64 bits.
    #[error("tensor `{0}` has a shape whose size overflows")]
    Overflow(String),
    /// Shape and dtype need another number of bytes than the offsets span.
    #[error("tensor `{name}` needs {needed} bytes, its offsets span {spanned}")]
    Size {
        /// The tensor.
        name: String,
        /// Bytes that shape and dtype need.
        needed: u64,
        /// Bytes between its offsets.
        spanned: u64,
    },
    /// Offsets run backwards.
    #[error("tensor `{0}` ends before it begins")]
    Backwards(String),
    /// Offsets overlap another tensor or leave a hole.
    #[error("tensor `{name}` begins at {found}, the tensor before it ends at {expected}")]
    NotContiguous {
        /// The tensor.
        name: String,
        /// Where it should begin.
        expected: u64,
        /// Where it begins.
        found: u64,
    },
    /// The tensors do not end where the file ends.
    #[error("the tensors end at byte {tensors} of the data, the file at {file}")]
    WrongEnd {
        /// Where the last tensor ends.
        tensors: u64,
        /// Where the data ends.
        file: u64,
    },
}

/// Ways in which a shard index can be wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexFault {
    /// The file is not the JSON that the format asks for.
    #[error("{0}")]
    Json(String),
    /// The index is larger than any real one.
    #[error("{0} bytes exceed the limit of 100000000")]
    TooLarge(u64),
    /// A shard name is not a plain file name, so that it could point outside the directory.
    #[error("shard `{0}` is not a plain file name")]
    ShardName(String),
    /// The index promises a tensor that its shard does not hold.
    #[error("tensor `{tensor}` is not in `{shard}`")]
    NotInShard {
        /// The tensor.
        tensor: String,
        /// The shard that should hold it.
        shard: String,
    },
    /// Two shards hold a tensor of the same name.
    #[error("tensor `{tensor}` is in both `{first}` and `{second}`")]
    InTwoShards {
        /// The tensor.
        tensor: String,
        /// One shard.
        first: String,
        /// The other shard.
        second: String,
    },
}

/// Ways in which a PyTorch checkpoint can be wrong, or more than a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TorchFault {
    /// Saved by PyTorch before 1.6, or with `_use_new_zipfile_serialization=False`.
    #[error("it is a bare pickle, PyTorch's format before 1.6: load it with `weights_only=True` and save it again")]
    BarePickle,
    /// The archive is broken.
    #[error("the zip archive is broken: {0}")]
    Zip(String),
    /// The archive holds no pickle, or several.
    #[error("the zip archive has no `data.pkl`, or several (TorchScript archives are not read)")]
    NoPickle,
    /// An entry is compressed or encrypted, which PyTorch never does.
    #[error("the entry `{0}` is compressed or encrypted")]
    Compressed(String),
    /// Numbers are stored with the most significant byte first.
    #[error("it was saved on a big-endian machine")]
    BigEndian,
    /// The pickle stops in the middle.
    #[error("its pickle ends too soon")]
    PickleEnds,
    /// An opcode that no state dict needs.
    #[error("its pickle has the opcode {0:#04x}, which no state dict needs")]
    Opcode(u8),
    /// The pickle would call something.
    #[error("its pickle asks for `{0}`, and only tensors are read: nothing of it was run")]
    Global(String),
    /// The pickle is no sensible program.
    #[error("its pickle is malformed: {0}")]
    Malformed(&'static str),
    /// There are no tensors by name.
    #[error("it holds no dictionary of tensors")]
    NoStateDict,
    /// There is more than one.
    #[error("it holds several dictionaries of tensors, `{first}` and `{second}`: save the one that is meant alone")]
    SeveralStateDicts {
        /// Key of one.
        first: String,
        /// Key of another.
        second: String,
    },
    /// The same tensor name twice.
    #[error("tensor `{0}` appears twice")]
    Duplicate(String),
    /// A tensor refers to an entry that is not there.
    #[error("the storage of tensor `{0}` is missing")]
    NoStorage(String),
    /// Element count or byte count overflows 64 bits.
    #[error("tensor `{0}` has a shape whose size overflows")]
    Overflow(String),
    /// A tensor leaves its storage.
    #[error("tensor `{0}` leaves its storage")]
    OutsideStorage(String),
    /// An expanded view.
    #[error("tensor `{0}` is a view that repeats its elements: save it with `.contiguous()`")]
    Repeats(String),
    /// Tensors share storages without end.
    #[error("its tensors would take {tensors} bytes, the file has {file}")]
    Bomb {
        /// Bytes of all tensors.
        tensors: u64,
        /// Bytes of the file.
        file: u64,
    },
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
