//! The compiled half of `lora_compress`: converts, releases the GIL, calls the core, converts back. No logic lives here.
//!
//! One file per noun of the core: `checkpoint`, `delta`, `rank`, `kernel`, `writer`, `merge`; `gate` is the only way into long work, `error`
//! the only way out of a failure.

use pyo3::prelude::*;

mod checkpoint;
mod delta;
mod error;
mod gate;
mod kernel;
mod merge;
mod patch;
mod pattern;
mod rank;
mod writer;

/// Keeps memory that is freed for what comes next: the system's allocator returns arrays of megabytes to the kernel, and every
/// tensor would pay for having them cleared again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<checkpoint::Checkpoint>()?;
    module.add_class::<checkpoint::TensorInfo>()?;
    module.add_class::<delta::Delta>()?;
    module.add_class::<delta::Workspace>()?;
    module.add_class::<rank::Spectrum>()?;
    module.add_class::<rank::Allocation>()?;
    module.add_class::<writer::Writer>()?;
    module.add_class::<merge::LowRank>()?;
    module.add_class::<merge::Update>()?;
    module.add_class::<merge::Comparison>()?;
    module.add_class::<merge::MergedTensor>()?;
    module.add_class::<patch::Patch>()?;
    module.add_class::<pattern::Patterns>()?;
    module.add_function(wrap_pyfunction!(checkpoint::check_finite, module)?)?;
    module.add_function(wrap_pyfunction!(checkpoint::fingerprint, module)?)?;
    module.add_function(wrap_pyfunction!(checkpoint::same_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(delta::energies, module)?)?;
    module.add_function(wrap_pyfunction!(delta::round_to, module)?)?;
    module.add_function(wrap_pyfunction!(kernel::kernel, module)?)?;
    module.add_function(wrap_pyfunction!(kernel::kernels, module)?)?;
    module.add_function(wrap_pyfunction!(kernel::measure_kernel, module)?)?;
    module.add_function(wrap_pyfunction!(merge::merge_shard, module)?)?;
    module.add_function(wrap_pyfunction!(merge::compare, module)?)?;
    module.add_function(wrap_pyfunction!(patch::unmerge_shard, module)?)?;
    module.add_function(wrap_pyfunction!(gate::set_threads, module)?)?;
    module.add_function(wrap_pyfunction!(gate::threads, module)?)?;
    error::register(module)
}
