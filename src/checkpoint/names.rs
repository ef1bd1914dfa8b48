//! The names of a checkpoint's files, and of its parameters.

use std::fs;
use std::path::{Component, Path};

use crate::error::Nf4Error;

/// The file that lists the shards of a folder.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The file of a folder without shards.
pub const SINGLE_FILE: &str = "model.safetensors";

/// The file that describes the model.
pub(super) const CONFIG_FILE: &str = "config.json";

/// The file in which ModelOpt says how a model is quantized.
pub(super) const QUANT_CONFIG_FILE: &str = "hf_quant_config.json";

/// Whether a file belongs to the weights: `model.safetensors`, its index, or a shard.
pub(super) fn is_model_file(name: &str) -> bool {
    name == SINGLE_FILE || name == INDEX_FILE || is_shard(name)
}

/// Whether a name is that of a shard, such as `model-00001-of-00002.safetensors`.
pub(super) fn is_shard(name: &str) -> bool {
    name.strip_prefix("model-")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .and_then(|numbers| numbers.split_once("-of-"))
        .is_some_and(|(number, count)| {
            [number, count]
                .iter()
                .all(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
        })
}

/// The names of what a folder holds, sorted, but for those that are not UTF-8: no file of a model has
/// such a name.
///
/// # Errors
/// [`Nf4Error::Io`].
pub(super) fn names_in(folder: &Path) -> Result<Vec<String>, Nf4Error> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Nf4Error::io(folder))? {
        let name = entry.map_err(Nf4Error::io(folder))?.file_name();
        names.extend(name.to_str().map(String::from));
    }
    names.sort_unstable();
    Ok(names)
}

/// Whether a path that is relative to a folder stays inside of it.
pub(super) fn is_inside(path: &str) -> bool {
    let mut components = Path::new(path).components();
    !path.is_empty() && components.all(|component| matches!(component, Component::Normal(_)))
}

/// Whether a name is that of a file in a folder itself, on any platform.
pub(super) fn is_file_name(name: &str) -> bool {
    is_inside(name) && !name.contains(['/', '\\', ':'])
}

/// The module that a weight belongs to: its path without `.weight`, or all of one that ends in another way.
pub(crate) fn module_of_weight(key: &str) -> &str {
    key.strip_suffix(".weight").unwrap_or(key)
}

/// The last part of the path of a module or a parameter.
pub(crate) fn last_part(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}
