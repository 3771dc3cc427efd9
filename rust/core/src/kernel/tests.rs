#![allow(clippy::unwrap_used, clippy::panic)]

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::memory::Workspace;
use crate::packed::Blocks;

/// Values of very different sizes, subnormal ones among them, rounded to bf16.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D) | 1;
    (0..count)
        .map(|i| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = (state >> 40) as f32 / 8_388_608.0 - 1.0;
            let value = match i % 97 {
                0 => value * 1e-39,
                1 => value * 1e6,
                2 => 0.0,
                _ => value,
            };
            bf16::from_f32(value).to_f32()
        })
        .collect()
}

fn packed(values: &[f32], rows: usize, cols: usize, exact: bool) -> Packed {
    let take = |strip: usize| &values[strip * BLOCK * cols..((strip + 1) * BLOCK * cols).min(values.len())];
    if exact {
        let mut blocks = Blocks::anything(rows, cols, &Workspace::default());
        blocks
            .fill(|strip, blocks: &mut [f32]| {
                for (r, row) in take(strip).chunks(cols).enumerate() {
                    for (j, &value) in row.iter().enumerate() {
                        blocks[j / BLOCK * AREA + r * BLOCK + j % BLOCK] = value;
                    }
                }
                Ok(())
            })
            .unwrap();
        Packed::F32(blocks)
    } else {
        let mut blocks = Blocks::anything(rows, cols, &Workspace::default());
        let lost = blocks.fill(|strip, blocks| Ok(pack_rows(take(strip), cols, 0, blocks))).unwrap();
        // bf16 values survive, but for subnormal ones nothing is rounded away either.
        assert!(lost.iter().all(|rounding| rounding.lost == 0.0 && rounding.leaning == 0.0));
        Packed::Bf16(blocks)
    }
}

/// Both products against f64. Bounds: a sum of k products in f32, each exact or rounded once, errs by at most
/// (k + 1)·u·Σ|terms| in any order (Higham 2002, §3.1), u = 2⁻²⁴ (2⁻²³ where `tdpbf16ps` truncates between its steps); a
/// kernel may take subnormal factors as zero (2⁻¹²⁶ each); and Y is rounded to bf16 (2⁻⁸) before it meets Δᵀ.
fn check(kernel: Kernel, rows: usize, cols: usize, width: usize, exact: bool, seed: u64) {
    let delta = values(rows * cols, seed);
    let (long, short) = (rows.max(cols), rows.min(cols));
    let at = |i: usize, j: usize| f64::from(if rows < cols { delta[j * cols + i] } else { delta[i * cols + j] });
    let v_values = values(short * width, seed ^ 1);
    let v = Mat::from_fn(short, width, |i, j| v_values[i * width + j]);
    let packed = packed(&delta, rows, cols, exact);
    // What is there already must not matter.
    let (mut y, mut z) = (Mat::from_fn(long, width, |_, _| f32::NAN), Mat::from_fn(short, width, |_, _| f32::NAN));
    let workspace = Workspace::default();
    products(kernel, &packed, v.as_ref(), y.as_mut(), Some(z.as_mut()), &workspace);
    let mut y_alone = Mat::zeros(long, width);
    products(kernel, &packed, v.as_ref(), y_alone.as_mut(), None, &workspace);
    assert_eq!(y, y_alone);
    let u = f64::from(f32::EPSILON);
    let tiny = f64::from(f32::MIN_POSITIVE);
    let rounding = if kernel.rounds_operands() && !exact { 2f64.powi(-8) } else { 0.0 };
    for j in 0..width {
        for i in 0..long {
            let (mut sum, mut size, mut lost) = (0.0, 0.0, 0.0);
            for k in 0..short {
                let (a, x) = (at(i, k), f64::from(v[(k, j)]));
                sum += a * x;
                size += (a * x).abs();
                lost += tiny * (a.abs() + x.abs() + 1.0);
            }
            let error = (f64::from(y[(i, j)]) - sum).abs();
            assert!(error <= (short + 1) as f64 * u * size + lost, "{kernel:?} Y[{i}, {j}] is off by {error:e}");
        }
        for i in 0..short {
            let (mut sum, mut size, mut lost) = (0.0, 0.0, 0.0);
            for k in 0..long {
                let (a, x) = (at(k, i), f64::from(y[(k, j)]));
                sum += a * x;
                size += (a * x).abs();
                lost += tiny * (a.abs() + x.abs() + 1.0);
            }
            let error = (f64::from(z[(i, j)]) - sum).abs();
            let bound = ((long + 1) as f64 * u + rounding) * size + lost;
            assert!(error <= bound, "{kernel:?} Z[{i}, {j}] is off by {error:e}, allowed {bound:e}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn kernels_agree_with_f64(rows in 1usize..150, cols in 1usize..150, width in 1usize..70, exact: bool, seed: u64) {
        for kernel in Kernel::available() {
            check(kernel, rows, cols, width, exact, seed);
        }
    }
}

#[test]
fn odd_prime_and_unit_sizes() {
    for kernel in Kernel::available() {
        for (rows, cols) in
            [(1, 1), (1, 97), (97, 1), (31, 33), (33, 31), (32, 32), (64, 32), (257, 64), (64, 257), (521, 131)]
        {
            for width in [1, 16, 17, 48, 64] {
                check(kernel, rows, cols, width, false, 5);
                check(kernel, rows, cols, width, true, 6);
            }
        }
    }
}

#[test]
fn every_kernel_has_a_name_of_its_own_and_one_is_available() {
    let names: std::collections::BTreeSet<_> = Kernel::ALL.iter().map(|kernel| kernel.name()).collect();
    assert_eq!(names.len(), Kernel::ALL.len());
    assert!(Kernel::Portable.is_available() && Kernel::current().unwrap().is_available());
}

proptest! {
    #[test]
    fn elementwise_loops_agree_with_f64(count in 0usize..200, seed: u64) {
        let (base, tuned) = (values(count, seed), values(count, seed ^ 3));
        let mut delta = tuned.clone();
        let sums = subtract(&base, &mut delta, f32::MIN_POSITIVE);
        let exact: Vec<f64> = tuned.iter().zip(&base).map(|(&t, &b)| f64::from((f64::from(t) - f64::from(b)) as f32)).collect();
        prop_assert!(delta.iter().zip(&exact).all(|(&d, &e)| f64::from(d) == e));
        let energy: f64 = exact.iter().map(|d| d * d).sum();
        let base_energy: f64 = base.iter().map(|&b| f64::from(b) * f64::from(b)).sum();
        // Two orders of one f64 sum of positive terms: each errs by at most n·2⁻⁵³.
        let close = |a: f64, b: f64| (a - b).abs() <= 2.0 * count as f64 * f64::EPSILON * b.abs();
        prop_assert!(close(sums.energy, energy) && close(sums.base_energy, base_energy));
        prop_assert!(close(sum_squares(&delta), energy));
        let changed = tuned.iter().zip(&base).filter(|(tuned, base)| tuned != base);
        let binades: f64 = changed.map(|(&t, _)| f64::from(t).abs().max(2f64.powi(-126)).log2().floor().exp2().powi(2)).sum();
        prop_assert!(close(sums.binades, binades));
        prop_assert_eq!(f64::from(sums.largest), exact.iter().fold(0.0, |most: f64, d| most.max(d.abs())));
        let bytes: Vec<u8> = tuned.iter().flat_map(|&t| bf16::from_f32(t).to_le_bytes()).collect();
        let mut wide = vec![0f32; count];
        widen_bf16(&bytes, &mut wide);
        prop_assert_eq!(wide, tuned);
    }

    #[test]
    fn bf16_differences_are_packed_to_the_bit_as_any_machine_packs_them(rows in 1usize..12, cols in 1usize..110, row in 0usize..20, seed: u64) {
        let (base, tuned) = (values(rows * cols, seed), values(rows * cols, seed ^ 7));
        let bytes = |values: &[f32]| values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect::<Vec<u8>>();
        let size = cols.div_ceil(BLOCK) * AREA;
        let (mut fast, mut plain, mut steps) = (vec![0u16; size], vec![0u16; size], vec![0u16; size]);
        // Files hold tensors at any offset: an odd address on one side.
        let odd = [&[0][..], &bytes(&base)].concat();
        let packing = subtract_and_pack(&odd[1..], &bytes(&tuned), cols, row, &mut fast);
        let portable = pack::subtract_and_pack_portably(&bytes(&base), &bytes(&tuned), cols, row, &mut plain);
        let mut delta = tuned;
        let sums = subtract(&base, &mut delta, f32::MIN_POSITIVE);
        let rounding = pack_rows(&delta, cols, row, &mut steps);
        prop_assert_eq!((&fast, &fast), (&plain, &steps));
        let bits = |packing: &Packing| {
            let sums = packing.sums;
            [sums.energy.to_bits(), sums.base_energy.to_bits(), sums.binades.to_bits(), packing.rounding.lost.to_bits(), packing.rounding.leaning.to_bits(), u64::from(sums.largest.to_bits())]
        };
        prop_assert_eq!(bits(&packing), bits(&portable));
        // Other orders of the same sums of positive terms: each errs by at most n·2⁻⁵³.
        let close = |a: f64, b: f64| (a - b).abs() <= 2.0 * (rows * cols) as f64 * f64::EPSILON * b.abs();
        prop_assert!(close(packing.sums.energy, sums.energy) && close(packing.sums.base_energy, sums.base_energy));
        prop_assert!((packing.sums.binades - sums.binades).abs() <= 1e-12 * sums.binades + 1e-70);
        prop_assert!(close(packing.rounding.lost, rounding.lost) && packing.sums.largest == sums.largest);
    }

    #[test]
    fn packing_rounds_to_nearest_even_and_tells_what_it_lost(rows in 1usize..40, cols in 1usize..80, seed: u64) {
        let delta: Vec<f32> = values(rows * cols, seed).iter().enumerate().map(|(i, v)| v * (1.0 + i as f32 * 1e-4)).collect();
        let mut blocks = Blocks::<u16>::anything(rows, cols, &Workspace::default());
        let take = |strip: usize| &delta[strip * BLOCK * cols..((strip + 1) * BLOCK * cols).min(delta.len())];
        let strips = blocks.fill(|strip, blocks| Ok(pack_rows(take(strip), cols, 0, blocks))).unwrap();
        let lost: f64 = strips.iter().map(|rounding| rounding.lost).sum();
        let mut expected = 0.0;
        for i in 0..rows {
            for j in 0..cols {
                let (panel, block) = if rows < cols { (j / BLOCK, i / BLOCK) } else { (i / BLOCK, j / BLOCK) };
                let (row, column) = if rows < cols { (j, i) } else { (i, j) };
                let place = (panel * blocks.depth() + block) * AREA + row % BLOCK * BLOCK + column % BLOCK;
                let value = delta[i * cols + j];
                prop_assert_eq!(blocks.values()[place], bf16::from_f32(value).to_bits());
                expected += (f64::from(value) - f64::from(bf16::from_f32(value).to_f32())).powi(2);
            }
        }
        prop_assert!((lost - expected).abs() <= 1e-12 * expected);
    }
}
