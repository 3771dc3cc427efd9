//! `Delta`: the handle on one tensor's ΔW that decompositions are fitted to.

use lora_compress_core as core;
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2, PyReadonlyArrayDyn, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::error::to_python;
use crate::gate;
use crate::rank::Spectrum;

type Svd<'py> = (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray1<f64>>, Bound<'py, PyArray2<f32>>);

/// Memory that deltas hand on to the next ones: much faster than new memory where many follow each other. Freed with the last
/// delta that uses it.
#[pyclass(frozen, module = "lora_compress._native")]
#[derive(Default)]
pub struct Workspace {
    inner: core::Workspace,
}

#[pymethods]
impl Workspace {
    #[new]
    fn new() -> Self {
        Self::default()
    }
}

/// ΔW = tuned − base of one tensor, seen as a matrix of `shape[0]` rows (a vector is one row).
///
/// Where one side has more rows, the delta covers those that both have. Raises `TensorError` for missing tensors, shapes
/// that differ otherwise, dtypes other than BF16, F16, F32 and F64, and values that are not finite. Holds two bytes an element, and
/// the open files.
#[pyclass(frozen, module = "lora_compress._native")]
pub struct Delta {
    inner: core::Delta,
    name: String,
}

#[pymethods]
impl Delta {
    #[new]
    #[pyo3(signature = (base, tuned, name, workspace=None))]
    fn new(
        py: Python<'_>,
        base: &Checkpoint,
        tuned: &Checkpoint,
        name: String,
        workspace: Option<&Workspace>,
    ) -> PyResult<Self> {
        let workspace = workspace.map_or_else(core::Workspace::default, |workspace| workspace.inner.clone());
        let inner = gate::run(py, || core::Delta::load_in(&workspace, &base.inner, &tuned.inner, &name))?;
        Ok(Self { inner, name })
    }

    /// A delta from values in memory, float32 of shape (rows, cols).
    #[staticmethod]
    #[pyo3(signature = (values, name="delta"))]
    fn from_array(values: PyReadonlyArray2<'_, f32>, name: &str) -> PyResult<Self> {
        let matrix = matrix(&values)?;
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let inner = core::Delta::from_values(matrix.into_values(), rows, cols).map_err(to_python)?;
        Ok(Self { inner, name: name.into() })
    }

    /// The rows of several deltas, one below the other: ΔW of layers that share their input. Read anew from the files, two bytes
    /// an element again. Raises `TensorError` when the columns differ or there are none.
    #[staticmethod]
    fn stack(py: Python<'_>, deltas: Vec<PyRef<'_, Self>>) -> PyResult<Self> {
        let name = deltas.iter().map(|delta| delta.name.as_str()).collect::<Vec<_>>().join(" + ");
        let parts: Vec<&core::Delta> = deltas.iter().map(|delta| &delta.inner).collect();
        let inner = gate::run(py, || core::Delta::stack(&parts))?;
        Ok(Self { inner, name })
    }

    /// The tensor's name.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    /// (rows, cols).
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.inner.rows(), self.inner.cols())
    }

    /// ‖Δ‖² (squared Frobenius norm, summed in float64).
    #[getter]
    fn energy(&self) -> f64 {
        self.inner.energy()
    }

    /// ‖W_base‖² over the same elements.
    #[getter]
    fn base_energy(&self) -> f64 {
        self.inner.base_energy()
    }

    /// Energy that rounding to tuned's dtype has added to Δ: Σ spacing²/12 over the elements that changed.
    #[getter]
    fn rounding_energy(&self) -> f64 {
        self.inner.rounding_energy()
    }

    /// Leading singular triplets Δ ≈ U·diag(σ)·Vᵀ: U float32 (rows, r), σ float64 (r,), Vᵀ float32 (r, cols).
    ///
    /// r is `rank`, or less when fewer singular values differ from zero; with `error` instead, as many as bring the error down
    /// to that share of ‖Δ‖. The error ‖Δ − UσVᵀ‖ is at most `tolerance` above the optimum of its rank, relatively.
    /// Deterministic in (seed, name), whatever the number of threads.
    #[pyo3(signature = (rank=None, *, error=None, seed=0, tolerance=1e-4))]
    fn truncated_svd<'py>(
        &self,
        py: Python<'py>,
        rank: Option<usize>,
        error: Option<f64>,
        seed: u64,
        tolerance: f64,
    ) -> PyResult<Svd<'py>> {
        let options = self.options(rank, error, seed, tolerance)?;
        let svd = gate::run(py, || core::truncated_svd(&self.inner, options))?;
        Ok((array(py, svd.u)?, svd.sigma.into_pyarray(py), array(py, svd.vt)?))
    }

    /// The singular values of `truncated_svd`, with the energies of Δ, as a `Spectrum`.
    #[pyo3(signature = (rank=None, *, error=None, seed=0, tolerance=1e-4))]
    fn spectrum(
        &self,
        py: Python<'_>,
        rank: Option<usize>,
        error: Option<f64>,
        seed: u64,
        tolerance: f64,
    ) -> PyResult<Spectrum> {
        let options = self.options(rank, error, seed, tolerance)?;
        let sigma = gate::run(py, || core::singular_values(&self.inner, options))?;
        Spectrum::of(&self.inner, sigma)
    }

    /// ‖Δ − b·a‖²; b float32 (rows, r), a float32 (r, cols). From the residual itself, formed from the files, or from a product
    /// with the packed delta where that is a few millionths away: if what rounding took from it is independent of b·a.
    fn residual_energy(
        &self,
        py: Python<'_>,
        b: PyReadonlyArray2<'_, f32>,
        a: PyReadonlyArray2<'_, f32>,
    ) -> PyResult<f64> {
        let (b, a) = (matrix(&b)?, matrix(&a)?);
        gate::run(py, || self.inner.residual_energy(&b, &a))
    }

    /// Rows start..stop of Δ as float32.
    fn rows<'py>(&self, py: Python<'py>, start: usize, stop: usize) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (rows, cols) = self.shape();
        let stop = stop.min(rows);
        let values = gate::run(py, || self.inner.read_rows(start.min(stop)..stop))?;
        values.into_pyarray(py).reshape([stop - start.min(stop), cols])
    }

    /// Δ·x for x float32 (cols, k).
    fn matmul<'py>(&self, py: Python<'py>, x: PyReadonlyArray2<'_, f32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let x = matrix(&x)?;
        if x.rows() != self.inner.cols() {
            return Err(PyValueError::new_err(format!("x has {} rows, Δ has {} columns", x.rows(), self.inner.cols())));
        }
        array(py, gate::run(py, || self.inner.times(&x))?)
    }

    /// Δᵀ·y for y float32 (rows, k).
    fn rmatmul<'py>(&self, py: Python<'py>, y: PyReadonlyArray2<'_, f32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let y = matrix(&y)?;
        if y.rows() != self.inner.rows() {
            return Err(PyValueError::new_err(format!("y has {} rows, Δ has {}", y.rows(), self.inner.rows())));
        }
        array(py, gate::run(py, || self.inner.transpose_times(&y))?)
    }

    fn __repr__(&self) -> String {
        format!("Delta({:?}, shape={:?})", self.name, self.shape())
    }
}

impl Delta {
    fn options(
        &self,
        rank: Option<usize>,
        error: Option<f64>,
        seed: u64,
        tolerance: f64,
    ) -> PyResult<core::SvdOptions> {
        let target = match (rank, error) {
            (Some(rank), None) if rank > 0 => core::Target::Rank(rank),
            (None, Some(error)) if error > 0.0 && error < 1.0 => core::Target::Error(error),
            _ => return Err(PyValueError::new_err("give a positive rank, or an error between 0 and 1")),
        };
        if !(tolerance > 0.0 && tolerance.is_finite()) {
            return Err(PyValueError::new_err("tolerance must be positive"));
        }
        Ok(core::SvdOptions { target, tolerance, seed: core::tensor_seed(seed, &self.name) })
    }
}

/// (‖Δ‖², ‖W_base‖²) of a tensor: what `Delta` gives, without a copy in memory. Raises as `Delta` does.
#[pyfunction]
pub fn energies(py: Python<'_>, base: &Checkpoint, tuned: &Checkpoint, name: &str) -> PyResult<(f64, f64)> {
    gate::run(py, || core::energies(&base.inner, &tuned.inner, name))
}

/// float32 values rounded to `dtype` ("BF16", "F16", "F32") and back: what a file of that dtype would hold.
#[pyfunction]
pub fn round_to<'py>(
    py: Python<'py>,
    values: PyReadonlyArrayDyn<'py, f32>,
    dtype: &str,
) -> PyResult<Bound<'py, PyAny>> {
    let mut rounded: Vec<f32> = values.as_array().iter().copied().collect();
    let dtype = parse_dtype(dtype)?;
    if !core::round_to(dtype, &mut rounded) {
        return Err(PyValueError::new_err(format!("cannot round to {dtype}")));
    }
    rounded.into_pyarray(py).call_method1("reshape", (values.shape().to_vec(),))
}

/// A dtype by its safetensors name.
pub fn parse_dtype(name: &str) -> PyResult<core::Dtype> {
    name.parse().map_err(|_| PyValueError::new_err(format!("unknown dtype `{name}`")))
}

/// Any 2-D float32 array as a row-major matrix.
pub fn matrix(values: &PyReadonlyArray2<'_, f32>) -> PyResult<core::Matrix> {
    let view = values.as_array();
    let (rows, cols) = view.dim();
    let values = view.as_slice().map_or_else(|| view.iter().copied().collect(), <[f32]>::to_vec);
    core::Matrix::new(rows, cols, values).ok_or_else(|| PyValueError::new_err("the array's shape overflows"))
}

pub fn array<'py>(py: Python<'py>, matrix: core::Matrix) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let shape = [matrix.rows(), matrix.cols()];
    matrix.into_values().into_pyarray(py).reshape(shape)
}
