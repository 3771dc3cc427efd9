//! A stack machine that follows a pickle without running it.
//!
//! A pickle is a program for a stack machine, and `GLOBAL` + `REDUCE` call whatever it names. This machine knows the names that
//! a state dict needs ([`Global`]) and calls nothing: each "call" becomes a description of a tensor. Any other name, and any
//! other opcode, is refused. (PyTorch's own `weights_only` unpickler, `torch/_weights_only_unpickler.py`, takes the same way.)
//!
//! Values live in an arena and are referred to by number: neither deep nesting nor cycles cost any stack, nothing is copied when
//! it is referred to again, and how many values there may be is bounded.

use std::collections::HashMap;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::TorchFault;
use crate::torch::names::Global;

pub(crate) type Result<T> = std::result::Result<T, TorchFault>;

/// Values that a pickle may make or refer to: those of a hundred thousand tensors.
const MAX_VALUES: usize = 1 << 21;

pub(crate) type Id = usize;
/// Keys and values of a dictionary.
pub(crate) type Items = [(Id, Id)];

#[derive(Debug)]
pub(crate) enum Node {
    /// None, a float, bytes: nothing that a tensor is made of.
    Other,
    Int(i64),
    Text(Arc<str>),
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage {
        dtype: Option<Dtype>,
        key: Arc<str>,
    },
    Tensor {
        dtype: Dtype,
        key: Arc<str>,
        first: Id,
        shape: Id,
        strides: Id,
    },
}

#[derive(Default)]
pub(crate) struct Machine<'a> {
    input: &'a [u8],
    pub(crate) arena: Vec<Node>,
    stack: Vec<Id>,
    /// Where in the stack each open MARK stands.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
    /// Items in all sequences and dictionaries.
    items: usize,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self { input, ..Self::default() }
    }

    /// Runs to STOP; the value on top.
    pub(crate) fn run(&mut self) -> Result<Id> {
        loop {
            let [code] = self.take()?;
            match code {
                b'.' => return self.pop(),
                0x80 => _ = self.take::<1>()?,                                 // PROTO
                0x95 => _ = self.take::<8>()?,                                 // FRAME
                b'(' => self.mark()?,                                          // MARK
                b'0' => _ = self.pop()?,                                       // POP
                b'1' => _ = self.pop_mark()?,                                  // POP_MARK
                b'2' => self.top().and_then(|id| self.refer(id))?,             // DUP
                b'N' => self.push(Node::Other)?,                               // NONE
                0x88 | 0x89 => self.push(Node::Int(i64::from(code == 0x88)))?, // NEWTRUE, NEWFALSE
                b'J' => self.take().and_then(|raw| self.push(Node::Int(i32::from_le_bytes(raw).into())))?, // BININT
                b'K' => self.length::<1>().and_then(|number| self.push(Node::Int(number as i64)))?, // BININT1
                b'M' => self.length::<2>().and_then(|number| self.push(Node::Int(number as i64)))?, // BININT2
                0x8a => self.long()?,                                          // LONG1
                b'G' => self.take::<8>().and_then(|_| self.push(Node::Other))?, // BINFLOAT
                b'X' => self.length::<4>().and_then(|len| self.text(len))?,    // BINUNICODE
                0x8c => self.length::<1>().and_then(|len| self.text(len))?,    // SHORT_BINUNICODE
                0x8d => self.length::<8>().and_then(|len| self.text(len))?,    // BINUNICODE8
                b'B' | b'T' => self.length::<4>().and_then(|len| self.opaque(len))?, // BINBYTES, BINSTRING
                b'C' | b'U' => self.length::<1>().and_then(|len| self.opaque(len))?, // SHORT_BINBYTES, SHORT_BINSTRING
                0x8e => self.length::<8>().and_then(|len| self.opaque(len))?,  // BINBYTES8
                b'}' => self.push(Node::Dict(Vec::new()))?,                    // EMPTY_DICT
                b']' | b')' | 0x8f => self.push(Node::Sequence(Vec::new()))?,  // EMPTY_LIST, EMPTY_TUPLE, EMPTY_SET
                b'a' => self.pop().and_then(|item| self.extend(vec![item]))?,  // APPEND
                b'e' | 0x90 => self.pop_mark().and_then(|items| self.extend(items))?, // APPENDS, ADDITEMS
                b's' => self.set_item()?,                                      // SETITEM
                b'u' => self.pop_mark().and_then(|items| self.set_items(&items))?, // SETITEMS
                b't' | 0x91 => self.pop_mark().and_then(|items| self.push(Node::Sequence(items)))?, // TUPLE, FROZENSET
                0x85..=0x87 => self.short_tuple(usize::from(code - 0x84))?,    // TUPLE1, TUPLE2, TUPLE3
                b'h' => self.length::<1>().and_then(|key| self.get(key))?,     // BINGET
                b'j' => self.length::<4>().and_then(|key| self.get(key))?,     // LONG_BINGET
                b'q' => self.length::<1>().and_then(|key| self.put(key))?,     // BINPUT
                b'r' => self.length::<4>().and_then(|key| self.put(key))?,     // LONG_BINPUT
                0x94 => self.put(self.memo.len() as u64)?,                     // MEMOIZE
                b'c' => self.global()?,                                        // GLOBAL
                0x93 => self.stack_global()?,                                  // STACK_GLOBAL
                b'Q' => self.persistent()?,                                    // BINPERSID
                b'R' | 0x81 => self.reduce()?,                                 // REDUCE, NEWOBJ
                b'b' => self.build()?,                                         // BUILD
                other => return Err(TorchFault::Opcode(other)),
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.input.split_first_chunk::<N>().ok_or(TorchFault::PickleEnds)?;
        self.input = rest;
        Ok(*head)
    }

    fn bytes(&mut self, len: u64) -> Result<&[u8]> {
        let len = usize::try_from(len).map_err(|_| TorchFault::PickleEnds)?;
        let (head, rest) = self.input.split_at_checked(len).ok_or(TorchFault::PickleEnds)?;
        self.input = rest;
        Ok(head)
    }

    fn line(&mut self) -> Result<String> {
        let len = self.input.iter().position(|&byte| byte == b'\n').ok_or(TorchFault::PickleEnds)?;
        let text = String::from_utf8_lossy(self.bytes(len as u64)?).into_owned();
        self.take::<1>()?;
        Ok(text)
    }

    /// An unsigned number of N bytes.
    fn length<const N: usize>(&mut self) -> Result<u64> {
        let raw: [u8; N] = self.take()?;
        Ok(raw.iter().rev().fold(0u64, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn long(&mut self) -> Result<()> {
        let len = self.length::<1>()?;
        let raw = self.bytes(len)?;
        // Two's complement of any length, but nothing that a tensor is made of needs more than 64 bits.
        let number = match raw {
            [] => Some(0),
            [.., last] if raw.len() <= 8 => {
                let sign = if last & 0x80 == 0 { 0i64 } else { -1 };
                Some(raw.iter().rev().fold(sign, |number, &byte| number << 8 | i64::from(byte)))
            }
            _ => None,
        };
        self.push(number.map_or(Node::Other, Node::Int))
    }

    fn text(&mut self, len: u64) -> Result<()> {
        let text = std::str::from_utf8(self.bytes(len)?).map_err(|_| TorchFault::Malformed("a text is not UTF-8"))?;
        let node = Node::Text(text.into());
        self.push(node)
    }

    fn opaque(&mut self, len: u64) -> Result<()> {
        self.bytes(len)?;
        self.push(Node::Other)
    }

    fn push(&mut self, node: Node) -> Result<()> {
        let id = self.arena.len();
        self.arena.push(node);
        self.refer(id)
    }

    fn refer(&mut self, id: Id) -> Result<()> {
        self.stack.push(id);
        self.within(self.arena.len().max(self.stack.len()))
    }

    fn mark(&mut self) -> Result<()> {
        self.marks.push(self.stack.len());
        self.within(self.marks.len())
    }

    fn within(&self, values: usize) -> Result<()> {
        if values > MAX_VALUES { Err(TorchFault::Malformed("it holds too many values")) } else { Ok(()) }
    }

    fn top(&self) -> Result<Id> {
        self.stack.last().copied().ok_or(TorchFault::Malformed("its stack runs empty"))
    }

    fn pop(&mut self) -> Result<Id> {
        // What lies below an open mark belongs to whoever comes after it.
        if self.marks.last().is_some_and(|&mark| self.stack.len() <= mark) {
            return Err(TorchFault::Malformed("its stack runs empty"));
        }
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or(TorchFault::Malformed("a mark is missing"))?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    pub(crate) fn node(&self, id: Id) -> Result<&Node> {
        self.arena.get(id).ok_or(TorchFault::Malformed("a value is missing"))
    }

    fn extend(&mut self, items: Vec<Id>) -> Result<()> {
        self.items += items.len();
        self.within(self.items)?;
        let list = self.top()?;
        match self.arena.get_mut(list) {
            Some(Node::Sequence(held)) => held.extend(items),
            _ => return Err(TorchFault::Malformed("items are added to what is no list")),
        }
        Ok(())
    }

    fn set_item(&mut self) -> Result<()> {
        let value = self.pop()?;
        let key = self.pop()?;
        self.set_items(&[key, value])
    }

    fn set_items(&mut self, items: &[Id]) -> Result<()> {
        self.items += items.len();
        self.within(self.items)?;
        let dict = self.top()?;
        match self.arena.get_mut(dict) {
            Some(Node::Dict(held)) if items.len().is_multiple_of(2) => {
                held.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err(TorchFault::Malformed("items are set in what is no dictionary")),
        }
        Ok(())
    }

    fn short_tuple(&mut self, len: usize) -> Result<()> {
        let mut items = (0..len).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        items.reverse();
        self.push(Node::Sequence(items))
    }

    fn get(&mut self, key: u64) -> Result<()> {
        let id = self.memo.get(&key).copied().ok_or(TorchFault::Malformed("it refers to what it has not named"))?;
        self.refer(id)
    }

    fn put(&mut self, key: u64) -> Result<()> {
        self.memo.insert(key, self.top()?);
        self.within(self.memo.len())
    }

    fn global(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        self.push_global(&module, &name)
    }

    fn stack_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        match (self.node(module)?, self.node(name)?) {
            (Node::Text(module), Node::Text(name)) => {
                let (module, name) = (module.clone(), name.clone());
                self.push_global(&module, &name)
            }
            _ => Err(TorchFault::Malformed("a global has no name")),
        }
    }

    fn push_global(&mut self, module: &str, name: &str) -> Result<()> {
        let global =
            Global::named(module, name).ok_or_else(|| TorchFault::Global(shortened(&format!("{module}.{name}"))))?;
        self.push(Node::Global(global))
    }

    /// `('storage', class, key, location, elements)`.
    fn persistent(&mut self) -> Result<()> {
        const MALFORMED: TorchFault = TorchFault::Malformed("a storage is malformed");
        let id = self.pop()?;
        let &[tag, class, key, _, _] = self.sequence(id)? else { return Err(MALFORMED) };
        let storage = match (self.node(tag)?, self.node(class)?, self.node(key)?) {
            (Node::Text(tag), Node::Global(Global::Storage(dtype)), Node::Text(key)) if &**tag == "storage" => {
                Node::Storage { dtype: *dtype, key: Arc::clone(key) }
            }
            _ => return Err(MALFORMED),
        };
        self.push(storage)
    }

    /// What a call of a known name would make.
    fn reduce(&mut self) -> Result<()> {
        let (args, callable) = (self.pop()?, self.pop()?);
        let Node::Global(global) = self.node(callable)? else {
            return Err(TorchFault::Malformed("what is called has no name"));
        };
        match (global, self.sequence(args)?) {
            (Global::OrderedDict, []) => self.push(Node::Dict(Vec::new())),
            (Global::Size, &[sizes]) => self.refer(sizes),
            (Global::Parameter, &[data, ..]) => self.refer(data),
            (Global::Opaque, _) => self.push(Node::Other),
            (Global::Tensor, &[storage, first, shape, strides, _, _, ref rest @ ..]) if self.is_plain(rest) => {
                self.tensor(storage, first, shape, strides, None)
            }
            (Global::TensorOfDtype, &[storage, first, shape, strides, _, _, dtype, ref rest @ ..])
                if self.is_plain(rest) =>
            {
                match self.node(dtype)? {
                    Node::Global(Global::Dtype(dtype)) => self.tensor(storage, first, shape, strides, Some(*dtype)),
                    _ => Err(TorchFault::Malformed("a tensor has no dtype")),
                }
            }
            (Global::Tensor | Global::TensorOfDtype, [_, _, _, _, ..]) => {
                Err(TorchFault::Malformed("a tensor is a negated or conjugated view: save it with `.resolve_neg()`"))
            }
            _ => Err(TorchFault::Malformed("a call has other arguments than PyTorch's")),
        }
    }

    /// Whether what follows a tensor's usual arguments says nothing more of it.
    fn is_plain(&self, rest: &[Id]) -> bool {
        rest.iter().all(|&id| match self.arena.get(id) {
            Some(Node::Dict(items)) => items.is_empty(),
            node => matches!(node, Some(Node::Other)),
        })
    }

    fn tensor(&mut self, storage: Id, first: Id, shape: Id, strides: Id, dtype: Option<Dtype>) -> Result<()> {
        let Node::Storage { dtype: stored, key } = self.node(storage)? else {
            return Err(TorchFault::Malformed("a tensor has no storage"));
        };
        let dtype = dtype.or(*stored).ok_or(TorchFault::Malformed("a tensor has no dtype"))?;
        let key = Arc::clone(key);
        self.push(Node::Tensor { dtype, key, first, shape, strides })
    }

    pub(crate) fn sequence(&self, id: Id) -> Result<&[Id]> {
        match self.node(id)? {
            Node::Sequence(items) => Ok(items),
            _ => Err(TorchFault::Malformed("a tuple is missing")),
        }
    }

    pub(crate) fn size(&self, id: Id) -> Result<usize> {
        match self.node(id)? {
            Node::Int(number) => usize::try_from(*number).map_err(|_| TorchFault::Malformed("a size is negative")),
            _ => Err(TorchFault::Malformed("a size is no number")),
        }
    }

    /// Attributes: a state dict has some of its own (`_metadata`), which say nothing about weights.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.node(self.top()?)? {
            Node::Dict(_) | Node::Tensor { .. } => Ok(()),
            _ => Err(TorchFault::Malformed("attributes are set on what has none")),
        }
    }
}

/// A name as it is shown: long enough to recognise, never longer than a line.
pub(crate) fn shortened(name: &str) -> String {
    name.chars().filter(|character| !character.is_control()).take(80).collect()
}
