//! PEFT's patterns of module names, matched in linear time.
//!
//! `rank_pattern` and `alpha_pattern` of an adapter are regular expressions from a file that nobody vouches for. A
//! backtracking engine such as Python's `re` can be kept busy for years by a short one; this one cannot.

use regex::Regex;

use crate::error::{Error, Result};

/// Index of the first pattern that matches the end of `name`, begun at the beginning or after a dot: PEFT's rule
/// `re.match(rf"(.*\.)?({pattern})$", name)` (`peft.utils.other.get_pattern_key`).
///
/// # Errors
/// [`Error::Pattern`] for a pattern that is no regular expression, or needs look-around or back-references.
pub fn first_match(patterns: &[&str], name: &str) -> Result<Option<usize>> {
    for (index, pattern) in patterns.iter().enumerate() {
        let regex = Regex::new(&format!(r"^(?:(?:.*\.)?(?:{pattern}))$"))
            .map_err(|_| Error::Pattern { pattern: (*pattern).to_owned() })?;
        if regex.is_match(name) {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

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
        assert_eq!(first_match(&["(a+)+b"], &"a".repeat(10_000)).unwrap(), None);
    }
}
