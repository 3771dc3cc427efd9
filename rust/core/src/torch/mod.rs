//! PyTorch checkpoints (`.bin`, `.pt`, `.pth`): a zip archive with one pickle of what there is and an entry for each storage.
//!
//! The archive is not unpacked: PyTorch stores entries as they are, so a tensor is a place in the file like one of safetensors.
//! The pickle is read by a machine that runs nothing ([`machine`]).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rawzip::{CompressionMethod, ReaderAt, ZipArchive, ZipArchiveEntryWayfinder, ZipLocator};

use crate::error::TorchFault;
use crate::header::{TensorInfo, byte_count};

mod machine;
mod names;
mod pickle;

use pickle::PickledTensor;
#[cfg(any(fuzzing, test))]
pub(crate) use pickle::read as read_pickle;

/// The pickle of a hundred thousand tensors has some ten megabytes.
const MAX_PICKLE: u64 = 100_000_000;
/// A zip's comment cannot be longer, so its end record begins within the last 64 KiB.
const TAIL: u64 = 1 << 17;
/// Tensors may share storages (tied weights do), but not without end: a small file would describe a large checkpoint.
const MAX_SHARING: u64 = 16;

type Result<T> = std::result::Result<T, TorchFault>;

/// Where the elements of a tensor that is no run of memory lie: a transposed view, every second row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Strided {
    /// Bytes from its first element to its last.
    pub(crate) span: u64,
    /// Bytes between neighbours, by dimension.
    pub(crate) strides: Vec<usize>,
}

/// What a file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// In the order of the file.
    pub(crate) tensors: Vec<(String, TensorInfo, Option<Strided>)>,
    /// Of what else the file holds, what a user has to know.
    pub(crate) note: Option<String>,
}

/// Whether a file begins as a zip archive does.
pub(crate) fn is_archive(begin: &[u8]) -> bool {
    begin.starts_with(b"PK\x03\x04")
}

/// Whether a file begins as a bare pickle does: PyTorch's format before release 1.6.
pub(crate) fn is_bare_pickle(begin: &[u8]) -> bool {
    matches!(begin, [0x80, 1..=5, ..])
}

/// Reads what a file of `len` bytes holds; no tensor is read.
///
/// # Errors
/// [`TorchFault`].
pub(crate) fn open(file: impl ReaderAt, len: u64) -> Result<Contents> {
    let archive = Archive::open(file, len)?;
    let root = archive.root()?;
    let pickled = archive.read(&format!("{root}data.pkl"), MAX_PICKLE)?.ok_or(TorchFault::NoPickle)?;
    if let Some(order) = archive.read(&format!("{root}byteorder"), 16)?
        && order != b"little"
    {
        return Err(TorchFault::BigEndian);
    }
    let pickled = pickle::read(&pickled)?;
    let mut storages: HashMap<Arc<str>, Range<u64>> = HashMap::new();
    let (mut tensors, mut total) = (Vec::with_capacity(pickled.tensors.len()), 0u64);
    for (name, tensor) in pickled.tensors {
        let storage = match storages.get(&tensor.key) {
            Some(storage) => storage.clone(),
            None => {
                let found = archive.find(&format!("{root}data/{}", tensor.key))?;
                let storage = found.ok_or_else(|| TorchFault::NoStorage(name.to_string()))?;
                storages.insert(Arc::clone(&tensor.key), storage.clone());
                storage
            }
        };
        let (info, strided) = place(&name, &tensor, &storage)?;
        total = total.saturating_add(info.nbytes);
        tensors.push((name.to_string(), info, strided));
    }
    if total > len.saturating_mul(MAX_SHARING) {
        return Err(TorchFault::Bomb { tensors: total, file: len });
    }
    tensors.sort_by(|left, right| (left.1.offset, &left.0).cmp(&(right.1.offset, &right.0)));
    let note = pickled.inside.filter(|_| !pickled.left_out.is_empty()).map(|inside| {
        let (shown, more) = pickled.left_out.split_at(pickled.left_out.len().min(3));
        let names = shown.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
        format!("the weights are those under `{inside}`; tensors under {names}{more} are left out")
    });
    Ok(Contents { tensors, note })
}

/// Where a tensor lies in the file.
fn place(name: &str, tensor: &PickledTensor, storage: &Range<u64>) -> Result<(TensorInfo, Option<Strided>)> {
    let size = tensor.dtype.bits() / 8;
    let nbytes = byte_count(tensor.dtype, &tensor.shape).ok_or_else(|| TorchFault::Overflow(name.into()))?;
    let outside = || TorchFault::OutsideStorage(name.into());
    let begin =
        tensor.first.checked_mul(size).and_then(|first| storage.start.checked_add(first)).ok_or_else(outside)?;
    let (dtype, shape) = (tensor.dtype, &tensor.shape);
    let info = |offset| TensorInfo { dtype, stored: dtype, shape: shape.clone(), offset, nbytes };
    if nbytes == 0 {
        return Ok((info(storage.start), None));
    }
    let mut last = 0u64;
    for (&dim, &stride) in tensor.shape.iter().zip(&tensor.strides) {
        let reach = (dim as u64 - 1).checked_mul(stride as u64).ok_or_else(outside)?;
        last = last.checked_add(reach).ok_or_else(outside)?;
    }
    let span = last.checked_add(1).and_then(|elements| elements.checked_mul(size)).ok_or_else(outside)?;
    if begin.checked_add(span).is_none_or(|end| end > storage.end) {
        return Err(outside());
    }
    if is_row_major(&tensor.shape, &tensor.strides) {
        return Ok((info(begin), None));
    }
    if nbytes > span {
        return Err(TorchFault::Repeats(name.into()));
    }
    let strides = tensor.strides.iter().map(|&stride| stride * size as usize).collect();
    Ok((info(begin), Some(Strided { span, strides })))
}

fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.iter().zip(strides).rev().all(|(&dim, &stride)| {
        let fits = dim == 1 || stride == expected;
        expected = expected.saturating_mul(dim);
        fits
    })
}

impl Strided {
    /// The elements of a tensor of this shape, row by row, from the bytes that it spans.
    pub(crate) fn gather(&self, shape: &[usize], size: usize, spanned: &[u8]) -> Vec<u8> {
        let count: usize = shape.iter().product();
        let mut out = Vec::with_capacity(count * size);
        let mut index = vec![0usize; shape.len()];
        let mut place = 0usize;
        for _ in 0..count {
            // What `place` says was checked when the file was opened.
            out.extend_from_slice(spanned.get(place..place + size).unwrap_or_default());
            for ((at, &dim), &stride) in index.iter_mut().zip(shape).zip(&self.strides).rev() {
                *at += 1;
                place += stride;
                if *at < dim {
                    break;
                }
                place -= stride * dim;
                *at = 0;
            }
        }
        out
    }
}

/// The view that was gathered last: whoever reads a tensor reads it on, and one is held at a time.
#[derive(Debug, Default)]
pub(crate) struct Gathered(Mutex<Option<(View, Arc<Vec<u8>>)>>);

/// Number of the file, and what the view is there: several may begin at one byte.
type View = (usize, TensorInfo, Strided);

impl Gathered {
    /// The rows of a view, made if it is another than last time. Threads that want the same one wait for the
    /// first of them.
    pub(crate) fn get(
        &self,
        view: View,
        make: impl FnOnce() -> crate::error::Result<Vec<u8>>,
    ) -> crate::error::Result<Arc<Vec<u8>>> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((held, rows)) = last.as_ref()
            && *held == view
        {
            return Ok(Arc::clone(rows));
        }
        *last = None;
        let rows = Arc::new(make()?);
        *last = Some((view, Arc::clone(&rows)));
        Ok(rows)
    }
}

/// A zip archive by the names of its entries.
struct Archive<R> {
    zip: ZipArchive<R>,
    entries: HashMap<String, (ZipArchiveEntryWayfinder, bool)>,
    len: u64,
}

impl<R: ReaderAt> Archive<R> {
    fn open(file: R, len: u64) -> Result<Self> {
        let mut buffer = vec![0u8; rawzip::RECOMMENDED_BUFFER_SIZE];
        let locator = ZipLocator::new().max_search_space(TAIL);
        let zip = locator.locate_in_reader(file, &mut buffer, len).map_err(|(_, error)| zip_fault(&error))?;
        let mut entries = HashMap::new();
        let mut records = zip.entries(&mut buffer);
        while let Some(record) = records.next_entry().map_err(|error| zip_fault(&error))? {
            let name = String::from_utf8_lossy(record.file_path().as_ref()).into_owned();
            let is_plain = record.compression_method() == CompressionMethod::STORE && !record.flags().is_encrypted();
            if entries.insert(name.clone(), (record.wayfinder(), is_plain)).is_some() {
                return Err(TorchFault::Zip(format!("the entry `{}` appears twice", name.escape_debug())));
            }
        }
        Ok(Self { zip, entries, len })
    }

    /// What all names begin with.
    fn root(&self) -> Result<String> {
        let mut roots = self.entries.keys().filter_map(|name| {
            let root = name.strip_suffix("data.pkl")?;
            (root.is_empty() || root.ends_with('/')).then_some(root)
        });
        match (roots.next(), roots.next()) {
            (Some(root), None) => Ok(root.to_owned()),
            _ => Err(TorchFault::NoPickle),
        }
    }

    /// The bytes that an entry takes in the file; `None` where there is no such entry.
    fn find(&self, name: &str) -> Result<Option<Range<u64>>> {
        let Some((wayfinder, is_plain)) = self.entries.get(name) else { return Ok(None) };
        if !is_plain {
            return Err(TorchFault::Compressed(name.escape_debug().to_string()));
        }
        let entry = self.zip.get_entry(*wayfinder).map_err(|error| zip_fault(&error))?;
        let (begin, end) = entry.compressed_data_range();
        if begin > end || end > self.len {
            return Err(TorchFault::Zip(format!("the entry `{}` leaves the file", name.escape_debug())));
        }
        Ok(Some(begin..end))
    }

    fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(range) = self.find(name)? else { return Ok(None) };
        let len = range.end - range.start;
        if len > limit {
            return Err(TorchFault::Zip(format!("the entry `{}` is too large", name.escape_debug())));
        }
        let mut bytes = vec![0u8; len as usize];
        let read = self.zip.get_ref().read_exact_at(&mut bytes, range.start);
        read.map_err(|error| TorchFault::Zip(error.to_string()))?;
        Ok(Some(bytes))
    }
}

fn zip_fault(error: &rawzip::Error) -> TorchFault {
    TorchFault::Zip(error.to_string())
}
