//! From a kernel's name to its code: the functions that enable its instructions.

use super::Kernel;
#[cfg(target_arch = "x86_64")]
use super::in_bf16::{InPairs, InTiles};
use super::in_f32::{InF32, Widen};
use super::vector::Portable;
use super::walk::{Chunk, Operands, both, products};
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::packed::Blocks;

#[cfg(target_arch = "x86_64")]
mod enabled {
    use super::{Chunk, InF32, InPairs, InTiles, both, x86};

    /// Defines a function that runs a chunk with `$features` enabled.
    macro_rules! enabled {
        ($name:ident, $features:literal, $multiply:ty) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name(chunk: Chunk<'_, $multiply>) {
                // SAFETY: the instructions are enabled for this function.
                unsafe { both(chunk) }
            }
        };
    }

    enabled!(tiles, "avx512f,avx512bw,avx512dq,avx512vl,fma", InTiles);
    enabled!(pairs, "avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16", InPairs);
    enabled!(avx512_bf16, "avx512f,avx512bw,avx512dq,avx512vl,fma", InF32<x86::Avx512, u16>);
    enabled!(avx512_f32, "avx512f,avx512bw,avx512dq,avx512vl,fma", InF32<x86::Avx512, f32>);
    enabled!(avx2_bf16, "avx2,fma", InF32<x86::Avx2, u16>);
    enabled!(avx2_f32, "avx2,fma", InF32<x86::Avx2, f32>);
}

fn portable<S: Widen>(chunk: Chunk<'_, InF32<Portable, S>>) {
    // SAFETY: no particular instructions are needed.
    unsafe { both(chunk) }
}

/// Products with a Δ stored in bf16.
pub(super) fn bf16_blocks(kernel: Kernel, blocks: &Blocks<u16>, operands: Operands<'_>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a kernel is run only where it is available.
    unsafe {
        match kernel {
            Kernel::Amx => return products(blocks, operands, |chunk| enabled::tiles(chunk)),
            Kernel::Avx512Bf16 => return products(blocks, operands, |chunk| enabled::pairs(chunk)),
            Kernel::Avx512 => return products(blocks, operands, |chunk| enabled::avx512_bf16(chunk)),
            Kernel::Avx2 => return products(blocks, operands, |chunk| enabled::avx2_bf16(chunk)),
            Kernel::Portable => {}
        }
    }
    let _ = kernel;
    products(blocks, operands, portable::<u16>);
}

/// Products with a Δ stored in f32.
pub(super) fn f32_blocks(kernel: Kernel, blocks: &Blocks<f32>, operands: Operands<'_>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a kernel is run only where it is available.
    unsafe {
        match kernel {
            Kernel::Avx512 => return products(blocks, operands, |chunk| enabled::avx512_f32(chunk)),
            Kernel::Avx2 => return products(blocks, operands, |chunk| enabled::avx2_f32(chunk)),
            _ => {}
        }
    }
    let _ = kernel;
    products(blocks, operands, portable::<f32>);
}
