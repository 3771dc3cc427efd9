//! Merging: a base checkpoint and updates become a merged checkpoint, shard by shard and row panel by row panel.
//!
//! A merged shard has the tensors, order and, unless told otherwise, dtypes of the base's shard; tensors without an update are
//! copied byte for byte (weights of eight bits become BF16). Every panel is read, summed, rounded and written to its place by one
//! thread, so reading, arithmetic and writing go on side by side. Memory holds the factors of some tensors and a few panels; of an
//! update that is computed, the whole tensor, but one at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, split_number};
use crate::error::{Error, Result};
use crate::header::TensorInfo;
use crate::panels;
use crate::patch::{self, Patch};
use crate::place::PlacedFile;
use crate::rounding::{self, Applied, Storing};
use crate::update::{LoadedUpdate, Scratch, Update};
use crate::write::Spec;

/// Bytes of tensors that are worked on at a time; their factors are in memory.
const BATCH: u64 = 192 << 20;
/// Elements of a panel: sums in f32 that stay in the second-level cache. And its least rows, that factors be used often enough.
const PANEL: usize = 1 << 18;
const ROWS: usize = 12;

/// Updates by the name of the base's tensor.
pub type Updates = BTreeMap<String, Update>;

/// What became of the update of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct MergedTensor {
    /// Its name.
    pub name: String,
    /// Elements that the update would change.
    pub touched: u64,
    /// Those that rounding left as they were.
    pub lost: u64,
    /// ⟨D, D⟩ of the update D.
    pub asked: f64,
    /// ⟨W' − W, D⟩: equal to it where nothing is lost.
    pub got: f64,
}

/// A merged shard.
#[derive(Debug, Clone, PartialEq)]
pub struct MergedShard {
    /// Size of the file.
    pub nbytes: u64,
    /// Tensors with an update that is summed, in the order of the shard.
    pub tensors: Vec<MergedTensor>,
}

/// Writes the merged form of shard number `shard` of `base` to `path`.
///
/// A `patch` gets what leads back to the base; `storing` must leave its dtypes alone then.
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
    storing: &Storing,
    mut patch: Option<&mut Patch>,
    path: &Path,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<MergedShard> {
    let Some(shard) = base.shards().get(shard) else {
        return Err(Error::Writer { path: path.into(), reason: format!("the base has no shard number {shard}") });
    };
    let split = split_tensors(base, updates)?;
    let mut specs = Vec::with_capacity(shard.names().len());
    for name in shard.names() {
        let info = base.info(name)?;
        let dtype = storing.target(&info);
        let shape = match updates.get(name) {
            // Only appended rows change a shape: factors need not be read for it.
            Some(update) => {
                Update { new_rows: update.new_rows.clone(), ..Update::default() }.load(base, name)?.merged_shape()?
            }
            None => info.shape,
        };
        specs.push(Spec { name: name.clone(), dtype, shape });
    }
    let file = PlacedFile::create(path, &specs, shard.metadata())?;
    let mut tensors = Vec::new();
    for batch in batches(base, shard.names(), updates)? {
        let mut pieces = Vec::with_capacity(batch.len());
        for name in batch {
            pieces.extend(pieces_of(base, name, split.contains(name.as_str()), storing)?);
        }
        let mut loaded = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            let update = updates.get(&piece.name).map(|update| update.load(base, &piece.name)).transpose()?;
            loaded.push((piece, update));
        }
        let jobs: Vec<(usize, Range<usize>)> = (0..loaded.len())
            .map(|at| Ok((at, panels_of(base, &loaded[at])?)))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flat_map(|(at, panels)| panels.into_iter().map(move |panel| (at, panel)))
            .collect();
        // Matrices without an update are part of what is patched where others of their tensor have one.
        let keeps = |piece: &Piece<'_>| patch.is_some() && (piece.is_part() || updates.contains_key(&piece.name));
        let done = jobs.par_iter().map_init(Scratch::default, |scratch, (at, panel)| {
            let (piece, update) = &loaded[*at];
            match update {
                Some(update) => write_merged(update, piece, panel.clone(), storing, &file, scratch, keeps(piece)),
                None => copy(base, piece, panel.clone(), storing, &file, keeps(piece)),
            }
        });
        let done = done.collect::<Result<Vec<_>>>()?;
        let mut sums = vec![Applied::default(); loaded.len()];
        let mut frames: Vec<(&str, Vec<Vec<u8>>)> = Vec::new();
        // In the order of the panels, whoever finished first.
        for ((at, _), (applied, frame)) in jobs.iter().zip(done) {
            sums[*at].add(applied);
            let whole = loaded[*at].0.whole;
            if frames.last().is_none_or(|(name, _)| *name != whole) {
                frames.push((whole, Vec::new()));
            }
            if let Some((_, frames)) = frames.last_mut() {
                frames.extend(frame);
            }
        }
        if let Some(patch) = patch.as_deref_mut() {
            for (name, frames) in &frames {
                if updates.contains_key(*name) || split.contains(name) {
                    patch.append(name, frames)?;
                }
            }
        }
        let mut written = 0;
        for ((piece, update), sum) in loaded.iter().zip(sums) {
            written += base.info(&piece.name)?.nbytes;
            let Some(update) = update else { continue };
            file.write(piece.whole, appended_at(update, storing), &update.appended_bytes(storing)?)?;
            if sum.touched > 0 {
                let Applied { touched, lost, asked, got, .. } = sum;
                tensors.push(MergedTensor { name: piece.name.clone(), touched, lost, asked, got });
            }
        }
        progress(written)?;
    }
    Ok(MergedShard { nbytes: file.finish()?, tensors })
}

/// A tensor, or one of the matrices that it is changed by.
struct Piece<'a> {
    whole: &'a str,
    name: String,
    /// Where it begins in the merged tensor, in bytes.
    begin: u64,
}

impl Piece<'_> {
    fn is_part(&self) -> bool {
        self.name != self.whole
    }
}

/// Tensors whose matrices have updates of their own.
fn split_tensors<'a>(base: &Checkpoint, updates: &'a Updates) -> Result<BTreeSet<&'a str>> {
    let wholes = updates.keys().filter_map(|name| Some(split_number(name)?.0)).filter(|whole| base.contains(whole));
    let wholes: BTreeSet<&str> = wholes.collect();
    if let Some(name) = wholes.iter().find(|whole| updates.contains_key(**whole)) {
        let reason = "it is changed as a whole and matrix by matrix".into();
        return Err(Error::Computed { name: (*name).to_owned(), reason });
    }
    Ok(wholes)
}

fn pieces_of<'a>(base: &Checkpoint, name: &'a str, is_split: bool, storing: &Storing) -> Result<Vec<Piece<'a>>> {
    if !is_split {
        return Ok(vec![Piece { whole: name, name: name.to_owned(), begin: 0 }]);
    }
    let info = base.info(name)?;
    let (count, elements) = info.matrix_shape();
    let nbytes = elements as u64 * storing.target(&info).bits() / 8;
    let piece = |number: usize| Piece { whole: name, name: format!("{name}[{number}]"), begin: number as u64 * nbytes };
    Ok((0..count).map(piece).collect())
}

/// Names of updates that no tensor of the base answers to.
#[must_use]
pub fn unknown_tensors(base: &Checkpoint, updates: &Updates) -> Vec<String> {
    updates.keys().filter(|name| !base.contains(name)).cloned().collect()
}

/// Cuts the names of a shard into runs of tensors that are not too large together.
///
/// One whose update is computed fills a run: it may be held whole.
fn batches<'a>(base: &Checkpoint, names: &'a [String], updates: &Updates) -> Result<Vec<&'a [String]>> {
    let mut batches = Vec::new();
    let (mut first, mut size) = (0, 0u64);
    for (at, name) in names.iter().enumerate() {
        let is_computed = updates.get(name).is_some_and(|update| !update.computed.is_empty());
        let nbytes = if is_computed { BATCH } else { base.info(name)?.nbytes };
        if at > first && size.saturating_add(nbytes) > BATCH {
            batches.push(&names[first..at]);
            (first, size) = (at, 0);
        }
        size = size.saturating_add(nbytes);
    }
    batches.push(&names[first..]);
    Ok(batches)
}

/// Panels of a piece: rows where it is merged; bytes where it is copied, elements where that converts.
fn panels_of(base: &Checkpoint, piece: &(&Piece<'_>, Option<LoadedUpdate<'_>>)) -> Result<Vec<Range<usize>>> {
    if let (_, Some(update)) = piece {
        let (rows, cols) = update.matrix_shape();
        return Ok(panels::cut(rows, (PANEL / cols.max(1)).max(ROWS) / 6 * 6));
    }
    let info = base.info(&piece.0.name)?;
    Ok(panels::cut((info.nbytes / unit(&info)) as usize, PANEL))
}

/// Bytes that are copied together: an element that may be converted, or one byte.
fn unit(info: &TensorInfo) -> u64 {
    if info.dtype.is_computable() { info.dtype.bits() / 8 } else { 1 }
}

type Written = (Applied, Option<Vec<u8>>);

fn write_merged(
    update: &LoadedUpdate<'_>,
    piece: &Piece<'_>,
    rows: Range<usize>,
    storing: &Storing,
    file: &PlacedFile,
    scratch: &mut Scratch,
    keeps: bool,
) -> Result<Written> {
    let (_, cols) = update.matrix_shape();
    let bits = update.target(storing).bits();
    let begin = piece.begin + (rows.start * cols) as u64 * bits / 8;
    let applied = update.merge_into(rows.clone(), storing, scratch)?;
    file.write(piece.whole, begin, &scratch.out)?;
    if !keeps {
        return Ok((applied, None));
    }
    let base = update.base_rows(rows)?;
    Ok((applied, Some(patch::frame(&base, &scratch.out, (bits / 8).max(1) as usize)?)))
}

/// Where appended rows begin, in bytes.
fn appended_at(update: &LoadedUpdate<'_>, storing: &Storing) -> u64 {
    let (rows, cols) = update.matrix_shape();
    (rows * cols) as u64 * update.target(storing).bits() / 8
}

fn copy(
    base: &Checkpoint,
    piece: &Piece<'_>,
    panel: Range<usize>,
    storing: &Storing,
    file: &PlacedFile,
    keeps: bool,
) -> Result<Written> {
    let name = &piece.name;
    let info = base.info(name)?;
    let (unit, target) = (unit(&info), storing.target(&info));
    let mut bytes = vec![0u8; panel.len() * unit as usize];
    base.read_bytes(name, panel.start as u64 * unit, &mut bytes)?;
    if target == info.dtype {
        file.write(piece.whole, piece.begin + panel.start as u64 * unit, &bytes)?;
    } else {
        let converted = rounding::convert(name, panel.start, (info.dtype, target), &bytes)?;
        file.write(piece.whole, piece.begin + panel.start as u64 * target.bits() / 8, &converted)?;
    }
    let frame = if keeps { Some(patch::frame(&bytes, &bytes, unit as usize)?) } else { None };
    Ok((Applied::default(), frame))
}
