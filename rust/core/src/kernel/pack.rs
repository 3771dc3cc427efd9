//! From differences to blocks of bf16. The same bits on every machine, as all loops over elements ([`super::elementwise`]).

use super::elementwise::{LANES, Sums, binade, dispatched};
use super::{AREA, BLOCK};

/// What packing some of Δ tells.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Packing {
    /// Over the elements of Δ.
    pub(crate) sums: Sums,
    /// What rounding took away.
    pub(crate) rounding: Rounding,
}

/// R = Δ − bf16(Δ).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rounding {
    /// ‖R‖².
    pub(crate) lost: f64,
    /// ⟨R, bf16(Δ)⟩: how far all of Δ has become shorter.
    pub(crate) leaning: f64,
}

impl Rounding {
    /// Takes in that of another part.
    pub(crate) fn add(&mut self, other: Self) {
        self.lost += other.lost;
        self.leaning += other.leaning;
    }
}

impl Packing {
    /// Takes in what another part gives.
    pub(crate) fn add(&mut self, other: Self) {
        self.sums.add(other.sums);
        self.rounding.add(other.rounding);
    }
}

/// Sums in lanes.
#[derive(Clone, Copy)]
pub(crate) struct Lanes {
    pub(super) energy: [f64; LANES],
    pub(super) base_energy: [f64; LANES],
    pub(super) binades: [f64; LANES],
    pub(super) lost: [f64; LANES],
    pub(super) leaning: [f64; LANES],
    pub(super) largest: [f32; LANES],
}

impl Lanes {
    const ZERO: Self = Self {
        energy: [0.0; LANES],
        base_energy: [0.0; LANES],
        binades: [0.0; LANES],
        lost: [0.0; LANES],
        leaning: [0.0; LANES],
        largest: [0.0; LANES],
    };

    #[inline(always)]
    fn total(&self) -> Packing {
        let largest = self.largest.iter().fold(0f32, |most, &value| value.max(most));
        let [energy, base_energy, binades] =
            [&self.energy, &self.base_energy, &self.binades].map(|lanes| lanes.iter().sum());
        let rounding = Rounding { lost: self.lost.iter().sum(), leaning: self.leaning.iter().sum() };
        Packing { sums: Sums { energy, base_energy, binades, largest }, rounding }
    }
}

/// Rows `row..` of a strip of Δ = tuned − base, both little-endian bf16 of `cols` elements a row, as blocks (whose padding is
/// left alone). Sums are NaN or infinite when an element is.
pub(crate) fn subtract_and_pack(base: &[u8], tuned: &[u8], cols: usize, row: usize, blocks: &mut [u16]) -> Packing {
    let rows = base.len() / (2 * cols).max(1);
    assert!(base.len() == tuned.len() && row + rows <= BLOCK && cols.div_ceil(BLOCK) * AREA <= blocks.len());
    #[cfg(target_arch = "x86_64")]
    if super::Kernel::Avx512.is_available() {
        let mut lanes = Lanes::ZERO;
        for r in 0..rows {
            let bytes = r * 2 * cols..(r + 1) * 2 * cols;
            // SAFETY: the instructions are available; both rows have `cols` elements, and the blocks have room for them.
            unsafe {
                super::x86::subtract_and_pack(&base[bytes.clone()], &tuned[bytes], row + r, blocks, &mut lanes);
            }
        }
        return lanes.total();
    }
    subtract_and_pack_portably(base, tuned, cols, row, blocks)
}

dispatched! {
    /// As [`subtract_and_pack`].
    fn subtract_and_pack_portably(base: &[u8], tuned: &[u8], cols: usize, row: usize, blocks: &mut [u16]) -> Packing {
        let mut lanes = Lanes::ZERO;
        for (r, (base, tuned)) in base.chunks_exact(2 * cols).zip(tuned.chunks_exact(2 * cols)).enumerate() {
            let pieces = base.chunks(2 * BLOCK).zip(tuned.chunks(2 * BLOCK));
            for ((base, tuned), block) in pieces.zip(blocks.chunks_exact_mut(AREA)) {
                let out = &mut block[(row + r) * BLOCK..(row + r + 1) * BLOCK];
                let halves = base.chunks(2 * LANES).zip(tuned.chunks(2 * LANES));
                for ((base, tuned), out) in halves.zip(out.chunks_exact_mut(LANES)) {
                    let (mut own, mut theirs) = ([0u8; 2 * LANES], [0u8; 2 * LANES]);
                    own[..base.len()].copy_from_slice(base);
                    theirs[..tuned.len()].copy_from_slice(tuned);
                    if let Ok(out) = out.try_into() {
                        subtract_lanes(&own, &theirs, out, &mut lanes);
                    }
                }
            }
        }
        lanes.total()
    }
}

dispatched! {
    /// Rows `row..` of a strip of `cols` elements each as blocks (whose padding is left alone).
    fn pack_rows(rows: &[f32], cols: usize, row: usize, blocks: &mut [u16]) -> Rounding {
        let mut lanes = Lanes::ZERO;
        for (r, values) in rows.chunks_exact(cols).enumerate() {
            for (values, block) in values.chunks(BLOCK).zip(blocks.chunks_exact_mut(AREA)) {
                let out = &mut block[(row + r) * BLOCK..(row + r + 1) * BLOCK];
                for (values, out) in values.chunks(LANES).zip(out.chunks_exact_mut(LANES)) {
                    let mut padded = [0f32; LANES];
                    padded[..values.len()].copy_from_slice(values);
                    if let Ok(out) = out.try_into() {
                        round_lanes(&padded, out, &mut lanes);
                    }
                }
            }
        }
        lanes.total().rounding
    }
}

#[inline(always)]
fn subtract_lanes(base: &[u8; 2 * LANES], tuned: &[u8; 2 * LANES], out: &mut [u16; LANES], lanes: &mut Lanes) {
    let (mut before, mut delta, mut step) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
    for i in 0..LANES {
        before[i] = f32::from_bits(u32::from(u16::from_le_bytes([base[2 * i], base[2 * i + 1]])) << 16);
        let after = f32::from_bits(u32::from(u16::from_le_bytes([tuned[2 * i], tuned[2 * i + 1]])) << 16);
        delta[i] = after - before[i];
        step[i] = binade(after, after != before[i]);
    }
    for i in 0..LANES {
        lanes.binades[i] += f64::from(step[i]) * f64::from(step[i]);
        lanes.energy[i] += f64::from(delta[i]) * f64::from(delta[i]);
        lanes.base_energy[i] += f64::from(before[i]) * f64::from(before[i]);
        lanes.largest[i] = if delta[i].abs() > lanes.largest[i] { delta[i].abs() } else { lanes.largest[i] };
    }
    round_lanes(&delta, out, lanes);
}

/// Rounds to the nearest bf16, ties to even; adds up what that takes away.
#[inline(always)]
fn round_lanes(values: &[f32; LANES], out: &mut [u16; LANES], lanes: &mut Lanes) {
    let (mut kept, mut rest) = ([0f32; LANES], [0f32; LANES]);
    for i in 0..LANES {
        let bits = values[i].to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        out[i] = rounded as u16;
        kept[i] = f32::from_bits(rounded << 16);
        rest[i] = values[i] - kept[i];
    }
    for i in 0..LANES {
        lanes.lost[i] += f64::from(rest[i]) * f64::from(rest[i]);
        lanes.leaning[i] += f64::from(rest[i]) * f64::from(kept[i]);
    }
}
