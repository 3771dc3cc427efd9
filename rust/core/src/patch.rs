//! What a merge takes away, kept beside its result, so that the base can be had again to the bit.
//!
//! For every panel of a changed tensor the patch holds W − W', the difference of stored codes as whole numbers that wrap. Most are
//! small, so their bytes are put apart by place and compressed. Nothing is computed again when the base is restored: neither
//! adapter nor kernel have to be what they were. A digest of each panel says whether what comes out is the base.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::checkpoint::{Checkpoint, Shard, split_number};
use crate::dtype::Dtype;
use crate::error::{Error, IoContext, Result};
use crate::header::{Header, PREFIX};
use crate::place::PlacedFile;
use crate::write::{Spec, Writer};

/// zstd's fastest level: the differences are mostly zeros and ones, and more effort finds little.
const LEVEL: i32 = 1;
/// Bytes of SHA-256 that are kept for each panel.
const DIGEST: usize = 8;
/// Length of the panel, length of the frame, digest.
const FRAME: usize = 4 + 4 + DIGEST;
const CODES: &str = "codes:";
const HEADER: &str = "header:";

/// A patch being written: one safetensors file for all shards.
#[derive(Debug)]
pub struct Patch {
    writer: Writer,
}

impl Patch {
    /// Begins a patch of `base` for the tensors that a merge will change; the headers of its shards are kept at once.
    ///
    /// # Errors
    /// As [`Writer::create`]; [`Error::Io`] when a shard cannot be read.
    pub fn create(path: &Path, base: &Checkpoint, changed: &[String]) -> Result<Self> {
        let whole = |name: String, nbytes: usize| Spec { name, dtype: Dtype::U8, shape: vec![nbytes] };
        if !base.is_stored_as_read() {
            let reason = "a patch leads back to safetensors files without eight-bit weights only".into();
            return Err(Error::Patch { path: base.path().into(), reason });
        }
        // Matrices of one tensor are patched together.
        let whole_name = |name: &'_ String| match split_number(name) {
            Some((whole, _)) if base.contains(whole) => whole.to_owned(),
            _ => name.clone(),
        };
        let changed: BTreeSet<String> = changed.iter().map(whole_name).collect();
        let mut headers = Vec::new();
        for shard in base.shards() {
            headers.push((format!("{HEADER}{}", shard.file_name()), raw_header(shard)?));
        }
        let mut expected: Vec<Spec> = headers.iter().map(|(name, bytes)| whole(name.clone(), bytes.len())).collect();
        for name in changed {
            // What cannot be compressed grows by a little, and frames by their heads.
            let nbytes = base.info(&name)?.nbytes as usize;
            expected.push(whole(format!("{CODES}{name}"), nbytes.saturating_mul(2).saturating_add(1 << 16)));
        }
        let mut writer = Writer::create(path, &expected, BTreeMap::new())?;
        for (name, bytes) in headers {
            writer.begin(whole(name, bytes.len()))?;
            writer.write(&bytes)?;
        }
        Ok(Self { writer })
    }

    /// Appends the frames of one tensor, in the order of its panels.
    pub(crate) fn append(&mut self, name: &str, frames: &[Vec<u8>]) -> Result<()> {
        let nbytes = frames.iter().map(Vec::len).sum();
        self.writer.begin(Spec { name: format!("{CODES}{name}"), dtype: Dtype::U8, shape: vec![nbytes] })?;
        frames.iter().try_for_each(|frame| self.writer.write(frame))
    }

    /// Completes the file; returns its size.
    ///
    /// # Errors
    /// As [`Writer::finish`].
    pub fn finish(self) -> Result<u64> {
        self.writer.finish()
    }
}

/// A panel's frame: what leads from the merged bytes back to the base's.
pub(crate) fn frame(base: &[u8], merged: &[u8], width: usize) -> Result<Vec<u8>> {
    let compressed = zstd::bulk::compress(&apart(base, merged, width), LEVEL).map_err(|error| fault(&error))?;
    let mut frame = Vec::with_capacity(FRAME + compressed.len());
    frame.extend_from_slice(&(base.len() as u32).to_le_bytes());
    frame.extend_from_slice(&(compressed.len() as u32).to_le_bytes());
    frame.extend_from_slice(&digest(base));
    frame.extend_from_slice(&compressed);
    Ok(frame)
}

/// Writes shard number `shard` of the base of `merged` to `path`, its header as it was; `progress` as for merging.
///
/// # Errors
/// [`Error::Patch`] for a patch that is damaged or of another merge; whatever reading and writing refuse.
pub fn unmerge_shard(
    merged: &Checkpoint,
    patch: &Checkpoint,
    shard: usize,
    path: &Path,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<u64> {
    let Some(shard) = merged.shards().get(shard) else {
        return Err(Error::Writer { path: path.into(), reason: format!("the model has no shard number {shard}") });
    };
    let key = format!("{HEADER}{}", shard.file_name());
    let mut raw = vec![0u8; patch.info(&key)?.nbytes as usize];
    patch.read_bytes(&key, 0, &mut raw)?;
    let broken = |reason: String| Error::Patch { path: patch.path().into(), reason };
    // The file's length follows from the header itself.
    let end = raw_end(&raw).ok_or_else(|| broken(format!("`{key}` is no header")))?;
    let header = Header::parse(raw.get(PREFIX as usize..).unwrap_or_default(), end)
        .map_err(|error| broken(format!("`{key}`: {error}")))?;
    let file = PlacedFile::with_header(path, &raw, &header, end)?;
    for (name, info) in &header.tensors {
        let codes = format!("{CODES}{name}");
        if patch.contains(&codes) {
            restore(merged, patch, name, info.nbytes, (info.dtype.bits() / 8).max(1) as usize, &file)?;
        } else {
            copy(merged, name, info.nbytes, &file)?;
        }
        progress(info.nbytes)?;
    }
    file.finish()
}

fn restore(
    merged: &Checkpoint,
    patch: &Checkpoint,
    name: &str,
    nbytes: u64,
    width: usize,
    file: &PlacedFile,
) -> Result<()> {
    let codes = format!("{CODES}{name}");
    let broken = |reason: &str| Error::Patch { path: patch.path().into(), reason: format!("`{name}`: {reason}") };
    let mut frames: Vec<(u64, usize, Range<u64>)> = Vec::new();
    let (mut at, mut begin, total) = (0u64, 0u64, patch.info(&codes)?.nbytes);
    while at < total {
        let mut head = [0u8; 8];
        if total - at < FRAME as u64 {
            return Err(broken("a frame is cut short"));
        }
        patch.read_bytes(&codes, at, &mut head)?;
        let [panel, length] =
            [0, 4].map(|from| u32::from_le_bytes([head[from], head[from + 1], head[from + 2], head[from + 3]]));
        let end = at + FRAME as u64 + u64::from(length);
        if end > total || u64::from(panel) > nbytes - begin.min(nbytes) {
            return Err(broken("a frame is larger than what is there"));
        }
        frames.push((begin, panel as usize, at..end));
        (at, begin) = (end, begin + u64::from(panel));
    }
    if begin != nbytes {
        return Err(broken("its panels are not all of it"));
    }
    if merged.info(name)?.nbytes < nbytes {
        return Err(broken("the merged tensor is smaller than the base's"));
    }
    let done = frames.into_par_iter().map(|(begin, panel, range)| {
        let mut frame = vec![0u8; (range.end - range.start) as usize];
        patch.read_bytes(&codes, range.start, &mut frame)?;
        let mut bytes = vec![0u8; panel];
        merged.read_bytes(name, begin, &mut bytes)?;
        let apart = zstd::bulk::decompress(&frame[FRAME..], panel).map_err(|_| broken("a frame cannot be read"))?;
        if apart.len() != panel || panel % width != 0 {
            return Err(broken("a frame is of another size"));
        }
        join(&mut bytes, &apart, width);
        if digest(&bytes) != frame[8..FRAME] {
            return Err(broken("what comes out is not the base: was the merged model changed?"));
        }
        file.write(name, begin, &bytes)
    });
    done.collect()
}

fn copy(merged: &Checkpoint, name: &str, nbytes: u64, file: &PlacedFile) -> Result<()> {
    const PIECE: u64 = 4 << 20;
    let pieces: Vec<u64> = (0..nbytes.div_ceil(PIECE)).collect();
    let done = pieces.into_par_iter().map(|piece| {
        let begin = piece * PIECE;
        let mut bytes = vec![0u8; PIECE.min(nbytes - begin) as usize];
        merged.read_bytes(name, begin, &mut bytes)?;
        file.write(name, begin, &bytes)
    });
    done.collect()
}

/// Differences of little-endian codes of `width` bytes: all first bytes, then all second ones, and so on.
fn apart(base: &[u8], merged: &[u8], width: usize) -> Vec<u8> {
    let count = base.len() / width;
    let mut planes = vec![0u8; base.len()];
    for (element, (base, merged)) in base.chunks_exact(width).zip(merged.chunks_exact(width)).enumerate() {
        let mut borrow = 0u16;
        for (byte, (&base, &merged)) in base.iter().zip(merged).enumerate() {
            let difference = u16::from(base).wrapping_sub(u16::from(merged)).wrapping_sub(borrow);
            planes[byte * count + element] = difference as u8;
            borrow = difference >> 15;
        }
    }
    planes
}

/// Undoes [`apart`]: merged codes become the base's.
fn join(merged: &mut [u8], planes: &[u8], width: usize) {
    let count = merged.len() / width;
    for (element, merged) in merged.chunks_exact_mut(width).enumerate() {
        let mut carry = 0u16;
        for (byte, merged) in merged.iter_mut().enumerate() {
            let sum = u16::from(*merged) + u16::from(planes[byte * count + element]) + carry;
            *merged = sum as u8;
            carry = sum >> 8;
        }
    }
}

fn digest(bytes: &[u8]) -> [u8; DIGEST] {
    let mut kept = [0u8; DIGEST];
    kept.copy_from_slice(&Sha256::digest(bytes)[..DIGEST]);
    kept
}

/// A shard's length field and header, byte for byte.
fn raw_header(shard: &Shard) -> Result<Vec<u8>> {
    use std::io::Read;
    let mut file = File::open(shard.path()).at(shard.path())?;
    let mut length = [0u8; PREFIX as usize];
    file.read_exact(&mut length).at(shard.path())?;
    let mut raw = length.to_vec();
    file.take(u64::from_le_bytes(length)).read_to_end(&mut raw).at(shard.path())?;
    Ok(raw)
}

/// The length of the file that a raw header belongs to.
fn raw_end(raw: &[u8]) -> Option<u64> {
    let json: serde_json::Value = serde_json::from_slice(raw.get(PREFIX as usize..)?).ok()?;
    let ends = json.as_object()?.iter().filter(|(name, _)| *name != "__metadata__");
    let end = ends
        .map(|(_, entry)| entry.get("data_offsets")?.get(1)?.as_u64())
        .try_fold(0, |most, end| Some(end?.max(most)));
    (raw.len() as u64).checked_add(end?)
}

fn fault(error: &std::io::Error) -> Error {
    Error::Patch { path: "memory".into(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ten_thousand_random_panels_come_back() {
        let mut state = 11u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        for case in 0..10_000 {
            let width = [1, 2, 4, 8][case % 4];
            let count = (next() % 40) as usize;
            let base: Vec<u8> = (0..count * width).map(|_| next() as u8).collect();
            // Near or anywhere: carries run through all bytes.
            let near = next() % 2 == 0;
            let mut merged = base.clone();
            for code in merged.chunks_exact_mut(width) {
                if near {
                    let mut wide = [0u8; 8];
                    wide[..width].copy_from_slice(code);
                    let moved = u64::from_le_bytes(wide).wrapping_add(next() % 5).wrapping_sub(2).to_le_bytes();
                    code.copy_from_slice(&moved[..width]);
                } else {
                    code.iter_mut().for_each(|byte| *byte = next() as u8);
                }
            }
            let frame = frame(&base, &merged, width).unwrap();
            let planes = zstd::bulk::decompress(&frame[FRAME..], base.len()).unwrap();
            join(&mut merged, &planes, width);
            assert_eq!(merged, base);
            assert_eq!(digest(&merged), frame[8..FRAME]);
        }
    }
}
