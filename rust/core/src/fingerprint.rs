//! What a checkpoint holds, in 64 hexadecimal digits, without reading all of it.

use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::error::Result;

/// Bytes that are read at each place of a tensor.
const PIECE: u64 = 512;
/// Places in each tensor: its ends and evenly between them.
const PLACES: u64 = 5;

/// SHA-256 over name, dtype, shape and some bytes of every tensor, in the order of their names. Does not depend on shards or
/// on other keys of the header.
///
/// Training moves most elements of most tensors, so this tells models apart that any training, merge or conversion lies between.
/// An edit of single elements, or of a few rows of an embedding, can escape it.
///
/// # Errors
/// [`crate::Error::Io`] when a file cannot be read.
pub fn fingerprint(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = Vec::new();
    for (name, info) in checkpoint.tensors() {
        // Lengths go before contents, so that no two lists of tensors give the same bytes.
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name.as_bytes());
        hash.update((info.dtype.name().len() as u64).to_le_bytes());
        hash.update(info.dtype.name().as_bytes());
        hash.update((info.shape.len() as u64).to_le_bytes());
        info.shape.iter().for_each(|&size| hash.update((size as u64).to_le_bytes()));
        let piece = PIECE.min(info.nbytes);
        buffer.resize(piece as usize, 0);
        for place in 0..PLACES {
            let begin = ((info.nbytes - piece) as u128 * u128::from(place) / u128::from(PLACES - 1)) as u64;
            checkpoint.read_bytes(name, begin, &mut buffer)?;
            hash.update(&buffer);
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
