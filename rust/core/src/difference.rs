//! The stream of W_tuned − W_base: rows are read from both files and subtracted when they are asked for.
//!
//! Each element is the exact difference of the two stored values rounded once to f32. A tensor of any rank is seen as a matrix
//! of `shape[0]` rows; a vector or scalar as a single row.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::codec::decode;
use crate::dtype::{Dtype, Element, with_element};
use crate::error::{Error, Result};
use crate::kernel::{self, Packing, Sums};
use crate::panels;

/// Where the values of a difference come from.
#[derive(Debug, Clone)]
enum Source {
    Files {
        base: Arc<Checkpoint>,
        tuned: Arc<Checkpoint>,
        dtypes: (Dtype, Dtype),
        /// Of what tuned was rounded to.
        unit_roundoff: f64,
    },
    Memory(Arc<Vec<f32>>),
    /// The rows of the first, those of the second, and so on.
    Stack(Vec<Difference>),
}

/// A difference that is not held in memory, unless it came from there.
#[derive(Debug, Clone)]
pub(crate) struct Difference {
    source: Source,
    name: String,
    rows: usize,
    cols: usize,
}

/// Memory that one thread reads through again and again: fresh memory would cost more than the reading.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    bytes: Vec<u8>,
    base: Vec<f32>,
}

impl Scratch {
    /// Room for bytes of both sides, holding anything.
    fn pair(&mut self, base: usize, tuned: usize) -> (&mut [u8], &mut [u8]) {
        if self.bytes.len() < base + tuned {
            self.bytes.resize(base + tuned, 0);
        }
        self.bytes[..base + tuned].split_at_mut(base)
    }
}

/// Runs `job` with this thread's scratch and room for `len` values, which hold anything.
pub(crate) fn with_scratch<T>(len: usize, job: impl FnOnce(&mut [f32], &mut Scratch) -> T) -> T {
    thread_local! {
        static MEMORY: Cell<(Vec<f32>, Scratch)> = const { Cell::new((Vec::new(), Scratch { bytes: Vec::new(), base: Vec::new() })) };
    }
    // Taken out while in use, so that a nested call finds none instead of the same.
    let (mut values, mut scratch) = MEMORY.take();
    if values.len() < len {
        values.resize(len, 0.0);
    }
    let result = job(&mut values[..len], &mut scratch);
    MEMORY.set((values, scratch));
    result
}

impl Difference {
    /// Of the tensor `name`. Where one side has more rows (a grown vocabulary, or a padded one), the rows that both have.
    ///
    /// # Errors
    /// [`Error::TensorMissing`], [`Error::UnsupportedDtype`], [`Error::ShapeMismatch`].
    pub(crate) fn open(base: &Arc<Checkpoint>, tuned: &Arc<Checkpoint>, name: &str) -> Result<Self> {
        let (rows, cols) = overlap(base, tuned, name)?;
        let dtypes = (base.computable(name)?, tuned.computable(name)?);
        let unit_roundoff = tuned.info(name)?.stored.unit_roundoff().unwrap_or(0.0);
        let source = Source::Files { base: Arc::clone(base), tuned: Arc::clone(tuned), dtypes, unit_roundoff };
        Ok(Self { source, name: name.into(), rows, cols })
    }

    /// Of values in memory, row-major.
    pub(crate) fn from_values(values: Vec<f32>, rows: usize, cols: usize) -> Self {
        Self { source: Source::Memory(Arc::new(values)), name: "delta".into(), rows, cols }
    }

    /// The rows of several differences, one below the other; `None` unless all have the same number of columns.
    pub(crate) fn stack(parts: Vec<Self>) -> Option<Self> {
        let cols = parts.first()?.cols;
        let rows = parts.iter().try_fold(0usize, |rows, part| rows.checked_add(part.rows))?;
        let name = parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>().join(" + ");
        parts.iter().all(|part| part.cols == cols).then_some(Self { source: Source::Stack(parts), name, rows, cols })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Energy that rounding tuned to its dtype has added to Δ, given the sums over it: an error spread evenly over one spacing s
    /// has the variance s²/12, and s = 2u·2^⌊log₂|w|⌋. Elements that did not change carry none; 0 for values in memory.
    pub(crate) fn rounding_energy(&self, sums: &Sums) -> f64 {
        let unit = self.unit_roundoff();
        sums.binades * unit * unit / 3.0
    }

    /// Of tuned's dtype, 0 for values in memory; the largest in a stack.
    fn unit_roundoff(&self) -> f64 {
        match &self.source {
            Source::Files { unit_roundoff, .. } => *unit_roundoff,
            Source::Memory(_) => 0.0,
            Source::Stack(parts) => parts.iter().map(Self::unit_roundoff).fold(0.0, f64::max),
        }
    }

    /// Whether both sides are stored in bf16 throughout.
    fn is_bf16(&self) -> bool {
        match &self.source {
            Source::Files { dtypes, .. } => *dtypes == (Dtype::BF16, Dtype::BF16),
            Source::Memory(_) => false,
            Source::Stack(parts) => parts.iter().all(Self::is_bf16),
        }
    }

    /// The sums over all elements.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(crate) fn sums(&self) -> Result<Sums> {
        const PIECE: usize = 1 << 17;
        let pieces = panels::cut(self.rows * self.cols, PIECE);
        let mut total = Sums::default();
        for sums in panels::map(pieces, |piece| {
            with_scratch(piece.len(), |values, scratch| self.read(piece.start, values, scratch))
        }) {
            total.add(sums?);
        }
        Ok(total)
    }

    /// Where both sides are stored in bf16: `rows` into blocks of a strip, from its row `at` on, in one pass over the files'
    /// bytes. `None` for other dtypes.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(crate) fn pack_stored(
        &self,
        at: usize,
        rows: Range<usize>,
        blocks: &mut [u16],
        scratch: &mut Scratch,
    ) -> Result<Option<Packing>> {
        if !self.is_bf16() {
            return Ok(None);
        }
        let (base, tuned) = match &self.source {
            Source::Files { base, tuned, .. } => (base, tuned),
            Source::Memory(_) => return Ok(None),
            Source::Stack(parts) => {
                let mut total = Packing::default();
                for (part, first, own) in within(parts, &rows, |part| part.rows) {
                    let at = at + first + own.start - rows.start;
                    let Some(packing) = part.pack_stored(at, own, blocks, scratch)? else { return Ok(None) };
                    total.add(packing);
                }
                return Ok(Some(total));
            }
        };
        let (begin, len) = (rows.start * self.cols, rows.len() * self.cols);
        let (base_bytes, tuned_bytes) = scratch.pair(2 * len, 2 * len);
        base.read_bytes(&self.name, 2 * begin as u64, base_bytes)?;
        tuned.read_bytes(&self.name, 2 * begin as u64, tuned_bytes)?;
        let packing = kernel::subtract_and_pack(base_bytes, tuned_bytes, self.cols, at, blocks);
        if packing.sums.is_finite() {
            return Ok(Some(packing));
        }
        // The slower way says what is wrong, and where.
        self.read(begin, &mut vec![0f32; len], scratch).map(|sums| Some(Packing { sums, ..packing }))
    }

    /// Elements from flat index `begin` on into `out`, and their sums.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NonFinite`] when either side holds NaN or an infinity, [`Error::TooFar`] when the difference
    /// does not fit f32.
    pub(crate) fn read(&self, begin: usize, out: &mut [f32], scratch: &mut Scratch) -> Result<Sums> {
        /// Elements that stay in the first-level cache from the decoding to the sums.
        const CACHED: usize = 2048;
        let (base, tuned, dtypes) = match &self.source {
            Source::Files { base, tuned, dtypes, .. } => (base, tuned, *dtypes),
            Source::Stack(parts) => {
                let mut sums = Sums::default();
                for (part, first, own) in within(parts, &(begin..begin + out.len()), |part| part.rows * part.cols) {
                    let out = &mut out[first + own.start - begin..first + own.end - begin];
                    sums.add(part.read(own.start, out, scratch)?);
                }
                return Ok(sums);
            }
            Source::Memory(values) => {
                out.copy_from_slice(values.get(begin..begin + out.len()).unwrap_or_default());
                let largest = out.iter().fold(0f32, |most, value| most.max(value.abs()));
                let sums = Sums { energy: kernel::sum_squares(out), largest, ..Sums::default() };
                return if sums.energy.is_finite() { Ok(sums) } else { Err(non_finite_in_memory(begin, out)) };
            }
        };
        let sizes = (dtypes.0.bits() as usize / 8, dtypes.1.bits() as usize / 8);
        let mut widened = std::mem::take(&mut scratch.base);
        widened.resize(CACHED, 0.0);
        let (base_bytes, tuned_bytes) = scratch.pair(out.len() * sizes.0, out.len() * sizes.1);
        base.read_bytes(&self.name, (begin * sizes.0) as u64, base_bytes)?;
        tuned.read_bytes(&self.name, (begin * sizes.1) as u64, tuned_bytes)?;
        let mut sums = Sums::default();
        let pieces = base_bytes.chunks(CACHED * sizes.0).zip(tuned_bytes.chunks(CACHED * sizes.1));
        for ((base_bytes, tuned_bytes), out) in pieces.zip(out.chunks_mut(CACHED)) {
            if dtypes.0 == Dtype::F64 || dtypes.1 == Dtype::F64 {
                sums.add(subtract_wide(dtypes, base_bytes, tuned_bytes, out));
                continue;
            }
            let base = &mut widened[..out.len()];
            widen(dtypes.0, base_bytes, base);
            widen(dtypes.1, tuned_bytes, out);
            sums.add(kernel::subtract(base, out, dtypes.1.smallest_normal()));
        }
        if sums.is_finite() {
            scratch.base = widened;
            return Ok(sums);
        }
        for (side, dtype, bytes) in [(base, dtypes.0, &*base_bytes), (tuned, dtypes.1, &*tuned_bytes)] {
            let found = with_element!(dtype, E => first_non_finite::<E>(bytes)).flatten();
            if let Some((index, value)) = found {
                let index = begin + index;
                return Err(Error::NonFinite { path: side.path().into(), name: self.name.clone(), index, value });
            }
        }
        let index = out.iter().position(|value| !value.is_finite()).unwrap_or(0);
        Err(Error::TooFar { path: tuned.path().into(), name: self.name.clone(), index: begin + index })
    }
}

/// The parts that a range of a stack falls into: each with where it begins in the stack, and the range inside it.
fn within<'a>(
    parts: &'a [Difference],
    range: &Range<usize>,
    len: impl Fn(&Difference) -> usize,
) -> impl Iterator<Item = (&'a Difference, usize, Range<usize>)> {
    let range = range.clone();
    let mut end = 0;
    parts.iter().filter_map(move |part| {
        let first = end;
        end += len(part);
        let own = range.start.max(first)..range.end.min(end);
        (own.start < own.end).then(|| (part, first, own.start - first..own.end - first))
    })
}

/// Refuses NaN and infinities in the rows of a tensor from `first_row` on.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::TensorMissing`], [`Error::UnsupportedDtype`], [`Error::Io`].
pub fn check_finite(checkpoint: &Checkpoint, name: &str, first_row: usize) -> Result<()> {
    /// Bytes that are read at a time.
    const READ: usize = 1 << 20;
    let info = checkpoint.info(name)?;
    let dtype = checkpoint.computable(name)?;
    let rows = info.shape.first().copied().unwrap_or(1).max(1) as u64;
    let size = dtype.bits() / 8;
    let mut begin = info.nbytes / rows * (first_row as u64).min(rows);
    let mut buffer = vec![0u8; READ];
    while begin < info.nbytes {
        let bytes = &mut buffer[..READ.min((info.nbytes - begin) as usize)];
        checkpoint.read_bytes(name, begin, bytes)?;
        if let Some((index, value)) = with_element!(dtype, E => first_non_finite::<E>(bytes)).flatten() {
            let index = (begin / size) as usize + index;
            return Err(Error::NonFinite { path: checkpoint.path().into(), name: name.into(), index, value });
        }
        begin += bytes.len() as u64;
    }
    Ok(())
}

/// Matrix shape of the part that both sides have.
fn overlap(base: &Checkpoint, tuned: &Checkpoint, name: &str) -> Result<(usize, usize)> {
    let (left, right) = (base.info(name)?.shape, tuned.info(name)?.shape);
    let mismatch = || Error::ShapeMismatch { name: name.into(), base: left.clone(), tuned: right.clone() };
    match (left.as_slice(), right.as_slice()) {
        ([], []) => Ok((1, 1)),
        ([base_rows, base_rest @ ..], [tuned_rows, tuned_rest @ ..]) if base_rest == tuned_rest => {
            let (rows, cols) = (*base_rows.min(tuned_rows), base_rest.iter().product());
            Ok(if base_rest.is_empty() { (1, rows) } else { (rows, cols) })
        }
        _ => Err(mismatch()),
    }
}

/// Stored elements as f32, exactly; not for F64.
fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    // The dtypes were checked when the difference was opened.
    let _ = decode(dtype, bytes, out);
}

/// The difference where one side is F64: formed in f64, then rounded.
fn subtract_wide(dtypes: (Dtype, Dtype), base: &[u8], tuned: &[u8], out: &mut [f32]) -> Sums {
    let mut sums = Sums::default();
    let _ = with_element!(dtypes.0, B => with_element!(dtypes.1, T => {
        let pairs = base.chunks_exact(B::BYTES).zip(tuned.chunks_exact(T::BYTES));
        for (value, (base, tuned)) in out.iter_mut().zip(pairs) {
            let (base, tuned) = (B::read(base), T::read(tuned));
            *value = (tuned - base) as f32;
            if tuned != base {
                let floored = tuned.abs().max(f64::from(dtypes.1.smallest_normal()));
                sums.binades += f64::from_bits(floored.to_bits() & 0x7ff0_0000_0000_0000).powi(2);
            }
            sums.energy += f64::from(*value) * f64::from(*value);
            sums.base_energy += base * base;
            sums.largest = sums.largest.max(value.abs());
        }
    }));
    sums
}

fn first_non_finite<E: Element>(bytes: &[u8]) -> Option<(usize, f64)> {
    bytes.chunks_exact(E::BYTES).map(E::read).enumerate().find(|(_, value)| !value.is_finite())
}

fn non_finite_in_memory(begin: usize, values: &[f32]) -> Error {
    let index = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
    let value = values.get(index).copied().map_or(f64::NAN, f64::from);
    Error::NonFinite { path: "memory".into(), name: "delta".into(), index: begin + index, value }
}
