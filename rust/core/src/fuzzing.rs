//! Doors for fuzzers: everything that reads bytes of strangers, without files. `make fuzz` runs them for minutes with coverage
//! (`rust/fuzz`), the tests below for a moment with blind mutations of the same corpus.

use crate::header::{Header, PREFIX, header_len};
use crate::{directory, torch};

/// A safetensors file up to the end of its header.
pub fn header(data: &[u8]) {
    let (prefix, rest) = data.split_at(data.len().min(PREFIX as usize));
    // The data behind the header need not be there: the file is as long as its first tensor that fits says.
    for file in [data.len() as u64, data.len() as u64 + 64, u64::MAX] {
        if let Ok(len) = header_len(prefix, file)
            && let Some(json) = rest.get(..len as usize)
        {
            let _ = Header::parse(json, file);
        }
    }
    let _ = Header::parse(data, data.len() as u64);
}

/// A shard index.
pub fn index(data: &[u8]) {
    if let Ok(by_shard) = directory::parse_index(data) {
        assert!(by_shard.keys().all(|name| std::path::Path::new(name).components().count() == 1));
    }
}

/// A zip archive of PyTorch's, with all that it describes.
pub fn torch(data: &[u8]) {
    let Ok(contents) = torch::open(data, data.len() as u64) else { return };
    for (_, info, strided) in contents.tensors {
        let len = strided.as_ref().map_or(info.nbytes, |strided| strided.span);
        let spanned = data.get(info.offset as usize..(info.offset + len) as usize);
        assert!(spanned.is_some() || info.nbytes == 0, "a tensor leaves the file");
        if let (Some(strided), Some(spanned)) = (strided, spanned) {
            let gathered = strided.gather(&info.shape, info.dtype.bits() as usize / 8, spanned);
            assert_eq!(gathered.len() as u64, info.nbytes);
        }
    }
}

/// The pickle inside.
pub fn pickle(data: &[u8]) {
    let _ = torch::read_pickle(data);
}

/// A pattern of an adapter's configuration, and a module's name after a line break.
pub fn pattern(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (pattern, name) = text.split_once('\n').unwrap_or((&text, "model.layers.0.self_attn.q_proj"));
    let _ = crate::Patterns::new(&[pattern]).map(|patterns| patterns.first_match(name));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    type Door = fn(&[u8]);
    const DOORS: [(&str, Door); 5] =
        [("header", header), ("index", index), ("torch", torch), ("pickle", pickle), ("pattern", pattern)];

    fn corpus(door: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(door);
        let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.iter().map(|file| std::fs::read(file).unwrap()).collect()
    }

    /// One of the things that happen to bytes; `random` gives numbers.
    fn mutate(bytes: &mut Vec<u8>, other: &[u8], mut random: impl FnMut() -> usize) {
        let at = random() % (bytes.len() + 1);
        let len = random() % 9;
        let end = (at + len).min(bytes.len());
        match random() % 6 {
            0 => bytes.truncate(at),
            1 => _ = bytes.drain(at..end),
            2 => bytes[at..end].iter_mut().for_each(|byte| *byte = random() as u8),
            3 => bytes[at..end].fill([0, 0xff, 0x7f, 0x80][random() % 4]),
            4 => {
                let copied = bytes[at..end].to_vec();
                let to = random() % (bytes.len() + 1);
                bytes.splice(to..to, copied);
            }
            _ => {
                let from = random() % (other.len() + 1);
                bytes.splice(at..end, other[from..(from + 4 * len).min(other.len())].iter().copied());
            }
        }
    }

    #[test]
    fn mutations_of_the_corpus_do_no_harm() {
        const ROUNDS: usize = 20_000;
        for (name, door) in DOORS {
            let seeds = corpus(name);
            assert!(!seeds.is_empty(), "there is no corpus for {name}");
            seeds.iter().for_each(|seed| door(seed));
            let mut state = 7u64;
            let mut random = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as usize
            };
            for _ in 0..ROUNDS {
                let mut bytes = seeds[random() % seeds.len()].clone();
                let other = &seeds[random() % seeds.len()];
                for _ in 0..=random() % 4 {
                    mutate(&mut bytes, other, &mut random);
                }
                door(&bytes);
            }
        }
    }
}
