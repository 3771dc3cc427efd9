//! Weights in eight bits: read as what they stand for.
//!
//! An fp8 weight is stored with scales: one for all, one for each row, or one for each block (128×128 in DeepSeek's format). Its
//! value is `fp8 · scale`, whatever the scale's name says (`weight_scale_inv` too is multiplied with: DeepSeek-V3's
//! README_WEIGHTS). Everything above this module sees an F32 tensor of these values; without scales, a BF16 one, which holds
//! every fp8 value.

use half::f16;

use crate::codec::decode;
use crate::dtype::Dtype;

/// How the scales of a tensor lie over its last two dimensions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Rows and columns of each matrix of the tensor.
    matrix: (usize, usize),
    /// Rows and columns that have one scale.
    block: (usize, usize),
    /// Rows and columns of scales for each matrix.
    scales: (usize, usize),
    /// Scales from one matrix to the next: none where all have the same.
    stride: usize,
}

/// Names that the scales of a weight may have.
pub(crate) fn scale_names(weight: &str) -> Vec<String> {
    let mut names = vec![format!("{weight}_scale_inv"), format!("{weight}_scale")];
    names.extend(weight.strip_suffix(".weight").map(|module| format!("{module}.scale_weight")));
    names
}

/// Weights whose scales a tensor of this name would be.
pub(crate) fn weights_of(scale: &str) -> Vec<String> {
    let suffixes = [("_scale_inv", ""), ("_scale", ""), (".scale_weight", ".weight")];
    let weight =
        |(suffix, instead): (&str, &str)| scale.strip_suffix(suffix).map(|weight| format!("{weight}{instead}"));
    suffixes.into_iter().filter_map(weight).collect()
}

/// Whether a dtype is one of the two that weights are stored in.
pub(crate) fn is_fp8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2)
}

/// Whether scales may be stored in a dtype.
pub(crate) fn is_scale(dtype: Dtype) -> bool {
    dtype.is_computable() || dtype == Dtype::F8_E8M0
}

impl Grid {
    /// The grid of scales of shape `scales` over a tensor; `None` where they do not fit.
    pub(crate) fn new(tensor: &[usize], scales: &[usize]) -> Option<Self> {
        /// DeepSeek's blocks; the last one of a row or column may be cut.
        const USUAL: usize = 128;
        let (lead, matrix) = match tensor {
            [lead @ .., rows, cols] => (lead, (*rows, *cols)),
            [len] => (&[][..], (1, *len)),
            [] => (&[][..], (1, 1)),
        };
        if scales.iter().all(|&size| size == 1) {
            return Some(Self { matrix, block: (matrix.0.max(1), matrix.1.max(1)), scales: (1, 1), stride: 0 });
        }
        // One for each row may lack its last dimension.
        let own: (usize, usize) = match scales.strip_prefix(lead)? {
            [rows] => (*rows, 1),
            [rows, cols] => (*rows, *cols),
            _ => return None,
        };
        let side = |size: usize, scales: usize| {
            if scales == 0 {
                None
            } else if size.div_ceil(USUAL) == scales {
                Some(USUAL)
            } else {
                // Blocks of other sizes are powers of two, or whole sides.
                let block = (size / scales).max(1);
                (size.is_multiple_of(scales) && (scales == 1 || block.is_power_of_two())).then_some(block)
            }
        };
        let block = (side(matrix.0, own.0)?, side(matrix.1, own.1)?);
        Some(Self { matrix, block, scales: own, stride: own.0 * own.1 })
    }

    /// The scales that elements `first..last` have: as a range of scales.
    pub(crate) fn needed(&self, first: usize, last: usize) -> std::ops::Range<usize> {
        let row = |element: usize| {
            let row = element / self.matrix.1.max(1);
            let (matrix, row) = (row / self.matrix.0.max(1), row % self.matrix.0.max(1));
            matrix * self.stride + row / self.block.0 * self.scales.1
        };
        row(first)..row(last.saturating_sub(1).max(first)) + self.scales.1
    }

    /// The values of elements from `first` on, as little-endian F32; `scales` are those of [`Self::needed`].
    pub(crate) fn apply(&self, dtype: Dtype, first: usize, stored: &[u8], scales: &[f32], out: &mut [u8]) {
        let table = table(dtype);
        let cols = self.matrix.1.max(1);
        let begin = self.needed(first, first + 1).start;
        let (mut at, end) = (first, first + stored.len());
        while at < end {
            let in_row = at % cols;
            let segment = (self.block.1 - in_row % self.block.1).min(cols - in_row).min(end - at);
            let scale = self.needed(at, at + 1).start + in_row / self.block.1 - begin;
            let scale = scales.get(scale).copied().unwrap_or(f32::NAN);
            let (begin, end) = (at - first, at - first + segment);
            for (value, &byte) in out[4 * begin..4 * end].chunks_exact_mut(4).zip(&stored[begin..end]) {
                value.copy_from_slice(&(table[usize::from(byte)] * scale).to_le_bytes());
            }
            at += segment;
        }
    }
}

/// Scales as numbers; `None` for a dtype that scales do not have.
pub(crate) fn decode_scales(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    if dtype == Dtype::F8_E8M0 {
        // A power of two: 2^(byte − 127), 255 is NaN.
        let scale = |byte| if byte == u8::MAX { f32::NAN } else { (f64::from(byte) - 127.0).exp2() as f32 };
        return Some(bytes.iter().map(|&byte| scale(byte)).collect());
    }
    let mut values = vec![0f32; bytes.len() * 8 / dtype.bits().max(1) as usize];
    decode(dtype, bytes, &mut values).then_some(values)
}

/// Unscaled fp8 as BF16, exactly.
pub(crate) fn widen(dtype: Dtype, stored: &[u8], out: &mut [u8]) {
    let table = table(dtype);
    for (&byte, out) in stored.iter().zip(out.chunks_exact_mut(2)) {
        out.copy_from_slice(&half::bf16::from_f32(table[usize::from(byte)]).to_le_bytes());
    }
}

/// Values of all bytes.
fn table(dtype: Dtype) -> [f32; 256] {
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        // E5M2 is the upper half of a binary16; E4M3 (OCP's "fn") has a bias of 7, no infinities and one NaN of each sign.
        if dtype == Dtype::F8_E5M2 {
            return f16::from_bits(u16::from(byte) << 8).to_f32();
        }
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
        let magnitude = match (exponent, byte & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa * 2f32.powi(-9),
            _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
        };
        if byte & 0x80 == 0 { magnitude } else { -magnitude }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_the_values_of_the_formats() {
        let e4m3 = table(Dtype::F8_E4M3);
        assert_eq!(
            [e4m3[0x01], e4m3[0x08], e4m3[0x38], e4m3[0x7e], e4m3[0xb8]],
            [2f32.powi(-9), 2f32.powi(-6), 1.0, 448.0, -1.0]
        );
        assert!(e4m3[0x7f].is_nan() && e4m3[0x80].is_sign_negative());
        let e5m2 = table(Dtype::F8_E5M2);
        assert_eq!([e5m2[0x01], e5m2[0x3c], e5m2[0x7b], e5m2[0x7c]], [2f32.powi(-16), 1.0, 57344.0, f32::INFINITY]);
    }

    #[test]
    fn grids_are_told_from_shapes() {
        let grid = |tensor: &[usize], scales: &[usize]| Grid::new(tensor, scales).map(|grid| grid.block);
        assert_eq!(grid(&[300, 200], &[]), Some((300, 200)));
        assert_eq!(grid(&[300, 200], &[1]), Some((300, 200)));
        assert_eq!(grid(&[300, 200], &[300]), Some((1, 200)));
        assert_eq!(grid(&[300, 200], &[300, 1]), Some((1, 200)));
        assert_eq!(grid(&[300, 200], &[3, 2]), Some((128, 128)));
        assert_eq!(grid(&[4, 300, 200], &[4, 3, 2]), Some((128, 128)));
        assert_eq!(grid(&[64, 64], &[2, 4]), Some((32, 16)));
        for misfit in [&[2, 3][..], &[2, 2], &[7], &[3, 2, 1], &[0, 1]] {
            assert_eq!(grid(&[300, 200], misfit), None, "{misfit:?}");
        }
    }
}
