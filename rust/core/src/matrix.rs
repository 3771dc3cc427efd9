//! A small dense row-major f32 matrix: the form in which factors cross the borders of this crate.

use faer::MatRef;

/// Row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// Wraps row-major values; `None` unless there are `rows·cols` of them.
    #[must_use]
    pub fn new(rows: usize, cols: usize, values: Vec<f32>) -> Option<Self> {
        (rows.checked_mul(cols) == Some(values.len())).then_some(Self { rows, cols, values })
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The row-major values.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The row-major values, without a copy.
    #[must_use]
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    pub(crate) fn view(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.values, self.rows, self.cols)
    }

    /// `scale·matrix`, copied into row-major order.
    pub(crate) fn from_faer(matrix: MatRef<'_, f32>, scale: f64) -> Self {
        Self::from_columns(matrix, &vec![scale; matrix.ncols()])
    }

    /// `matrix·diag(factors)`.
    pub(crate) fn from_columns(matrix: MatRef<'_, f32>, factors: &[f64]) -> Self {
        let (rows, cols) = (matrix.nrows(), matrix.ncols());
        let mut values = vec![0f32; rows * cols];
        // Columns of the source are contiguous, rows of the result are: go by strips in which both stay in cache.
        for first in (0..rows).step_by(64) {
            for (j, factor) in factors.iter().enumerate() {
                for i in first..rows.min(first + 64) {
                    values[i * cols + j] = (f64::from(matrix[(i, j)]) * factor) as f32;
                }
            }
        }
        Self { rows, cols, values }
    }

    /// `(matrix·diag(factors))ᵀ`.
    pub(crate) fn from_transposed_columns(matrix: MatRef<'_, f32>, factors: &[f64]) -> Self {
        let (rows, cols) = (matrix.nrows(), matrix.ncols());
        let mut values = Vec::with_capacity(rows * cols);
        for (j, factor) in factors.iter().enumerate() {
            values.extend((0..rows).map(|i| (f64::from(matrix[(i, j)]) * factor) as f32));
        }
        Self { rows: cols, cols: rows, values }
    }
}
