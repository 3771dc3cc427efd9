//! Merging: a base checkpoint and updates become a merged checkpoint, streamed shard by shard and row panel by row panel.
//!
//! A merged shard has the tensors, dtypes and order of the base's shard; tensors without an update are copied byte for byte.
//! Memory holds the factors of one tensor and a few row panels, never a whole tensor.

use std::collections::BTreeMap;
use std::path::Path;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::panels;
use crate::update::{LoadedUpdate, Update};
use crate::write::{Spec, Writer};

/// Bytes of a tensor that are produced before they are written.
const GROUP: usize = 32 << 20;
/// Bytes of a tensor that one thread works on.
const PANEL: usize = 1 << 20;

/// Updates by the name of the base's tensor.
pub type Updates = BTreeMap<String, Update>;

/// Writes the merged form of shard number `shard` of `base` to `path`; returns the size of the file.
///
/// `progress` is called with the number of bytes written since the last call; its error ends the merge, and nothing is left
/// behind. Updates for tensors of other shards are ignored; [`unknown_tensors`] finds those that belong to none.
///
/// # Errors
/// Whatever reading, [`Update::load`], [`LoadedUpdate::merged_rows`] and writing refuse.
pub fn merge_shard(
    base: &Checkpoint,
    shard: usize,
    updates: &Updates,
    path: &Path,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<u64> {
    let Some(shard) = base.shards().get(shard) else {
        return Err(Error::Writer { path: path.into(), reason: format!("the base has no shard number {shard}") });
    };
    let mut specs = Vec::with_capacity(shard.names().len());
    for name in shard.names() {
        let info = base.info(name)?;
        let shape = match updates.get(name) {
            // Only appended rows change a shape: factors need not be read for it.
            Some(update) => {
                Update { new_rows: update.new_rows.clone(), ..Update::default() }.load(base, name)?.merged_shape()?
            }
            None => info.shape.clone(),
        };
        specs.push(Spec { name: name.clone(), dtype: info.dtype, shape });
    }
    let mut writer = Writer::create(path, &specs, shard.metadata().clone())?;
    for spec in specs {
        let name = spec.name.clone();
        writer.begin(spec)?;
        match updates.get(&name) {
            Some(update) => write_merged(&update.load(base, &name)?, &mut writer, progress)?,
            None => copy(base, &name, &mut writer, progress)?,
        }
    }
    writer.finish()
}

/// Names of updates that no tensor of the base answers to.
#[must_use]
pub fn unknown_tensors(base: &Checkpoint, updates: &Updates) -> Vec<String> {
    updates.keys().filter(|name| !base.contains(name)).cloned().collect()
}

fn write_merged(
    update: &LoadedUpdate<'_>,
    writer: &mut Writer,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = update.matrix_shape();
    let height = (PANEL / (4 * cols.max(1))).max(1);
    for group in panels::cut(rows, height * (GROUP / PANEL)) {
        let ranges = panels::cut(group.len(), height).into_iter();
        let ranges = ranges.map(|range| range.start + group.start..range.end + group.start).collect();
        for bytes in panels::map(ranges, |range| update.merged_rows(range)) {
            let bytes = bytes?;
            writer.write(&bytes)?;
            progress(bytes.len() as u64)?;
        }
    }
    let bytes = update.appended_bytes()?;
    writer.write(&bytes)?;
    progress(bytes.len() as u64)
}

fn copy(base: &Checkpoint, name: &str, writer: &mut Writer, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
    let total = base.info(name)?.nbytes;
    let mut buffer = vec![0u8; (GROUP as u64).min(total) as usize];
    let mut begin = 0;
    while begin < total {
        let len = (total - begin).min(GROUP as u64) as usize;
        let bytes = &mut buffer[..len];
        base.read_bytes(name, begin, bytes)?;
        writer.write(bytes)?;
        progress(len as u64)?;
        begin += len as u64;
    }
    Ok(())
}
