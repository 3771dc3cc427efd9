//! Verifying: what a merge would give for one tensor, compared with the tuned model, without writing anything.

use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::difference::{Difference, with_scratch};
use crate::dtype::{Element, with_element};
use crate::error::{Error, Result};
use crate::panels;
use crate::rounding::Storing;
use crate::update::Update;

/// How far base + adapter is from tuned, for one tensor (over the rows that base and tuned have).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// ‖Δ‖²_F with Δ = tuned − base.
    pub delta_energy: f64,
    /// ‖Δ − adapter‖²_F: the adapter's own error, before the merged weights are rounded.
    pub error_energy: f64,
    /// ‖merged − tuned‖²_F: the same after rounding to the base's dtype.
    pub merged_error_energy: f64,
    /// Largest |merged − tuned|.
    pub largest: f64,
    /// Whether appended rows equal the tuned model's to the byte (true where there are none).
    pub new_rows_equal: bool,
}

/// Compares base + update with tuned.
///
/// # Errors
/// As [`crate::Delta::load`] and [`Update::load`].
pub fn compare(base: &Arc<Checkpoint>, tuned: &Arc<Checkpoint>, name: &str, update: &Update) -> Result<Comparison> {
    const BYTES: usize = 1 << 20;
    let difference = Difference::open(base, tuned, name)?;
    let update = update.load(base, name)?;
    let cols = update.matrix_shape().1;
    // A tuned model with fewer rows says nothing about the base's others.
    let rows = difference.rows() * difference.cols() / cols.max(1);
    let merged_dtype = update.target(&Storing::default());
    base.computable(name)?;
    let tuned_dtype = tuned.computable(name)?;
    // A vector is a row to the delta and a column to the update: compare by flat index.
    let parts = panels::map(panels::cut(rows, (BYTES / (4 * cols.max(1))).max(1)), |range| -> Result<[f64; 4]> {
        let (begin, len) = (range.start * cols, range.len() * cols);
        let approximation = update.delta_rows(range.clone())?;
        let (merged_bytes, _) = update.merged_rows(range, &Storing::default())?;
        let mut tuned_bytes = vec![0u8; len * (tuned_dtype.bits() / 8) as usize];
        tuned.read_bytes(name, begin as u64 * tuned_dtype.bits() / 8, &mut tuned_bytes)?;
        let decode = |dtype, bytes: &[u8]| {
            with_element!(dtype, E => bytes.chunks_exact(E::BYTES).map(E::read).collect::<Vec<f64>>())
                .ok_or_else(|| base.unsupported(name, dtype))
        };
        let (merged, target) = (decode(merged_dtype, &merged_bytes)?, decode(tuned_dtype, &tuned_bytes)?);
        let mut exact = vec![0f32; len];
        let sums = with_scratch(0, |_, scratch| difference.read(begin, &mut exact, scratch))?;
        let (mut error, mut merged_error, mut largest) = (0f64, 0f64, 0f64);
        for (((&d, &a), &m), &t) in exact.iter().zip(&approximation).zip(&merged).zip(&target) {
            let distance = m - t;
            error += (f64::from(d) - f64::from(a)).powi(2);
            merged_error += distance.powi(2);
            largest = largest.max(distance.abs());
        }
        // A replacement is exact but for the rounding that the merge does, so its own error is that of the merged tensor.
        let own_error = if update.is_replacement() { merged_error } else { error };
        Ok([sums.energy, own_error, merged_error, largest])
    });
    let mut result = Comparison {
        delta_energy: 0.0,
        error_energy: 0.0,
        merged_error_energy: 0.0,
        largest: 0.0,
        new_rows_equal: true,
    };
    for part in parts {
        let [energy, error, merged_error, largest] = part?;
        result.delta_energy += energy;
        result.error_energy += error;
        result.merged_error_energy += merged_error;
        result.largest = result.largest.max(largest);
    }
    let shape = update.merged_shape()?;
    let tuned_info = tuned.info(name)?;
    let has_fewer = tuned_info.shape.first() < shape.first() && tuned_info.shape.get(1..) == shape.get(1..);
    if shape != tuned_info.shape && !(has_fewer && update.appends_nothing()) {
        return Err(Error::ShapeMismatch { name: name.into(), base: shape, tuned: tuned_info.shape.clone() });
    }
    let appended = update.appended_bytes(&Storing::default())?;
    if merged_dtype == tuned_dtype && !appended.is_empty() {
        let mut expected = vec![0u8; appended.len()];
        tuned.read_bytes(name, tuned_info.nbytes.saturating_sub(appended.len() as u64), &mut expected)?;
        result.new_rows_equal = expected == appended;
    }
    Ok(result)
}
