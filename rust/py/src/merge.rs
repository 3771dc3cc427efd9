//! `LowRank`, `Update`, and what is done with them: `merge_shard` and `compare`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::PoisonError;

use lora_compress_core as core;
use numpy::{PyArray2, PyReadonlyArray2};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::delta::{array, matrix, parse_dtype};
use crate::gate;
use crate::patch::Patch;

/// One low-rank term scale·B·A, by the names of its factors in `adapter`: B (out, r), A (r, in).
///
/// `transposed`: the base stores the weight as (in, out), so that (B·A)ᵀ is added.
#[pyclass(frozen, from_py_object, module = "lora_compress._native")]
#[derive(Clone)]
pub struct LowRank {
    inner: core::LowRank,
}

#[pymethods]
impl LowRank {
    #[new]
    #[pyo3(signature = (adapter, b, a, *, scale=1.0, transposed=false))]
    fn new(adapter: &Checkpoint, b: String, a: String, scale: f64, transposed: bool) -> Self {
        let source = |name| core::Source { checkpoint: adapter.inner.clone(), name };
        Self { inner: core::LowRank { b: source(b), a: source(a), scale, transposed, part: None } }
    }

    /// The terms of the `count` matrices of one tensor, in their order, where A is stored as (count·r, in), matrix by matrix, and
    /// B as (out, r·count), the columns of one matrix `count` apart.
    #[staticmethod]
    #[pyo3(signature = (adapter, b, a, count, *, scale=1.0, transposed=false))]
    fn parts(adapter: &Checkpoint, b: String, a: String, count: usize, scale: f64, transposed: bool) -> Vec<Self> {
        let whole = Self::new(adapter, b, a, scale, transposed).inner;
        let part = |part| Self { inner: core::LowRank { part: Some(part), ..whole.clone() } };
        core::Part::all(count).into_iter().map(part).collect()
    }

    /// Names of B and A in the adapter.
    #[getter]
    fn keys(&self) -> (&str, &str) {
        (&self.inner.b.name, &self.inner.a.name)
    }

    /// What B·A is multiplied with.
    #[getter]
    fn scale(&self) -> f64 {
        self.inner.scale
    }

    /// Whether (B·A)ᵀ is added.
    #[getter]
    fn transposed(&self) -> bool {
        self.inner.transposed
    }

    /// The same term, `weight` times.
    fn scaled(&self, weight: f64) -> Self {
        Self { inner: core::LowRank { scale: self.inner.scale * weight, ..self.inner.clone() } }
    }

    /// The factors in the base tensor's own orientation, scale included: float32 (rows, r) and (r, cols) whose product is
    /// added to it.
    fn factors<'py>(&self, py: Python<'py>) -> PyResult<Factors<'py>> {
        let (left, right) = gate::run_here(py, || self.inner.factors())?;
        Ok((array(py, left)?, array(py, right)?))
    }
}

type Factors<'py> = (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<f32>>);

/// What adapters do to one tensor of the base: low-rank terms, computed terms, stored replacements, appended rows.
///
/// `replacements`: where values that take the place of the base's are stored, and a weight. One of weight 1 is copied; of others each
/// difference to the base is added, weighted. `computed`: callables that return what is added to the base's tensor, a float32 pair B (rows, r), A (r, cols) or a float32 matrix
/// (rows, cols). Each is called when the tensor's turn comes, on any thread; what it raises becomes a `TensorError`.
#[pyclass(frozen, from_py_object, module = "lora_compress._native")]
#[derive(Clone)]
pub struct Update {
    inner: core::Update,
}

type Stored<'py> = (PyRef<'py, Checkpoint>, String);
type Weighted<'py> = (PyRef<'py, Checkpoint>, String, f64);

#[pymethods]
impl Update {
    #[new]
    #[pyo3(signature = (*, low_rank=Vec::new(), computed=Vec::new(), replacements=Vec::new(), new_rows=None))]
    fn new(
        low_rank: Vec<LowRank>,
        computed: Vec<Py<PyAny>>,
        replacements: Vec<Weighted<'_>>,
        new_rows: Option<Stored<'_>>,
    ) -> Self {
        let source = |checkpoint: &Checkpoint, name| core::Source { checkpoint: checkpoint.inner.clone(), name };
        Self {
            inner: core::Update {
                low_rank: low_rank.into_iter().map(|term| term.inner).collect(),
                computed: computed.into_iter().map(computed_term).collect(),
                replacements: replacements
                    .into_iter()
                    .map(|(checkpoint, name, weight)| (source(&checkpoint, name), weight))
                    .collect(),
                new_rows: new_rows.map(|(checkpoint, name)| source(&checkpoint, name)),
            },
        }
    }
}

#[derive(FromPyObject)]
enum Values<'py> {
    Pair(PyReadonlyArray2<'py, f32>, PyReadonlyArray2<'py, f32>),
    Dense(PyReadonlyArray2<'py, f32>),
}

fn computed_term(callable: Py<PyAny>) -> core::Computed {
    core::Computed::new(move || {
        Python::attach(|py| {
            Ok(match callable.call0(py)?.extract::<Values<'_>>(py)? {
                Values::Pair(b, a) => core::Values::Pair(matrix(&b)?, matrix(&a)?),
                Values::Dense(values) => core::Values::Dense(matrix(&values)?),
            })
        })
        .map_err(|error: PyErr| {
            if Python::attach(|py| error.is_instance_of::<PyKeyboardInterrupt>(py)) {
                return core::Error::Interrupted;
            }
            core::Error::Computed { name: String::new(), reason: error.to_string() }
        })
    })
}

/// How far base + adapter is from tuned, for one tensor, over the rows of the base.
#[pyclass(frozen, get_all, module = "lora_compress._native")]
pub struct Comparison {
    /// ‖Δ‖² with Δ = tuned − base.
    delta_energy: f64,
    /// ‖Δ − adapter‖², before the merged weights are rounded.
    error_energy: f64,
    /// ‖merged − tuned‖², after rounding to the base's dtype.
    merged_error_energy: f64,
    /// Largest |merged − tuned|.
    largest: f64,
    /// Whether appended rows equal the tuned model's.
    new_rows_equal: bool,
}

/// What became of the update D of one merged tensor.
#[pyclass(frozen, get_all, module = "lora_compress._native")]
pub struct MergedTensor {
    /// Its name.
    name: String,
    /// Elements that D would change.
    touched: u64,
    /// Those that rounding left as they were.
    lost: u64,
    /// ⟨D, D⟩.
    asked: f64,
    /// ⟨merged − base, D⟩.
    got: f64,
}

/// Writes the merged form of one shard of `base` to `path`; returns the size of the file in bytes, and what became of every update
/// that is summed.
///
/// Tensors that `updates` does not name are copied byte for byte, or rounded once to `dtype` where that is given. With a seed,
/// `stochastic`, sums are rounded to BF16 and F16 at random. `patch` gets what leads back to the base. `progress(bytes)` is called as bytes are written; what it raises ends the
/// merge and leaves nothing behind.
#[pyfunction]
#[pyo3(signature = (base, shard, updates, path, progress=None, *, dtype=None, stochastic=None, patch=None))]
#[allow(clippy::too_many_arguments)] // They are Python's, and have names there.
pub fn merge_shard(
    py: Python<'_>,
    base: &Checkpoint,
    shard: usize,
    updates: BTreeMap<String, Update>,
    path: PathBuf,
    progress: Option<Py<PyAny>>,
    dtype: Option<&str>,
    stochastic: Option<u64>,
    patch: Option<PyRef<'_, Patch>>,
) -> PyResult<(u64, Vec<MergedTensor>)> {
    let updates: core::Updates = updates.into_iter().map(|(name, update)| (name, update.inner)).collect();
    let storing = core::Storing {
        dtype: dtype.map(parse_dtype).transpose()?,
        rounding: stochastic.map_or(core::Rounding::Nearest, core::Rounding::Stochastic),
    };
    let patch = patch.map(|patch| patch.inner.clone());
    let merged = gate::run_reporting(py, progress, |report| {
        let mut held = patch.as_ref().map(|patch| patch.lock().unwrap_or_else(PoisonError::into_inner));
        let patch = held.as_mut().and_then(|held| held.as_mut());
        core::merge_shard(&base.inner, shard, &updates, &storing, patch, &path, report)
    })?;
    let tensors = merged.tensors.into_iter().map(|tensor| {
        let core::MergedTensor { name, touched, lost, asked, got } = tensor;
        MergedTensor { name, touched, lost, asked, got }
    });
    Ok((merged.nbytes, tensors.collect()))
}

/// Compares base + update with tuned for one tensor, without writing anything.
#[pyfunction]
#[pyo3(signature = (base, tuned, name, update=None))]
pub fn compare(
    py: Python<'_>,
    base: &Checkpoint,
    tuned: &Checkpoint,
    name: &str,
    update: Option<&Update>,
) -> PyResult<Comparison> {
    let update = update.map(|update| update.inner.clone()).unwrap_or_default();
    let result = gate::run(py, || core::compare(&base.inner, &tuned.inner, name, &update))?;
    Ok(Comparison {
        delta_energy: result.delta_energy,
        error_energy: result.error_energy,
        merged_error_energy: result.merged_error_energy,
        largest: result.largest,
        new_rows_equal: result.new_rows_equal,
    })
}
