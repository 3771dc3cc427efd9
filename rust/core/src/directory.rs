//! Which files of a directory are its checkpoint.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, IndexFault, IoContext, Result};
use crate::shard::{Opened, Shard};

/// What a directory may hold, in the order in which it is looked for: a file, or an index of several.
const USUAL: [&str; 6] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];
const INDEX: &str = ".index.json";
/// Not a model, whatever it lies beside.
const ADAPTER: &str = "adapter_model.safetensors";
/// No real index comes near this size; a larger one is an attack on memory.
const MAX_INDEX: u64 = 100_000_000;

/// The files of the checkpoint in a directory, sorted by name, and the index that lists them, if there is one.
///
/// # Errors
/// [`Error::NoCheckpoint`]; as [`crate::Checkpoint::open`].
pub(crate) fn open(path: &Path) -> Result<(Vec<Opened>, Option<PathBuf>)> {
    let found = match USUAL.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
        Some(usual) => usual,
        None => only(path)?,
    };
    if found.as_os_str().to_string_lossy().ends_with(INDEX) {
        return Ok((open_sharded(path, &found)?, Some(found)));
    }
    Ok((vec![Shard::open(&found)?], None))
}

/// The only index, else the only safetensors file, of a directory that has none of the usual names.
fn only(path: &Path) -> Result<PathBuf> {
    let mut names: Vec<String> = std::fs::read_dir(path)
        .at(path)?
        .flatten()
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != ADAPTER && !name.starts_with('.'))
        .collect();
    names.sort();
    let ending = |ending: &str| names.iter().filter(|name| name.ends_with(ending)).collect::<Vec<_>>();
    let hint = match (ending(".safetensors.index.json").as_slice(), ending(".safetensors").as_slice()) {
        ([index], _) => return Ok(path.join(index)),
        ([], [file]) => return Ok(path.join(file)),
        ([first, second, ..], _) | ([], [first, second, ..]) => {
            format!(": there are `{first}` and `{second}`: name the file that is meant")
        }
        ([], []) => {
            match names.iter().find(|name| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end))) {
                Some(name) => format!(": name the file itself if you mean `{name}`"),
                None => String::new(),
            }
        }
    };
    Err(Error::NoCheckpoint { path: path.to_path_buf(), hint })
}

fn open_sharded(path: &Path, index: &Path) -> Result<Vec<Opened>> {
    let fault = |fault| Error::Index { path: index.to_path_buf(), fault };
    let len = std::fs::metadata(index).at(index)?.len();
    if len > MAX_INDEX {
        return Err(fault(IndexFault::TooLarge(len)));
    }
    let by_shard = parse_index(&std::fs::read(index).at(index)?).map_err(fault)?;
    let shards = by_shard.keys().map(|shard| Shard::open(&path.join(shard))).collect::<Result<Vec<_>>>()?;
    for ((shard, promised), (opened, _)) in by_shard.iter().zip(&shards) {
        let held: HashSet<&str> = opened.names().iter().map(String::as_str).collect();
        if let Some(tensor) = promised.iter().find(|tensor| !held.contains(tensor.as_str())) {
            return Err(fault(IndexFault::NotInShard { tensor: tensor.clone(), shard: shard.clone() }));
        }
    }
    Ok(shards)
}

/// Names of tensors by the file that holds them.
pub(crate) fn parse_index(json: &[u8]) -> std::result::Result<BTreeMap<String, Vec<String>>, IndexFault> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = serde_json::from_slice(json).map_err(|error| IndexFault::Json(error.to_string()))?;
    let mut by_shard: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        if !is_plain_file_name(&shard) {
            return Err(IndexFault::ShardName(shard));
        }
        by_shard.entry(shard).or_default().push(tensor);
    }
    Ok(by_shard)
}

/// Whether joining `name` to a directory stays in that directory, on every platform.
fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}
