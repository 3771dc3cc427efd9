//! Runs of stored elements to f32 and back.

use crate::dtype::{Dtype, Element, F32, F64, with_element};
use crate::kernel;

/// Decodes stored elements to f32 (F64 is rounded); false for a dtype this crate does not compute with.
#[must_use]
pub fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> bool {
    match dtype {
        Dtype::BF16 => kernel::widen_bf16(bytes, out),
        Dtype::F16 => kernel::widen_f16(bytes, out),
        Dtype::F32 => decode_each::<F32>(bytes, out),
        Dtype::F64 => decode_each::<F64>(bytes, out),
        _ => return false,
    }
    true
}

fn decode_each<E: Element>(bytes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(bytes.chunks_exact(E::BYTES)).for_each(|(value, raw)| *value = E::read(raw) as f32);
}

/// Encodes f32 values, each rounded once; `None` for a dtype this crate does not compute with.
#[must_use]
pub fn encode(dtype: Dtype, values: &[f32]) -> Option<Vec<u8>> {
    with_element!(dtype, E => {
        let mut bytes = vec![0u8; values.len() * E::BYTES];
        for (&value, raw) in values.iter().zip(bytes.chunks_exact_mut(E::BYTES)) {
            E::write(f64::from(value), raw);
        }
        bytes
    })
}

/// Rounds each value to `dtype` and back to f32 in place; false for a dtype this crate does not compute with.
#[must_use]
pub fn round_to(dtype: Dtype, values: &mut [f32]) -> bool {
    with_element!(dtype, E => values.iter_mut().for_each(|value| *value = E::round(*value))).is_some()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLOATS: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64];

    #[test]
    fn integers_are_not_decoded() {
        assert!(!decode(Dtype::I64, &[0; 8], &mut [0.0]));
        assert!(encode(Dtype::U8, &[1.0]).is_none());
    }

    proptest! {
        /// Rounding errs by at most half an ulp (u·|x| when normal), and a stored value survives a second trip.
        #[test]
        fn rounding_is_within_half_an_ulp(value in -6e4f32..6e4f32) {
            for dtype in FLOATS {
                let mut once = [value];
                prop_assert!(round_to(dtype, &mut once));
                let smallest_normal = if dtype == Dtype::F16 { 6.103_515_6e-5 } else { f32::MIN_POSITIVE };
                let bound = dtype.unit_roundoff().unwrap() * f64::from(value.abs().max(smallest_normal));
                prop_assert!((f64::from(once[0]) - f64::from(value)).abs() <= bound);
                let bytes = encode(dtype, &once).unwrap();
                let mut again = [0f32];
                prop_assert!(decode(dtype, &bytes, &mut again));
                prop_assert_eq!(again[0].to_bits(), once[0].to_bits());
            }
        }
    }
}
