//! ‖Δ − B·A‖²: what factors leave of a delta.
//!
//! Two ways. The *direct* one forms the residual from the files: right however small it is, for any factors. The *short* one
//! multiplies the packed copy with one factor, at the kernels' speed:
//!
//! ```text
//! ‖Δ − B·A‖² = ‖Δ‖² − 2·⟨Δ·Aᵀ, B⟩ + ⟨BᵀB, A·Aᵀ⟩
//! ```
//!
//! It is taken where its two errors are small beside the result: cancellation between the terms, and what rounding Δ by R to
//! bf16 does to the second one. R may have made all of Δ shorter or longer: how much is known (`Rounding::leaning`) and undone.
//! What is left of it is as good as independent of B·A, and changes the result by about ‖R‖·‖B·A‖/√(rows·cols).

use faer::{Mat, MatMut};

use crate::delta::Delta;
use crate::error::Result;
use crate::kernel::{self, Kernel};
use crate::matrix::Matrix;
use crate::packed::Packed;
use crate::panels;

/// The short way has to leave this share of ‖Δ‖²: f32 sums are right to some 1e-7 of the whole.
const LEAST: f64 = 1e-2;
/// Share of the result that rounding Δ may change: if it is independent of B·A, and if all of it fell into that direction.
const USUALLY: f64 = 2e-6;
const AT_WORST: f64 = 2e-2;

impl Delta {
    /// ‖Δ − B·A‖²_F: the short way where that can be relied on, else as [`Self::direct_residual`].
    ///
    /// # Errors
    /// As [`Self::load`]; [`crate::Error::UpdateShape`] when the factors do not fit.
    pub fn residual_energy(&self, b: &Matrix, a: &Matrix) -> Result<f64> {
        self.factors_fit(b, a)?;
        match self.short_residual(b, a)? {
            Some(energy) => Ok(energy),
            None => self.direct_residual(b, a),
        }
    }

    /// ‖Δ − B·A‖²_F from the residual itself, formed from the files.
    ///
    /// # Errors
    /// As [`Self::residual_energy`].
    pub fn direct_residual(&self, b: &Matrix, a: &Matrix) -> Result<f64> {
        self.factors_fit(b, a)?;
        let down = self.scale().recip();
        let parts = self.for_strips(
            |_| 0f64,
            |sum, rows, strip| {
                let b = b.view().subrows(rows.start, rows.len());
                let b = Mat::from_fn(rows.len(), b.ncols(), |i, j| (f64::from(b[(i, j)]) * down) as f32);
                let cols = strip.ncols();
                let residual = strip.values();
                panels::multiply_add(
                    MatMut::from_row_major_slice_mut(residual, rows.len(), cols),
                    b.as_ref(),
                    a.view(),
                    -1.0,
                );
                *sum += kernel::sum_squares(residual);
            },
        )?;
        Ok(parts.iter().sum::<f64>() * self.scale().powi(2))
    }

    fn factors_fit(&self, b: &Matrix, a: &Matrix) -> Result<()> {
        self.fits(b.rows() == self.rows() && a.cols() == self.cols() && b.cols() == a.rows(), &[b, a])
    }

    /// `None` where it might be wrong.
    fn short_residual(&self, b: &Matrix, a: &Matrix) -> Result<Option<f64>> {
        let Some((packed @ Packed::Bf16(blocks), rounding)) = self.packed() else { return Ok(None) };
        if b.cols() == 0 || self.scale() != 1.0 {
            return Ok(None);
        }
        let (b, a) = (b.view().to_owned(), a.view().transpose().to_owned());
        let (long, short) = if blocks.is_wide() { (&a, &b) } else { (&b, &a) };
        let mut image = Mat::zeros(long.nrows(), long.ncols());
        let kernel = Kernel::current()?.exact_for(short.as_ref());
        kernel::products(kernel, packed, short.as_ref(), image.as_mut(), None, self.workspace());
        // ⟨Δ, bf16(Δ)⟩ / ‖bf16(Δ)‖²: the best multiple of the packed copy.
        let packed_energy = self.energy() - 2.0 * rounding.leaning - rounding.lost;
        let length = (packed_energy + rounding.leaning) / packed_energy;
        let inner = length * panels::inner_product(image.as_ref(), long.as_ref());
        let gram = |factor: &Mat<f32>| panels::gram(factor.as_ref(), factor.as_ref());
        let (left, right) = (gram(&b), gram(&a));
        let product: f64 = left.col_iter().zip(right.col_iter()).map(|(left, right)| left.transpose() * right).sum();
        let energy = self.energy() - 2.0 * inner + product;
        let turned = 2.0 * (rounding.lost * product).sqrt();
        let elements = self.rows() as f64 * self.cols() as f64;
        let trusted = energy > LEAST * self.energy()
            && turned <= AT_WORST * energy
            && turned <= USUALLY * energy * elements.sqrt();
        Ok(trusted.then_some(energy))
    }
}
