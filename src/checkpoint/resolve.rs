//! Which files of a folder hold its weights, as transformers 5.24 decides it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::file::read_text;
use super::names::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE, is_inside, is_shard, names_in};
use super::python_json;
use crate::error::Nf4Error;

/// Where the weights are.
#[derive(Debug)]
pub(super) enum Weights {
    Single(PathBuf),
    Index(PathBuf),
}

/// The entry of `config.json` that names the file of the weights.
pub(super) const WEIGHTS_ENTRY: &str = "transformers_weights";

/// Chooses as `_get_resolved_checkpoint_files` does: the file that `config.json` names, else the
/// single file, else the index. Variants and consolidated files are not chosen by it either.
///
/// # Errors
/// [`Nf4Error::NoWeights`], [`Nf4Error::ModelConfig`] for the name of a file that transformers
/// refuses, [`Nf4Error::Io`].
pub(super) fn find_weights(folder: &Path) -> Result<Weights, Nf4Error> {
    let names = names_in(folder)?;
    if names
        .iter()
        .any(|name| Other::of(name) == Some(Other::Distributed))
    {
        // transformers looks for such files before all others.
        return Err(no_weights(folder, &names));
    }
    if let Some(weights) = named_weights(folder)? {
        return Ok(weights);
    }
    let (single, index) = (folder.join(SINGLE_FILE), folder.join(INDEX_FILE));
    // A link that leads nowhere or a pipe is no file, but where there is no other one, opening it
    // says what is wrong with it.
    let is_there = |path: &PathBuf| fs::symlink_metadata(path).is_ok();
    if single.is_file() {
        Ok(Weights::Single(single))
    } else if index.is_file() {
        Ok(Weights::Index(index))
    } else if is_there(&single) {
        Ok(Weights::Single(single))
    } else if is_there(&index) {
        Ok(Weights::Index(index))
    } else {
        Err(no_weights(folder, &names))
    }
}

/// The file that `config.json` names.
fn named_weights(folder: &Path) -> Result<Option<Weights>, Nf4Error> {
    let path = folder.join(CONFIG_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    // A malformed file is an error where the settings of the model are read, not here.
    let config = python_json::from_slice::<Map<String, Value>>(&read_text(&path)?);
    let name = match config.as_ref().map(|config| config.get(WEIGHTS_ENTRY)) {
        Ok(Some(Value::String(name))) => name,
        Ok(Some(Value::Null) | None) | Err(_) => return Ok(None),
        Ok(Some(other)) => &other.to_string(),
    };
    let file = folder.join(name);
    match is_inside(name) {
        true if name.ends_with(".safetensors") => Ok(Some(Weights::Single(file))),
        true if name.ends_with(".safetensors.index.json") => Ok(Some(Weights::Index(file))),
        _ => Err(Nf4Error::ModelConfig {
            path,
            message: format!(
                "{WEIGHTS_ENTRY} is `{name}`, expected a file inside the folder whose name ends \
                 in .safetensors or .safetensors.index.json"
            ),
        }),
    }
}

fn no_weights(folder: &Path, names: &[String]) -> Nf4Error {
    let kind = names.iter().filter_map(|name| Other::of(name)).min();
    let is_of_kind = |name: &&String| kind.is_some() && Other::of(name) == kind;
    Nf4Error::NoWeights {
        path: folder.into(),
        found: names.iter().filter(is_of_kind).cloned().collect(),
        advice: kind.map_or("", Other::advice),
    }
}

/// Forms of weights that are not read, the one whose advice helps most first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Other {
    Distributed,
    Shard,
    Variant,
    Consolidated,
    Adapter,
    Safetensors,
    Pickle,
    Format,
}

impl Other {
    fn of(name: &str) -> Option<Self> {
        let extension = Path::new(name).extension().and_then(|ext| ext.to_str());
        // What a trainer leaves beside the weights.
        let of_trainer = [
            "training_args",
            "optimizer",
            "scheduler",
            "rng_state",
            "scaler",
        ]
        .iter()
        .any(|start| name.starts_with(start));
        Some(match extension? {
            "json" if name.starts_with("model.safetensors.index.") && name != INDEX_FILE => {
                Self::Variant
            }
            "safetensors" if is_distributed(name) => Self::Distributed,
            "safetensors" if is_shard(name) => Self::Shard,
            "safetensors" if name == SINGLE_FILE => return None,
            "safetensors" if name.starts_with("model.") => Self::Variant,
            "safetensors" if name.starts_with("consolidated") => Self::Consolidated,
            "safetensors" | "bin" if name.starts_with("adapter_model.") => Self::Adapter,
            "safetensors" => Self::Safetensors,
            "bin" | "pt" | "pth" | "ckpt" if !of_trainer => Self::Pickle,
            "gguf" | "h5" | "msgpack" | "onnx" | "ot" => Self::Format,
            _ => return None,
        })
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Distributed => {
                "a distributed checkpoint is not read; merge it into one with \
                 `torch.distributed.checkpoint`, or load it with transformers and save it again"
            }
            Self::Shard => {
                "the index of the shards is missing, and says which files belong together"
            }
            Self::Variant => {
                "a variant is taken only by those who ask for it; to use it, give it the name \
                 without the variant, or give the path of the file itself"
            }
            Self::Consolidated => {
                "its tensors have other names than transformers gives them; to read it as it is, \
                 give the path of the file itself"
            }
            Self::Adapter => "an adapter without its base model, which has to be opened",
            Self::Safetensors => "to read it, give the path of the file itself",
            Self::Pickle => {
                "PyTorch's pickled files are not read, as they can hold code; load the model with \
                 transformers and save it again, which writes safetensors"
            }
            Self::Format => "its format is not read, only safetensors is",
        }
    }
}

/// Whether a file belongs to a checkpoint of `torch.distributed`, for transformers'
/// `is_sharded_checkpoint`: `shard-00001-model-00001-of-00002.safetensors`.
fn is_distributed(name: &str) -> bool {
    name.strip_prefix("shard-")
        .and_then(|rest| rest.split_once("-model-"))
        .is_some_and(|(number, rest)| {
            number.len() == 5
                && number.bytes().all(|byte| byte.is_ascii_digit())
                && is_shard(&format!("model-{rest}"))
        })
}
