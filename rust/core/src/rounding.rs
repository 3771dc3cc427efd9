//! W + D as it is stored: rounded once, to nearest or at random, and what that did to D.

use crate::dtype::{Dtype, Element, with_element};
use crate::error::{Error, Result};
use crate::header::TensorInfo;
pub use crate::kernel::Applied;
use crate::kernel::{self};

/// How merged values are stored.
#[derive(Debug, Clone, Copy, Default)]
pub struct Storing {
    /// The dtype of all float tensors; each one's own where there is none.
    pub dtype: Option<Dtype>,
    /// How sums are rounded.
    pub rounding: Rounding,
}

impl Storing {
    /// The dtype that a tensor is stored in: whole numbers keep theirs.
    pub(crate) fn target(&self, info: &TensorInfo) -> Dtype {
        self.dtype.filter(|_| info.dtype.is_computable()).unwrap_or(info.written())
    }
}

/// How a sum becomes a value of a dtype.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest, ties to even: least error for each element, but what is below half a spacing is lost.
    #[default]
    Nearest,
    /// Up or down at random, in proportion to the distance, so that the mean is right: BF16 and F16; other dtypes are rounded to
    /// nearest. Numbers come from the seed, the tensor's name and the element's index.
    Stochastic(u64),
}

/// Merged elements from flat index `first` on: `stored` bytes of W in the first dtype plus D, into `out` in the second.
///
/// # Errors
/// [`Error::Overflow`]; [`Error::Computed`] for dtypes without arithmetic.
pub(crate) fn apply(
    name: &str,
    first: usize,
    dtypes: (Dtype, Dtype),
    stored: &[u8],
    delta: &[f32],
    storing: &Storing,
    out: &mut [u8],
) -> Result<Applied> {
    let seed = match storing.rounding {
        Rounding::Stochastic(seed) if matches!(dtypes.1, Dtype::BF16 | Dtype::F16) => {
            Some(crate::tensor_seed(seed, name))
        }
        _ => None,
    };
    if seed.is_none()
        && let Some(applied) = kernel::apply(dtypes, stored, delta, out)
        && !applied.overflows
    {
        return Ok(applied);
    }
    // The slower way says where a sum is too large.
    match apply_elementwise(dtypes, stored, delta, (first as u64, seed), out) {
        Some(Ok(applied)) => Ok(applied),
        Some(Err((index, value))) => Err(overflow(name, first + index, value, dtypes.1)),
        None => Err(no_arithmetic(name, dtypes)),
    }
}

/// What [`apply`] does, element by element in f64, at random where there is a `seed`; indices count from the first number. `None` for
/// dtypes without arithmetic.
pub(crate) fn apply_elementwise(
    dtypes: (Dtype, Dtype),
    stored: &[u8],
    delta: &[f32],
    (first, seed): (u64, Option<u64>),
    out: &mut [u8],
) -> Option<std::result::Result<Applied, (usize, f64)>> {
    with_element!(dtypes.0, W => with_element!(dtypes.1, T => {
        add_elements::<W, T>(stored, delta, dtypes.0 == dtypes.1, first, seed, out)
    }))
    .flatten()
}

/// Elements in another dtype, each rounded once to nearest. NaN and infinities stay what they are.
///
/// # Errors
/// [`Error::Overflow`] for a finite value that the dtype does not hold.
pub(crate) fn convert(name: &str, first: usize, dtypes: (Dtype, Dtype), stored: &[u8]) -> Result<Vec<u8>> {
    let converted = with_element!(dtypes.0, W => with_element!(dtypes.1, T => {
        let mut out = vec![0u8; stored.len() / W::BYTES * T::BYTES];
        let pairs = stored.chunks_exact(W::BYTES).zip(out.chunks_exact_mut(T::BYTES)).enumerate();
        let mut outside = None;
        for (index, (value, out)) in pairs {
            let value = W::read(value);
            if !T::write(value, out) && value.is_finite() {
                outside.get_or_insert((index, value));
            }
        }
        outside.map_or(Ok(out), Err)
    }));
    match converted.flatten() {
        Some(Ok(bytes)) => Ok(bytes),
        Some(Err((index, value))) => Err(overflow(name, first + index, value, dtypes.1)),
        None => Err(no_arithmetic(name, dtypes)),
    }
}

fn overflow(name: &str, index: usize, value: f64, dtype: Dtype) -> Error {
    Error::Overflow { name: name.into(), index, value, dtype }
}

fn no_arithmetic(name: &str, dtypes: (Dtype, Dtype)) -> Error {
    Error::Computed { name: name.into(), reason: format!("{} and {} have no arithmetic here", dtypes.0, dtypes.1) }
}

/// `x + y`, where what is lost sets the last bit: rounding that to a shorter type gives what rounding the exact sum would (Boldo &
/// Melquiond 2008, by the error of Knuth's two-sum).
fn sum_to_odd(x: f64, y: f64) -> f64 {
    let sum = x + y;
    let part = sum - x;
    let lost = (x - (sum - part)) + (y - part);
    if lost == 0.0 || sum.to_bits() & 1 == 1 || !sum.is_finite() {
        return sum;
    }
    // Away from zero codes grow, towards it they fall.
    let away = (lost > 0.0) == (sum > 0.0);
    f64::from_bits(if away { sum.to_bits() + 1 } else { sum.to_bits() - 1 })
}

/// The exact W + D, rounded once. Returns the first element whose finite sum does not fit.
fn add_elements<W: Element, T: Element>(
    stored: &[u8],
    delta: &[f32],
    same: bool,
    first: u64,
    seed: Option<u64>,
    out: &mut [u8],
) -> std::result::Result<Applied, (usize, f64)> {
    let mut applied = Applied::default();
    let elements = stored.chunks_exact(W::BYTES).zip(out.chunks_exact_mut(T::BYTES)).zip(delta);
    for (index, ((stored, out), &step)) in elements.enumerate() {
        if same && step == 0.0 {
            out.copy_from_slice(&stored[..T::BYTES]);
            continue;
        }
        let value = W::read(stored);
        // −0 + 0 is 0.
        let sum = match step {
            0.0 => value,
            _ if T::BYTES == 8 => value + f64::from(step),
            _ => sum_to_odd(value, f64::from(step)),
        };
        if !T::write(sum, out) && value.is_finite() {
            return Err((index, sum));
        }
        if let Some(seed) = seed
            && sum.is_finite()
        {
            dither::<T>(sum, uniform(seed, first + index as u64), out);
        }
        if step != 0.0 {
            let change = T::read(out) - value;
            applied.touched += 1;
            applied.lost += u64::from(change == 0.0);
            applied.asked += f64::from(step) * f64::from(step);
            // Of what is no number in W, nothing can arrive.
            applied.got += if change.is_finite() { change * f64::from(step) } else { 0.0 };
        }
    }
    Ok(applied)
}

/// Moves the nearest value of a 16-bit dtype to its neighbour on the other side of `sum`, with the probability that makes the
/// mean right. At the end of the dtype's range the nearest stays.
fn dither<T: Element>(sum: f64, chance: f64, out: &mut [u8]) {
    let nearest = T::read(out);
    let rest = sum - nearest;
    let &mut [low, high] = out else { return };
    if rest == 0.0 {
        return;
    }
    let code = u16::from_le_bytes([low, high]);
    // Codes of one sign follow the magnitude; from zero, the smallest number of the sign that is wanted.
    let neighbour = match (nearest == 0.0, (rest > 0.0) == (nearest > 0.0)) {
        (true, _) => 1 | if rest < 0.0 { 0x8000 } else { 0 },
        (false, true) => code + 1,
        (false, false) => code - 1,
    };
    let bytes = neighbour.to_le_bytes();
    let spacing = (T::read(&bytes) - nearest).abs();
    if spacing.is_finite() && chance * spacing < rest.abs() {
        out.copy_from_slice(&bytes);
    }
}

/// A number in [0, 1) for every index, the same on every machine (SplitMix64; Steele, Lea & Flood 2014).
fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 * 2f64.powi(-53)
}
