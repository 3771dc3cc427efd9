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
        let (rows, cols) = (matrix.nrows(), matrix.ncols());
        let values =
            (0..rows).flat_map(|i| (0..cols).map(move |j| (f64::from(matrix[(i, j)]) * scale) as f32)).collect();
        Self { rows, cols, values }
    }
}
