//! Writing safetensors files: streamed, atomic, reproducible to the byte.
//!
//! The header stands in front of the data but is known only after it (an adapter's ranks may come out smaller than asked).
//! So the caller announces an upper bound of what will come, room for that header is kept, and the true header is written
//! last, padded with spaces as the format allows. Header keys and metadata are sorted, the data starts 8-byte aligned.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::dtype::Dtype;
use crate::error::{Error, IoContext, Result};
use crate::header::{PREFIX, byte_count};

/// What a tensor will look like in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Name, unique in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

/// A safetensors file under construction. Dropping it unfinished removes every trace of it.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    out: BufWriter<NamedTempFile>,
    metadata: BTreeMap<String, String>,
    reserved: usize,
    done: BTreeMap<String, (Spec, u64, u64)>,
    open: Option<(Spec, u64)>,
    position: u64,
}

impl Writer {
    /// Starts a file. `expected` bounds the header: the tensors written later must be among these names, with no larger
    /// shapes; leaving some out is fine, and so is any order.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be written to, [`Error::Writer`] for a shape that overflows.
    pub fn create(path: &Path, expected: &[Spec], metadata: BTreeMap<String, String>) -> Result<Self> {
        let mut total = 0u64;
        for spec in expected {
            let overflow = || Error::Writer { path: path.into(), reason: format!("`{}` is too large", spec.name) };
            let nbytes = byte_count(spec.dtype, &spec.shape).ok_or_else(overflow)?;
            total = total.checked_add(nbytes).ok_or_else(overflow)?;
        }
        // No offset has more digits than the end of the last tensor.
        let bound = expected.iter().map(|spec| (spec.name.clone(), (spec.clone(), total, total))).collect();
        let reserved = header_json(&bound, &metadata).len().next_multiple_of(PREFIX as usize);

        let file = beside(path)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&vec![b' '; PREFIX as usize + reserved]).at(path)?;
        Ok(Self { path: path.into(), out, metadata, reserved, done: BTreeMap::new(), open: None, position: 0 })
    }

    /// Begins a tensor; its bytes follow through [`Self::write`].
    ///
    /// # Errors
    /// [`Error::Writer`] when the tensor before it is incomplete, the name was used, or the shape overflows.
    pub fn begin(&mut self, spec: Spec) -> Result<()> {
        self.close_tensor()?;
        if self.done.contains_key(&spec.name) {
            return Err(self.fault(format!("tensor `{}` was written twice", spec.name)));
        }
        let Some(nbytes) = byte_count(spec.dtype, &spec.shape) else {
            return Err(self.fault(format!("`{}` is too large", spec.name)));
        };
        self.open = Some((spec, nbytes));
        Ok(())
    }

    /// Appends bytes to the tensor begun last.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Writer`] when the tensor would get more bytes than its shape holds.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let excess = match &mut self.open {
            Some((_, missing)) => match missing.checked_sub(bytes.len() as u64) {
                Some(left) => {
                    *missing = left;
                    false
                }
                None => true,
            },
            None => true,
        };
        if excess {
            return Err(self.fault("more bytes than the tensor's shape holds".into()));
        }
        self.out.write_all(bytes).at(&self.path)
    }

    /// Writes the header and moves the file to its final name, replacing what was there.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Writer`] when a tensor is incomplete or the header exceeds what was announced.
    pub fn finish(mut self) -> Result<u64> {
        self.close_tensor()?;
        let mut header = header_json(&self.done, &self.metadata);
        if header.len() > self.reserved {
            return Err(self.fault("the header outgrew what was announced for it".into()));
        }
        while header.len() < self.reserved {
            header.push(' ');
        }
        let Self { path, mut out, reserved, position, .. } = self;
        out.seek(SeekFrom::Start(0)).at(&path)?;
        out.write_all(&(reserved as u64).to_le_bytes()).at(&path)?;
        out.write_all(header.as_bytes()).at(&path)?;
        let file = out.into_inner().map_err(std::io::IntoInnerError::into_error).at(&path)?;
        file.persist(&path).map_err(|error| error.error).at(&path)?;
        Ok(PREFIX + reserved as u64 + position)
    }

    fn close_tensor(&mut self) -> Result<()> {
        let Some((spec, missing)) = self.open.take() else { return Ok(()) };
        if missing != 0 {
            return Err(self.fault(format!("tensor `{}` lacks {missing} bytes", spec.name)));
        }
        let begin = self.position;
        // `begin` has checked that this does not overflow.
        self.position += byte_count(spec.dtype, &spec.shape).unwrap_or(0);
        self.done.insert(spec.name.clone(), (spec, begin, self.position));
        Ok(())
    }

    fn fault(&self, reason: String) -> Error {
        Error::Writer { path: self.path.clone(), reason }
    }
}

/// A temporary file beside `path`, to be renamed to it.
pub(crate) fn beside(path: &Path) -> Result<NamedTempFile> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A sibling temporary file, renamed when complete: readers never see half a file, and another process that has
    // the old file open or mapped keeps the old bytes. A sibling, because a rename cannot cross file systems.
    let prefix = format!(".{name}.");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".partial");
    #[cfg(unix)]
    {
        // Temporary files are private by default; a checkpoint gets the permissions of any other new file.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder).at(path)
}

pub(crate) fn header_json(tensors: &BTreeMap<String, (Spec, u64, u64)>, metadata: &BTreeMap<String, String>) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let mut json = String::from("{");
    if !metadata.is_empty() {
        let pairs: Vec<String> =
            metadata.iter().map(|(key, value)| format!("{}:{}", quoted(key), quoted(value))).collect();
        let _ = write!(json, "\"__metadata__\":{{{}}}", pairs.join(","));
    }
    for (name, (spec, begin, end)) in tensors {
        let separator = if json.len() > 1 { "," } else { "" };
        let shape: Vec<String> = spec.shape.iter().map(ToString::to_string).collect();
        let _ = write!(
            json,
            "{separator}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{begin},{end}]}}",
            quoted(name),
            spec.dtype,
            shape.join(",")
        );
    }
    json.push('}');
    json
}
