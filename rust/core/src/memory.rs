//! Large arrays of zeros.
//!
//! A packed Δ is read front to back a dozen times and written once: in huge pages that costs a fraction of the page faults and
//! of the address translations. The kernel is asked for them where it gives them on request, and need not comply.

use memmap2::MmapMut;

/// An array in anonymous memory of its own, or on the heap where that cannot be had.
#[derive(Debug)]
pub(crate) enum Array<T> {
    Mapped(MmapMut),
    Heap(Vec<T>),
}

impl<T: bytemuck::Pod> Array<T> {
    /// Below this, the heap serves as well.
    const LARGE: usize = 1 << 21;

    pub(crate) fn zeros(len: usize) -> Self {
        let bytes = len * size_of::<T>();
        if bytes >= Self::LARGE
            && let Ok(map) = MmapMut::map_anon(bytes)
        {
            #[cfg(target_os = "linux")]
            // Advice only: without huge pages it is slower, not wrong.
            let _ = map.advise(memmap2::Advice::HugePage);
            return Self::Mapped(map);
        }
        Self::Heap(vec![T::zeroed(); len])
    }

    pub(crate) fn values(&self) -> &[T] {
        match self {
            Self::Mapped(map) => bytemuck::cast_slice(map),
            Self::Heap(values) => values,
        }
    }

    pub(crate) fn values_mut(&mut self) -> &mut [T] {
        match self {
            Self::Mapped(map) => bytemuck::cast_slice_mut(map),
            Self::Heap(values) => values,
        }
    }
}
