//! Columns that are added one block after another, in memory that is used again.
//!
//! They are filled front to back and never moved while there is room: products write straight into them.

use faer::{MatMut, MatRef};

use crate::memory::{Array, Workspace};

/// A matrix that grows to the right.
pub(super) struct Columns {
    memory: Array<f32>,
    rows: usize,
    count: usize,
    workspace: Workspace,
}

impl Columns {
    /// None yet, and room for `capacity`.
    pub(super) fn new(rows: usize, capacity: usize, workspace: &Workspace) -> Self {
        let memory = Array::holding_anything(rows * capacity, workspace);
        Self { memory, rows, count: 0, workspace: workspace.clone() }
    }

    /// All of them.
    pub(super) fn all(&self) -> MatRef<'_, f32> {
        self.from(0)
    }

    /// Those from number `first` on.
    pub(super) fn from(&self, first: usize) -> MatRef<'_, f32> {
        let values = &self.memory.values()[first * self.rows..self.count * self.rows];
        MatRef::from_column_major_slice(values, self.rows, self.count - first)
    }

    /// Adds columns that hold anything, to be written.
    pub(super) fn add(&mut self, count: usize) -> MatMut<'_, f32> {
        let (old, new) = (self.count * self.rows, (self.count + count) * self.rows);
        if new > self.memory.values().len() {
            let mut larger = Array::holding_anything(new + new / 2, &self.workspace);
            larger.values_mut()[..old].copy_from_slice(&self.memory.values()[..old]);
            self.memory = larger;
        }
        self.count += count;
        MatMut::from_column_major_slice_mut(&mut self.memory.values_mut()[old..new], self.rows, count)
    }
}
