//! Loops over elements, compiled for several instruction sets. All give the same bits: sums run in sixteen lanes of f64 that are
//! written out, and Rust never contracts a multiplication and an addition.

use super::code::Code;
use crate::dtype::{Bf16, F16};

/// Lanes of a sum.
pub(super) const LANES: usize = 16;

/// What one pass over a difference gathers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums {
    /// ‖Δ‖².
    pub(crate) energy: f64,
    /// ‖W_base‖².
    pub(crate) base_energy: f64,
    /// Σ 4^⌊log₂|w|⌋ over the elements w of W_tuned that differ from the base: what the spacing of their dtype follows.
    pub(crate) binades: f64,
    /// max |Δ|.
    pub(crate) largest: f32,
}

impl Sums {
    /// Whether all elements on both sides are.
    pub(crate) fn is_finite(&self) -> bool {
        self.energy.is_finite() && self.base_energy.is_finite()
    }

    /// Takes in what another part has gathered.
    pub(crate) fn add(&mut self, other: Self) {
        self.energy += other.energy;
        self.base_energy += other.base_energy;
        self.binades += other.binades;
        self.largest = self.largest.max(other.largest);
    }
}

/// Defines a function that runs its body with the widest vectors of this machine. The body must call no closures: they would be
/// compiled without those vectors.
macro_rules! dispatched {
    ($(#[$attribute:meta])* fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        pub(crate) fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::is_x86_feature_detected as has;

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                // SAFETY: the instructions have been detected.
                unsafe {
                    if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("fma") {
                        return avx512($($argument),*);
                    }
                    if has!("avx2") && has!("fma") {
                        return avx2($($argument),*);
                    }
                }
            }
            body($($argument),*)
        }
    };
}

pub(super) use dispatched;

#[inline(always)]
fn widen<C: Code>(bytes: &[u8], out: &mut [f32]) {
    for (value, raw) in out.iter_mut().zip(bytes.chunks_exact(C::BYTES)) {
        *value = C::widen(C::load(raw, 0));
    }
}

dispatched! {
    /// Little-endian bf16 as f32.
    fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
        widen::<Bf16>(bytes, out);
    }
}

dispatched! {
    /// Little-endian f16 as f32.
    fn widen_f16(bytes: &[u8], out: &mut [f32]) {
        widen::<F16>(bytes, out);
    }
}

/// 2^⌊log₂|value|⌋ where it has `changed`, else 0; 0 for subnormal values too.
#[inline(always)]
pub(super) fn binade(value: f32, changed: bool) -> f32 {
    f32::from_bits(if changed { value.to_bits() & 0x7f80_0000 } else { 0 })
}

dispatched! {
    /// `delta ← delta − base`, elementwise in f32: the exact difference rounded once. Sums are NaN or infinite when an
    /// element is. The dtype of `delta` is spaced evenly below `least`.
    fn subtract(base: &[f32], delta: &mut [f32], least: f32) -> Sums {
        let (mut energy, mut base_energy, mut largest) = ([0f64; LANES], [0f64; LANES], [0f32; LANES]);
        let mut binades = [0f64; LANES];
        let mut pieces = delta.chunks_exact_mut(LANES);
        let mut base_pieces = base.chunks_exact(LANES);
        for (delta, base) in pieces.by_ref().zip(base_pieces.by_ref()) {
            for i in 0..LANES {
                let floored = if delta[i].abs() > least { delta[i] } else { least };
                let step = binade(floored, delta[i] != base[i]);
                binades[i] += f64::from(step) * f64::from(step);
                delta[i] -= base[i];
                energy[i] += f64::from(delta[i]) * f64::from(delta[i]);
                base_energy[i] += f64::from(base[i]) * f64::from(base[i]);
                largest[i] = if delta[i].abs() > largest[i] { delta[i].abs() } else { largest[i] };
            }
        }
        for ((i, delta), base) in pieces.into_remainder().iter_mut().enumerate().zip(base_pieces.remainder()) {
            let step = binade(delta.abs().max(least), *delta != *base);
            binades[i] += f64::from(step) * f64::from(step);
            *delta -= base;
            energy[i] += f64::from(*delta) * f64::from(*delta);
            base_energy[i] += f64::from(*base) * f64::from(*base);
            largest[i] = largest[i].max(delta.abs());
        }
        Sums {
            energy: energy.iter().sum(),
            base_energy: base_energy.iter().sum(),
            binades: binades.iter().sum(),
            largest: largest.iter().fold(0.0, |most, &value| value.max(most)),
        }
    }
}

dispatched! {
    /// Σ x², in f64.
    fn sum_squares(values: &[f32]) -> f64 {
        let mut sums = [0f64; LANES];
        let mut chunks = values.chunks_exact(LANES);
        for chunk in chunks.by_ref() {
            for i in 0..LANES {
                sums[i] += f64::from(chunk[i]) * f64::from(chunk[i]);
            }
        }
        let rest: f64 = chunks.remainder().iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        sums.iter().sum::<f64>() + rest
    }
}

/// Columns of a tile of inner products, and rows that are multiplied at a time.
const TILE: usize = 4;
const DEEP: usize = 8;

/// Inner products of four columns with four others, in f64: eight partial sums, then their sum, then the rest. (Products of two
/// f32 are exact there, so it is all the same whether they are fused with the addition.)
pub(crate) fn inner_tile(left: &[&[f32]; TILE], right: &[&[f32]; TILE]) -> [[f64; TILE]; TILE] {
    let rows = left.iter().chain(right).fold(usize::MAX, |least, column| least.min(column.len()));
    let whole = rows / DEEP * DEEP;
    let (left, right) = (left.map(|column| &column[..rows]), right.map(|column| &column[..rows]));
    #[cfg(target_arch = "x86_64")]
    let sums = if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512 has been detected, and every column has `whole` rows.
        unsafe { super::x86::inner_tile(left.map(<[f32]>::as_ptr), right.map(<[f32]>::as_ptr), whole) }
    } else {
        inner_lanes(&left, &right)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let sums = inner_lanes(&left, &right);
    let mut totals = [[0f64; TILE]; TILE];
    for i in 0..TILE {
        for j in 0..TILE {
            totals[i][j] = sums[i][j].iter().sum();
            for k in whole..rows {
                totals[i][j] += f64::from(left[i][k]) * f64::from(right[j][k]);
            }
        }
    }
    totals
}

dispatched! {
    /// Eight partial sums of every inner product, over all whole eights of rows.
    fn inner_lanes(left: &[&[f32]; TILE], right: &[&[f32]; TILE]) -> [[[f64; DEEP]; TILE]; TILE] {
        let rows = left[0].len();
        let mut sums = [[[0f64; DEEP]; TILE]; TILE];
        for first in (0..rows / DEEP * DEEP).step_by(DEEP) {
            let mut wide = [[0f64; DEEP]; TILE];
            for j in 0..TILE {
                for k in 0..DEEP {
                    wide[j][k] = f64::from(right[j][first + k]);
                }
            }
            for i in 0..TILE {
                let mut own = [0f64; DEEP];
                for k in 0..DEEP {
                    own[k] = f64::from(left[i][first + k]);
                }
                for j in 0..TILE {
                    for k in 0..DEEP {
                        sums[i][j][k] += own[k] * wide[j][k];
                    }
                }
            }
        }
        sums
    }
}
