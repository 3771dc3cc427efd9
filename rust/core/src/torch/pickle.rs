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

/// What a pickle describes: the tensors of the state dict, and what else it holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pickled {
    pub(crate) tensors: Vec<(Arc<str>, PickledTensor)>,
    /// The key of the state dict where the pickle holds it among other things.
    pub(crate) inside: Option<Arc<str>>,
    /// Keys of other things with tensors in them: weights from another time, the state of an optimizer.
    pub(crate) left_out: Vec<String>,
}

/// Values that are looked at for tensors in them.
const MAX_STEPS: usize = 1 << 24;
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
    /// The dictionary of tensors: the value of one of [`STATE_DICTS`], or the whole, or the value of the only key that has one.
    fn state_dict(&self, root: Id) -> Result<Pickled> {
        let Node::Dict(items) = self.node(root)? else {
            return Err(TorchFault::NoStateDict);
        };
        // Of everything with tensors in it: its key, and its items where it is a state dict.
        let mut holders: Vec<(String, Option<&Items>)> = Vec::new();
        let mut steps = 0;
        for &(key, value) in items {
            if self.reaches_tensor(value, &mut steps)? {
                let held = match self.node(value)? {
                    Node::Dict(held) if self.holds_tensors(held) => Some(held.as_slice()),
                    _ => None,
                };
                holders.push((self.shown(key), held));
            }
        }
        let usual =
            STATE_DICTS.iter().find_map(|name| holders.iter().position(|(key, held)| key == name && held.is_some()));
        let only = if let [(_, Some(_))] = holders.as_slice() { Some(0) } else { None };
        if let Some(chosen) = usual.or(only)
            && let Some((key, Some(held))) = holders.get(chosen)
        {
            let mut pickled = self.collect(held, &mut steps)?;
            pickled.inside = Some(key.as_str().into());
            pickled.left_out =
                holders.iter().filter(|(other, _)| other != key).map(|(other, _)| other.clone()).collect();
            return Ok(pickled);
        }
        if self.holds_tensors(items) {
            return self.collect(items, &mut steps);
        }
        match holders.as_slice() {
            [] | [_] => Err(TorchFault::NoStateDict),
            [(first, _), (second, _), ..] => {
                Err(TorchFault::SeveralStateDicts { first: first.clone(), second: second.clone() })
            }
        }
    }

    fn holds_tensors(&self, items: &Items) -> bool {
        items.iter().any(|&(_, value)| matches!(self.arena.get(value), Some(Node::Tensor { .. })))
    }

    /// Whether a value is a tensor or has one anywhere in it. `steps` counts over all calls: values may share what they hold.
    fn reaches_tensor(&self, id: Id, steps: &mut usize) -> Result<bool> {
        let (mut left, mut seen) = (vec![id], HashSet::new());
        while let Some(id) = left.pop() {
            *steps += 1;
            if *steps > MAX_STEPS {
                return Err(TorchFault::Malformed("its values hold each other too often"));
            }
            match self.node(id)? {
                Node::Tensor { .. } => return Ok(true),
                Node::Sequence(items) if seen.insert(id) => left.extend(items),
                Node::Dict(items) if seen.insert(id) => left.extend(items.iter().map(|&(_, value)| value)),
                _ => {}
            }
        }
        Ok(false)
    }

    /// A key as it is told.
    fn shown(&self, key: Id) -> String {
        match self.arena.get(key) {
            Some(Node::Text(text)) => shortened(text),
            Some(Node::Int(number)) => number.to_string(),
            _ => "?".into(),
        }
    }

    fn collect(&self, items: &Items, steps: &mut usize) -> Result<Pickled> {
        let mut tensors = Vec::new();
        let mut seen = HashSet::new();
        for &(key, value) in items {
            let Node::Tensor { dtype, key: storage, first, shape, strides } = self.node(value)? else {
                // Numbers and texts are no weights; tensors one level down would be lost.
                if self.reaches_tensor(value, steps)? {
                    return Err(TorchFault::Nested(self.shown(key)));
                }
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
        Ok(Pickled { tensors, ..Pickled::default() })
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>> {
        let items = self.sequence(id)?;
        if items.len() > MAX_DIMS {
            return Err(TorchFault::Malformed("a tensor has too many dimensions"));
        }
        items.iter().map(|&item| self.size(item)).collect()
    }
}
