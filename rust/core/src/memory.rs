//! Large arrays, and a workspace that uses their memory again.
//!
//! A packed Δ is read front to back a dozen times and written once: in huge pages that costs a fraction of the page faults and
//! of the address translations. The kernel is asked for them where it gives them on request, and need not comply. Fresh
//! memory has to be cleared by the kernel, which takes as long as reading the tensor: a [`Workspace`] keeps it.

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Memory of packed deltas, kept for the next ones. Clones share it; it is freed with the last.
#[derive(Debug, Clone, Default)]
pub struct Workspace(Arc<Mutex<Vec<MmapMut>>>);

impl Workspace {
    /// The smallest piece that has room for `bytes`, but not far more: it is left for what needs it. Where there is none, the
    /// largest of those that are too small is given up: arrays to come are as likely to be too large for it.
    fn take(&self, bytes: usize) -> Option<MmapMut> {
        const FAR_MORE: usize = 4;
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.sort_unstable_by_key(|map| map.len());
        let too_small = free.partition_point(|map| map.len() < bytes);
        if free.get(too_small).is_some_and(|map| map.len() <= FAR_MORE * bytes) {
            return Some(free.remove(too_small));
        }
        if let Some(largest) = too_small.checked_sub(1) {
            free.remove(largest);
        }
        None
    }

    fn give_back(&self, map: MmapMut) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(map);
    }
}

/// An array in anonymous memory of its own, or on the heap where it is small or that cannot be had.
#[derive(Debug)]
pub(crate) struct Array<T: Pod> {
    len: usize,
    heap: Vec<T>,
    map: Option<MmapMut>,
    home: Workspace,
}

impl<T: Pod> Array<T> {
    /// Below this, the heap serves as well.
    const LARGE: usize = 1 << 21;

    /// `len` values in memory of `workspace`, or in new memory that it gets back: zeros, or what was there before.
    pub(crate) fn holding_anything(len: usize, workspace: &Workspace) -> Self {
        let bytes = len * size_of::<T>();
        let mut array = Self { len, heap: Vec::new(), map: None, home: workspace.clone() };
        if bytes < Self::LARGE {
            array.heap = vec![T::zeroed(); len];
        } else if let Some(map) = workspace.take(bytes) {
            array.map = Some(map);
        } else if let Ok(map) = MmapMut::map_anon(bytes) {
            // Advice only: without huge pages it is slower, not wrong.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            array.map = Some(map);
        } else {
            array.heap = vec![T::zeroed(); len];
        }
        array
    }

    pub(crate) fn values(&self) -> &[T] {
        match &self.map {
            Some(map) => bytemuck::cast_slice(&map[..self.len * size_of::<T>()]),
            None => &self.heap,
        }
    }

    pub(crate) fn values_mut(&mut self) -> &mut [T] {
        match &mut self.map {
            Some(map) => bytemuck::cast_slice_mut(&mut map[..self.len * size_of::<T>()]),
            None => &mut self.heap,
        }
    }
}

impl<T: Pod> Drop for Array<T> {
    fn drop(&mut self) {
        if let Some(map) = self.map.take() {
            self.home.give_back(map);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again() {
        let workspace = Workspace::default();
        let mut first = Array::<u16>::holding_anything(3 << 20, &workspace);
        first.values_mut().fill(7);
        let place = first.values().as_ptr();
        drop(first);
        let second = Array::<f32>::holding_anything(1 << 20, &workspace);
        assert_eq!(second.values().as_ptr().cast(), place);
        let third = Array::<u16>::holding_anything(3 << 20, &workspace);
        assert!(third.values().iter().all(|&value| value == 0), "new memory is zero");
        assert_eq!((second.values().len(), third.values().len()), (1 << 20, 3 << 20));
    }
}
