//! One file of a checkpoint: opened, recognised, its list of tensors validated.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, IoContext, Result, TorchFault};
use crate::file::{Positioned, read_at};
use crate::header::{Header, PREFIX, TensorInfo, header_len};
use crate::torch::{self, Strided};

/// One file of a checkpoint.
#[derive(Debug, Clone)]
pub struct Shard {
    path: PathBuf,
    file: Arc<File>,
    /// Names in file order, so that streaming a shard reads it front to back.
    pub(crate) names: Vec<String>,
    metadata: BTreeMap<String, String>,
    note: Option<String>,
    is_safetensors: bool,
}

/// A tensor of a file as it lies there.
pub(crate) type Listed = (String, TensorInfo, Option<Strided>);
/// A file, and the tensors that it lists.
pub(crate) type Opened = (Shard, Vec<Listed>);

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

    /// What a user has to know of a file that holds more than weights.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    pub(crate) fn file_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn is_safetensors(&self) -> bool {
        self.is_safetensors
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

    /// Opens a file of safetensors or of PyTorch's: the first bytes tell.
    pub(crate) fn open(path: &Path) -> Result<Opened> {
        // Opening a pipe would wait for somebody to write to it.
        if !std::fs::metadata(path).at(path)?.is_file() {
            return Err(Error::NoFile { path: path.to_path_buf() });
        }
        let file = File::open(path).at(path)?;
        let len = file.metadata().at(path)?.len();
        let mut prefix = vec![0u8; PREFIX.min(len) as usize];
        read_at(&file, &mut prefix, 0).at(path)?;
        let named_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
        let fault = |fault| Error::Torch { path: path.to_path_buf(), fault };
        let is_torch = !named_safetensors && torch::is_archive(&prefix);
        let (tensors, metadata, note) = if is_torch {
            let torch::Contents { tensors, note } = torch::open(Positioned(&file), len).map_err(fault)?;
            // What transformers wants to see in a safetensors file of PyTorch's tensors.
            (tensors, BTreeMap::from([("format".to_owned(), "pt".to_owned())]), note)
        } else if !named_safetensors && torch::is_bare_pickle(&prefix) {
            return Err(fault(TorchFault::BarePickle));
        } else {
            let Header { tensors, metadata } = read_header(path, &file, &prefix, len)?;
            (tensors.into_iter().map(|(name, info)| (name, info, None)).collect(), metadata, None)
        };
        let names = tensors.iter().map(|(name, ..)| name.clone()).collect();
        Ok((
            Self { path: path.into(), file: Arc::new(file), names, metadata, note, is_safetensors: !is_torch },
            tensors,
        ))
    }
}

fn read_header(path: &Path, file: &File, prefix: &[u8], len: u64) -> Result<Header> {
    let fault = |fault| Error::Header { path: path.to_path_buf(), fault };
    let mut json = vec![0u8; header_len(prefix, len).map_err(fault)? as usize];
    read_at(file, &mut json, PREFIX).at(path)?;
    Header::parse(&json, len).map_err(fault)
}
