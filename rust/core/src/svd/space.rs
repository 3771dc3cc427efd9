//! The space that the iteration builds: a basis, its image, and the best approximation within it.

use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, MatMut, MatRef, Par, Scale, Side};

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
    in_bf16: bool,
    /// Of the space as it is, if it is known.
    solved: Option<Ritz>,
}

/// The eigenvalue problem of the space: L⁻¹·MᵀM·L⁻ᵀ·x = θ²·x with VᵀV = L·Lᵀ.
struct Ritz {
    /// θ², ascending.
    values: Vec<f64>,
    /// x, in the same order.
    vectors: Mat<f64>,
    lower: Mat<f64>,
}

/// Basis vectors to be, and their inner products with those of the space and with each other, one below the other.
pub(super) struct Vectors {
    block: Mat<f32>,
    overlap: Mat<f64>,
}

impl Vectors {
    pub(super) fn as_ref(&self) -> MatRef<'_, f32> {
        self.block.as_ref()
    }

    pub(super) fn count(&self) -> usize {
        self.block.ncols()
    }
}

impl Space {
    /// An empty space for a Δ of this shape. Basis vectors have bf16 values if `in_bf16`.
    pub(super) fn new(rows: usize, cols: usize, capacity: usize, in_bf16: bool, workspace: &Workspace) -> Self {
        Self {
            basis: Columns::new(cols, capacity, workspace),
            image: Columns::new(rows, capacity, workspace),
            overlap: Mat::new(),
            gram: Mat::new(),
            in_bf16,
            solved: None,
        }
    }

    pub(super) fn size(&self) -> usize {
        self.overlap.ncols()
    }

    /// A lower bound of σ₁, good enough to scale a noise floor.
    pub(super) fn peak(&self) -> f64 {
        (0..self.size()).map(|j| self.gram[(j, j)]).fold(0.0, f64::max).sqrt()
    }

    /// Takes in a block; `multiply` writes its image. Returns the norm of that, and of the image of what of the block is
    /// orthogonal to the space: a vector that is rounded to bf16 leans a little towards it, and there images are large.
    pub(super) fn extend(&mut self, vectors: &Vectors, multiply: impl FnOnce(MatMut<'_, f32>)) -> (f64, f64) {
        let old = self.size();
        self.solved = None;
        self.basis.add(vectors.count()).copy_from(&vectors.block);
        multiply(self.image.add(vectors.count()));
        border(&mut self.overlap, &vectors.overlap);
        border(&mut self.gram, &panels::gram(self.image.all(), self.image.from(old)));
        let new = self.size() - old;
        let (overlap, gram) = (self.overlap.as_ref(), self.gram.as_ref());
        let leaning = overlap.submatrix(0, old, old, new);
        // (VᵀV)⁻¹·Vᵀb, with the inverse as in `panels::project_out`.
        let leaning = leaning * Scale(2.0) - overlap.submatrix(0, 0, old, old) * leaning;
        let (mixed, inner) = (gram.submatrix(0, old, old, new), gram.submatrix(0, 0, old, old) * &leaning);
        let mut outside = 0.0;
        for j in 0..new {
            let taken: f64 = (0..old).map(|i| leaning[(i, j)] * (2.0 * mixed[(i, j)] - inner[(i, j)])).sum();
            outside += gram[(old + j, old + j)] - taken;
        }
        let norm = (old..self.size()).map(|j| gram[(j, j)]).sum::<f64>().sqrt();
        (norm, outside.max(0.0).sqrt())
    }

    /// Ritz values θ², descending.
    ///
    /// If this is probably the `last` look, vectors are computed with them and kept.
    pub(super) fn ritz_values(&mut self, last: bool) -> Result<Vec<f64>> {
        let mut values = if last {
            let ritz = self.solve()?;
            self.solved.insert(ritz).values.clone()
        } else {
            let (matrix, _) = self.reduced()?;
            matrix.self_adjoint_eigenvalues(Side::Lower).map_err(|_| no_eigenvalues(self.size()))?
        };
        values.reverse();
        Ok(values)
    }

    fn solve(&self) -> Result<Ritz> {
        let (matrix, lower) = self.reduced()?;
        let (values, vectors) = eigen(matrix.as_ref())?;
        Ok(Ritz { values, vectors, lower })
    }

    /// The `rank` leading Ritz values and the coefficients of their vectors, without those that are rounding noise.
    fn ritz(&mut self, rank: usize) -> Result<(Vec<f64>, Mat<f32>)> {
        let solved = self.solved.take();
        let Ritz { values, vectors, lower } = solved.map_or_else(|| self.solve(), Ok)?;
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

    /// What `block` adds to the space, as new basis vectors; directions no longer than `floor` are dropped, and all beyond the
    /// first `most`.
    pub(super) fn new_vectors(&self, block: Mat<f32>, floor: f64, most: usize) -> Result<Vectors> {
        let block = self.orthonormalise(block, floor)?;
        let block = block.subcols(0, block.ncols().min(most)).to_owned();
        Ok(self.independent(if self.in_bf16 { round(block) } else { block }))
    }

    /// Vectors that were new to a space that held this one.
    pub(super) fn adopt(&self, vectors: Vectors) -> Vectors {
        self.independent(vectors.block)
    }

    /// The columns of `block` that stand out of the space and of those before them by a half. Almost all do: but what is left
    /// of a block that lies in the space is noise, and noise that is rounded can fall back into it.
    fn independent(&self, block: Mat<f32>) -> Vectors {
        let own = panels::gram(block.as_ref(), block.as_ref());
        // The space is orthonormal up to rounding, so this is the Gram matrix of what stands out of it.
        let inside = panels::gram(self.basis.all(), block.as_ref());
        let outside = &own - inside.transpose() * &inside;
        // Cholesky, column by column.
        let mut kept: Vec<(usize, Vec<f64>)> = Vec::new();
        for j in 0..block.ncols() {
            let mut row = Vec::with_capacity(kept.len());
            for (i, other) in &kept {
                let taken: f64 = row.iter().zip(other).map(|(x, y)| x * y).sum();
                row.push((outside[(*i, j)] - taken) / other[row.len()]);
            }
            let pivot = outside[(j, j)] - row.iter().map(|x| x * x).sum::<f64>();
            if pivot > 0.25 * own[(j, j)] && own[(j, j)] > 0.0 {
                row.push(pivot.sqrt());
                kept.push((j, row));
            }
        }
        let old = self.size();
        let at = |i: usize| if i < old { i } else { old + kept[i - old].0 };
        let overlap = |i: usize, j: usize| if i < old { inside[(i, j)] } else { own[(i - old, j)] };
        Vectors {
            block: Mat::from_fn(block.nrows(), kept.len(), |i, j| block[(i, kept[j].0)]),
            overlap: Mat::from_fn(old + kept.len(), kept.len(), |i, j| overlap(at(i), kept[j].0)),
        }
    }

    /// Orthonormal basis of what `block` adds to the space; directions no longer than `floor` are dropped.
    ///
    /// Classical Gram–Schmidt against the basis, then normalisation through the block's own Gram matrix in f64: CholeskyQR where
    /// columns are clearly independent, else an eigenvalue form of it that tells the rank, repeated until both hold.
    fn orthonormalise(&self, mut block: Mat<f32>, floor: f64) -> Result<Mat<f32>> {
        let mut floor = floor.max(f64::MIN_POSITIVE);
        let mut passes = 0;
        for _ in 0..4 {
            if self.size() > 0 {
                // A pass leaves 1e-6 or so of what it takes away: that matters once nearly all is taken away.
                while panels::project_out(self.basis.all(), self.overlap.as_ref(), &mut block) > 0.9999 && passes < 8 {
                    passes += 1;
                }
            }
            let gram = panels::gram(block.as_ref(), block.as_ref());
            if let Some(rotation) = inverse_factor(gram.as_ref(), floor) {
                return Ok(panels::tall_times_small(block.as_ref(), rotation.as_ref()));
            }
            let (values, vectors) = eigen(gram.as_ref())?;
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

    /// The `count` leading Ritz vectors, as basis vectors of another space.
    pub(super) fn leading_basis(&mut self, count: usize) -> Result<Vectors> {
        let coefficients = self.ritz(count)?.1;
        let basis = panels::tall_times_small(self.basis.all(), coefficients.as_ref());
        let block = if self.in_bf16 { round(basis) } else { basis };
        Ok(Vectors { overlap: panels::gram(block.as_ref(), block.as_ref()), block })
    }

    /// The `rank` leading Ritz triplets, without those that are rounding noise.
    pub(super) fn leading(&mut self, rank: usize, columns: usize) -> Result<Triplets> {
        let (theta, coefficients) = self.ritz(rank)?;
        Ok(Triplets {
            v: panels::tall_times_small(self.basis.all(), coefficients.as_ref()),
            image: panels::tall_times_small(self.image.all(), coefficients.as_ref()),
            sigma: theta.into_iter().take(coefficients.ncols()).map(f64::sqrt).collect(),
            columns,
        })
    }
}

/// L⁻ᵀ of a Gram matrix L·Lᵀ, if its columns are clearly longer than `floor` and independent.
fn inverse_factor(gram: MatRef<'_, f64>, floor: f64) -> Option<Mat<f32>> {
    /// Shortest to longest part of a column that stands out of those before it: what rounding does to the rest is far smaller.
    const CLEAR: f64 = 0.1;
    let factor = gram.llt(Side::Lower).ok()?;
    let size = gram.nrows();
    let pivots = (0..size).map(|j| factor.L()[(j, j)]);
    let (least, most) = pivots.fold((f64::INFINITY, 0f64), |(least, most), pivot| (least.min(pivot), most.max(pivot)));
    if !(least > CLEAR * most && least > 2.0 * floor) {
        return None;
    }
    let mut inverse = Mat::<f64>::identity(size, size);
    solve_upper_triangular_in_place(factor.L().transpose(), inverse.as_mut(), Par::Seq);
    Some(Mat::from_fn(size, size, |i, j| inverse[(i, j)] as f32))
}

/// To bf16 values.
pub(super) fn round(mut block: Mat<f32>) -> Mat<f32> {
    for column in block.col_iter_mut() {
        column.iter_mut().for_each(|value| *value = half::bf16::from_f32(*value).to_f32());
    }
    block
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
