//! Whether a tensor is unchanged, at the speed of comparing memory.

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::panels;

/// Bytes of one side that are read at a time: both sides stay in the second-level cache.
const READ: usize = 1 << 18;

/// Whether two stored tensors have the same dtype, shape and bytes.
///
/// Tensors at the same place of one and the same file (a cache that links both names to it) are not read at all.
///
/// # Errors
/// [`crate::Error::TensorMissing`], [`crate::Error::Io`].
pub fn same_bytes(left: (&Checkpoint, &str), right: (&Checkpoint, &str)) -> Result<bool> {
    let ((our_file, our_name), (their_file, their_name)) = (left, right);
    let (left, right) = (our_file.info(our_name)?, their_file.info(their_name)?);
    if left.dtype != right.dtype || left.shape != right.shape {
        return Ok(false);
    }
    let one_file = our_file.shard_of(our_name)?.is_same_file(their_file.shard_of(their_name)?);
    let ours = our_file.place(our_name)?;
    if one_file && ours.is_some() && ours == their_file.place(their_name)? {
        return Ok(true);
    }
    let compare = |range: std::ops::Range<usize>, buffer: &mut [u8]| -> Result<bool> {
        let (ours, theirs) = buffer[..2 * range.len()].split_at_mut(range.len());
        our_file.read_bytes(our_name, range.start as u64, ours)?;
        their_file.read_bytes(their_name, range.start as u64, theirs)?;
        Ok(ours == theirs)
    };
    // Tensors that differ mostly differ at once.
    let mut pieces = panels::cut(left.nbytes as usize, READ).into_iter();
    let mut buffer = vec![0u8; 2 * READ.min(left.nbytes as usize)];
    if let Some(first) = pieces.next()
        && !compare(first, &mut buffer)?
    {
        return Ok(false);
    }
    panels::all(pieces.collect(), || vec![0u8; 2 * READ], |piece, buffer| compare(piece, buffer))
}
