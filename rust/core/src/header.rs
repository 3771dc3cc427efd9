//! The safetensors header: parsed and validated once, at the door.
//!
//! Format: `u64` little-endian header length N, N bytes of JSON (`{"name": {"dtype", "shape", "data_offsets"}}`, padded with
//! spaces), then the tensors' bytes. A [`Header`] exists only when every offset has been checked: tensors tile the data
//! without overlap or hole up to the last byte of the file, and every size was computed without overflow.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::dtype::Dtype;
use crate::error::HeaderFault;

/// Bytes of the length field.
pub(crate) const PREFIX: u64 = 8;
/// The format's own limit on the header's length.
const MAX_HEADER: u64 = 100_000_000;

/// Where and what a tensor is inside one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type, as it is read.
    pub dtype: Dtype,
    /// Element type in the file: eight bits are read as more.
    pub stored: Dtype,
    /// Row-major shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// First byte, counted from the beginning of the file.
    pub offset: u64,
    /// Length in bytes.
    pub nbytes: u64,
}

impl TensorInfo {
    /// The dtype in which the tensor is written again unless another is asked for: its own, and BF16 for eight-bit weights, whose
    /// scales would no longer fit.
    #[must_use]
    pub fn written(&self) -> Dtype {
        if self.dtype == self.stored { self.dtype } else { Dtype::BF16 }
    }

    /// Rows and columns of the tensor seen as a matrix: its first dimension, and all others together. A vector is a column.
    #[must_use]
    pub fn matrix_shape(&self) -> (usize, usize) {
        match self.shape.as_slice() {
            [] => (1, 1),
            [rows, rest @ ..] => (*rows, rest.iter().product()),
        }
    }
}

/// A validated header: tensors in file order, and the free-form metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) tensors: Vec<(String, TensorInfo)>,
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Reads the length field of a file of `file_len` bytes, of which `prefix` are the first.
pub(crate) fn header_len(prefix: &[u8], file_len: u64) -> Result<u64, HeaderFault> {
    let Ok(raw) = <[u8; 8]>::try_from(prefix) else {
        return Err(HeaderFault::TooShort(file_len));
    };
    let len = u64::from_le_bytes(raw);
    if len > MAX_HEADER {
        return Err(HeaderFault::TooLarge(len));
    }
    if len > file_len.saturating_sub(PREFIX) {
        return Err(HeaderFault::BeyondFile { header: len, file: file_len });
    }
    Ok(len)
}

impl Header {
    /// Parses and validates the JSON of a header that belongs to a file of `file_len` bytes.
    pub(crate) fn parse(json: &[u8], file_len: u64) -> Result<Self, HeaderFault> {
        let raw: RawHeader = serde_json::from_slice(json).map_err(|error| HeaderFault::Json(error.to_string()))?;
        if let Some(name) = raw.duplicate {
            return Err(HeaderFault::Duplicate(name));
        }
        let data_begin = PREFIX + json.len() as u64;
        let mut entries = raw.tensors;
        entries.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut end = 0u64;
        let mut tensors = Vec::with_capacity(entries.len());
        for (name, entry) in entries {
            let (begin, stop) = entry.data_offsets;
            let Some(spanned) = stop.checked_sub(begin) else {
                return Err(HeaderFault::Backwards(name));
            };
            if begin != end {
                return Err(HeaderFault::NotContiguous { name, expected: end, found: begin });
            }
            let Some(needed) = byte_count(entry.dtype, &entry.shape) else {
                return Err(HeaderFault::Overflow(name));
            };
            if needed != spanned {
                return Err(HeaderFault::Size { name, needed, spanned });
            }
            end = stop;
            // `stop` is checked against the file below; until then the sum could overflow for a hostile header.
            let offset = data_begin.saturating_add(begin);
            let RawEntry { dtype, shape, .. } = entry;
            tensors.push((name, TensorInfo { dtype, stored: dtype, shape, offset, nbytes: needed }));
        }
        let data_len = file_len.saturating_sub(data_begin);
        if end != data_len {
            return Err(HeaderFault::WrongEnd { tensors: end, file: data_len });
        }
        Ok(Self { tensors, metadata: raw.metadata })
    }
}

/// Bytes of a tensor, or `None` when the count overflows or is not whole.
pub(crate) fn byte_count(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    // A zero must not hide an overflow before or after it: rows and columns are multiplied apart later, and up to eight
    // bytes an element. So the product of the other dimensions must fit as well.
    let mut nonzero = shape.iter().filter(|&&dim| dim != 0);
    let product = nonzero.try_fold(1u64, |product, &dim| product.checked_mul(u64::try_from(dim).ok()?))?;
    usize::try_from(product.checked_mul(64)?).ok()?;
    let elements = if shape.contains(&0) { 0 } else { product };
    let bits = elements.checked_mul(dtype.bits())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

#[derive(Default)]
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
    metadata: BTreeMap<String, String>,
    duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            // A map type would keep the last of two equal keys: whoever reads the file next may keep the first.
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        header.duplicate.get_or_insert_with(|| key.clone());
                    }
                    if key == "__metadata__" {
                        header.metadata =
                            map.next_value().map_err(|error| A::Error::custom(format!("`__metadata__`: {error}")))?;
                    } else {
                        let entry =
                            map.next_value().map_err(|error| A::Error::custom(format!("tensor `{key}`: {error}")))?;
                        header.tensors.push((key, entry));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse(json: &str, data: u64) -> Result<Header, HeaderFault> {
        Header::parse(json.as_bytes(), PREFIX + json.len() as u64 + data)
    }

    #[test]
    fn a_valid_header_lists_tensors_in_file_order() {
        let json = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[2,10]},"a":{"dtype":"BF16","shape":[],"data_offsets":[0,2]}}"#;
        let header = parse(json, 10).unwrap();
        assert_eq!(header.tensors[0].0, "a");
        assert_eq!(header.tensors[1].1.offset, PREFIX + json.len() as u64 + 2);
    }

    #[test]
    fn empty_tensors_and_metadata_are_legal() {
        let json = r#"{"__metadata__":{"format":"pt"},"e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}}"#;
        assert_eq!(parse(json, 0).unwrap().metadata["format"], "pt");
    }

    #[test]
    fn every_contradiction_is_refused() {
        type Case = (&'static str, u64, fn(&HeaderFault) -> bool);
        let cases: [Case; 12] = [
            (r#"{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}"#, 0, |f| {
                matches!(f, HeaderFault::Overflow(_))
            }),
            ("[", 0, |f| matches!(f, HeaderFault::Json(_))),
            (r#"{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,1]}}"#, 1, |f| matches!(f, HeaderFault::Json(_))),
            (r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, 1, |f| matches!(f, HeaderFault::Json(_))),
            (r#"{"__metadata__":{"a":1}}"#, 0, |f| matches!(f, HeaderFault::Json(_))),
            (
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
                2,
                |f| matches!(f, HeaderFault::Duplicate(_)),
            ),
            (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}"#, 1, |f| matches!(f, HeaderFault::Backwards(_))),
            (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#, 2, |f| {
                matches!(f, HeaderFault::NotContiguous { .. })
            }),
            (
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
                3,
                |f| matches!(f, HeaderFault::NotContiguous { .. }),
            ),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, |f| matches!(f, HeaderFault::Size { .. })),
            (r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}"#, 0, |f| {
                matches!(f, HeaderFault::Overflow(_))
            }),
            (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 2, |f| {
                matches!(f, HeaderFault::WrongEnd { .. })
            }),
        ];
        for (json, data, expected) in cases {
            let fault = parse(json, data).unwrap_err();
            assert!(expected(&fault), "{json}: {fault:?}");
        }
    }

    #[test]
    fn deep_json_does_not_overflow_the_stack() {
        let json = format!("{{\"a\":{}", "[".repeat(1_000_000));
        assert!(matches!(parse(&json, 0), Err(HeaderFault::Json(_))));
    }

    #[test]
    fn the_length_field_is_checked_against_file_and_limit() {
        assert!(matches!(header_len(&[0; 3], 3), Err(HeaderFault::TooShort(3))));
        assert!(matches!(header_len(&9u64.to_le_bytes(), 16), Err(HeaderFault::BeyondFile { .. })));
        assert!(matches!(header_len(&u64::MAX.to_le_bytes(), u64::MAX), Err(HeaderFault::TooLarge(_))));
        assert_eq!(header_len(&8u64.to_le_bytes(), 16), Ok(8));
    }
}
