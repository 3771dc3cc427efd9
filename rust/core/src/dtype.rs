//! Element types of safetensors files, and the conversions of the four that this crate computes with.
//!
//! Bytes are little-endian and never assumed to be aligned. Rounding is to nearest, ties to even, once.

use std::fmt;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Element type of a stored tensor, named as in the safetensors format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(non_camel_case_types, missing_docs)] // The names are the format's own.
pub enum Dtype {
    BOOL,
    F4,
    F6_E2M3,
    F6_E3M2,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    F8_E4M3FNUZ,
    F8_E5M2FNUZ,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    C64,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Bits of one element.
    #[must_use]
    pub const fn bits(self) -> u64 {
        match self {
            Self::F4 => 4,
            Self::F6_E2M3 | Self::F6_E3M2 => 6,
            Self::BOOL | Self::U8 | Self::I8 => 8,
            Self::F8_E5M2 | Self::F8_E4M3 | Self::F8_E8M0 | Self::F8_E4M3FNUZ | Self::F8_E5M2FNUZ => 8,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 16,
            Self::I32 | Self::U32 | Self::F32 => 32,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 64,
        }
    }

    /// Whether this crate computes with elements of this type.
    #[must_use]
    pub const fn is_computable(self) -> bool {
        matches!(self, Self::F16 | Self::BF16 | Self::F32 | Self::F64)
    }

    /// The name in the safetensors format.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BOOL => "BOOL",
            Self::F4 => "F4",
            Self::F6_E2M3 => "F6_E2M3",
            Self::F6_E3M2 => "F6_E3M2",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8_E5M2 => "F8_E5M2",
            Self::F8_E4M3 => "F8_E4M3",
            Self::F8_E8M0 => "F8_E8M0",
            Self::F8_E4M3FNUZ => "F8_E4M3FNUZ",
            Self::F8_E5M2FNUZ => "F8_E5M2FNUZ",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::C64 => "C64",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
        }
    }

    /// Unit roundoff: the largest relative error of rounding to this type, for values in its normal range.
    #[must_use]
    pub const fn unit_roundoff(self) -> Option<f64> {
        match self {
            Self::BF16 => Some(0.003_906_25),               // 2^-8
            Self::F16 => Some(0.000_488_281_25),            // 2^-11
            Self::F32 => Some(5.960_464_477_539_063e-8),    // 2^-24
            Self::F64 => Some(1.110_223_024_625_156_5e-16), // 2^-53
            Self::F8_E4M3 => Some(0.062_5),                 // 2^-4
            Self::F8_E5M2 => Some(0.125),                   // 2^-3
            _ => None,
        }
    }
}

impl Dtype {
    /// Smallest positive normal value, as far as f32 tells: below it, values of a type have one spacing. 0 for types that this
    /// crate does not compute with.
    pub(crate) const fn smallest_normal(self) -> f32 {
        match self {
            Self::BF16 | Self::F32 => f32::MIN_POSITIVE,
            Self::F16 => 6.103_515_6e-5,
            _ => 0.0,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Dtype {
    type Err = serde::de::value::Error;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        use serde::de::IntoDeserializer;
        Self::deserialize(name.into_deserializer())
    }
}

/// One stored float type: how its little-endian bytes become a number and back.
pub(crate) trait Element: Copy {
    /// Bytes of one element.
    const BYTES: usize;
    /// The stored value, exactly.
    fn read(bytes: &[u8]) -> f64;
    /// Rounds `value` to this type; returns whether the result is finite.
    fn write(value: f64, out: &mut [u8]) -> bool;
    /// Rounds an f32 to this type and back.
    fn round(value: f32) -> f32;
}

/// `value` as f32, where what is lost sets the last bit: rounding that to 16 bits gives what rounding `value` at once would
/// (Boldo & Melquiond 2008). `half` looks at 20 bits of the significand only.
fn to_odd(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    if back == value || !near.is_finite() || near.to_bits() & 1 == 1 {
        return near;
    }
    // Away from zero codes grow, towards it they fall; from zero the sign is that of the value.
    let toward_zero = back.abs() > value.abs();
    f32::from_bits(if toward_zero { near.to_bits() - 1 } else { near.to_bits() + 1 })
}

macro_rules! element {
    ($type:ident, $float:ty, $bytes:literal, $read:expr, $write:expr, $write_f64:expr) => {
        #[derive(Clone, Copy)]
        pub(crate) struct $type;

        impl $type {
            #[inline(always)]
            fn load(bytes: &[u8]) -> $float {
                let mut raw = [0u8; $bytes];
                raw.copy_from_slice(&bytes[..$bytes]);
                $read(raw)
            }
        }

        impl Element for $type {
            const BYTES: usize = $bytes;

            #[inline(always)]
            fn read(bytes: &[u8]) -> f64 {
                f64::from(Self::load(bytes))
            }

            #[inline(always)]
            fn write(value: f64, out: &mut [u8]) -> bool {
                let raw: [u8; $bytes] = $write_f64(value);
                out[..$bytes].copy_from_slice(&raw);
                ($read(raw) as $float).is_finite()
            }

            #[inline(always)]
            fn round(value: f32) -> f32 {
                let raw: [u8; $bytes] = $write(<$float>::from(value));
                $read(raw) as f32
            }
        }
    };
}

element!(Bf16, f32, 2, |raw| bf16::from_le_bytes(raw).to_f32(), |value| bf16::from_f32(value).to_le_bytes(), |value| {
    bf16::from_f32(to_odd(value)).to_le_bytes()
});
element!(F16, f32, 2, |raw| f16::from_le_bytes(raw).to_f32(), |value| f16::from_f32(value).to_le_bytes(), |value| {
    f16::from_f32(to_odd(value)).to_le_bytes()
});
element!(F32, f32, 4, f32::from_le_bytes, f32::to_le_bytes, |value: f64| (value as f32).to_le_bytes());
element!(F64, f64, 8, f64::from_le_bytes, f64::to_le_bytes, f64::to_le_bytes);

/// Runs `$body` with `$element` bound to the [`Element`] of a computable dtype; `None` for any other.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::BF16 => {
                type $element = $crate::dtype::Bf16;
                Some($body)
            }
            $crate::dtype::Dtype::F16 => {
                type $element = $crate::dtype::F16;
                Some($body)
            }
            $crate::dtype::Dtype::F32 => {
                type $element = $crate::dtype::F32;
                Some($body)
            }
            $crate::dtype::Dtype::F64 => {
                type $element = $crate::dtype::F64;
                Some($body)
            }
            _ => None,
        }
    };
}
pub(crate) use with_element;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for dtype in [Dtype::BF16, Dtype::F8_E4M3, Dtype::F6_E2M3, Dtype::I64, Dtype::BOOL] {
            assert_eq!(dtype.name().parse::<Dtype>().unwrap(), dtype);
        }
        assert!("BFLOAT16".parse::<Dtype>().is_err());
    }
}
