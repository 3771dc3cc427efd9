//! PEFT's patterns of module names, matched in linear time.
//!
//! `rank_pattern` and `alpha_pattern` of an adapter are regular expressions from a file that nobody vouches for. A
//! backtracking engine such as Python's `re` can be kept busy for years by a short one; this one cannot.

use regex::{Regex, RegexBuilder};

use crate::error::{Error, Result};

/// Bytes that a pattern may take when it is compiled: names of modules need some thousands.
const SIZE: usize = 1 << 18;

/// Patterns of one setting, in the order of the file.
#[derive(Debug)]
pub struct Patterns(Vec<Regex>);

impl Patterns {
    /// Compiles each of them once: they are asked for every module.
    ///
    /// # Errors
    /// [`Error::Pattern`] for a pattern that is no regular expression, needs look-around or back-references, or repeats so much that
    /// compiling it would take long.
    pub fn new(patterns: &[&str]) -> Result<Self> {
        let compile = |pattern: &&str| {
            // PEFT's rule: `re.match(rf"(.*\.)?({pattern})$", name)` (`peft.utils.other.get_pattern_key`).
            let whole = format!(r"^(?:(?:.*\.)?(?:{pattern}))$");
            let regex = RegexBuilder::new(&whole).size_limit(SIZE).dfa_size_limit(SIZE).build();
            regex.map_err(|_| Error::Pattern { pattern: (*pattern).to_owned() })
        };
        Ok(Self(patterns.iter().map(compile).collect::<Result<_>>()?))
    }

    /// Index of the first pattern that matches the end of `name`, begun at the beginning or after a dot.
    #[must_use]
    pub fn first_match(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|regex| regex.is_match(name))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn first_match(patterns: &[&str], name: &str) -> Result<Option<usize>> {
        Ok(Patterns::new(patterns)?.first_match(name))
    }

    #[test]
    fn patterns_match_the_end_of_a_path_as_in_peft() {
        let name = "model.layers.1.self_attn.q_proj";
        for pattern in
            ["q_proj", r"self_attn\.q_proj", r"^model\.layers\.1\.self_attn\.q_proj", ".*q.*", "k_proj|q_proj"]
        {
            assert_eq!(first_match(&[pattern], name).unwrap(), Some(0), "{pattern}");
        }
        for pattern in ["proj", "attn.q_proj", "model", r"layers\.1"] {
            assert_eq!(first_match(&[pattern], name).unwrap(), None, "{pattern}");
        }
        assert_eq!(first_match(&["x", "q_proj", "q.*"], name).unwrap(), Some(1));
    }

    #[test]
    fn bad_and_explosive_patterns_neither_panic_nor_hang() {
        assert!(matches!(first_match(&["("], "a"), Err(Error::Pattern { .. })));
        assert!(matches!(first_match(&["(a{1000}){1000}"], "a"), Err(Error::Pattern { .. })));
        assert!(matches!(first_match(&[r"(a[\w-]){160}+b"], "a"), Err(Error::Pattern { .. })));
        assert_eq!(first_match(&["(a+)+b"], &"a".repeat(10_000)).unwrap(), None);
    }
}
