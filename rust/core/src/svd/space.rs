//! The space that the iteration builds: a basis, its image, and the best approximation within it.

use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, MatMut, MatRef, Par, Side};

use super::columns::Columns;
use super::{Triplets, eigen, no_eigenvalues};
use crate::error::Result;
use crate::memory::Workspace;
use crate::panels;

/// Directions below this share of the largest are rounding noise of the f32 products.
pub(super) const NOISE: f64 = 1e-6;

/// Basis V, image M = Δ·V, and the Gram matrices of both.
///
/// V is orthonormal only up to its own rounding (to bf16, for kernels that multiply bf16): instead of pretending, its Gram
/// matrix VᵀV is kept, and Ritz values solve MᵀM·c = θ²·VᵀV·c. So rounding a basis vector makes it another basis vector,
/// never an error of the result.
pub(super) struct Space {
    basis: Columns,
    image: Columns,
    overlap: Mat<f64>,
    gram: Mat<f64>,
}

impl Space {
    pub(super) fn new(rows: usize, cols: usize, capacity: usize, workspace: &Workspace) -> Self {
        Self {
            basis: Columns::new(cols, capacity, workspace),
            image: Columns::new(rows, capacity, workspace),
            overlap: Mat::new(),
            gram: Mat::new(),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.overlap.ncols()
    }

    /// A lower bound of σ₁, good enough to scale a noise floor.
    pub(super) fn peak(&self) -> f64 {
        (0..self.size()).map(|j| self.gram[(j, j)]).fold(0.0, f64::max).sqrt()
    }

    /// Takes in a block; `multiply` writes its image. Returns the norm of that.
    pub(super) fn extend(&mut self, block: MatRef<'_, f32>, multiply: impl FnOnce(MatMut<'_, f32>)) -> f64 {
        let old = self.size();
        self.basis.add(block.ncols()).copy_from(block);
        multiply(self.image.add(block.ncols()));
        border(&mut self.overlap, &panels::gram(self.basis.all(), self.basis.from(old)));
        border(&mut self.gram, &panels::gram(self.image.all(), self.image.from(old)));
        (old..self.size()).map(|j| self.gram[(j, j)]).sum::<f64>().sqrt()
    }

    /// Ritz values θ², descending.
    pub(super) fn ritz_values(&self) -> Result<Vec<f64>> {
        let (matrix, _) = self.reduced()?;
        let mut values = matrix.self_adjoint_eigenvalues(Side::Lower).map_err(|_| no_eigenvalues(self.size()))?;
        values.reverse();
        Ok(values)
    }

    /// The `rank` leading Ritz values and the coefficients of their vectors, without those that are rounding noise.
    fn ritz(&self, rank: usize) -> Result<(Vec<f64>, Mat<f32>)> {
        let (matrix, lower) = self.reduced()?;
        let (values, vectors) = eigen(matrix.as_ref())?;
        let size = values.len();
        let theta: Vec<f64> = values.into_iter().rev().collect();
        let floor = theta.first().copied().unwrap_or(0.0) * NOISE * NOISE;
        let keep = theta.iter().take(rank).take_while(|&&value| value > floor).count();
        let mut coefficients = Mat::from_fn(size, keep, |i, j| vectors[(i, size - 1 - j)]);
        solve_upper_triangular_in_place(lower.as_ref().transpose(), coefficients.as_mut(), Par::Seq);
        Ok((theta, Mat::from_fn(size, keep, |i, j| coefficients[(i, j)] as f32)))
    }

    /// L⁻¹·MᵀM·L⁻ᵀ with VᵀV = L·Lᵀ, and L.
    fn reduced(&self) -> Result<(Mat<f64>, Mat<f64>)> {
        let factor = self.overlap.llt(Side::Lower).map_err(|_| no_eigenvalues(self.size()))?;
        let lower = factor.L().to_owned();
        let mut half = self.gram.clone();
        solve_lower_triangular_in_place(lower.as_ref(), half.as_mut(), Par::Seq);
        let mut whole = half.transpose().to_owned();
        solve_lower_triangular_in_place(lower.as_ref(), whole.as_mut(), Par::Seq);
        Ok((whole, lower))
    }

    /// Orthonormal basis of what `block` adds to the space; directions no longer than `floor` are dropped.
    ///
    /// Classical Gram–Schmidt against the basis, then normalisation through the block's own Gram matrix in f64 (an
    /// eigenvalue form of CholeskyQR that tells the rank), repeated until both hold.
    pub(super) fn orthonormalise(&self, mut block: Mat<f32>, floor: f64) -> Result<Mat<f32>> {
        let mut floor = floor.max(f64::MIN_POSITIVE);
        let mut passes = 0;
        for _ in 0..4 {
            if self.size() > 0 {
                // A pass leaves 1e-6 or so of what it takes away: that matters once nearly all is taken away.
                while panels::project_out(self.basis.all(), self.overlap.as_ref(), &mut block) > 0.9999 && passes < 8 {
                    passes += 1;
                }
            }
            let (values, vectors) = eigen(panels::gram(block.as_ref(), block.as_ref()).as_ref())?;
            let size = values.len();
            let lambda: Vec<f64> = values.into_iter().rev().collect();
            let longest = lambda.first().copied().unwrap_or(0.0).max(0.0).sqrt();
            let keep = lambda.iter().take_while(|&&value| value.max(0.0).sqrt() > floor.max(NOISE * longest)).count();
            let shortest = lambda.get(keep.wrapping_sub(1)).copied().unwrap_or(0.0).max(0.0).sqrt();
            let rotation = Mat::from_fn(size, keep, |i, j| (vectors[(i, size - 1 - j)] / lambda[j].sqrt()) as f32);
            block = panels::tall_times_small(block.as_ref(), rotation.as_ref());
            // One round leaves columns that overlap by ε·(longest/shortest)², and the space by ε·(longest/shortest).
            if keep == 0 || shortest > 0.03 * longest {
                return Ok(block);
            }
            // From here on columns have unit length; one that collapses in the next round was not independent.
            floor = 0.5;
        }
        Ok(block)
    }

    /// The `count` leading Ritz vectors, orthonormal up to f32 rounding.
    pub(super) fn leading_basis(&self, count: usize) -> Result<Mat<f32>> {
        Ok(panels::tall_times_small(self.basis.all(), self.ritz(count)?.1.as_ref()))
    }

    /// The `rank` leading Ritz triplets, without those that are rounding noise.
    pub(super) fn leading(&self, rank: usize, columns: usize) -> Result<Triplets> {
        let (theta, coefficients) = self.ritz(rank)?;
        Ok(Triplets {
            v: panels::tall_times_small(self.basis.all(), coefficients.as_ref()),
            image: panels::tall_times_small(self.image.all(), coefficients.as_ref()),
            sigma: theta.into_iter().take(coefficients.ncols()).map(f64::sqrt).collect(),
            columns,
        })
    }
}

/// Adds the last columns of a symmetric matrix, and with them its last rows.
fn border(matrix: &mut Mat<f64>, columns: &Mat<f64>) {
    let (new, old) = (columns.nrows(), columns.nrows() - columns.ncols());
    matrix.resize_with(new, new, |_, _| 0.0);
    for j in old..new {
        for i in 0..new {
            let value = columns[(i, j - old)];
            matrix[(i, j)] = value;
            matrix[(j, i)] = value;
        }
    }
}
