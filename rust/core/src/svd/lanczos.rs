//! One-sided adaptive block Lanczos: leading singular triplets from a few dozen products with Δ.
//!
//! Let G = ΔᵀΔ, acting on the smaller side. From a random block the iteration builds a basis of the block Krylov space
//! span{V₁, G·V₁, G²·V₁, …} (Musco & Musco 2015, arXiv 1504.05477; small blocks suffice: Meyer, Musco & Musco 2023, arXiv
//! 2305.02535) and keeps M = Δ·V beside it:
//!
//! ```text
//! V₁ = orth(G·Ω)
//! repeat   Y = Δ·Vⱼ,  Z = Δᵀ·Y          one read of Δ for both
//!          V ← [V Vⱼ],  M ← [M Y]
//!          MᵀM·c = θ²·VᵀV·c              K×K, in f64 (Rayleigh–Ritz)
//!          stop when the energy still to come is small
//!          Vⱼ₊₁ = orth(Z − V·VᵀZ), rounded to what the kernel multiplies
//! result   V_r = V·C_r,  Δ·V_r = M·C_r
//! ```
//!
//! A claim of convergence is put to the test by two more steps from a random block outside the space ([`Probe`]). A basis that
//! has become large is replaced by its leading Ritz vectors (thick restart: Wu & Simon 2000).
//!
//! Only the captured *energy* Σθ² has to converge, not single vectors, so the stopping rule looks at nothing else: increments
//! of the top-r energy shrink geometrically, and their predicted sum bounds the excess. θ ≤ σ by interlacing: what is
//! claimed is always reached.

use faer::{Mat, MatRef};

use super::space::{NOISE, Space};
use super::{DENSE, SvdOptions, Target, Triplets};
use crate::error::Result;
use crate::kernel::{Kernel, both_products};
use crate::packed::Packed;

/// Energy below this share of ‖Δ‖² cannot be told from rounding of the captured energy.
const ENERGY_NOISE: f64 = 1e-10;
/// Steps from the random block before a claim is believed, and its columns.
const PROBE_STEPS: usize = 2;
const PROBE_WIDTH: usize = 16;
/// A basis is restarted at this multiple of the rank, or at `ROOMY` columns if that is more.
const LARGE: usize = 8;
const ROOMY: usize = 384;
/// Products beyond this multiple of the shorter side cost more than all of the spectrum by a dense method. Every round adds
/// some, so this also ends an iteration whose tolerance lies below what f32 can tell.
const PATIENCE: usize = 6;

/// Leading triplets of a packed Δ with ‖Δ‖² = `energy` > 0; `None` when a dense method would need less work for the same.
pub(super) fn triplets(kernel: Kernel, packed: &Packed, energy: f64, options: SvdOptions) -> Result<Option<Triplets>> {
    let operator = Operator { kernel, packed };
    let (rows, cols) = packed.tall();
    let width = operator.width(options.target).min(cols);
    let mut random = Random(options.seed);
    let mut space = Space::new(rows, cols, 12 * width);
    let mut columns = 2 * width;
    let start = operator.both(operator.round(random.block(cols, width)).as_ref()).1;
    let mut block = operator.round(space.orthonormalise(start, 0.0)?);
    let mut progress = Progress::default();
    let mut probe: Option<Probe> = None;
    let mut checked_at = 0;
    // Ranks are looked for once the space could hold them twice; a rank that is not known yet, all the time.
    let mut rank = if let Target::Rank(rank) = options.target { rank } else { 0 };
    while block.ncols() > 0 {
        if columns > PATIENCE * cols {
            return Ok(None);
        }
        let (image, next) = operator.both(block.as_ref());
        columns += 2 * block.ncols();
        let image_norm = f64::from(image.norm_l2());
        if probe.as_ref().is_some_and(|probe| probe.steps == 0)
            && image_norm.powi(2) <= NOISE * NOISE * energy * width as f64
        {
            break; // Nothing but rounding noise is left outside the space.
        }
        space.extend(block.as_ref(), image.as_ref());
        if space.size() >= cols {
            break;
        }
        let floor = f64::from(f32::EPSILON) * 8.0 * space.peak() * image_norm;
        let next = operator.round(space.orthonormalise(next, floor)?);
        let exhausted = next.ncols() == 0;
        let mut fresh = exhausted;
        let due = match &mut probe {
            Some(probe) => {
                probe.steps += 1;
                exhausted || probe.steps == PROBE_STEPS
            }
            // The eigenproblem costs K³: solve it when the basis has grown enough for the answer to have changed.
            None => exhausted || (space.size() >= 2 * rank && 10 * space.size() >= 11 * checked_at),
        };
        if due {
            checked_at = space.size();
            let theta = space.ritz_values()?;
            let wanted = options.target.rank(&theta, energy);
            if wanted.is_none() && DENSE * space.size() > cols {
                return Ok(None);
            }
            // A rank that is still sinking begins a new series of increments.
            let found = wanted.unwrap_or(0);
            if found != rank {
                progress = Progress::default();
                probe = None;
                rank = found;
            }
            let captured: f64 = theta.iter().take(rank).sum();
            // A probe sees some of what is hidden, not all of it: it may show an eighth of what is allowed.
            let allowed = 0.125 * options.tolerance * (energy - captured).max(ENERGY_NOISE * energy);
            match probe.take() {
                Some(claim) if captured - claim.captured <= allowed => break,
                Some(_) => progress = Progress::default(),
                None if rank > 0 && progress.done(captured, energy, options.tolerance) || exhausted => {
                    probe = Some(Probe { captured, steps: 0 });
                    fresh = true;
                }
                None => {}
            }
        }
        let kept = rank + width;
        if probe.is_none() && space.size() >= (LARGE * rank).max(ROOMY).max(2 * kept) {
            let basis = operator.round(space.leading_basis(kept)?);
            let image = operator.both(basis.as_ref()).0;
            columns += 2 * basis.ncols();
            space = Space::new(rows, cols, 2 * kept);
            space.extend(basis.as_ref(), image.as_ref());
            checked_at = 0;
        }
        let room = cols - space.size();
        block = if fresh {
            operator.round(space.orthonormalise(random.block(cols, PROBE_WIDTH.min(room)), 0.0)?)
        } else if next.ncols() > room {
            next.subcols(0, room).to_owned()
        } else {
            next
        };
    }
    let rank = match options.target {
        Target::Rank(rank) => rank,
        Target::Error(_) => options.target.rank(&space.ritz_values()?, energy).unwrap_or(cols),
    };
    Ok(Some(space.leading(rank, columns)?))
}

/// Δ as the iteration sees it.
struct Operator<'a> {
    kernel: Kernel,
    packed: &'a Packed,
}

impl Operator<'_> {
    fn both(&self, v: MatRef<'_, f32>) -> (Mat<f32>, Mat<f32>) {
        both_products(self.kernel, self.packed, v)
    }

    /// Rounds a block to what the kernel multiplies.
    fn round(&self, mut block: Mat<f32>) -> Mat<f32> {
        if self.kernel.rounds_operands() && matches!(self.packed, Packed::Bf16(_)) {
            for column in block.col_iter_mut() {
                column.iter_mut().for_each(|value| *value = half::bf16::from_f32(*value).to_f32());
            }
        }
        block
    }

    /// Columns of a block: a quarter of the rank needs the fewest in all, a few groups use the kernel best.
    fn width(&self, target: Target) -> usize {
        let group = self.kernel.preferred_width();
        match target {
            Target::Rank(rank) => rank.div_ceil(4).next_multiple_of(group).clamp(group, 64),
            Target::Error(_) => 32,
        }
    }
}

/// A claim of convergence under test: the energy captured when it was made, and the steps taken since from a fresh random
/// block. A Krylov space holds at most one direction per start vector of every repeated singular value, and few of a tight
/// cluster: it can look converged without having seen the others. A random block outside the space sees them.
struct Probe {
    captured: f64,
    steps: usize,
}

/// The stopping rule: energy increments, and what they predict.
#[derive(Default)]
struct Progress {
    captured: f64,
    increment: Option<f64>,
}

impl Progress {
    /// Whether the excess of the top-r error is predicted to be within `tolerance`.
    fn done(&mut self, captured: f64, energy: f64, tolerance: f64) -> bool {
        let error = energy - captured;
        if error <= ENERGY_NOISE * energy {
            return true;
        }
        let previous = self.increment;
        let increment = captured - self.captured;
        let first = self.captured == 0.0;
        self.captured = captured;
        if first {
            return false;
        }
        self.increment = Some(increment.max(0.0));
        // One ratio is needed for a prediction; increments at rounding level need none.
        if increment <= ENERGY_NOISE * energy {
            return true;
        }
        let Some(previous) = previous else { return false };
        let ratio = (increment / previous).clamp(0.0, 0.95);
        let to_come = increment * ratio / (1.0 - ratio);
        // ‖Δ−Δ̂‖/‖Δ−Δ_r‖ − 1 ≈ ½·(missing energy)/(error energy); half the tolerance is kept for the prediction's own error.
        0.5 * to_come / error < 0.5 * tolerance
    }
}

/// SplitMix64 (Steele, Lea & Flood 2014): counter based, so a block depends on seed and position alone. Uniform numbers serve a
/// random start as well as normal ones do, and need no library function that could differ between platforms.
struct Random(u64);

impl Random {
    fn block(&mut self, rows: usize, cols: usize) -> Mat<f32> {
        Mat::from_fn(rows, cols, |_, _| self.uniform())
    }

    /// Uniform in [−1, 1).
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        // The top 24 bits fill a significand exactly.
        ((z >> 40) as f32) / 8_388_608.0 - 1.0
    }
}
