//! Reading checkpoints: one safetensors file, or a directory with `model.safetensors` or a sharded index.
//!
//! Opening reads and validates every header and nothing else. Tensors are read by position (`pread`) into the caller's
//! buffer, never mapped: a file that is truncated while in use gives an error, where a mapping would kill the process with
//! SIGBUS, and the core needs no `unsafe` for it. Reads of one tensor from many threads need no lock.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::dtype::Dtype;
use crate::error::{Error, IndexFault, IoContext, Result};
use crate::header::{Header, PREFIX, TensorInfo, header_len};

/// File name of an unsharded checkpoint.
const SINGLE: &str = "model.safetensors";
/// File name of a shard index.
const INDEX: &str = "model.safetensors.index.json";
/// No real index comes near this size; a larger one is an attack on memory.
const MAX_INDEX: u64 = 100_000_000;

/// One file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    file: File,
    /// Names in file order, so that streaming a shard reads it front to back.
    names: Vec<String>,
    metadata: BTreeMap<String, String>,
}

impl Shard {
    /// Path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, in file order.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The header's free-form metadata.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Whether both are one file, by whatever names they were opened.
    #[must_use]
    pub fn is_same_file(&self, other: &Self) -> bool {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let identity = |shard: &Self| shard.file.metadata().ok().map(|data| (data.dev(), data.ino()));
            identity(self).is_some_and(|id| identity(other) == Some(id))
        }
        #[cfg(not(unix))]
        {
            match (self.path.canonicalize(), other.path.canonicalize()) {
                (Ok(ours), Ok(theirs)) => ours == theirs,
                _ => false,
            }
        }
    }

    fn open(path: &Path) -> Result<(Self, Vec<(String, TensorInfo)>)> {
        let fault = |fault| Error::Header { path: path.to_path_buf(), fault };
        let file = File::open(path).at(path)?;
        let file_len = file.metadata().at(path)?.len();
        let mut prefix = vec![0u8; PREFIX.min(file_len) as usize];
        read_at(&file, &mut prefix, 0).at(path)?;
        let len = header_len(&prefix, file_len).map_err(fault)?;
        let mut json = vec![0u8; len as usize];
        read_at(&file, &mut json, PREFIX).at(path)?;
        let Header { tensors, metadata } = Header::parse(&json, file_len).map_err(fault)?;
        let names = tensors.iter().map(|(name, _)| name.clone()).collect();
        Ok((Self { path: path.to_path_buf(), file, names, metadata }, tensors))
    }
}

/// A validated, opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

impl Checkpoint {
    /// Opens a safetensors file, or a directory that holds `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::NoCheckpoint`] when a directory holds neither file,
    /// [`Error::Header`] and [`Error::Index`] when a file contradicts its format.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Self::from_shards(path, vec![Shard::open(path)?]);
        }
        let single = path.join(SINGLE);
        if single.is_file() {
            return Self::from_shards(path, vec![Shard::open(&single)?]);
        }
        let index = path.join(INDEX);
        if index.is_file() {
            return Self::open_sharded(path, &index);
        }
        Err(Error::NoCheckpoint { path: path.to_path_buf(), hint: hint(path) })
    }

    fn open_sharded(path: &Path, index: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let fault = |fault| Error::Index { path: index.to_path_buf(), fault };

        let len = std::fs::metadata(index).at(index)?.len();
        if len > MAX_INDEX {
            return Err(fault(IndexFault::TooLarge(len)));
        }
        let json = std::fs::read(index).at(index)?;
        let Index { weight_map } =
            serde_json::from_slice(&json).map_err(|error| fault(IndexFault::Json(error.to_string())))?;
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &weight_map {
            if !is_plain_file_name(shard) {
                return Err(fault(IndexFault::ShardName(shard.clone())));
            }
            by_shard.entry(shard).or_default().push(tensor);
        }
        let shards = by_shard.keys().map(|shard| Shard::open(&path.join(shard))).collect::<Result<Vec<_>>>()?;
        for ((shard, promised), (_, tensors)) in by_shard.iter().zip(&shards) {
            let held: std::collections::HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
            if let Some(tensor) = promised.iter().find(|tensor| !held.contains(*tensor)) {
                return Err(fault(IndexFault::NotInShard { tensor: (*tensor).into(), shard: (*shard).into() }));
            }
        }
        Self::from_shards(path, shards)
    }

    fn from_shards(path: &Path, opened: Vec<(Shard, Vec<(String, TensorInfo)>)>) -> Result<Self> {
        let mut shards: Vec<Shard> = Vec::with_capacity(opened.len());
        let mut all: BTreeMap<String, (usize, TensorInfo)> = BTreeMap::new();
        for (number, (shard, tensors)) in opened.into_iter().enumerate() {
            for (name, info) in tensors {
                if let Some((other, _)) = all.get(&name) {
                    let fault = IndexFault::InTwoShards {
                        first: shards.get(*other).map(file_name).unwrap_or_default(),
                        second: file_name(&shard),
                        tensor: name,
                    };
                    return Err(Error::Index { path: path.join(INDEX), fault });
                }
                all.insert(name, (number, info));
            }
            shards.push(shard);
        }
        Ok(Self { path: path.to_path_buf(), shards, tensors: all })
    }

    /// The path this checkpoint was opened from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, sorted by name.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, (_, info))| (name.as_str(), info))
    }

    /// Whether a tensor of that name exists.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Dtype, shape and place of a tensor.
    ///
    /// # Errors
    /// [`Error::TensorMissing`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(self.find(name)?.1)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// [`Error::TensorMissing`].
    pub fn shard_of(&self, name: &str) -> Result<&Shard> {
        Ok(self.find(name)?.0)
    }

    /// Reads `out.len()` bytes of a tensor, beginning at its byte `begin`.
    ///
    /// # Errors
    /// [`Error::TensorMissing`]; [`Error::Io`] when the range leaves the tensor or the file has shrunk since opening.
    pub fn read_bytes(&self, name: &str, begin: u64, out: &mut [u8]) -> Result<()> {
        let (shard, info) = self.find(name)?;
        let fits = begin.checked_add(out.len() as u64).is_some_and(|end| end <= info.nbytes);
        if !fits {
            let source =
                std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("read past the end of `{name}`"));
            return Err(Error::Io { path: shard.path.clone(), source });
        }
        read_at(&shard.file, out, info.offset + begin)
            .map_err(|error| std::io::Error::new(error.kind(), format!("tensor `{name}`: {error}")))
            .at(&shard.path)
    }

    /// Asks the system to have a tensor read by the time it is wanted. A hint: where the system takes none, nothing happens.
    ///
    /// # Errors
    /// [`Error::TensorMissing`].
    pub fn announce(&self, name: &str) -> Result<()> {
        let (shard, info) = self.find(name)?;
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{Advice, fadvise};
            // Without a length it would be the rest of the file.
            if let Some(length) = std::num::NonZeroU64::new(info.nbytes) {
                let _ = fadvise(&shard.file, info.offset, Some(length), Advice::WillNeed);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (shard, info);
        Ok(())
    }

    /// Reads a whole tensor as f32 (F64 is rounded).
    ///
    /// # Errors
    /// As [`Self::read_bytes`], and [`Error::UnsupportedDtype`].
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.info(name)?;
        let dtype = self.computable(name)?;
        let mut bytes = vec![0u8; info.nbytes as usize];
        self.read_bytes(name, 0, &mut bytes)?;
        let mut values = vec![0f32; bytes.len() / (dtype.bits() / 8) as usize];
        if crate::dtype::decode(dtype, &bytes, &mut values) { Ok(values) } else { Err(self.unsupported(name, dtype)) }
    }

    /// The tensor's dtype, if this crate computes with it.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::UnsupportedDtype`].
    pub fn computable(&self, name: &str) -> Result<Dtype> {
        let dtype = self.info(name)?.dtype;
        if dtype.is_computable() { Ok(dtype) } else { Err(self.unsupported(name, dtype)) }
    }

    pub(crate) fn unsupported(&self, name: &str, dtype: Dtype) -> Error {
        Error::UnsupportedDtype { path: self.path.clone(), name: name.into(), dtype }
    }

    fn find(&self, name: &str) -> Result<(&Shard, &TensorInfo)> {
        self.tensors
            .get(name)
            .and_then(|(shard, info)| Some((self.shards.get(*shard)?, info)))
            .ok_or_else(|| Error::TensorMissing { path: self.path.clone(), name: name.into() })
    }
}

fn file_name(shard: &Shard) -> String {
    shard.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether joining `name` to a directory stays in that directory, on every platform.
fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}

/// Names what a directory holds instead of a checkpoint, so that the user need not look.
fn hint(path: &Path) -> String {
    let mut names: Vec<String> = std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    if let Some(name) = names.iter().find(|name| name.ends_with(".safetensors")) {
        return format!(": name the file itself if you mean `{name}`");
    }
    match names.iter().find(|name| [".bin", ".pt", ".pth"].iter().any(|ending| name.ends_with(ending))) {
        Some(name) => format!(": `{name}` is a pickle, save it as safetensors first"),
        None => String::new(),
    }
}

#[cfg(unix)]
fn read_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut out: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                out = &mut out[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}
