//! The three float types of checkpoints as f32 and back, without branches: loops over them become vectors.

use crate::dtype::{Bf16, Dtype, F16, F32};

/// One float type: how its code becomes an f32, exactly, and an f32 a code, to nearest, ties to even.
pub(super) trait Code {
    const DTYPE: Dtype;
    /// Bytes of a code.
    const BYTES: usize;
    /// Bits of the exponent, where they are in a code: all are set in what is not finite.
    const EXPONENT: u32;
    fn widen(code: u32) -> f32;
    fn narrow(value: f32) -> u32;

    /// Code number `i` of some.
    #[inline(always)]
    fn load(bytes: &[u8], i: usize) -> u32 {
        let byte = |n: usize| u32::from(bytes[i * Self::BYTES + n]) << (8 * n);
        if Self::BYTES == 2 { byte(0) | byte(1) } else { byte(0) | byte(1) | byte(2) | byte(3) }
    }

    #[inline(always)]
    fn store(code: u32, bytes: &mut [u8], i: usize) {
        let raw = code.to_le_bytes();
        bytes[i * Self::BYTES..(i + 1) * Self::BYTES].copy_from_slice(&raw[..Self::BYTES]);
    }

    #[inline(always)]
    fn is_finite(code: u32) -> bool {
        code & Self::EXPONENT != Self::EXPONENT
    }
}

impl Code for F32 {
    const DTYPE: Dtype = Dtype::F32;
    const BYTES: usize = 4;
    const EXPONENT: u32 = 0x7f80_0000;

    #[inline(always)]
    fn widen(code: u32) -> f32 {
        f32::from_bits(code)
    }

    #[inline(always)]
    fn narrow(value: f32) -> u32 {
        value.to_bits()
    }
}

impl Code for Bf16 {
    const DTYPE: Dtype = Dtype::BF16;
    const BYTES: usize = 2;
    const EXPONENT: u32 = 0x7f80;

    #[inline(always)]
    fn widen(code: u32) -> f32 {
        f32::from_bits(code << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> u32 {
        let bits = value.to_bits();
        // The largest finite values round to infinity by the same addition; NaN keeps a bit that makes it one.
        let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        if value.is_nan() { (bits >> 16) | 0x40 } else { nearest }
    }
}

impl Code for F16 {
    const DTYPE: Dtype = Dtype::F16;
    const BYTES: usize = 2;
    const EXPONENT: u32 = 0x7c00;

    #[inline(always)]
    fn widen(code: u32) -> f32 {
        /// 2^-14, the smallest normal value.
        const LEAST: u32 = 113 << 23;
        let shifted = (code & 0x7fff) << 13;
        let exponent = code & Self::EXPONENT;
        // Below, significands count steps of 2^-24: beside 2^-14 they do so in f32 too.
        let small = (f32::from_bits(shifted + LEAST) - f32::from_bits(LEAST)).to_bits();
        let normal = shifted + (112 << 23);
        let wide = if exponent == 0 { small } else { normal };
        let wide = if exponent == Self::EXPONENT { shifted | 0x7f80_0000 } else { wide };
        f32::from_bits(wide | (code & 0x8000) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> u32 {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + ((magnitude >> 13) & 1)) >> 13;
        // One half has a spacing of 2^-24, as all values below 2^-14 have: the addition rounds.
        let small = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let near = if magnitude < 113 << 23 { small } else { normal };
        let near = if magnitude >= 143 << 23 { Self::EXPONENT } else { near };
        let near = if magnitude > 0x7f80_0000 { 0x7e00 | (magnitude >> 13) & 0x3ff } else { near };
        near | (bits >> 16) & 0x8000
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn codes_are_those_of_half() {
        for code in 0..=u16::MAX {
            let (wide, expected) = (F16::widen(code.into()), f16::from_bits(code).to_f32());
            assert!(wide.to_bits() == expected.to_bits() || (wide.is_nan() && expected.is_nan()), "{code:04x}");
            assert_eq!(F16::is_finite(code.into()), expected.is_finite());
            let (wide, expected) = (Bf16::widen(code.into()), bf16::from_bits(code).to_f32());
            assert!(wide.to_bits() == expected.to_bits() || (wide.is_nan() && expected.is_nan()), "{code:04x}");
            assert_eq!(Bf16::is_finite(code.into()), expected.is_finite());
        }
        // Every exponent and sign, with significands at and next to ties of both types, and others.
        let mut state = 1u32;
        for high in 0..1u32 << 9 {
            for tail in (0..64u32).flat_map(|n| [n << 12, (n << 12) + 1, (n << 12).wrapping_sub(1), n << 15, n << 16]) {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                for low in [tail, state] {
                    let value = f32::from_bits(high << 23 | low & 0x7f_ffff);
                    let (half, brain) = (F16::narrow(value) as u16, Bf16::narrow(value) as u16);
                    if value.is_nan() {
                        assert!(f16::from_bits(half).is_nan() && bf16::from_bits(brain).is_nan());
                    } else {
                        assert_eq!(half, f16::from_f32(value).to_bits(), "{value:e}");
                        assert_eq!(brain, bf16::from_f32(value).to_bits(), "{value:e}");
                    }
                }
            }
        }
    }
}
