//! The names that the pickle of a state dict may use. All others are refused: a name is what a pickle calls.

use crate::dtype::Dtype;

/// The names that a state dict may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Global {
    OrderedDict,
    Size,
    Tensor,
    TensorOfDtype,
    Parameter,
    /// Something that no tensor is made of, made by something that does no harm.
    Opaque,
    /// A storage class; untyped ones hold bytes.
    Storage(Option<Dtype>),
    /// `torch.float16` and the like.
    Dtype(Dtype),
}

impl Global {
    /// The name, if it is one of them.
    pub(crate) fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch", "Size") => Self::Size,
            ("torch", "device") | ("_codecs", "encode") | ("collections", "Counter") => Self::Opaque,
            ("builtins" | "__builtin__", "set") => Self::Opaque,
            ("torch._utils", "_rebuild_tensor_v2") => Self::Tensor,
            ("torch._utils", "_rebuild_tensor_v3") => Self::TensorOfDtype,
            ("torch._utils", "_rebuild_parameter") => Self::Parameter,
            ("torch.storage", "UntypedStorage") | ("torch", "UntypedStorage") => Self::Storage(None),
            ("torch", storage) if storage.ends_with("Storage") => Self::Storage(Some(storage_dtype(storage)?)),
            ("torch", dtype) => Self::Dtype(torch_dtype(dtype)?),
            _ => return None,
        })
    }
}

fn storage_dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        "ComplexFloatStorage" => Dtype::C64,
        _ => return None,
    })
}

fn torch_dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "float64" => Dtype::F64,
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float8_e4m3fnuz" => Dtype::F8_E4M3FNUZ,
        "float8_e5m2fnuz" => Dtype::F8_E5M2FNUZ,
        "float8_e8m0fnu" => Dtype::F8_E8M0,
        "int64" => Dtype::I64,
        "int32" => Dtype::I32,
        "int16" => Dtype::I16,
        "int8" => Dtype::I8,
        "uint64" => Dtype::U64,
        "uint32" => Dtype::U32,
        "uint16" => Dtype::U16,
        "uint8" => Dtype::U8,
        "bool" => Dtype::BOOL,
        "complex64" => Dtype::C64,
        _ => return None,
    })
}
