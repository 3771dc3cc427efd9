//! What can be wrong with a file, one enum for each of its formats.

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
    /// Tensors beside tensors, but one level down.
    #[error("`{0}` holds tensors of its own beside those of the state dict: save the dictionary that is meant alone")]
    Nested(String),
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
