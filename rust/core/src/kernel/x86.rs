//! The vector registers of x86-64.

use std::arch::x86_64::*;

use super::elementwise::LANES;
use super::pack;
use super::vector::Lanes;
use super::{AREA, BLOCK, GROUP};

/// A ymm register of f32.
pub(super) struct Avx2;

impl Lanes for Avx2 {
    type Word = f32;
    type Sums = __m256;
    const WIDTH: usize = 8;
    // SAFETY: any bits are valid in both.
    const ZERO: __m256 = unsafe { std::mem::transmute::<[f32; 8], __m256>([0.0; 8]) };

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller vouches for bounds and instructions, here and below.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(sums: __m256, to: *mut f32) {
        // SAFETY: see `load`.
        unsafe { _mm256_storeu_ps(to, sums) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m256, word: *const f32, x: *const f32) -> __m256 {
        // SAFETY: see `load`.
        unsafe { _mm256_fmadd_ps(_mm256_set1_ps(*word), _mm256_loadu_ps(x), sums) }
    }
}

/// A zmm register of f32.
pub(super) struct Avx512;

impl Lanes for Avx512 {
    type Word = f32;
    type Sums = __m512;
    const WIDTH: usize = 16;
    // SAFETY: any bits are valid in both.
    const ZERO: __m512 = unsafe { std::mem::transmute::<[f32; 16], __m512>([0.0; 16]) };

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for bounds and instructions, here and below.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(sums: __m512, to: *mut f32) {
        // SAFETY: see `load`.
        unsafe { _mm512_storeu_ps(to, sums) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, word: *const f32, x: *const f32) -> __m512 {
        // SAFETY: see `load`.
        unsafe { _mm512_fmadd_ps(_mm512_set1_ps(*word), _mm512_loadu_ps(x), sums) }
    }
}

/// A zmm register of f32 sums of products of bf16 pairs.
pub(super) struct Avx512Bf16;

impl Lanes for Avx512Bf16 {
    type Word = u32;
    type Sums = __m512;
    const WIDTH: usize = 16;
    // SAFETY: any bits are valid in both.
    const ZERO: __m512 = unsafe { std::mem::transmute::<[f32; 16], __m512>([0.0; 16]) };

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for bounds and instructions, here and below.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(sums: __m512, to: *mut f32) {
        // SAFETY: see `load`.
        unsafe { _mm512_storeu_ps(to, sums) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, word: *const u32, x: *const u32) -> __m512 {
        // SAFETY: see `load`; __m512i and __m512bh have the same size and any bits are valid in both.
        unsafe {
            let (word, x) = (_mm512_set1_epi32(word.read_unaligned().cast_signed()), _mm512_loadu_si512(x.cast()));
            _mm512_dpbf16_ps(
                sums,
                std::mem::transmute::<__m512i, __m512bh>(word),
                std::mem::transmute::<__m512i, __m512bh>(x),
            )
        }
    }
}

/// Places of the elements of two rows of a block, interleaved: element n of the even row, element n of the odd one (at 32 + n).
const PLACES: [u16; 2 * BLOCK] = {
    let mut places = [0; 2 * BLOCK];
    let mut n = 0;
    while n < BLOCK {
        places[2 * n] = n as u16;
        places[2 * n + 1] = (BLOCK + n) as u16;
        n += 1;
    }
    places
};

/// Rows `2·pair` and `2·pair + 1` of a block, interleaved: pairs of the first sixteen columns, and of the others.
///
/// # Safety
/// AVX-512 BW must be available, and the rows in bounds.
#[inline(always)]
unsafe fn interleaved(block: *const u16, pair: usize) -> (__m512i, __m512i) {
    // SAFETY: a row of a block is one register; the caller vouches for bounds and instructions.
    unsafe {
        let left = _mm512_loadu_si512(PLACES.as_ptr().cast());
        let right = _mm512_loadu_si512(PLACES.as_ptr().add(BLOCK).cast());
        let even = _mm512_loadu_si512(block.add(2 * pair * BLOCK).cast());
        let odd = _mm512_loadu_si512(block.add((2 * pair + 1) * BLOCK).cast());
        (_mm512_permutex2var_epi16(even, left, odd), _mm512_permutex2var_epi16(even, right, odd))
    }
}

/// Interleaves the rows of a block two by two: `pairs[i][n] = (block[2i][n], block[2i + 1][n])`.
///
/// # Safety
/// AVX-512 BW must be available, and `pairs` writable.
#[inline(always)]
pub(super) unsafe fn interleave(block: &[u16; AREA], pairs: *mut [u32; AREA / 2]) {
    for i in 0..BLOCK / 2 {
        // SAFETY: two rows of pairs are four registers; the caller vouches for the instructions.
        unsafe {
            let (left, right) = interleaved(block.as_ptr(), i);
            let pairs = pairs.cast::<u32>().add(i * BLOCK);
            _mm512_storeu_si512(pairs.cast(), left);
            _mm512_storeu_si512(pairs.add(BLOCK / 2).cast(), right);
        }
    }
}

/// `out[j][c] += Σ block[k, c]·x[k, j]` for sixteen columns j of an operand and the 32 columns c of `count` blocks, `step`
/// elements apart. `x` has pairs along k, `[16][16]` for each block, `x_step` words apart. Unless it is zero, what lies `ahead`
/// elements after each block is brought into cache, evenly over the time that the block takes.
///
/// # Safety
/// All of that must be in bounds, and AVX-512 BW and BF16 be available.
#[inline(always)]
pub(super) unsafe fn multiply_turned(
    blocks: *const u16,
    step: usize,
    count: usize,
    x: *const u32,
    x_step: usize,
    out: *mut f32,
    ahead: usize,
) {
    /// Columns of the operand whose sums are in registers, two each.
    const WIDE: usize = 8;
    for first in (0..GROUP).step_by(WIDE) {
        // SAFETY: the caller vouches for the bounds and the instructions; __m512i and __m512bh have the same size and any bits are
        // valid in both.
        unsafe {
            let out = out.add(first * BLOCK);
            let mut sums = [[_mm512_setzero_ps(); 2]; WIDE];
            for (j, sums) in sums.iter_mut().enumerate() {
                sums[0] = _mm512_loadu_ps(out.add(j * BLOCK));
                sums[1] = _mm512_loadu_ps(out.add(j * BLOCK + GROUP));
            }
            for block in 0..count {
                let (block, x) = (blocks.add(block * step), x.add(block * x_step + first));
                for pair in 0..BLOCK / 2 {
                    if ahead > 0 {
                        let row = 2 * pair + first / WIDE;
                        _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(ahead + row * BLOCK).cast());
                    }
                    let (left, right) = interleaved(block, pair);
                    let (left, right) = (
                        std::mem::transmute::<__m512i, __m512bh>(left),
                        std::mem::transmute::<__m512i, __m512bh>(right),
                    );
                    for (j, sums) in sums.iter_mut().enumerate() {
                        let word = _mm512_set1_epi32(x.add(pair * GROUP + j).read_unaligned().cast_signed());
                        let word = std::mem::transmute::<__m512i, __m512bh>(word);
                        sums[0] = _mm512_dpbf16_ps(sums[0], left, word);
                        sums[1] = _mm512_dpbf16_ps(sums[1], right, word);
                    }
                }
            }
            for (j, sums) in sums.iter().enumerate() {
                _mm512_storeu_ps(out.add(j * BLOCK), sums[0]);
                _mm512_storeu_ps(out.add(j * BLOCK + GROUP), sums[1]);
            }
        }
    }
}

/// Eight partial sums of each of the inner products of four columns with four others.
///
/// # Safety
/// Every pointer must have `rows` f32 behind it, a multiple of eight, and AVX-512 F be available.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn inner_tile(left: [*const f32; 4], right: [*const f32; 4], rows: usize) -> [[[f64; 8]; 4]; 4] {
    // Loops, not `map`: that is compiled without these instructions, and its closure would be called.
    let mut sums = [[_mm512_setzero_pd(); 4]; 4];
    for k in (0..rows).step_by(8) {
        let mut wide = [_mm512_setzero_pd(); 4];
        for (wide, column) in wide.iter_mut().zip(right) {
            // SAFETY: the caller vouches for the bounds.
            *wide = _mm512_cvtps_pd(unsafe { _mm256_loadu_ps(column.add(k)) });
        }
        for (sums, column) in sums.iter_mut().zip(left) {
            // SAFETY: as above.
            let own = _mm512_cvtps_pd(unsafe { _mm256_loadu_ps(column.add(k)) });
            for (sum, &wide) in sums.iter_mut().zip(&wide) {
                *sum = _mm512_fmadd_pd(own, wide, *sum);
            }
        }
    }
    let mut parts = [[[0f64; 8]; 4]; 4];
    for (parts, sums) in parts.iter_mut().zip(sums) {
        for (part, sum) in parts.iter_mut().zip(sums) {
            // SAFETY: an array of eight f64 is one register.
            unsafe { _mm512_storeu_pd(part.as_mut_ptr(), sum) };
        }
    }
    parts
}

/// One row of `tuned − base` (little-endian bf16) into row `row` of blocks, and its sums into `lanes`: what
/// `pack::subtract_and_pack_portably` does, to the bit.
///
/// # Safety
/// AVX-512 F, BW, DQ and VL must be available, both rows equally long, and `blocks` have room for the row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn subtract_and_pack(
    base: &[u8],
    tuned: &[u8],
    row: usize,
    blocks: &mut [u16],
    lanes: &mut pack::Lanes,
) {
    let halves = |values: &[f64; LANES]| -> [__m512d; 2] {
        // SAFETY: an array of sixteen has two registers of eight.
        unsafe { [_mm512_loadu_pd(values.as_ptr()), _mm512_loadu_pd(values.as_ptr().add(8))] }
    };
    let mut sums = [&lanes.energy, &lanes.base_energy, &lanes.lost, &lanes.leaning, &lanes.binades].map(halves);
    let mut largest = _mm512_set1_ps(0.0);
    let count = base.len() / 2;
    for first in (0..count).step_by(LANES) {
        let here = ((1u32 << LANES.min(count - first)) - 1) as __mmask16;
        // SAFETY: masked loads touch `here` only; the row of a block has room for two whole groups.
        let (before, after, out) = unsafe {
            (
                _mm256_maskz_loadu_epi16(here, base.as_ptr().cast::<i16>().add(first)),
                _mm256_maskz_loadu_epi16(here, tuned.as_ptr().cast::<i16>().add(first)),
                blocks.as_mut_ptr().add(first / BLOCK * AREA + row * BLOCK + first % BLOCK),
            )
        };
        let widen = |bits| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)));
        let (before, after) = (widen(before), widen(after));
        let delta = _mm512_sub_ps(after, before);
        let changed = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(after, before);
        let exponents = _mm512_set1_epi32(0x7f80_0000);
        let step = _mm512_castsi512_ps(_mm512_maskz_and_epi32(changed, _mm512_castps_si512(after), exponents));
        largest = _mm512_max_ps(largest, _mm512_abs_ps(delta));
        let bits = _mm512_castps_si512(delta);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let rounded = _mm512_srli_epi32::<16>(up);
        let kept = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(rounded));
        let lost = _mm512_sub_ps(delta, kept);
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(out.cast(), _mm512_cvtepi32_epi16(rounded)) };
        let low = |values| _mm512_cvtps_pd(_mm512_castps512_ps256(values));
        let high = |values| _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(values));
        let factors = [(delta, delta), (before, before), (lost, lost), (lost, kept), (step, step)];
        for (sums, (x, y)) in sums.iter_mut().zip(factors) {
            // A product of two f32 is exact in f64: fused or not, the sum is rounded once.
            sums[0] = _mm512_fmadd_pd(low(x), low(y), sums[0]);
            sums[1] = _mm512_fmadd_pd(high(x), high(y), sums[1]);
        }
    }
    let totals = [&mut lanes.energy, &mut lanes.base_energy, &mut lanes.lost, &mut lanes.leaning, &mut lanes.binades];
    for (lanes, sums) in totals.into_iter().zip(sums) {
        // SAFETY: as for `halves`.
        unsafe {
            _mm512_storeu_pd(lanes.as_mut_ptr(), sums[0]);
            _mm512_storeu_pd(lanes.as_mut_ptr().add(8), sums[1]);
        }
    }
    // SAFETY: an array of sixteen f32 is one register.
    unsafe {
        let most = _mm512_max_ps(_mm512_loadu_ps(lanes.largest.as_ptr()), largest);
        _mm512_storeu_ps(lanes.largest.as_mut_ptr(), most);
    }
}
