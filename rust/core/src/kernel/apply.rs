//! W + D, rounded once to the dtype that is stored, and what rounding did to D: loops over elements that read and write bytes.

use super::elementwise::{LANES, dispatched};

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

#[inline(always)]
fn apply_lanes(base: &[u8; 2 * LANES], step: &[f32; LANES], out: &mut [u8; 2 * LANES], tally: &mut Tally) {
    for i in 0..LANES {
        let bits = u32::from(u16::from_le_bytes([base[2 * i], base[2 * i + 1]]));
        let value = f32::from_bits(bits << 16);
        let sum = value + step[i];
        let sum_bits = sum.to_bits();
        // The largest finite values round to infinity by the same addition; NaN keeps a bit that makes it one.
        let even = 0x7fff + ((sum_bits >> 16) & 1);
        let nearest = if sum.is_nan() { (sum_bits >> 16) | 0x40 } else { sum_bits.wrapping_add(even) >> 16 };
        let moves = step[i] != 0.0;
        let stored = if moves { nearest } else { bits };
        let [low, high] = (stored as u16).to_le_bytes();
        (out[2 * i], out[2 * i + 1]) = (low, high);
        let change = f32::from_bits(stored << 16) - value;
        tally.touched[i] += u32::from(moves);
        tally.lost[i] += u32::from(moves && stored == bits);
        tally.overflows[i] |= u32::from(moves && (stored & 0x7f80) == 0x7f80 && (bits & 0x7f80) != 0x7f80);
        tally.asked[i] += step[i] * step[i];
        tally.got[i] += change * step[i];
    }
}

dispatched! {
    /// bf16 + f32 to bf16, to nearest, ties to even. Where D is 0 the stored bits are kept.
    fn apply_bf16(base: &[u8], delta: &[f32], out: &mut [u8]) -> Applied {
        let mut total = Applied::default();
        let pieces = base.chunks(2 * SHORT).zip(delta.chunks(SHORT)).zip(out.chunks_mut(2 * SHORT));
        for ((base, delta), out) in pieces {
            let mut tally = Tally::ZERO;
            // Whole lanes without a copy: one of unknown length would be a call.
            let (base, base_rest) = base.as_chunks::<{ 2 * LANES }>();
            let (delta, delta_rest) = delta.as_chunks::<LANES>();
            let (out, out_rest) = out.as_chunks_mut::<{ 2 * LANES }>();
            for ((base, delta), out) in base.iter().zip(delta).zip(out) {
                apply_lanes(base, delta, out, &mut tally);
            }
            if !delta_rest.is_empty() {
                let (mut raw, mut step, mut rounded) = ([0u8; 2 * LANES], [0f32; LANES], [0u8; 2 * LANES]);
                raw[..base_rest.len()].copy_from_slice(base_rest);
                step[..delta_rest.len()].copy_from_slice(delta_rest);
                apply_lanes(&raw, &step, &mut rounded, &mut tally);
                out_rest.copy_from_slice(&rounded[..out_rest.len()]);
            }
            tally.add_to(&mut total);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn sums_are_rounded_as_half_rounds_them_and_counted() {
        let mut state = 3u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        };
        for len in [0usize, 1, 15, 16, 17, 1024, 1500] {
            let base: Vec<u16> = (0..len).map(|_| next() as u16).collect();
            let delta: Vec<f32> = (0..len)
                .map(|i| match next() % 4 {
                    0 => 0.0,
                    1 => f32::from_bits(next() & 0x7f7f_ffff),
                    _ => bf16::from_bits(base[i]).to_f32() * (next() % 1000) as f32 * 1e-5,
                })
                .collect();
            let bytes: Vec<u8> = base.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            let mut out = vec![0xaa; 2 * len];
            let applied = apply_bf16(&bytes, &delta, &mut out);
            let (mut touched, mut lost, mut overflows) = (0, 0, false);
            for i in 0..len {
                let (value, found) = (bf16::from_bits(base[i]), bf16::from_le_bytes([out[2 * i], out[2 * i + 1]]));
                let expected = bf16::from_f32(value.to_f32() + delta[i]);
                if delta[i] == 0.0 {
                    assert_eq!(found.to_bits(), base[i]);
                    continue;
                }
                assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()));
                touched += 1;
                lost += u64::from(found.to_bits() == base[i]);
                overflows |= value.is_finite() && !expected.is_finite();
            }
            assert_eq!((applied.touched, applied.lost, applied.overflows), (touched, lost, overflows));
        }
    }
}
