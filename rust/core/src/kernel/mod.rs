//! The products with Δ, by the fastest instructions of the machine: the only room with `unsafe`.
//!
//! A packed Δ is cut into blocks of [`BLOCK`]×[`BLOCK`] elements ([`crate::packed`]). One step of the iteration reads it once
//! and uses every block twice, while it is in cache: for Y = Δ·V and for Z = Δᵀ·Y. All kernels share that walk
//! ([`walk`]); they differ in how one block is multiplied with `16·groups` columns (`walk::Multiply`):
//!
//! | kernel | stored | multiplies |
//! |---|---|---|
//! | `amx` | bf16 | 16×32 tiles, `tdpbf16ps` |
//! | `avx512bf16` | bf16 | pairs, `vdpbf16ps` |
//! | `avx512`, `avx2`, `portable` | bf16 or f32 | f32 |
//!
//! The operand of a bf16 kernel has bf16 values, in pairs along the summed index; sums are f32. A block is multiplied
//! *plain* (Δ·X) or *turned* (Δᵀ·X); bf16 kernels interleave two rows into pairs for the latter.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod apply;
mod code;
mod dispatch;
mod elementwise;
#[cfg(target_arch = "x86_64")]
mod in_bf16;
mod in_f32;
mod low_rank;
mod pack;
#[cfg(test)]
mod tests;
mod vector;
mod walk;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

pub use apply::Applied;
pub(crate) use apply::apply;
pub(crate) use elementwise::{Sums, inner_tile, subtract, sum_squares, widen_bf16, widen_f16};
use faer::{Mat, MatMut, MatRef};
pub(crate) use low_rank::{Factors, STRIP};
pub(crate) use pack::{Packing, Rounding, pack_rows, subtract_and_pack};

use crate::error::{Error, Result};
use crate::memory::Workspace;
use crate::packed::{Blocks, Packed};
use walk::Operands;

/// Rows and columns of a block.
pub(crate) const BLOCK: usize = 32;
/// Columns of one group: a zmm register of f32, or two ymm.
pub(crate) const GROUP: usize = 16;
/// Elements of a block, and of two groups' worth of a block's rows.
pub(crate) const AREA: usize = BLOCK * BLOCK;
/// Operand or result elements of one block and one group.
pub(crate) const CELL: usize = BLOCK * GROUP;

/// Instructions that products with Δ use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Intel AMX tiles in bf16.
    Amx,
    /// AVX-512 with `vdpbf16ps`.
    Avx512Bf16,
    /// AVX-512 in f32.
    Avx512,
    /// AVX2 with FMA in f32.
    Avx2,
    /// What every CPU has, as the compiler vectorises it.
    Portable,
}

impl Kernel {
    /// All kernels, fastest first.
    pub const ALL: [Self; 5] = [Self::Amx, Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];

    /// The name that `LORA_COMPRESS_KERNEL` knows it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Whether this machine can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("fma");
            match self {
                Self::Amx => avx512 && amx::is_permitted(),
                Self::Avx512Bf16 => avx512 && has!("avx512bf16"),
                Self::Avx512 => avx512,
                Self::Avx2 => has!("avx2") && has!("fma"),
                Self::Portable => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// The kernel in use: the one that `LORA_COMPRESS_KERNEL` names, else the fastest that this machine can run.
    ///
    /// # Errors
    /// [`Error::Kernel`] when no available kernel has that name.
    pub fn current() -> Result<Self> {
        static CURRENT: OnceLock<Option<Kernel>> = OnceLock::new();
        let asked = || std::env::var_os("LORA_COMPRESS_KERNEL").filter(|name| !name.is_empty());
        let choose = || match asked() {
            Some(name) => Self::available().find(|kernel| name == kernel.name()),
            None => Some(Self::fastest()),
        };
        CURRENT.get_or_init(choose).ok_or_else(|| Error::Kernel {
            name: asked().unwrap_or_default().to_string_lossy().into_owned(),
            available: Self::available().map(Self::name).collect::<Vec<_>>().join(", "),
        })
    }

    /// The kernels that this machine can run, fastest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|kernel| kernel.is_available())
    }

    /// Seconds that both products of a Δ of this shape with `width` columns take, the best of `repeats`; for benchmarks.
    #[must_use]
    pub fn measure(self, rows: usize, cols: usize, width: usize, repeats: usize) -> f64 {
        let workspace = Workspace::default();
        let mut blocks = Blocks::<u16>::anything(rows, cols, &workspace);
        // Bits as those of weights: processors are slower where more of them change.
        let mut state = 1u32;
        for value in blocks.values_mut() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Signs and significands at random, exponents of 2^-8 to 2^-1.
            *value = (state >> 16) as u16 & 0x83ff | 0x3c00;
        }
        let packed = Packed::Bf16(blocks);
        let v = Mat::from_fn(rows.min(cols), width, |i, j| ((i * 31 + j * 17) % 257) as f32 / 256.0 - 0.5);
        let (mut y, mut z) = (Mat::zeros(rows.max(cols), width), Mat::zeros(rows.min(cols), width));
        let mut time = || {
            let started = std::time::Instant::now();
            products(self, &packed, v.as_ref(), y.as_mut(), Some(z.as_mut()), &workspace);
            started.elapsed().as_secs_f64()
        };
        (0..repeats).map(|_| time()).fold(f64::INFINITY, f64::min)
    }

    /// `vdpbf16ps` issues at half the rate of an f32 multiply-add on Intel and at the same rate on AMD: per flop it gains
    /// nothing on the former.
    fn fastest() -> Self {
        let slow_pairs = cfg!(target_arch = "x86_64") && !is_amd();
        Self::available().find(|kernel| !(slow_pairs && *kernel == Self::Avx512Bf16)).unwrap_or(Self::Portable)
    }

    /// Whether it multiplies bf16 values only.
    pub(crate) fn rounds_operands(self) -> bool {
        matches!(self, Self::Amx | Self::Avx512Bf16)
    }

    /// The kernel that multiplies Δ with these very values: `self`, or one in f32 where it would round them.
    pub(crate) fn exact_for(self, v: MatRef<'_, f32>) -> Self {
        let is_bf16 = |value: &f32| value.to_bits() & 0xffff == 0;
        let exact = !self.rounds_operands() || v.col_iter().all(|column| column.iter().all(is_bf16));
        if exact { self } else { self.for_f32() }
    }

    /// Columns that a product is best given at a time: multiples of this.
    pub(crate) fn preferred_width(self) -> usize {
        match self {
            // Tiles are taken two by two; and one step is bound by reading Δ, not by arithmetic.
            Self::Amx => 2 * GROUP,
            _ => GROUP,
        }
    }

    /// The kernel that multiplies f32 blocks on this machine, where `self` multiplies bf16 only.
    pub(crate) fn for_f32(self) -> Self {
        match self {
            Self::Amx | Self::Avx512Bf16 => Self::Avx512,
            other => other,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    // "AuthenticAMD" in EBX, EDX, ECX.
    (vendor.ebx, vendor.edx, vendor.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
}

#[cfg(not(target_arch = "x86_64"))]
fn is_amd() -> bool {
    false
}

/// Y = Δ·V and, where `z` is given, Z = Δᵀ·Y in the tall orientation (Δ or its transpose, whichever has more rows), with one read
/// of Δ. Both are overwritten, and have columns that are contiguous.
///
/// `v` has as many rows as the shorter side. A kernel that rounds operands expects bf16 values in it.
pub(crate) fn products(
    kernel: Kernel,
    packed: &Packed,
    v: MatRef<'_, f32>,
    y: MatMut<'_, f32>,
    z: Option<MatMut<'_, f32>>,
    workspace: &Workspace,
) {
    // Asked again at the door of unsafe code, whoever has chosen the kernel.
    let kernel = if kernel.is_available() { kernel } else { Kernel::Portable };
    let operands = Operands { v, y, z, workspace };
    match packed {
        Packed::Bf16(blocks) => dispatch::bf16_blocks(kernel, blocks, operands),
        Packed::F32(blocks) => dispatch::f32_blocks(kernel.for_f32(), blocks, operands),
    }
}
