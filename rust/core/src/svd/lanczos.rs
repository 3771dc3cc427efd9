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
//! Only the captured *energy* Σθ² has to converge, not single vectors, so the stopping rule ([`super::search`]) looks at nothing
//! else. A step that will probably be the last one leaves Δᵀ·Y out. A basis that has become large is replaced by its leading
//! Ritz vectors (thick restart: Wu & Simon 2000).

use faer::{Mat, MatMut, MatRef};

use super::columns::Columns;
use super::search::{PROBE_WIDTH, Random, Search, Step};
use super::space::{NOISE, Space, round};
use super::{SvdOptions, Target, Triplets};
use crate::error::Result;
use crate::kernel::{self, Kernel};
use crate::memory::Workspace;
use crate::packed::Packed;

/// A basis is restarted at this multiple of the rank, or at `ROOMY` columns if that is more.
const LARGE: usize = 8;
const ROOMY: usize = 384;
/// Products beyond this multiple of the shorter side cost more than all of the spectrum by a dense method. Every round adds
/// some, so this also ends an iteration whose tolerance lies below what f32 can tell.
const PATIENCE: usize = 6;

/// Leading triplets of a packed Δ with ‖Δ‖² = `energy` > 0; `None` when a dense method would need less work for the same.
pub(super) fn triplets(
    kernel: Kernel,
    packed: &Packed,
    energy: f64,
    options: SvdOptions,
    workspace: &Workspace,
) -> Result<Option<Triplets>> {
    let operator = Operator { kernel, packed, workspace };
    let (rows, cols) = packed.tall();
    let width = operator.width(options.target).min(cols);
    let mut random = Random::new(options.seed);
    let mut search = Search::new(options, energy, cols);
    let mut space = Space::new(rows, cols, 16 * width, operator.in_bf16(), workspace);
    let mut columns = 2 * width;
    let start = random.block(cols, width);
    let start = operator.gram(if operator.in_bf16() { round(start) } else { start }.as_ref());
    let mut block = space.new_vectors(start, 0.0, cols)?;
    while block.count() > 0 {
        if columns > PATIENCE * cols {
            return Ok(None);
        }
        // Δᵀ is multiplied with the block's image only where that will probably be needed.
        let mut product = (!search.may_end(space.size() + block.count())).then(|| Mat::zeros(cols, block.count()));
        let (image_norm, outside) = space.extend(&block, |image| {
            operator.multiply(block.as_ref(), image, product.as_mut().map(Mat::as_mut));
        });
        columns += if product.is_some() { 2 } else { 1 } * block.count();
        let faint = outside.powi(2) <= NOISE * NOISE * energy * width as f64;
        if faint && search.begins_probe() {
            break; // Nothing but rounding noise is left outside the space.
        }
        if space.size() >= cols {
            break;
        }
        let floor = f64::from(f32::EPSILON) * 8.0 * space.peak() * image_norm;
        let mut next = match product {
            Some(product) => Some(space.new_vectors(product, floor, cols - space.size())?),
            None => None,
        };
        let exhausted = faint || next.as_ref().is_some_and(|next| next.count() == 0);
        let last = search.is_probing() && next.is_none();
        match search.step(space.size(), exhausted, || space.ritz_values(last))? {
            Step::Done => break,
            Step::Dense => return Ok(None),
            Step::Probe => next = None,
            Step::Go if next.is_none() => {
                let product = operator.gram(block.as_ref());
                columns += 2 * block.count();
                next = Some(space.new_vectors(product, floor, cols - space.size())?);
            }
            Step::Go => {}
        }
        let kept = search.rank() + width;
        let full = space.size() >= (LARGE * search.rank()).max(ROOMY).max(2 * kept);
        // Without a rank there is nothing to restart with: the space grows until it holds what is asked for.
        if full && search.rank() > 0 && !search.is_probing() {
            let basis = space.leading_basis(kept)?;
            columns += basis.count();
            space = Space::new(rows, cols, 2 * kept + 4 * width, operator.in_bf16(), workspace);
            space.extend(&basis, |image| operator.multiply(basis.as_ref(), image, None));
            search.restarted();
            next = next.map(|next| space.adopt(next));
        }
        block = match next {
            Some(next) if next.count() > 0 => next,
            _ => {
                let width = PROBE_WIDTH.min(cols - space.size());
                space.new_vectors(random.block(cols, width), 0.0, width)?
            }
        };
    }
    let rank = match options.target {
        Target::Rank(rank) => rank,
        Target::Error(_) => options.target.rank(&space.ritz_values(true)?, energy).unwrap_or(cols),
    };
    Ok(Some(space.leading(rank, columns)?))
}

/// Δ as the iteration sees it.
struct Operator<'a> {
    kernel: Kernel,
    packed: &'a Packed,
    workspace: &'a Workspace,
}

impl Operator<'_> {
    /// Δ·v into `image` and, where it is asked for, Δᵀ·Δ·v into `product`.
    fn multiply(&self, v: MatRef<'_, f32>, image: MatMut<'_, f32>, product: Option<MatMut<'_, f32>>) {
        kernel::products(self.kernel, self.packed, v, image, product, self.workspace);
    }

    /// ΔᵀΔ·v.
    fn gram(&self, v: MatRef<'_, f32>) -> Mat<f32> {
        let (rows, cols) = self.packed.tall();
        let mut image = Columns::new(rows, v.ncols(), self.workspace);
        let mut product = Mat::zeros(cols, v.ncols());
        self.multiply(v, image.add(v.ncols()), Some(product.as_mut()));
        product
    }

    /// Whether it multiplies bf16 values only.
    fn in_bf16(&self) -> bool {
        self.kernel.rounds_operands() && matches!(self.packed, Packed::Bf16(_))
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
