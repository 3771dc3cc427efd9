//! `Spectrum` and `Allocation`: ranks from singular values.

use lora_compress_core as core;
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::to_python;

/// The leading singular values of one ΔW, and what else one read of it has told.
///
/// `sigma` float64 descending, at most min(shape) of them; `energy` ‖Δ‖², `base_energy` ‖W_base‖², `rounding_energy` what
/// rounding to tuned's dtype has added to Δ. Raises `LoraCompressError` for numbers that cannot be a spectrum.
#[pyclass(frozen, module = "lora_compress._native")]
pub struct Spectrum {
    pub inner: core::Spectrum,
}

impl Spectrum {
    pub fn of(delta: &core::Delta, sigma: Vec<f64>) -> PyResult<Self> {
        let shape = (delta.rows(), delta.cols());
        let inner = core::Spectrum::new(shape, sigma, delta.energy(), delta.base_energy(), delta.rounding_energy());
        Ok(Self { inner: inner.map_err(to_python)? })
    }
}

#[pymethods]
impl Spectrum {
    #[new]
    #[pyo3(signature = (shape, sigma, energy, *, base_energy=0.0, rounding_energy=0.0))]
    fn new(
        shape: (usize, usize),
        sigma: Vec<f64>,
        energy: f64,
        base_energy: f64,
        rounding_energy: f64,
    ) -> PyResult<Self> {
        let inner = core::Spectrum::new(shape, sigma, energy, base_energy, rounding_energy).map_err(to_python)?;
        Ok(Self { inner })
    }

    /// (rows, cols) of Δ.
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.inner.rows(), self.inner.cols())
    }

    /// The σ that are known, float64, descending.
    #[getter]
    fn sigma<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        self.inner.sigma().to_vec().into_pyarray(py)
    }

    /// ‖Δ‖².
    #[getter]
    fn energy(&self) -> f64 {
        self.inner.energy()
    }

    /// ‖W_base‖².
    #[getter]
    fn base_energy(&self) -> f64 {
        self.inner.base_energy()
    }

    /// Energy that rounding to tuned's dtype has added to Δ: Σ spacing²/12 over the elements that changed.
    #[getter]
    fn rounding_energy(&self) -> f64 {
        self.inner.rounding_energy()
    }

    /// Whether no σ > 0 is missing.
    #[getter]
    fn is_complete(&self) -> bool {
        self.inner.is_complete()
    }

    /// Share of ‖Δ‖² that rounding explains, at most 1.
    #[getter]
    fn noise_share(&self) -> f64 {
        self.inner.noise_share()
    }

    /// The largest σ of rounding noise alone (Marchenko & Pastur 1967): smaller ones cannot be told from it.
    #[getter]
    fn noise_edge(&self) -> f64 {
        self.inner.noise_edge()
    }

    /// The largest σ that white noise with all of ‖Δ‖² would reach: larger ones stand out.
    #[getter]
    fn bulk_edge(&self) -> f64 {
        self.inner.bulk_edge(0)
    }

    /// The hard threshold of Gavish & Donoho (2014, arXiv 1305.5870) for σ in that noise.
    #[getter]
    fn hard_threshold(&self) -> f64 {
        self.inner.hard_threshold()
    }

    /// ‖Δ‖² / σ₁².
    #[getter]
    fn stable_rank(&self) -> f64 {
        self.inner.stable_rank()
    }

    /// exp(−Σ p·ln p), p = σ/Σσ (Roy & Vetterli 2007); σ that are not known are taken as equal: an upper bound.
    #[getter]
    fn effective_rank(&self) -> f64 {
        self.inner.effective_rank()
    }

    /// The rank of a Δ that is low-rank but for noise, as that of a merged LoRA is; None for any other.
    #[getter]
    fn low_rank(&self) -> Option<usize> {
        self.inner.low_rank()
    }

    /// Whether a cliff may lie just beyond the σ that are known.
    #[getter]
    fn may_end_soon(&self) -> bool {
        self.inner.may_end_soon()
    }

    /// ‖Δ − Δ_k‖ / ‖Δ‖ for the first `rank` directions.
    fn error(&self, rank: usize) -> f64 {
        self.inner.error(rank)
    }

    /// ‖Δ − Δ_k‖².
    fn rest(&self, rank: usize) -> f64 {
        self.inner.rest(rank)
    }

    /// The rank that a rule gives, None where that depends on σ that are not known. Rules and their values: "rank" k, "energy"
    /// share of ‖Δ‖² to capture, "error" share of ‖Δ‖ to leave, "threshold" σ above it, "ratio" σ ≥ σ₁/value; and without
    /// one "bulk-edge", "noise-edge", "hard-threshold" and "knee".
    #[pyo3(signature = (rule, value=0.0))]
    fn rank(&self, rule: &str, value: f64) -> PyResult<Option<usize>> {
        let share = (0.0..=1.0).contains(&value);
        let rule = match rule {
            "rank" if value >= 0.0 && value.is_finite() => core::Rule::Rank(value as usize),
            "energy" if share => core::Rule::Energy(value),
            "error" if share => core::Rule::Error(value),
            "threshold" if value >= 0.0 => core::Rule::Threshold(value),
            "ratio" if value >= 1.0 => core::Rule::Ratio(value),
            "bulk-edge" => core::Rule::BulkEdge,
            "noise-edge" => core::Rule::NoiseEdge,
            "hard-threshold" => core::Rule::HardThreshold,
            "knee" => core::Rule::Knee,
            _ => return Err(PyValueError::new_err(format!("no rule `{rule}` with value {value}"))),
        };
        Ok(self.inner.rank(rule))
    }

    fn __repr__(&self) -> String {
        format!("Spectrum(shape={:?}, {} σ, ‖Δ‖²={:.4e})", self.shape(), self.inner.sigma().len(), self.energy())
    }
}

/// Steps of an allocation: tensor, rank, bytes, share.
type Steps<'py> =
    (Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<u64>>, Bound<'py, PyArray1<f64>>);

/// Ranks of many tensors at once: bytes go where they lower Σ weight·‖Δ − Δ_k‖² most.
///
/// For tensor i `weights[i]` is the worth of a unit of energy, `units[i]` the bytes that one more rank takes, `ranks[i]` the allowed
/// ranks above 0, ascending; those beyond the σ known are left out where more are above 0. Optimal up to the last step taken.
#[pyclass(frozen, module = "lora_compress._native")]
pub struct Allocation {
    inner: core::Allocation,
}

#[pymethods]
impl Allocation {
    #[new]
    fn new(
        spectra: Vec<PyRef<'_, Spectrum>>,
        weights: PyReadonlyArray1<'_, f64>,
        units: Vec<u64>,
        ranks: Vec<Vec<usize>>,
    ) -> PyResult<Self> {
        let weights = weights.as_slice()?;
        if [weights.len(), units.len(), ranks.len()] != [spectra.len(); 3] {
            return Err(PyValueError::new_err("every spectrum needs one weight, one unit and one list of ranks"));
        }
        if !weights.iter().all(|weight| *weight >= 0.0 && weight.is_finite()) {
            return Err(PyValueError::new_err("weights must not be negative"));
        }
        let candidates: Vec<_> = spectra
            .iter()
            .zip(weights)
            .zip(units)
            .zip(ranks)
            .map(|(((spectrum, &weight), unit), ranks)| core::Candidate {
                spectrum: &spectrum.inner,
                weight,
                unit,
                ranks,
            })
            .collect();
        Ok(Self { inner: core::Allocation::new(&candidates) })
    }

    /// Ranks within a budget in bytes.
    fn for_budget(&self, nbytes: u64) -> Vec<usize> {
        self.inner.ranks(core::Goal::Budget(nbytes)).unwrap_or_default()
    }

    /// The first steps, by falling worth, with √(Σ‖Δ − Δ_k‖² / Σ‖Δ‖²) ≤ `error`; None where the allowed ranks do not reach that.
    fn for_error(&self, error: f64) -> PyResult<Option<Vec<usize>>> {
        if !(0.0..=1.0).contains(&error) {
            return Err(PyValueError::new_err(format!("an error lies between 0 and 1, not at {error}")));
        }
        Ok(self.inner.ranks(core::Goal::Error(error)))
    }

    /// All steps that lower Σ w‖Δ − Δ_k‖² / Σ w‖Δ‖² by at least `worth` for each byte.
    fn for_worth(&self, worth: f64) -> Vec<usize> {
        self.inner.ranks(core::Goal::Worth(worth)).unwrap_or_default()
    }

    /// The steps by falling worth: index of the tensor, its rank from there on, bytes added, share of Σ‖Δ‖² captured.
    fn steps<'py>(&self, py: Python<'py>) -> Steps<'py> {
        let steps = self.inner.steps();
        let column = |of: fn(&core::Step) -> u64| steps.iter().map(of).collect::<Vec<_>>().into_pyarray(py);
        let shares = steps.iter().map(|step| step.share).collect::<Vec<_>>().into_pyarray(py);
        (column(|step| step.tensor as u64), column(|step| step.rank as u64), column(|step| step.bytes), shares)
    }
}
