//! `Patterns`: PEFT's patterns of module names.

use lora_compress_core as core;
use pyo3::prelude::*;

use crate::error::to_python;

/// Patterns of PEFT's `rank_pattern` or `alpha_pattern`, compiled once.
///
/// Raises `LoraCompressError` for a pattern that is no regular expression or could not be matched in linear time.
#[pyclass(frozen, module = "lora_compress._native")]
pub struct Patterns {
    inner: core::Patterns,
}

#[pymethods]
impl Patterns {
    #[new]
    fn new(patterns: Vec<String>) -> PyResult<Self> {
        let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
        Ok(Self { inner: core::Patterns::new(&patterns).map_err(to_python)? })
    }

    /// Index of the first that matches the end of `name`, or None. Linear in the length of both.
    fn first_match(&self, name: &str) -> Option<usize> {
        self.inner.first_match(name)
    }
}
