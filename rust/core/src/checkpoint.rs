//! Reading checkpoints: files of safetensors or PyTorch, alone or as the shards of a directory.
//!
//! Opening reads and validates every list of tensors and nothing else. Tensors are read by position (`pread`) into the caller's
//! buffer, never mapped: a file that is truncated while in use gives an error, where a mapping would kill the process with
//! SIGBUS, and the core needs no `unsafe` for it. Reads of one tensor from many threads need no lock.
//!
//! Whoever reads sees row-major little-endian elements of a shape, whatever the file has: views are gathered (`torch`), eight-bit
//! weights multiplied by their scales (`scaled`), and `NAME[e]` is the e-th matrix of a tensor of more dimensions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::directory;
use crate::dtype::Dtype;
use crate::error::{Error, IndexFault, IoContext, Result};
use crate::file::read_at;
use crate::header::{TensorInfo, byte_count};
use crate::scaled::{self, Grid};
use crate::shard::Opened;
pub use crate::shard::Shard;
use crate::torch::{Gathered, Strided};

/// A tensor as it is stored, and what has to be done to read it.
#[derive(Debug, Clone)]
struct Entry {
    shard: usize,
    stored: TensorInfo,
    layout: Layout,
}

#[derive(Debug, Clone)]
enum Layout {
    Plain,
    /// Gathered, and kept until another one is.
    Strided(Strided),
    /// Eight bits times scales, read as F32.
    Scaled(Grid, Arc<Entry>),
    /// Eight bits alone, read as BF16.
    Widened,
}

/// A validated, opened checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    gathered: Arc<Gathered>,
}

/// What a name stands for.
struct Found<'a> {
    shard: &'a Shard,
    entry: &'a Entry,
    info: TensorInfo,
    /// Where it begins among the bytes of the whole tensor.
    first: u64,
}

impl Checkpoint {
    /// Opens a file, or a directory that holds `model.safetensors` or `pytorch_model.bin`, a shard index, or one safetensors
    /// file of any other name.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::NoCheckpoint`] when a directory holds none, [`Error::Header`],
    /// [`Error::Torch`], [`Error::Index`] and [`Error::Scales`] when a file contradicts its format.
    pub fn open(path: &Path) -> Result<Self> {
        let (files, index) = if path.is_dir() { directory::open(path)? } else { (vec![Shard::open(path)?], None) };
        Self::from_files(path, files, index.as_deref().unwrap_or(path))
    }

    fn from_files(path: &Path, files: Vec<Opened>, index: &Path) -> Result<Self> {
        let mut shards: Vec<Shard> = Vec::with_capacity(files.len());
        let mut tensors: BTreeMap<String, Entry> = BTreeMap::new();
        for (number, (shard, listed)) in files.into_iter().enumerate() {
            for (name, stored, strided) in listed {
                if let Some(other) = tensors.get(&name) {
                    let fault = IndexFault::InTwoShards {
                        first: shards.get(other.shard).map(Shard::file_name).unwrap_or_default(),
                        second: shard.file_name(),
                        tensor: name,
                    };
                    return Err(Error::Index { path: index.into(), fault });
                }
                let layout = strided.map_or(Layout::Plain, Layout::Strided);
                tensors.insert(name, Entry { shard: number, stored, layout });
            }
            shards.push(shard);
        }
        let mut checkpoint = Self { path: path.to_path_buf(), shards, tensors, gathered: Arc::default() };
        checkpoint.refuse_ambiguity()?;
        checkpoint.join_scales()?;
        Ok(checkpoint)
    }

    /// Refuses names that would mean a tensor and the matrix of a stack.
    fn refuse_ambiguity(&self) -> Result<()> {
        match self.tensors.keys().find(|name| self.matrix(name).is_some()) {
            Some(name) => Err(Error::Renamed { path: self.path.clone(), name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Gives eight-bit weights their scales, which are no tensors of their own from here on.
    fn join_scales(&mut self) -> Result<()> {
        let mut used = BTreeSet::new();
        let mut layouts = Vec::new();
        for (name, entry) in &self.tensors {
            if !scaled::is_fp8(entry.stored.dtype) || !matches!(entry.layout, Layout::Plain) {
                continue;
            }
            if scaled::weights_of(name).iter().any(|weight| self.tensors.contains_key(weight)) {
                continue; // Scales of another weight: with four bits, they have eight themselves.
            }
            let scale = scaled::scale_names(name).into_iter().find_map(|scale| self.tensors.get_key_value(&scale));
            let Some((scale, found)) = scale else {
                layouts.push((name.clone(), Layout::Widened));
                continue;
            };
            let grid = Grid::new(&entry.stored.shape, &found.stored.shape);
            let is_plain = scaled::is_scale(found.stored.dtype) && matches!(found.layout, Layout::Plain);
            // Read as F32, it has to be as countable as any other tensor.
            let (Some(grid), true, Some(_)) = (grid, is_plain, byte_count(Dtype::F32, &entry.stored.shape)) else {
                let (scales, weight) = (found.stored.shape.clone(), name.clone());
                return Err(Error::Scales { path: self.path.clone(), name: scale.clone(), scales, weight });
            };
            layouts.push((name.clone(), Layout::Scaled(grid, Arc::new(found.clone()))));
            used.insert(scale.clone());
        }
        for (name, layout) in layouts {
            if let Some(entry) = self.tensors.get_mut(&name) {
                entry.layout = layout;
            }
        }
        if !used.is_empty() {
            self.tensors.retain(|name, _| !used.contains(name));
            self.shards.iter_mut().for_each(|shard| shard.names.retain(|name| !used.contains(name)));
        }
        Ok(())
    }

    /// The same checkpoint with other names: `names` has the new one for each that changes.
    ///
    /// # Errors
    /// [`Error::TensorMissing`] for a name that is not there, [`Error::Renamed`] when two tensors would have the same.
    pub fn renamed(&self, names: &BTreeMap<String, String>) -> Result<Self> {
        if let Some(missing) = names.keys().find(|name| !self.tensors.contains_key(*name)) {
            return Err(Error::TensorMissing { path: self.path.clone(), name: missing.clone() });
        }
        let new = |name: &String| names.get(name).unwrap_or(name).clone();
        let mut tensors = BTreeMap::new();
        for (name, entry) in &self.tensors {
            if tensors.insert(new(name), entry.clone()).is_some() {
                return Err(Error::Renamed { path: self.path.clone(), name: new(name) });
            }
        }
        let mut shards = self.shards.clone();
        for shard in &mut shards {
            shard.names.iter_mut().for_each(|name| *name = new(name));
        }
        Ok(Self { path: self.path.clone(), shards, tensors, gathered: Arc::default() })
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
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, TensorInfo)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry.info()))
    }

    /// Whether a tensor of that name exists.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    /// Dtype, shape and place of a tensor.
    ///
    /// # Errors
    /// [`Error::TensorMissing`].
    pub fn info(&self, name: &str) -> Result<TensorInfo> {
        Ok(self.find(name)?.info)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// [`Error::TensorMissing`].
    pub fn shard_of(&self, name: &str) -> Result<&Shard> {
        Ok(self.find(name)?.shard)
    }

    /// Whether every file is safetensors and every tensor is stored as it is read: only then is a header all there is to know.
    #[must_use]
    pub fn is_stored_as_read(&self) -> bool {
        let plain = |entry: &Entry| matches!(entry.layout, Layout::Plain);
        self.shards.iter().all(Shard::is_safetensors) && self.tensors.values().all(plain)
    }

    /// Where a tensor lies in its file, if it lies there as it is read.
    pub(crate) fn place(&self, name: &str) -> Result<Option<u64>> {
        let found = self.find(name)?;
        Ok(matches!(found.entry.layout, Layout::Plain).then_some(found.info.offset))
    }

    /// Reads `out.len()` bytes of a tensor, beginning at its byte `begin`.
    ///
    /// # Errors
    /// [`Error::TensorMissing`]; [`Error::Io`] when the range leaves the tensor or the file has shrunk since opening.
    pub fn read_bytes(&self, name: &str, begin: u64, out: &mut [u8]) -> Result<()> {
        let found = self.find(name)?;
        let fits = begin.checked_add(out.len() as u64).is_some_and(|end| end <= found.info.nbytes);
        if !fits {
            let source =
                std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("read past the end of `{name}`"));
            return Err(Error::Io { path: found.shard.path().into(), source });
        }
        let begin = found.first + begin;
        let entry = found.entry;
        match &entry.layout {
            Layout::Plain => self.read_stored(entry, name, begin, out),
            Layout::Strided(strided) => {
                let gathered = self.gathered.get((entry.shard, entry.stored.clone(), strided.clone()), || {
                    let mut spanned = vec![0u8; strided.span as usize];
                    self.read_stored(entry, name, 0, &mut spanned)?;
                    Ok(strided.gather(&entry.stored.shape, entry.stored.dtype.bits() as usize / 8, &spanned))
                })?;
                let held = gathered.get(begin as usize..begin as usize + out.len());
                out.copy_from_slice(held.unwrap_or(&vec![0; out.len()]));
                Ok(())
            }
            Layout::Scaled(grid, scales) => {
                self.read_wider(entry, name, begin, size_of::<f32>(), out, |first, bytes, out| {
                    let needed = grid.needed(first, first + bytes.len());
                    let size = scales.stored.dtype.bits() as usize / 8;
                    let mut raw = vec![0u8; needed.len() * size];
                    self.read_stored(scales, name, (needed.start * size) as u64, &mut raw)?;
                    let scales = scaled::decode_scales(scales.stored.dtype, &raw).unwrap_or_default();
                    grid.apply(entry.stored.dtype, first, bytes, &scales, out);
                    Ok(())
                })
            }
            Layout::Widened => self.read_wider(entry, name, begin, size_of::<u16>(), out, |_, bytes, out| {
                scaled::widen(entry.stored.dtype, bytes, out);
                Ok(())
            }),
        }
    }

    /// Reads bytes of a tensor whose elements are stored in one byte and read as `size`: `widen(first element, stored, out)`
    /// makes whole elements of them.
    fn read_wider(
        &self,
        entry: &Entry,
        name: &str,
        begin: u64,
        size: usize,
        out: &mut [u8],
        widen: impl Fn(usize, &[u8], &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let (begin, end) = (begin as usize, begin as usize + out.len());
        let (first, last) = (begin / size, end.div_ceil(size));
        let mut bytes = vec![0u8; last - first];
        self.read_stored(entry, name, first as u64, &mut bytes)?;
        if begin == first * size && end == last * size {
            return widen(first, &bytes, out);
        }
        // Whoever asks for parts of elements asks for few.
        let mut whole = vec![0u8; bytes.len() * size];
        widen(first, &bytes, &mut whole)?;
        out.copy_from_slice(&whole[begin - first * size..end - first * size]);
        Ok(())
    }

    fn read_stored(&self, entry: &Entry, name: &str, begin: u64, out: &mut [u8]) -> Result<()> {
        let shard = self.shard(entry, name)?;
        read_at(shard.file(), out, entry.stored.offset + begin)
            .map_err(|error| {
                let shrunk = error.kind() == std::io::ErrorKind::UnexpectedEof;
                let reason = if shrunk { "the file has become shorter".into() } else { error.to_string() };
                std::io::Error::new(error.kind(), format!("tensor `{name}`: {reason}"))
            })
            .at(shard.path())
    }

    /// Asks the system to have a tensor read by the time it is wanted. A hint: where the system takes none, nothing happens.
    ///
    /// # Errors
    /// [`Error::TensorMissing`].
    pub fn announce(&self, name: &str) -> Result<()> {
        let found = self.find(name)?;
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{Advice, fadvise};
            let whole = matches!(found.entry.layout, Layout::Plain);
            let info = if whole { &found.info } else { &found.entry.stored };
            // Without a length it would be the rest of the file.
            if let Some(length) = std::num::NonZeroU64::new(info.nbytes) {
                let _ = fadvise(found.shard.file(), info.offset, Some(length), Advice::WillNeed);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = found;
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
        if crate::codec::decode(dtype, &bytes, &mut values) { Ok(values) } else { Err(self.unsupported(name, dtype)) }
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

    fn shard(&self, entry: &Entry, name: &str) -> Result<&Shard> {
        self.shards.get(entry.shard).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::TensorMissing { path: self.path.clone(), name: name.into() }
    }

    fn find(&self, name: &str) -> Result<Found<'_>> {
        if let Some(entry) = self.tensors.get(name) {
            return Ok(Found { shard: self.shard(entry, name)?, entry, info: entry.info(), first: 0 });
        }
        let (entry, info, first) = self.matrix(name).ok_or_else(|| self.missing(name))?;
        Ok(Found { shard: self.shard(entry, name)?, entry, info, first })
    }

    /// `NAME[e]`: the e-th of the matrices that lie along the first dimension of a tensor.
    fn matrix(&self, name: &str) -> Option<(&Entry, TensorInfo, u64)> {
        let (whole, number) = split_number(name)?;
        let entry = self.tensors.get(whole)?;
        let mut info = entry.info();
        let [count, shape @ ..] = info.shape.as_slice() else { return None };
        if number >= *count || shape.len() < 2 {
            return None;
        }
        let nbytes = info.nbytes / *count as u64;
        let first = nbytes * number as u64;
        info = TensorInfo { shape: shape.to_vec(), offset: info.offset + first, nbytes, ..info };
        Some((entry, info, first))
    }
}

/// The parts of `NAME[e]`.
pub(crate) fn split_number(name: &str) -> Option<(&str, usize)> {
    let (whole, number) = name.strip_suffix(']')?.rsplit_once('[')?;
    // One spelling for one matrix.
    let is_plain = number == "0" || (!number.starts_with(['0', '+']) && !number.is_empty());
    is_plain.then(|| number.parse().ok().map(|number| (whole, number)))?
}

impl Entry {
    /// The tensor as it is read.
    fn info(&self) -> TensorInfo {
        let dtype = match self.layout {
            Layout::Plain | Layout::Strided(..) => return self.stored.clone(),
            Layout::Scaled(..) => Dtype::F32,
            Layout::Widened => Dtype::BF16,
        };
        // Counted when it was opened: eight bits became at most 32.
        let nbytes = self.stored.nbytes * (dtype.bits() / 8);
        TensorInfo { dtype, nbytes, ..self.stored.clone() }
    }
}
