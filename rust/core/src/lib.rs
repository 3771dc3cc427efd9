//! The core of lora-compress: bytes and matrices, no Python.
//!
//! # The pipeline
//!
//! A fine-tune changes a base's weights by ΔW = W_tuned − W_base. This crate turns ΔW of every tensor into low-rank factors
//! and puts factors back into a base:
//!
//! 1. [`Checkpoint`] opens files of safetensors or PyTorch, or a directory of them; what they list is validated once, bytes are read by position.
//! 2. [`Delta`] forms one tensor's difference and its energy ‖Δ‖².
//! 3. [`Spectrum`] keeps the leading singular values; a [`Rule`] or an [`Allocation`] turns spectra into ranks.
//! 4. [`truncated_svd`] finds the leading singular triplets: the best factors of their rank.
//! 5. [`Writer`] streams an adapter to disk, atomically and reproducibly.
//! 6. [`merge_shard`] writes W' = round(W + s·B·A), [`compare`] says how far that is from tuned.
//!
//! ```
//! use lora_compress_core::{Delta, SvdOptions, Target, truncated_svd};
//!
//! // A rank-1 difference is found exactly.
//! let delta = Delta::from_values(vec![1.0, 2.0, 2.0, 4.0, 3.0, 6.0], 3, 2)?;
//! let svd = truncated_svd(&delta, SvdOptions { target: Target::Rank(2), tolerance: 1e-4, seed: 0 })?;
//! assert_eq!(svd.sigma.len(), 1);
//! assert!((svd.sigma[0] - 70f64.sqrt()).abs() < 1e-6);
//! # Ok::<(), lora_compress_core::Error>(())
//! ```
//!
//! # Threads
//!
//! Work runs on the current rayon pool. Results do not depend on its size: every panel's bounds follow from shapes alone and
//! partial sums are added in order.

mod checkpoint;
mod codec;
mod delta;
mod difference;
mod directory;
mod dtype;
mod error;
mod fault;
mod file;
mod fingerprint;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod header;
mod kernel;
mod matrix;
mod memory;
mod merge;
mod packed;
mod panels;
mod patch;
mod pattern;
mod place;
mod rank;
mod residual;
mod rounding;
mod same;
mod scaled;
mod shard;
mod svd;
mod terms;
mod torch;
mod update;
mod verify;
mod write;

pub use checkpoint::{Checkpoint, Shard};
pub use codec::{decode, encode, round_to};
pub use delta::{Delta, energies};
pub use difference::check_finite;
pub use dtype::Dtype;
pub use error::{Error, HeaderFault, IndexFault, Result, TorchFault};
pub use fingerprint::fingerprint;
pub use header::TensorInfo;
pub use kernel::Kernel;
pub use matrix::Matrix;
pub use memory::Workspace;
pub use merge::{MergedShard, MergedTensor, Updates, merge_shard, unknown_tensors};
pub use patch::{Patch, unmerge_shard};
pub use pattern::Patterns;
pub use rank::{Allocation, Candidate, Goal, Rule, Spectrum, Step};
pub use rounding::{Applied, Rounding, Storing};
pub use same::same_bytes;
pub use svd::{SvdOptions, Target, TruncatedSvd, singular_values, tensor_seed, truncated_svd};
pub use terms::{Computed, LowRank, Part, Source, Values};
pub use update::{LoadedUpdate, Update};
pub use verify::{Comparison, compare};
pub use write::{Spec, Writer};
