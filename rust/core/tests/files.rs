//! Checkpoints, writer and merge through real files: round trips, bounds, refusals.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use lora_compress_core::{
    Checkpoint, Computed, Delta, Dtype, Error, HeaderFault, IndexFault, LowRank, Matrix, MergedShard, Rounding, Source,
    Spec, Storing, Update, Updates, Values, Writer, compare, decode, encode, merge_shard, same_bytes, unknown_tensors,
};
use proptest::prelude::*;
use tempfile::TempDir;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn write(path: &Path, tensors: &Tensors) -> u64 {
    let specs: Vec<Spec> = tensors
        .iter()
        .map(|(name, (dtype, shape, _))| Spec { name: name.clone(), dtype: *dtype, shape: shape.clone() })
        .collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = Writer::create(path, &specs, metadata).unwrap();
    for (spec, (_, _, bytes)) in specs.into_iter().zip(tensors.values()) {
        writer.begin(spec).unwrap();
        writer.write(bytes).unwrap();
    }
    writer.finish().unwrap()
}

fn tensor(dtype: Dtype, shape: &[usize], values: &[f32]) -> (Dtype, Vec<usize>, Vec<u8>) {
    (dtype, shape.to_vec(), encode(dtype, values).unwrap())
}

fn read_all(checkpoint: &Checkpoint) -> Tensors {
    checkpoint
        .tensors()
        .map(|(name, info)| {
            let mut bytes = vec![0u8; info.nbytes as usize];
            checkpoint.read_bytes(name, 0, &mut bytes).unwrap();
            (name.to_owned(), (info.dtype, info.shape.clone(), bytes))
        })
        .collect()
}

struct Case {
    folder: TempDir,
    base: Arc<Checkpoint>,
    updates: Updates,
}

impl Case {
    /// A base of one matrix `w` of `dtype`, and an adapter `s·B·A` for it.
    fn low_rank(dtype: Dtype, shape: [usize; 2], w: &[f32], rank: usize, b: &[f32], a: &[f32], scale: f64) -> Self {
        let folder = TempDir::new().unwrap();
        let file = |name: &str| folder.path().join(name);
        write(&file("base.safetensors"), &BTreeMap::from([("w".into(), tensor(dtype, &shape, w))]));
        write(
            &file("adapter.safetensors"),
            &BTreeMap::from([
                ("a".into(), tensor(Dtype::F32, &[rank, shape[1]], a)),
                ("b".into(), tensor(Dtype::F32, &[shape[0], rank], b)),
            ]),
        );
        let base = Arc::new(Checkpoint::open(&file("base.safetensors")).unwrap());
        let adapter = Arc::new(Checkpoint::open(&file("adapter.safetensors")).unwrap());
        let source = |name: &str| Source { checkpoint: adapter.clone(), name: name.into() };
        let term = LowRank { b: source("b"), a: source("a"), scale, transposed: false, part: None };
        let updates = BTreeMap::from([("w".to_owned(), Update { low_rank: vec![term], ..Update::default() })]);
        Self { folder, base, updates }
    }

    fn store(&self, name: &str, storing: &Storing) -> Result<(Tensors, MergedShard), Error> {
        let path = self.folder.path().join(name);
        let shard = merge_shard(&self.base, 0, &self.updates, storing, None, &path, &mut |_| Ok(()))?;
        Ok((read_all(&Checkpoint::open(&path)?), shard))
    }

    fn merge(&self, name: &str) -> Result<Tensors, Error> {
        let path = self.folder.path().join(name);
        merge_shard(&self.base, 0, &self.updates, &Storing::default(), None, &path, &mut |_| Ok(()))?;
        Ok(read_all(&Checkpoint::open(&path)?))
    }
}

fn floats() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::BF16), Just(Dtype::F16), Just(Dtype::F32), Just(Dtype::F64)]
}

/// Half an ulp of `dtype` at `value`.
fn half_ulp(dtype: Dtype, value: f64) -> f64 {
    let smallest_normal = match dtype {
        Dtype::F16 => 2f64.powi(-14),
        Dtype::F64 => f64::MIN_POSITIVE,
        _ => 2f64.powi(-126),
    };
    let binade = 2f64.powi(value.abs().max(smallest_normal).log2().floor() as i32);
    dtype.unit_roundoff().unwrap() * binade
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn files_round_trip_and_are_reproducible(
        shapes in prop::collection::btree_map("[a-z\"\\\\é.]{1,12}", (floats(), prop::collection::vec(0usize..5, 0..4)), 0..6),
        seed in any::<u8>(),
    ) {
        let folder = TempDir::new().unwrap();
        let tensors: Tensors = shapes.into_iter().map(|(name, (dtype, shape))| {
            let count: usize = shape.iter().product();
            let bytes = (0..count * dtype.bits() as usize / 8).map(|i| (i as u8).wrapping_mul(37) ^ seed).collect();
            (name, (dtype, shape, bytes))
        }).collect();
        let (first, second) = (folder.path().join("first.safetensors"), folder.path().join("second.safetensors"));
        let size = write(&first, &tensors);
        write(&second, &tensors);
        prop_assert_eq!(std::fs::metadata(&first).unwrap().len(), size);
        prop_assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
        prop_assert_eq!(read_all(&Checkpoint::open(&first).unwrap()), tensors);
    }

    /// |W' − (W + s·B·A)| ≤ ½ulp(W') + γ_{r+2}·(|W| + |s|·|B|·|A|), element by element.
    #[test]
    fn merging_rounds_once(
        dtype in floats(), rows in 1usize..20, cols in 1usize..20, rank in 1usize..9,
        seed in any::<u64>(), scale in -2.0f64..2.0, magnitude in -12i32..6,
    ) {
        let mut state = seed | 1;
        let mut next = |size: f32| {
            state ^= state << 13; state ^= state >> 7; state ^= state << 17;
            ((state >> 40) as f32 / 8_388_608.0 - 1.0) * size
        };
        let w: Vec<f32> = (0..rows * cols).map(|_| next(2f32.powi(magnitude))).collect();
        let b: Vec<f32> = (0..rows * rank).map(|_| next(1.0)).collect();
        let a: Vec<f32> = (0..rank * cols).map(|_| next(0.1)).collect();
        let case = Case::low_rank(dtype, [rows, cols], &w, rank, &b, &a, scale);
        let merged = case.merge("merged.safetensors").unwrap();
        let mut stored = vec![0f32; w.len()];
        prop_assert!(decode(dtype, &encode(dtype, &w).unwrap(), &mut stored));
        let mut result = vec![0f32; w.len()];
        prop_assert!(decode(dtype, &merged["w"].2, &mut result));
        let u = 2f64.powi(-24);
        let gamma = (rank + 2) as f64 * u / (1.0 - (rank + 2) as f64 * u);
        for i in 0..rows {
            for j in 0..cols {
                let terms: Vec<f64> = (0..rank).map(|k| scale * f64::from(b[i * rank + k]) * f64::from(a[k * cols + j])).collect();
                let base = f64::from(stored[i * cols + j]);
                let exact = base + terms.iter().sum::<f64>();
                let size = base.abs() + terms.iter().map(|t| t.abs()).sum::<f64>();
                let got = f64::from(result[i * cols + j]);
                // `decode` rounds F64 to f32: allow for that reading, not for the merge.
                let reading = if dtype == Dtype::F64 { half_ulp(Dtype::F32, exact) } else { 0.0 };
                let bound = half_ulp(dtype, exact.abs() + gamma * size) + gamma * size + reading;
                prop_assert!((got - exact).abs() <= bound, "{} at ({}, {}): {} for {}, bound {}", dtype, i, j, got, exact, bound);
            }
        }
    }

    /// A zero update keeps every bit: NaN payloads, infinities, −0 and subnormals included.
    #[test]
    fn a_zero_update_changes_no_bit(bits in prop::collection::vec(any::<u16>(), 12), half in any::<bool>()) {
        let dtype = if half { Dtype::F16 } else { Dtype::BF16 };
        let folder = TempDir::new().unwrap();
        let base_path = folder.path().join("base.safetensors");
        let raw: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        write(&base_path, &BTreeMap::from([("w".into(), (dtype, vec![3, 4], raw.clone()))]));
        let mut case = Case::low_rank(dtype, [3, 4], &[0.0; 12], 2, &[0.0; 6], &[1.0; 8], 1.0);
        case.base = Arc::new(Checkpoint::open(&base_path).unwrap());
        prop_assert_eq!(&case.merge("merged.safetensors").unwrap()["w"].2, &raw);
    }

    /// Any damage to a header is an error or a checkpoint whose every byte can be read; never a panic.
    #[test]
    fn damaged_headers_never_panic(position in 0usize..120, value in any::<u8>(), cut in 0usize..200) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("x.safetensors");
        write(&path, &BTreeMap::from([("a".into(), tensor(Dtype::F32, &[3], &[1.0, 2.0, 3.0]))]));
        let mut bytes = std::fs::read(&path).unwrap();
        if let Some(byte) = bytes.get_mut(position) { *byte = value; }
        bytes.truncate(bytes.len().saturating_sub(cut.saturating_sub(100)));
        std::fs::write(&path, bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            read_all(&checkpoint);
        }
    }
}

#[test]
fn merging_is_the_same_on_any_number_of_threads() {
    let (rows, cols, rank) = (900, 700, 5);
    let fill = |count: usize, step: f32| (0..count).map(|i| ((i as f32 * step) % 1.7) - 0.8).collect::<Vec<f32>>();
    let (w, b, a) = (fill(rows * cols, 0.37), fill(rows * rank, 0.11), fill(rank * cols, 0.73));
    let case = Case::low_rank(Dtype::BF16, [rows, cols], &w, rank, &b, &a, 0.5);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.merge(&format!("{threads}.safetensors")).unwrap())
    };
    assert_eq!(run(1), run(4));
}

#[test]
fn all_that_a_wide_tensor_is_made_of_is_summed_in_every_tile() {
    let (rows, cols, rank) = (300, 1100, 3);
    let fill = |count: usize, step: f32| (0..count).map(|i| ((i as f32 * step) % 1.7) - 0.8).collect::<Vec<f32>>();
    let (w, b, a) = (fill(rows * cols, 0.37), fill(rows * rank, 0.11), fill(rank * cols, 0.73));
    let (dense, other) = (fill(rows * cols, 0.53), fill(rows * cols, 0.29));
    let mut case = Case::low_rank(Dtype::F32, [rows, cols], &w, rank, &b, &a, 0.5);
    let side = case.folder.path().join("side.safetensors");
    write(&side, &BTreeMap::from([("other".into(), tensor(Dtype::F32, &[rows, cols], &other))]));
    let source = Source { checkpoint: Arc::new(Checkpoint::open(&side).unwrap()), name: "other".into() };
    let matrix = Matrix::new(rows, cols, dense.clone()).unwrap();
    let update = case.updates.get_mut("w").unwrap();
    update.computed = vec![Computed::new(move || Ok(Values::Dense(matrix.clone())))];
    update.replacements = vec![(source, 0.25)];
    let merged = case.merge("merged.safetensors").unwrap();
    let mut found = vec![0f32; rows * cols];
    assert!(decode(Dtype::F32, &merged["w"].2, &mut found));
    for (at, &found) in found.iter().enumerate() {
        let (i, j) = (at / cols, at % cols);
        let product: f64 = (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * cols + j])).sum();
        let [w, dense, other] = [w[at], dense[at], other[at]].map(f64::from);
        let exact = w + 0.5 * product + dense + 0.25 * (other - w);
        // Seven numbers of at most 1, each sum of which is rounded to f32.
        assert!((f64::from(found) - exact).abs() <= 7.0 * 8.0 * 2f64.powi(-24), "at {i}, {j}");
    }
}

#[test]
fn chances_follow_the_element_and_not_the_tile() {
    // One row of 2200 and two of 1100 with the same updates: an element has the same place in both.
    let fill = |count: usize, step: f32| (0..count).map(|i| ((i as f32 * step) % 1.7) - 0.8).collect::<Vec<f32>>();
    let (w, a) = (fill(2200, 0.37), fill(1100, 0.73));
    let storing = Storing { dtype: None, rounding: Rounding::Stochastic(3) };
    let wide = Case::low_rank(Dtype::BF16, [1, 2200], &w, 1, &[0.01], &[a.clone(), a.clone()].concat(), 1.0);
    let tall = Case::low_rank(Dtype::BF16, [2, 1100], &w, 1, &[0.01, 0.01], &a, 1.0);
    let bytes = |case: &Case| case.store("merged.safetensors", &storing).unwrap().0["w"].2.clone();
    assert_eq!(bytes(&wide), bytes(&tall));
}

#[test]
fn a_replacement_is_copied_and_new_rows_are_appended() {
    let mut case = Case::low_rank(Dtype::BF16, [2, 3], &[1.0; 6], 1, &[0.0; 2], &[0.0; 3], 1.0);
    let side_path = case.folder.path().join("side.safetensors");
    let rows = tensor(Dtype::BF16, &[2, 3], &[7.0, 8.0, 9.0, 10.0, 11.0, 12.0]);
    let values = tensor(Dtype::BF16, &[2, 3], &[-0.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    write(&side_path, &BTreeMap::from([("rows".into(), rows.clone()), ("values".into(), values.clone())]));
    let side = Arc::new(Checkpoint::open(&side_path).unwrap());
    let source = |name: &str| Source { checkpoint: side.clone(), name: name.into() };
    case.updates = BTreeMap::from([(
        "w".to_owned(),
        Update {
            low_rank: vec![],
            computed: vec![],
            replacements: vec![(source("values"), 1.0)],
            new_rows: Some(source("rows")),
        },
    )]);
    let merged = case.merge("merged.safetensors").unwrap();
    assert_eq!(merged["w"].1, [4, 3]);
    assert_eq!(merged["w"].2, [values.2, rows.2].concat());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn other_dtypes_are_rounded_once_from_the_exact_sum(
        from in floats(), to in floats(), seed in any::<u64>(), stochastic in any::<bool>(),
        // Of one tile and of several, of one panel and of two.
        (rows, cols) in prop_oneof![Just((9, 21)), Just((5, 512)), Just((40, 513)), Just((3, 1100))],
    ) {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / 8_388_608.0 - 1.0) * 2f32.powi((state >> 33) as i32 % 6)
        };
        let rank = 2;
        let (w, b, a): (Vec<f32>, Vec<f32>, Vec<f32>) = (
            (0..rows * cols).map(|_| next()).collect(),
            (0..rows * rank).map(|_| next()).collect(),
            (0..rank * cols).map(|_| next()).collect(),
        );
        let case = Case::low_rank(from, [rows, cols], &w, rank, &b, &a, 1.0);
        let rounding = if stochastic { Rounding::Stochastic(seed) } else { Rounding::Nearest };
        let storing = Storing { dtype: Some(to), rounding };
        let (merged, _) = case.store("merged.safetensors", &storing).unwrap();
        prop_assert_eq!(&merged, &case.store("again.safetensors", &storing).unwrap().0);
        let values = |dtype, bytes: &[u8]| {
            let mut values = vec![0f32; rows * cols];
            assert!(decode(dtype, bytes, &mut values));
            values
        };
        let stored = values(from, &read_all(&case.base)["w"].2);
        prop_assert_eq!(merged["w"].0, to);
        let found = values(to, &merged["w"].2);
        for i in 0..rows {
            for j in 0..cols {
                let terms = (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * cols + j]));
                let (delta, size) = terms.fold((0.0, 0.0), |(sum, size), term: f64| (sum + term, size + term.abs()));
                let exact = f64::from(stored[i * cols + j]) + delta;
                let spacings = if stochastic { 2.0 } else { 1.0 };
                // The product is summed in f32, and f32 and F64 are compared as f32.
                let bound = spacings * half_ulp(to, exact) + (rank + 2) as f64 * 2f64.powi(-24) * (size + exact.abs());
                prop_assert!((f64::from(found[i * cols + j]) - exact).abs() <= bound, "{from} to {to} at {i}, {j}");
            }
        }
    }
}

#[test]
fn rounding_at_random_keeps_the_mean_and_rounding_to_nearest_loses_small_updates() {
    // A quarter of the spacing of bf16 at 1: to nearest nothing happens, at random a quarter of the elements move.
    let (rows, cols) = (64, 256);
    let case = Case::low_rank(
        Dtype::BF16,
        [rows, cols],
        &vec![1.0; rows * cols],
        1,
        &vec![1.0; rows],
        &vec![2f32.powi(-9); cols],
        1.0,
    );
    let (_, nearest) = case.store("nearest.safetensors", &Storing::default()).unwrap();
    let [lost] = nearest.tensors.as_slice() else { panic!("one tensor is merged") };
    assert_eq!((lost.touched, lost.lost, lost.got), (16384, 16384, 0.0));
    let random = |seed| Storing { dtype: None, rounding: Rounding::Stochastic(seed) };
    let (first, kept) = case.store("first.safetensors", &random(1)).unwrap();
    let [kept] = kept.tensors.as_slice() else { panic!("one tensor is merged") };
    // A binomial share of 16384 tries: five standard deviations are 0.017.
    assert!((kept.got / kept.asked - 1.0).abs() < 4.0 * 0.017, "{}", kept.got / kept.asked);
    assert_ne!(first, case.store("second.safetensors", &random(2)).unwrap().0);
}

#[test]
fn computed_terms_are_added_once() {
    let mut case = Case::low_rank(Dtype::F32, [2, 3], &[1.0; 6], 1, &[1.0, 2.0], &[1.0, 0.0, -1.0], 1.0);
    let matrix = |rows, cols, values: &[f32]| Matrix::new(rows, cols, values.to_vec()).unwrap();
    let pair = move || Ok(Values::Pair(matrix(2, 1, &[1.0, 2.0]), matrix(1, 3, &[1.0, 0.0, -1.0])));
    let dense = move || Ok(Values::Dense(matrix(2, 3, &[0.5, 0.0, 0.0, 0.0, 0.0, 4.0])));
    let update = case.updates.get_mut("w").unwrap();
    update.computed = vec![Computed::new(pair), Computed::new(dense)];
    let merged = case.merge("merged.safetensors").unwrap();
    assert_eq!(merged["w"].2, tensor(Dtype::F32, &[2, 3], &[3.5, 1.0, -1.0, 5.0, 1.0, 1.0]).2);
    for (misfit, what) in [
        (Computed::new(move || Ok(Values::Dense(matrix(3, 2, &[0.0; 6])))), "what was computed"),
        (
            Computed::new(move || Ok(Values::Pair(matrix(2, 2, &[0.0; 4]), matrix(1, 3, &[0.0; 3])))),
            "what was computed",
        ),
        (Computed::new(|| Err(Error::Computed { name: String::new(), reason: "out of luck".into() })), "out of luck"),
    ] {
        case.updates.get_mut("w").unwrap().computed = vec![misfit];
        let error = case.merge("other.safetensors").unwrap_err();
        assert!(error.to_string().contains(what) && error.to_string().contains("`w`"), "{error}");
    }
}

#[test]
fn overflow_and_misfits_are_named() {
    let case = Case::low_rank(Dtype::F16, [1, 2], &[60_000.0, 1.0], 1, &[1.0], &[10_000.0, 0.0], 1.0);
    let error = case.merge("merged.safetensors").unwrap_err();
    assert!(matches!(&error, Error::Overflow { name, index: 0, .. } if name == "w"), "{error}");
    assert!(!case.folder.path().join("merged.safetensors").exists());
    assert_eq!(std::fs::read_dir(case.folder.path()).unwrap().count(), 2, "a partial file was left behind");

    let mut case = Case::low_rank(Dtype::F16, [1, 2], &[1.0, 1.0], 1, &[1.0], &[1.0, 1.0], 1.0);
    case.updates.get_mut("w").unwrap().low_rank[0].transposed = true;
    assert!(matches!(case.merge("merged.safetensors"), Err(Error::UpdateShape { .. })));
    case.updates = BTreeMap::from([("elsewhere".to_owned(), Update::default())]);
    assert_eq!(unknown_tensors(&case.base, &case.updates), ["elsewhere"]);
}

#[test]
fn an_interrupted_merge_leaves_nothing() {
    let case = Case::low_rank(Dtype::F32, [8, 8], &[1.0; 64], 1, &[1.0; 8], &[1.0; 8], 1.0);
    let path = case.folder.path().join("merged.safetensors");
    let result =
        merge_shard(&case.base, 0, &case.updates, &Storing::default(), None, &path, &mut |_| Err(Error::Interrupted));
    assert!(matches!(result, Err(Error::Interrupted)));
    assert_eq!(std::fs::read_dir(case.folder.path()).unwrap().count(), 2);
}

#[test]
fn comparing_measures_the_merge() {
    let (w, b, a) = ([1.0, 2.0, 3.0, 4.0], [0.5, 0.25], [0.125, -1.0]);
    let case = Case::low_rank(Dtype::F32, [2, 2], &w, 1, &b, &a, 2.0);
    let merged = case.merge("tuned.safetensors").unwrap();
    assert_eq!(merged["w"].2, encode(Dtype::F32, &[1.125, 1.0, 3.0625, 3.5]).unwrap());
    let tuned = Arc::new(Checkpoint::open(&case.folder.path().join("tuned.safetensors")).unwrap());
    let same = compare(&case.base, &tuned, "w", &case.updates["w"]).unwrap();
    assert_eq!((same.error_energy, same.merged_error_energy, same.largest), (0.0, 0.0, 0.0));
    let none = compare(&case.base, &tuned, "w", &Update::default()).unwrap();
    assert_eq!(none.error_energy, none.delta_energy);
    assert_eq!(none.largest, 1.0);
}

#[test]
fn deltas_are_formed_from_any_pair_of_dtypes() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    write(&path("a"), &BTreeMap::from([("w".into(), tensor(Dtype::BF16, &[2], &[1.0, -2.0]))]));
    write(&path("b"), &BTreeMap::from([("w".into(), tensor(Dtype::F64, &[3], &[1.5, -2.25, 9.0]))]));
    write(&path("c"), &BTreeMap::from([("w".into(), tensor(Dtype::F16, &[2], &[1.0, f32::NAN]))]));
    let open = |name: &str| Arc::new(Checkpoint::open(&path(name)).unwrap());
    let delta = Delta::load(&open("a"), &open("b"), "w").unwrap();
    assert_eq!(delta.read_rows(0..1).unwrap(), [0.5, -0.25]);
    assert_eq!((delta.energy(), delta.base_energy()), (0.3125, 5.0));
    assert_eq!(Delta::load(&open("b"), &open("a"), "w").unwrap().read_rows(0..1).unwrap(), [-0.5, 0.25], "fewer rows");
    write(&path("d"), &BTreeMap::from([("w".into(), tensor(Dtype::F32, &[1, 2], &[1.0, 2.0]))]));
    assert!(matches!(Delta::load(&open("b"), &open("d"), "w"), Err(Error::ShapeMismatch { .. })));
    let error = Delta::load(&open("a"), &open("c"), "w").unwrap_err();
    assert!(matches!(&error, Error::NonFinite { index: 1, path, .. } if path.ends_with("c")), "{error}");
    assert!(same_bytes((&open("a"), "w"), (&open("a"), "w")).unwrap());
    assert!(!same_bytes((&open("a"), "w"), (&open("c"), "w")).unwrap());
    std::fs::hard_link(path("a"), path("linked")).unwrap();
    assert!(open("a").shards()[0].is_same_file(&open("linked").shards()[0]));
    assert!(!open("a").shards()[0].is_same_file(&open("c").shards()[0]));
    assert!(same_bytes((&open("a"), "w"), (&open("linked"), "w")).unwrap());
}

#[test]
fn unaligned_tensors_are_legal() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("odd.safetensors");
    let json = r#"{"flag":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}"#;
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.as_bytes());
    bytes.push(1);
    bytes.extend(encode(Dtype::F32, &[1.5, -2.5]).unwrap());
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().read_f32("w").unwrap(), [1.5, -2.5]);
}

fn sharded(index: &str) -> (TempDir, Result<Checkpoint, Error>) {
    let folder = TempDir::new().unwrap();
    let one = BTreeMap::from([("a".into(), tensor(Dtype::F32, &[1], &[1.0]))]);
    let two = BTreeMap::from([("b".into(), tensor(Dtype::F32, &[1], &[2.0]))]);
    write(&folder.path().join("model-1.safetensors"), &one);
    write(&folder.path().join("model-2.safetensors"), &two);
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    let checkpoint = Checkpoint::open(folder.path());
    (folder, checkpoint)
}

#[test]
fn a_sharded_checkpoint_is_one_checkpoint() {
    let (_folder, checkpoint) = sharded(r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#);
    let checkpoint = checkpoint.unwrap();
    assert_eq!(checkpoint.shards().len(), 2);
    assert_eq!(checkpoint.read_f32("b").unwrap(), [2.0]);
    assert!(checkpoint.shard_of("b").unwrap().path().ends_with("model-2.safetensors"));
}

#[test]
fn every_false_index_is_refused() {
    let fault = |index: &str| match sharded(index).1 {
        Err(Error::Index { fault, .. }) => fault,
        other => panic!("{index}: {other:?}"),
    };
    assert!(matches!(fault("{"), IndexFault::Json(_)));
    assert!(matches!(fault(r#"{"weight_map":[]}"#), IndexFault::Json(_)));
    for name in ["../model-1.safetensors", "/etc/passwd", "a\\\\b", "..", "", "C:x"] {
        let index = format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#);
        assert!(matches!(fault(&index), IndexFault::ShardName(_)), "{name}");
    }
    let missing = r#"{"weight_map":{"a":"model-1.safetensors","ghost":"model-2.safetensors"}}"#;
    assert!(matches!(fault(missing), IndexFault::NotInShard { tensor, .. } if tensor == "ghost"));
    let (_folder, result) = sharded(r#"{"weight_map":{"a":"model-3.safetensors"}}"#);
    assert!(matches!(result, Err(Error::Io { path, .. }) if path.ends_with("model-3.safetensors")));
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let index = r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    let (folder, _) = sharded(index);
    let both = BTreeMap::from([
        ("a".into(), tensor(Dtype::F32, &[1], &[3.0])),
        ("b".into(), tensor(Dtype::F32, &[1], &[2.0])),
    ]);
    write(&folder.path().join("model-2.safetensors"), &both);
    let error = Checkpoint::open(folder.path()).unwrap_err();
    let fault = |error: &Error| matches!(error, Error::Index { fault: IndexFault::InTwoShards { tensor, .. }, .. } if tensor == "a");
    assert!(fault(&error), "{error}");
}

#[test]
fn directories_without_a_checkpoint_say_what_they_hold() {
    let folder = TempDir::new().unwrap();
    let message = || Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(message().ends_with("`pytorch_model.bin`)"));
    std::fs::write(folder.path().join("adapter_model.safetensors"), b"x").unwrap();
    assert!(message().ends_with("`pytorch_model.bin`)"), "an adapter is no model");
    std::fs::write(folder.path().join("epoch-3.pt"), b"x").unwrap();
    assert!(message().contains("if you mean `epoch-3.pt`"));
    for name in ["one.safetensors", "two.safetensors"] {
        std::fs::write(folder.path().join(name), b"x").unwrap();
    }
    assert!(message().contains("there are `one.safetensors` and `two.safetensors`"));
    std::fs::remove_file(folder.path().join("two.safetensors")).unwrap();
    assert!(matches!(Checkpoint::open(folder.path()), Err(Error::Header { .. })), "the only one is meant");
    let file = folder.path().join("adapter_model.safetensors");
    assert!(matches!(Checkpoint::open(&file), Err(Error::Header { fault: HeaderFault::TooShort(1), .. })));
    assert!(matches!(Checkpoint::open(&folder.path().join("none")), Err(Error::Io { .. })));
}

#[test]
fn a_file_that_shrinks_after_opening_is_an_error() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("w.safetensors");
    write(&path, &BTreeMap::from([("w".into(), tensor(Dtype::F32, &[64], &[1.0; 64]))]));
    let checkpoint = Checkpoint::open(&path).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = checkpoint.read_f32("w").unwrap_err();
    assert!(error.to_string().contains("tensor `w`"), "{error}");
}

#[test]
fn the_writer_refuses_a_broken_protocol() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("w.safetensors");
    let spec = || Spec { name: "w".into(), dtype: Dtype::F32, shape: vec![2] };
    let create = || Writer::create(&path, &[spec()], BTreeMap::new()).unwrap();
    let mut writer = create();
    writer.begin(spec()).unwrap();
    assert!(writer.write(&[0; 9]).is_err());
    writer.write(&[0; 4]).unwrap();
    assert!(writer.finish().is_err(), "an incomplete tensor");
    let mut writer = create();
    writer.begin(spec()).unwrap();
    writer.write(&[0; 8]).unwrap();
    assert!(writer.begin(spec()).is_err(), "the same name twice");
    let mut writer = create();
    writer.begin(Spec { name: "another, longer than what was announced".into(), ..spec() }).unwrap();
    writer.write(&[0; 8]).unwrap();
    assert!(writer.finish().is_err());
    assert!(!path.exists());
}

#[test]
fn rounding_agrees_with_half() {
    for value in [1.0f32, 1.003_906_3, -3.337, 65_519.0, 1e-7, 3e-41] {
        assert_eq!(encode(Dtype::BF16, &[value]).unwrap(), bf16::from_f32(value).to_le_bytes());
        assert_eq!(encode(Dtype::F16, &[value]).unwrap(), f16::from_f32(value).to_le_bytes());
    }
}
