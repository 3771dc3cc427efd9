//! W + D, rounded once to the dtype that is stored, and what rounding did to D: loops over elements that read and write bytes.

use super::code::Code;
use super::elementwise::{LANES, dispatched};
use crate::dtype::{Bf16, Dtype, F16, F32};

/// What became of an update when it was rounded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Applied {
    /// Elements that D would change.
    pub touched: u64,
    /// Those of them that it did not change: their update was smaller than half a spacing.
    pub lost: u64,
    /// ⟨D, D⟩.
    pub asked: f64,
    /// ⟨W' − W, D⟩.
    pub got: f64,
    /// Whether a sum of finite values is not finite.
    pub(crate) overflows: bool,
}

impl Applied {
    /// Takes in what another part has gathered.
    pub(crate) fn add(&mut self, other: Self) {
        self.touched += other.touched;
        self.lost += other.lost;
        self.asked += other.asked;
        self.got += other.got;
        self.overflows |= other.overflows;
    }
}

/// Elements that are summed in f32 before the sums go on in f64: what f32 loses there is a few millionths.
const SHORT: usize = 64 * LANES;

/// Sums over a short stretch, in lanes.
struct Tally {
    touched: [u32; LANES],
    lost: [u32; LANES],
    overflows: [u32; LANES],
    asked: [f32; LANES],
    got: [f32; LANES],
}

impl Tally {
    const ZERO: Self =
        Self { touched: [0; LANES], lost: [0; LANES], overflows: [0; LANES], asked: [0.0; LANES], got: [0.0; LANES] };

    #[inline(always)]
    fn add_to(&self, total: &mut Applied) {
        for i in 0..LANES {
            total.touched += u64::from(self.touched[i]);
            total.lost += u64::from(self.lost[i]);
            total.asked += f64::from(self.asked[i]);
            total.got += f64::from(self.got[i]);
            total.overflows |= self.overflows[i] != 0;
        }
    }
}

/// `x + y` as f32, where what is lost sets the last bit: rounding that to 16 bits gives what rounding the exact sum would (Boldo &
/// Melquiond 2008, by the error of Knuth's two-sum).
#[inline(always)]
fn sum_to_odd(x: f32, y: f32) -> f32 {
    let sum = x + y;
    let part = sum - x;
    let lost = (x - (sum - part)) + (y - part);
    let bits = sum.to_bits();
    // Away from zero codes grow, towards it they fall.
    let away = (lost > 0.0) == (sum > 0.0);
    let odd = if away { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
    let is_exact = lost == 0.0 || bits & 1 == 1 || !sum.is_finite();
    f32::from_bits(if is_exact { bits } else { odd })
}

/// Sixteen elements: W in the type `W`, W' in the type `T`.
#[inline(always)]
fn apply_lanes<W: Code, T: Code>(base: &[u8], step: &[f32; LANES], out: &mut [u8], tally: &mut Tally) {
    let same = W::DTYPE == T::DTYPE;
    for (i, &step) in step.iter().enumerate() {
        let code = W::load(base, i);
        let value = W::widen(code);
        let moves = step != 0.0;
        // A sum that stays an f32 is rounded once as it is.
        let sum = if T::BYTES == 4 { value + step } else { sum_to_odd(value, step) };
        let nearest = T::narrow(if moves { sum } else { value });
        let stored = if moves || !same { nearest } else { code };
        T::store(stored, out, i);
        let change = T::widen(stored) - value;
        tally.touched[i] += u32::from(moves);
        tally.lost[i] += u32::from(moves && change == 0.0);
        tally.overflows[i] |= u32::from((moves || !same) && !T::is_finite(stored) && W::is_finite(code));
        tally.asked[i] += step * step;
        // Of what is no number in W, nothing can arrive.
        tally.got[i] += if change.is_finite() { change * step } else { 0.0 };
    }
}

/// The loop of [`apply`] for two types.
#[inline(always)]
fn apply_all<W: Code, T: Code>(base: &[u8], delta: &[f32], out: &mut [u8]) -> Applied {
    let mut total = Applied::default();
    let pieces = base.chunks(W::BYTES * SHORT).zip(delta.chunks(SHORT)).zip(out.chunks_mut(T::BYTES * SHORT));
    for ((base, delta), out) in pieces {
        let mut tally = Tally::ZERO;
        // Whole lanes without a copy: one of unknown length would be a call.
        let (delta, delta_rest) = delta.as_chunks::<LANES>();
        let mut base = base.chunks_exact(W::BYTES * LANES);
        let mut out = out.chunks_exact_mut(T::BYTES * LANES);
        for ((base, delta), out) in base.by_ref().zip(delta).zip(out.by_ref()) {
            apply_lanes::<W, T>(base, delta, out, &mut tally);
        }
        if !delta_rest.is_empty() {
            let (mut raw, mut step, mut rounded) = ([0u8; 4 * LANES], [0f32; LANES], [0u8; 4 * LANES]);
            let rest = out.into_remainder();
            raw[..base.remainder().len()].copy_from_slice(base.remainder());
            step[..delta_rest.len()].copy_from_slice(delta_rest);
            apply_lanes::<W, T>(&raw, &step, &mut rounded, &mut tally);
            let len = rest.len();
            rest.copy_from_slice(&rounded[..len]);
        }
        tally.add_to(&mut total);
    }
    total
}

macro_rules! applies {
    ($($name:ident: $w:ty, $t:ty;)*) => {
        $(dispatched! {
            fn $name(base: &[u8], delta: &[f32], out: &mut [u8]) -> Applied {
                apply_all::<$w, $t>(base, delta, out)
            }
        })*

        /// W + D, elements of W in the first dtype, rounded once to the second: to nearest, ties to even. Where D is 0 and the
        /// dtypes are one, the stored bits are kept. `None` for other dtypes than BF16, F16 and F32.
        pub(crate) fn apply(dtypes: (Dtype, Dtype), base: &[u8], delta: &[f32], out: &mut [u8]) -> Option<Applied> {
            let run = match dtypes {
                $((<$w>::DTYPE, <$t>::DTYPE) => $name,)*
                _ => return None,
            };
            Some(run(base, delta, out))
        }
    };
}

applies! {
    bf16_to_bf16: Bf16, Bf16;
    bf16_to_f16: Bf16, F16;
    bf16_to_f32: Bf16, F32;
    f16_to_bf16: F16, Bf16;
    f16_to_f16: F16, F16;
    f16_to_f32: F16, F32;
    f32_to_bf16: F32, Bf16;
    f32_to_f16: F32, F16;
    f32_to_f32: F32, F32;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::codec::decode;
    use crate::dtype::{Element, with_element};
    use crate::rounding::apply_elementwise;

    fn random(seed: u64) -> impl FnMut() -> u32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        }
    }

    /// Any code, and weights of ordinary sizes; updates of nothing, of halves of spacings and next to them, of any exponent.
    fn inputs(dtype: Dtype, len: usize, next: &mut impl FnMut() -> u32) -> (Vec<u8>, Vec<f32>) {
        let (mut bytes, mut delta) = (Vec::new(), Vec::new());
        for _ in 0..len {
            let code = match (dtype, next() % 8) {
                (_, 0) => next(),
                (Dtype::F32, _) => next() & 0x83ff_ffff | 0x3c00_0000,
                (Dtype::F16, _) => next() & 0xb3ff,
                (_, _) => next() & 0x83ff | 0x3c00,
            };
            bytes.extend_from_slice(&code.to_le_bytes()[..dtype.bits() as usize / 8]);
            let sign = next() & 0x8000_0000;
            delta.push(match next() % 8 {
                0 => 0.0,
                1 => f32::from_bits(sign | (next() % (100 << 23))),
                2 => f32::from_bits(sign | ((90 + next() % 30) << 23) | (next() % 2)),
                3 => f32::from_bits((sign | ((90 + next() % 30) << 23)) - 1),
                _ => (next() % 2001) as f32 * 1e-6 - 1e-3,
            });
        }
        (bytes, delta)
    }

    #[test]
    fn all_types_are_summed_and_counted_as_element_by_element_in_f64() {
        let mut next = random(3);
        let types = [Dtype::BF16, Dtype::F16, Dtype::F32];
        for (w, t) in types.into_iter().flat_map(|w| types.map(|t| (w, t))) {
            let (mut whole, mut outside) = (0, 0);
            for len in [0usize, 1, 15, 16, 17, 100].into_iter().cycle().take(600) {
                let (base, delta) = inputs(w, len, &mut next);
                let size = t.bits() as usize / 8;
                let (mut found, mut expected) = (vec![0xaa; size * len], vec![0x55; size * len]);
                let applied = apply((w, t), &base, &delta, &mut found).unwrap();
                let reference = apply_elementwise((w, t), &base, &delta, (0, None), &mut expected).unwrap();
                assert_eq!(applied.overflows, reference.is_err(), "{w} to {t}");
                let Ok(reference) = reference else {
                    outside += 1;
                    continue;
                };
                whole += 1;
                let is_nan = |bytes: &[u8]| with_element!(t, T => T::read(bytes).is_nan()).unwrap();
                for (i, (found, expected)) in found.chunks_exact(size).zip(expected.chunks_exact(size)).enumerate() {
                    let alike = found == expected || (is_nan(found) && is_nan(expected));
                    assert!(alike, "{w} to {t}: {:?} + {:e}", &base[i * w.bits() as usize / 8..][..2], delta[i]);
                }
                assert_eq!((applied.touched, applied.lost), (reference.touched, reference.lost), "{w} to {t}");
                // Sums of 64 products in f32, of rounded differences.
                let mut values = vec![0f32; len];
                assert!(decode(t, &expected, &mut values));
                assert!((applied.asked - reference.asked).abs() <= 1e-5 * reference.asked + 1e-30);
                let size: f64 = values
                    .iter()
                    .zip(&delta)
                    .map(|(value, step)| f64::from(value * step).abs())
                    .filter(|size| size.is_finite())
                    .sum();
                assert!((applied.got - reference.got).abs() <= 1e-5 * (size + reference.asked) + 1e-30, "{w} to {t}");
            }
            assert!(whole > 100 && (outside > 0 || t != Dtype::F16 || w == Dtype::F16), "{whole}, {outside}");
        }
    }

    #[test]
    fn bits_are_kept_where_nothing_is_added() {
        let mut next = random(5);
        for (dtype, size) in [(Dtype::BF16, 2), (Dtype::F16, 2), (Dtype::F32, 4)] {
            let base: Vec<u8> = (0..size * 1000).map(|_| next() as u8).collect();
            let mut out = vec![0u8; base.len()];
            let applied = apply((dtype, dtype), &base, &[0.0; 1000], &mut out).unwrap();
            assert_eq!(out, base);
            assert_eq!((applied.touched, applied.overflows), (0, false));
            assert!(applied.asked == 0.0 && applied.got == 0.0);
        }
        assert!(apply((Dtype::F64, Dtype::F32), &[], &[], &mut []).is_none());
    }
}
