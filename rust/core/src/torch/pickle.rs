//! What the pickle of a PyTorch checkpoint describes: the tensors of its state dict.

use std::collections::HashSet;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::TorchFault;
use crate::torch::machine::{Id, Items, Machine, Node, Result, shortened};

/// No weight has more dimensions.
const MAX_DIMS: usize = 8;
/// A tensor as the pickle describes it: elements of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PickledTensor {
    pub(crate) dtype: Dtype,
    /// Name of the storage's entry in the archive.
    pub(crate) key: Arc<str>,
    /// First element in the storage.
    pub(crate) first: u64,
    pub(crate) shape: Vec<usize>,
    /// Elements between neighbours, by dimension.
    pub(crate) strides: Vec<usize>,
}

/// What a pickle describes: the tensors of the state dict, and how many values lie beside them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pickled {
    pub(crate) tensors: Vec<(Arc<str>, PickledTensor)>,
    /// The key of the state dict where the pickle holds it among other things.
    pub(crate) inside: Option<Arc<str>>,
    /// Values that are no tensors of the state dict: numbers, texts, the state of an optimizer.
    pub(crate) others: usize,
}

/// Keys under which training scripts keep the weights.
const STATE_DICTS: [&str; 6] = ["state_dict", "model_state_dict", "model", "module", "params_ema", "params"];

/// Describes the tensors of a pickle.
///
/// # Errors
/// [`TorchFault`]: for what is no pickle of tensors alone.
pub(crate) fn read(bytes: &[u8]) -> Result<Pickled> {
    let mut machine = Machine::new(bytes);
    let root = machine.run()?;
    machine.state_dict(root)
}

impl Machine<'_> {
    /// The dictionary of tensors: the whole, or the value of one of [`STATE_DICTS`], or of the only key whose value is one.
    fn state_dict(&self, root: Id) -> Result<Pickled> {
        let Node::Dict(items) = self.node(root)? else {
            return Err(TorchFault::NoStateDict);
        };
        if self.holds_tensors(items) {
            return self.collect(items, None, 0);
        }
        let mut inner: Vec<(&Arc<str>, &Items)> = Vec::new();
        // One dictionary may stand under many keys.
        let mut seen = HashSet::new();
        for &(key, value) in items {
            if let (Node::Text(key), Node::Dict(held)) = (self.node(key)?, self.node(value)?)
                && seen.insert(value)
                && self.holds_tensors(held)
            {
                inner.push((key, held));
            }
        }
        let usual = STATE_DICTS.iter().find_map(|name| inner.iter().find(|(key, _)| &***key == *name));
        match (usual, inner.as_slice()) {
            (Some((key, held)), _) | (None, [(key, held)]) => {
                self.collect(held, Some(Arc::clone(key)), items.len().saturating_sub(1))
            }
            (None, []) => Err(TorchFault::NoStateDict),
            (None, [(first, _), (second, _), ..]) => {
                Err(TorchFault::SeveralStateDicts { first: shortened(first), second: shortened(second) })
            }
        }
    }

    fn holds_tensors(&self, items: &Items) -> bool {
        items.iter().any(|&(_, value)| matches!(self.arena.get(value), Some(Node::Tensor { .. })))
    }

    fn collect(&self, items: &Items, inside: Option<Arc<str>>, mut others: usize) -> Result<Pickled> {
        let mut tensors = Vec::new();
        let mut seen = HashSet::new();
        for &(key, value) in items {
            let Node::Tensor { dtype, key: storage, first, shape, strides } = self.node(value)? else {
                others += 1;
                continue;
            };
            // A tensor that cannot be named cannot be accounted for.
            let Node::Text(name) = self.node(key)? else {
                return Err(TorchFault::Malformed("a tensor's name is no text"));
            };
            if !seen.insert(name) {
                return Err(TorchFault::Duplicate(shortened(name)));
            }
            let (shape, strides) = (self.sizes(*shape)?, self.sizes(*strides)?);
            if shape.len() != strides.len() {
                return Err(TorchFault::Malformed("a tensor's shape and strides do not fit together"));
            }
            let (dtype, key, first) = (*dtype, Arc::clone(storage), self.size(*first)? as u64);
            tensors.push((Arc::clone(name), PickledTensor { dtype, key, first, shape, strides }));
        }
        Ok(Pickled { tensors, inside, others })
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>> {
        let items = self.sequence(id)?;
        if items.len() > MAX_DIMS {
            return Err(TorchFault::Malformed("a tensor has too many dimensions"));
        }
        items.iter().map(|&item| self.size(item)).collect()
    }
}
